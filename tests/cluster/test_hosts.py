"""Several real machines, as a user would use them: `ray up` with cluster/local.yaml over ssh, `ray submit`, Ray jobs, a
bucket for the results; one machine is lost in the middle and a new one joins. The results are those of a run in one process.

Not part of `make test`: `make test-cluster` (root, Linux).
"""

import json
import re
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml
from cluster.hosts import Hosts, HostsError, Machine, Share

from cvdd_ray.config import RunConfig
from cvdd_ray.data.artifacts import Artifacts
from cvdd_ray.data.storage import Store
from cvdd_ray.recipes import dump_config, with_settings, without_place
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pipeline import run_all

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

REPOSITORY = Path(__file__).parents[2]
VENV = Path(sys.prefix)
BASE = Path(sys.base_prefix)
EXPERTS = ("resnet18", "shufflenet_v2", "mobilenet_v2")  # one for each of the three machines
S3_PORT = 5000
# Lost machines are noticed within seconds; the patience of real clusters would only make the test longer.
QUICK = (
    "RAY_health_check_initial_delay_ms=0 RAY_health_check_period_ms=500 RAY_health_check_timeout_ms=2000"
    " RAY_health_check_failure_threshold=4 AUTOSCALER_UPDATE_INTERVAL_S=1"
)
SMALL = "--num-cpus=1 --object-store-memory=100000000"


class World:
    """The machines: `dev`, where a person types; `head`, `w1`, `w2`; `s3`, a bucket."""

    def __init__(self, hosts: Hosts):
        self.hosts = hosts
        for name in ("dev", "head", "w1", "w2", "w3", "s3"):
            hosts.address(name)
        env = {
            "RAY_USAGE_STATS_ENABLED": "0", "PIP_NO_INDEX": "1", "PIP_NO_BUILD_ISOLATION": "0",
            "PIP_ROOT_USER_ACTION": "ignore", "AWS_ACCESS_KEY_ID": "me", "AWS_SECRET_ACCESS_KEY": "hush",
            "AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_ENDPOINT_URL": f"http://{hosts.address('s3')}:{S3_PORT}",
        }  # fmt: skip
        self._env, self._shares = env, [Share(str(VENV), writable=True)]
        if not str(BASE).startswith("/usr"):
            self._shares.insert(0, Share(str(BASE)))
        typed = {
            "PATH": f"{VENV}/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
            "RAY_AUTH_MODE": "token",
        }
        self.dev = hosts.start(
            "dev", [*self._shares, Share(str(REPOSITORY), "/root/project", writable=True)], env | typed
        )
        self.s3 = self.start("s3")
        self.s3.popen(f"{VENV}/bin/moto_server -H 0.0.0.0 -p {S3_PORT} > moto.log 2>&1")
        self.machines = {name: self.start(name) for name in ("head", "w1", "w2")}
        self.config = self._config()
        self.dev.path("/root/project/cluster/small.yaml").write_text(yaml.safe_dump(self.config))

    def start(self, name: str) -> Machine:
        """Switch a machine on that has Python and the packages this package needs, but not this package itself."""
        machine = self.hosts.start(name, self._shares, self._env)
        machine.check(f"ln -s {VENV} cvdd-venv && cvdd-venv/bin/python -m pip uninstall --quiet --yes cvdd_ray")
        return machine

    def _config(self) -> dict:
        """cluster/local.yaml as a user edits it, and made small and quick."""
        config = yaml.safe_load((REPOSITORY / "cluster/local.yaml").read_text())
        config["provider"] |= {"head_ip": self.hosts.address("head")}
        config["provider"] |= {"worker_ips": [self.hosts.address(name) for name in ("w1", "w2")]}
        config["auth"] |= {"ssh_user": "root"}
        for commands in ("head_start_ray_commands", "worker_start_ray_commands"):
            edited = [line.replace("ray start", f"{QUICK} ray start") for line in config[commands]]
            config[commands] = [f"{line} {SMALL}" if "ray start" in line else line for line in edited]
        return config

    def project(self, command: str, timeout_s: float = 300) -> str:
        """Return what a command printed that was typed in the project's directory."""
        return self.dev.check(f"cd project && {command}", timeout_s)

    def python(self, code: str):
        """Return the JSON that Python code prints on the person's machine."""
        self.dev.path("/root/code.py").write_text(code)
        return json.loads(self.dev.check("PYTHONPATH=project python code.py").strip().splitlines()[-1])

    def join(self, name: str) -> None:
        """Set a new machine up as `ray up` does, by the same file, and let it join."""
        machine = self.machines[name] = self.start(name)
        for there, here in self.config["file_mounts"].items():
            folder = str(Path(there).parent)
            machine.check(f"mkdir -p {folder}")
            end = "/" if self.dev.run(f"test -d project/{here}").returncode == 0 else ""
            source = here if here.startswith("~") else f"project/{here}"
            self.dev.check(
                f"rsync -a -e 'ssh -o StrictHostKeyChecking=no' {source}{end} {machine.address}:{there}{end}"
            )
        for command in [*self.config["setup_commands"], *self.config["worker_start_ray_commands"]]:
            line = f"export RAY_HEAD_IP={self.hosts.address('head')}; {command}".replace("'", "'\\''")
            machine.check(f"bash --login -c -i 'source ~/.bashrc; {line}'", 200)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    try:
        hosts = Hosts(tmp_path_factory.mktemp("hosts"))
    except HostsError as lack:
        pytest.exit(str(lack), returncode=1)
    with hosts:
        yield World(hosts)


