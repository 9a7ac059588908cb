"""Nothing that is read can run code; what the package opens to the network, it opens to this machine alone or with a token."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

REPOSITORY = Path(__file__).parent.parent
FILES = sorted([*(REPOSITORY / "cvdd_ray").rglob("*.py"), *(REPOSITORY / "cluster").rglob("*.py")])
UNSAFE = {"cloudpickle", "dill", "joblib", "marshal", "shelve", "pandas.read_pickle"}


def calls(tree: ast.AST) -> list[tuple[str, ast.Call]]:
    """Every call in a file with its dotted name."""
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [(ast.unparse(node.func), node) for node in found]


def given(call: ast.Call, name: str) -> object:
    """The literal value of a keyword of a call, None if it is not there."""
    return next((ast.literal_eval(word.value) for word in call.keywords if word.arg == name), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_nothing_that_is_read_can_run_code(path):
    tree = ast.parse(path.read_text())
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not imported & UNSAFE
    used = {ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert {name for name in used if name.startswith("pickle.")} <= {"pickle.UnpicklingError"}
    for name, call in calls(tree):
        assert name not in ("eval", "exec", "compile", "os.system", "os.popen"), ast.unparse(call)
        assert name not in ("yaml.load", "yaml.unsafe_load", "yaml.full_load", "pickle.load", "pickle.loads"), name
        if name == "torch.load":
            assert given(call, "weights_only") is True
        if name in ("np.load", "np.save"):
            assert given(call, "allow_pickle") is False
        if name.startswith("subprocess."):
            assert not given(call, "shell")


PRIVATE = """
import json, os, subprocess, sys
import psutil
from cvdd_ray.config import RuntimeConfig
from cvdd_ray.runner import protect_private_cluster
protect_private_cluster()
from cvdd_ray.runner.cluster import connect, disconnect
import ray
from ray._private import ray_constants
usual = ray_constants.ENABLE_RAY_CLUSTER
connect(RuntimeConfig(num_cpus=1, object_store_mb=75))
assert ray_constants.ENABLE_RAY_CLUSTER == usual
ray.get(ray.remote(lambda: None).remote())  # a worker listens, too
family = [psutil.Process(), *psutil.Process().children(recursive=True)]
ports = [(process.name(), *connection.laddr) for process in family for connection in process.net_connections("inet")
         if connection.status == psutil.CONN_LISTEN]
ASK = "import sys; from ray._raylet import GcsClient; print(GcsClient(address=sys.argv[1]).internal_kv_keys(b'', None))"
where = ray.get_runtime_context().gcs_address
asked = {}
for who, token in (("owner", os.environ["RAY_AUTH_TOKEN"]), ("another", "0" * 64)):
    environment = {**os.environ, "RAY_AUTH_TOKEN": token}
    done = subprocess.run([sys.executable, "-c", ASK, where], env=environment, capture_output=True, text=True)
    asked[who] = [done.returncode, done.stderr[-2000:]]
disconnect(True)
print(json.dumps({"ports": ports, "asked": asked}))
"""


def test_a_private_ray_listens_on_loopback_answers_to_its_token_alone_and_has_no_dashboard():
    """Other users of the machine reach Ray's servers at loopback; the token is what keeps them out."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    environment["PYTHONPATH"] = str(REPOSITORY)
    done = subprocess.run([sys.executable, "-c", PRIVATE], env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert {"raylet", "gcs_server"} <= {name for name, _, _ in found["ports"]}
    assert {at.removeprefix("::ffff:") for _, at, _ in found["ports"]} == {"127.0.0.1"}
    assert 8265 not in {port for _, _, port in found["ports"]}
    assert found["asked"]["owner"][0] == 0, found
    assert found["asked"]["another"][0] != 0
    assert "nauthenticated" in found["asked"]["another"][1] or "token" in found["asked"]["another"][1]


TOKEN = {"cluster.yaml", "gcp.yaml", "local.yaml", "raycluster.yaml", "rayjob.yaml"}


def test_every_cluster_file_switches_the_token_on():
    files = {path.name: path.read_text() for path in (REPOSITORY / "cluster").glob("*.yaml")}
    starting = {name for name, text in files.items() if "ray start" in text or "kind: Ray" in text}
    assert starting == TOKEN
    for name in sorted(starting):
        content = yaml.safe_load(files[name])
        if "setup_commands" in content:
            assert "RAY_AUTH_MODE" in json.dumps(content), name
            assert "~/.ray/auth_token" in content["file_mounts"], name
        else:
            assert '"authOptions": {"mode": "token"}' in json.dumps(content), name
    slurm = (REPOSITORY / "cluster/slurm.sbatch").read_text()
    assert "export RAY_AUTH_MODE=token" in slurm
    assert "secrets.token_hex" in slurm
