"""A private cluster gets a token before Ray is imported and listens on loopback; a cluster that is joined keeps the user's
mode."""

import json
import os
import subprocess
import sys

import pytest

CODE = """
import json, os, sys
import cvdd_ray.runner
assert "ray" not in sys.modules
cvdd_ray.runner.protect_private_cluster()
print(json.dumps({k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH")}))
"""

LISTENING = """
import json, psutil, ray
from cvdd_ray.config import RuntimeConfig
from cvdd_ray.runner.cluster import connect, disconnect

usual = ray._private.ray_constants.ENABLE_RAY_CLUSTER
assert connect(RuntimeConfig(num_cpus=1, object_store_mb=100))
assert ray._private.ray_constants.ENABLE_RAY_CLUSTER == usual
ray.get(ray.remote(lambda: None).remote())  # a worker listens, too
own = psutil.Process()
ports = [(p.name(), port) for p in [own, *own.children(recursive=True)] for port in p.net_connections("inet")]
print(json.dumps([[name, port.laddr.ip] for name, port in ports if port.status == psutil.CONN_LISTEN]))
disconnect(True)
"""


def environment_after(**given: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**clean, **given}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_private_cluster_has_a_fresh_token():
    first, second = environment_after(), environment_after()
    assert first["RAY_AUTH_MODE"] == second["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


def test_the_users_own_mode_stands():
    assert environment_after(RAY_AUTH_MODE="disabled") == {"RAY_AUTH_MODE": "disabled"}


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere others' ports may not be listed")
def test_a_private_cluster_listens_on_loopback_alone():
    done = subprocess.run([sys.executable, "-c", LISTENING], capture_output=True, text=True, check=True)
    listening = json.loads(done.stdout.splitlines()[-1])
    assert {"raylet", "gcs_server"} <= {name for name, _ in listening}
    assert {at.removeprefix("::ffff:") for _, at in listening} == {"127.0.0.1"}