@pytest.fixture(scope="module")
def config() -> RunConfig:
    from conftest import tiny_config

    return tiny_config(
        ipc=[3],
        committee={"experts": EXPERTS},
        synthesize={"iterations": 120, "checkpoint_every": 10},
        evaluate={"seeds": 3, "test_every": 2, "baselines": []},
        runtime={"num_cpus": None, "object_store_mb": 512},
    )


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """The same run in one process, without Ray."""
    run = Run(config, str(tmp_path_factory.mktemp("alone")))
    run_all(run)
    return run


def files_of(manifests: dict) -> dict:
    """Every stage's files with their sha256; of the evaluation, whose results hold times, none."""
    return {stage: about["files"] for stage, about in manifests.items() if not stage.startswith("evaluate")}


READ = """
import json
from cvdd_ray.data.storage import Store
store = Store({where!r})
found = {{name.removesuffix("/manifest.json"): json.loads(store.read(name)) for name in store.all_names()
         if name.endswith("manifest.json")}}
print(json.dumps([found, json.loads(store.read("evaluate/ipc3/results.json"))["runs"]]))
"""


def read(world, where: str) -> tuple[dict, list]:
    return tuple(world.python(READ.format(where=where)))


def read_alone(run: Run) -> tuple[dict, list]:
    store, artifacts = run.store, Artifacts(run.store)
    stages = [name.removesuffix("/manifest.json") for name in store.all_names() if name.endswith("/manifest.json")]
    manifests = {stage: {"files": artifacts.manifest(stage).files} for stage in stages}
    return manifests, json.loads(Store(store.root).read("evaluate/ipc3/results.json"))["runs"]


def accuracies(runs: list) -> dict:
    return {(run["arm"], run["seed"]): [row[:4] for row in run["curve"]] for run in runs}


def events(output: str) -> list[dict]:
    """The JSON lines of a run's output, whatever Ray prints between them."""
    found = []
    for line in output.splitlines():
        start = line.find("{")
        if start >= 0:
            try:
                found.append(json.loads(line[start:]))
            except ValueError:
                continue
    return [event for event in found if "event" in event]


def workplaces(output: str) -> set[str]:
    return {event["host"] for event in events(output) if event.get("host")}


def submit(words: str) -> str:
    return f"ray submit cluster/small.yaml cluster/run.py -- --recipe tiny.yaml --set runtime.log_format=json {words}"


def test_up(world, config):
    world.dev.check("(umask 077; ray get-auth-token --generate > /dev/null)")
    world.project("ray up -y cluster/small.yaml")
    world.dev.path("/root/project/tiny.yaml").write_text(dump_config(without_place(config)))
    world.project("ray rsync-up cluster/small.yaml tiny.yaml '~/tiny.yaml'")
    world.python("import boto3; boto3.client('s3').create_bucket(Bucket='runs'); print(1)")


def test_a_run_takes_three_machines_one_is_lost_in_the_middle_and_nothing_with_it(world, alone):
    driver = world.dev.popen(
        f"cd project && {submit('--out s3://runs/one --wait-for-nodes 3 --wait-s 120 --set runtime.placement=spread')}",
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    watch = threading.Timer(600, driver.kill)
    watch.start()
    output, lost_at = [], None
    for line in driver.stdout:
        output.append(line)
        is_under_way = any(e["event"] == "checkpoint" and e["what"].startswith("distilled") for e in events(line))
        if is_under_way and lost_at is None:
            lost_at = time.monotonic()
            world.hosts.cut(world.machines["w2"])
    watch.cancel()
    text = "".join(output)
    assert driver.wait() == 0, text[-6000:]
    assert lost_at is not None, text[-6000:]
    print(f"finished {time.monotonic() - lost_at:.0f} s after the cable was cut")
    assert workplaces(text) == {"head", "w1", "w2"}
    (manifests, runs), (expected, expected_runs) = read(world, "s3://runs/one"), read_alone(alone)
    assert files_of(manifests) == files_of(expected)
    assert accuracies(runs) == accuracies(expected_runs)


def test_strangers_are_refused(world):
    """The same question from two machines: the person's has the token and is answered, another one is not."""
    ask = f"timeout 60 {VENV}/bin/ray status --address={world.hosts.address('head')}:6379"
    answered = world.dev.run(f"RAY_AUTH_MODE=token {ask}")
    assert answered.returncode == 0, answered.stdout
    assert "node_" in answered.stdout or "CPU" in answered.stdout, answered.stdout
    refused = world.s3.run(f"RAY_AUTH_MODE=disabled {ask}")
    assert refused.returncode != 0, refused.stdout
    assert "CPU" not in refused.stdout


def test_jobs(world):
    """Through the tunnel that `ray dashboard` opens: a finished run says so, a mistake is exit code 2."""
    tunnel = world.dev.popen(
        "cd project && exec ray dashboard cluster/small.yaml", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    at, job = "--address http://127.0.0.1:8265", "-- python cluster/run.py"
    try:
        deadline = time.monotonic() + 60
        while world.dev.run(f"ray job list {at}").returncode:
            assert time.monotonic() < deadline, "the dashboard does not answer"
        same = f"ray job submit {at} --working-dir . --submission-id again {job} --recipe tiny.yaml --out s3://runs/one"
        world.project(same)
        assert "SUCCEEDED" in world.dev.check(f"ray job status {at} again").upper()
        logs = world.dev.check(f"ray job logs {at} again")
        assert "synthesize ipc 3: already there" in logs
        assert "results: s3://runs/one" in logs
        wrong = world.dev.run(f"cd project && {same.replace('again', 'wrong').replace('tiny.yaml', 'nonsense')}")
        assert wrong.returncode == 1
        assert "error: recipe 'nonsense' is neither packaged nor a file" in wrong.stdout
        assert "2" in re.findall(r"driver_exit_code=(\d+)", world.dev.check(f"ray job list {at}"))
    finally:
        tunnel.kill()


def test_a_new_machine_joins_and_is_used(world, config, alone, tmp_path):
    world.join("w3")
    words = "--out s3://runs/two --reuse s3://runs/one --set relabel.epochs=20 --set evaluate.epochs=2 --set evaluate.seeds=6"
    text = world.project(submit(f"{words} --wait-for-nodes 3 --wait-s 120"), 600)
    assert workplaces(text) >= {"w3"}
    longer = with_settings(config, {"relabel.epochs": 20, "evaluate.epochs": 2, "evaluate.seeds": 6})
    reference = Run(longer, Artifacts(Store(str(tmp_path)), sources=[alone.store]))
    run_all(reference)
    (manifests, runs), (expected, expected_runs) = read(world, "s3://runs/two"), read_alone(reference)
    assert files_of(manifests) == files_of(expected)
    assert accuracies(runs) == accuracies(expected_runs)


def test_a_killed_maker_leaves_no_machine(tmp_path):
    """Machines end with the process that made them, however that ends."""
    code = (
        "import sys; from pathlib import Path; from cluster.hosts import Hosts\n"
        f"with Hosts(Path({str(tmp_path)!r})) as hosts:\n"
        "    print(hosts.start('alone').init, flush=True); sys.stdin.read()"
    )
    maker = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=Path(__file__).parents[1],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    first_process = Path("/proc", maker.stdout.readline().strip())
    assert first_process.exists()
    maker.kill()
    maker.wait()
    deadline = time.monotonic() + 10
    while first_process.exists():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_down(world):
    world.project("ray down -y cluster/small.yaml")
    assert "raylet" not in world.machines["head"].run("ps -eo comm").stdout
