"""Before work starts on a joined cluster: waiting for nodes and GPUs, who is there, and whether all share the store."""

import json
import subprocess
import sys

import pytest
from clusters import RayCluster

from cvdd_ray.config import RuntimeConfig
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError
from cvdd_ray.recipes import load_config, without_place
from cvdd_ray.runner.nodes import describe, gather

JOIN = """
import json, sys
import ray
from clusters import NoRights, OwnDisk
from cvdd_ray.config import RuntimeConfig
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import CvddError
from cvdd_ray.runner.cluster import connect
from cvdd_ray.runner.nodes import gather

class Unknown(Store):  # as if the package were not installed on the nodes
    def __reduce__(self):
        return __import__("stranger").Unknown, (self.root,)

address, cases = sys.argv[1], json.loads(sys.argv[2])
connect(RuntimeConfig(address=address))
for name, (kind, place, waits) in cases.items():
    say = lambda text: print(name, text, flush=True)
    try:
        gather(RuntimeConfig(address=address, **waits), globals()[kind](place), say)
        say(f"free GPUs: {ray.available_resources().get('GPU', 0):g}")
    except CvddError as error:
        say(f"error: {error}")
"""


@pytest.fixture(scope="module")
def answers(tmp_path_factory):
    """What one driver is told in every case, on a head and a node with a disk of its own; and the directory used."""
    there = tmp_path_factory.mktemp("places")
    (there / "file").write_text("")
    (there / "forbidden").mkdir()
    (there / "stranger.py").write_text("from cvdd_ray.data.storage import Store\nclass Unknown(Store): ...\n")
    cases = {
        "shared": ("Store", "shared", {}),
        "own": ("OwnDisk", "own", {}),
        "forbidden": ("NoRights", "forbidden", {}),
        "unknown": ("Unknown", "unknown", {}),
        "file": ("Store", "file/run", {}),
        "nodes": ("Store", "nodes", {"wait_for_nodes": 3, "wait_s": 1.5}),
        "gpus": ("Store", "gpus", {"wait_for_gpus": 2, "wait_s": 1.5}),
    }
    cases = {name: (kind, str(there / place), waits) for name, (kind, place, waits) in cases.items()}
    with RayCluster() as cluster:
        cluster.add(env_vars={"TEST_DISK": "-of-the-second-node"})
        path = f"{cluster.env['PYTHONPATH']}:{there}"
        done = cluster.python("-c", JOIN, cluster.address, json.dumps(cases), PYTHONPATH=path)
    assert done.returncode == 0, done.stderr
    lines = [line.split(" ", 1) for line in done.stdout.splitlines()]
    return there, {case: [text for name, text in lines if name == case] for case in cases}


def test_a_shared_directory_is_enough(answers):
    assert answers[1]["shared"] == ["cluster: 2 nodes, 2 CPUs, 0 GPUs", "free GPUs: 0"]


def test_nothing_is_left_behind(answers):
    assert sorted(path.name for path in answers[0].rglob("*") if path.suffix != ".pyc" and path.name != "__pycache__") == [
        "file", "forbidden", "stranger.py",
    ]  # fmt: skip


def test_a_directory_that_one_node_does_not_share_is_refused(answers):
    there, said = answers
    assert said["own"][-1].startswith(f"error: --out {there}/own: node ")
    assert "does not see what this one writes there; with 2 nodes give a directory" in said["own"][-1]
    assert "more)" not in said["own"][-1]  # the head sees it


def test_a_node_that_may_not_use_the_place_is_named_with_its_reason(answers):
    assert "cannot use it (PermissionError: AWS Error ACCESS_DENIED during HeadObject" in answers[1]["forbidden"][-1]


def test_nodes_without_the_package_are_named_with_their_reason(answers):
    assert "(and 1 more) cannot use it (" in answers[1]["unknown"][-1]
    assert "No module named 'stranger'" in answers[1]["unknown"][-1]


def test_a_place_that_cannot_be_written_is_one_line(answers):
    there, said = answers
    assert said["file"][-1].startswith(f"error: --out {there}/file/run: cannot be written (")


def test_nodes_that_do_not_come(answers):
    first, *_, last = answers[1]["nodes"]
    assert first == "waiting up to 1.5 s for 3 nodes; there: 2 nodes, 2 CPUs, 0 GPUs"
    assert last.startswith("error: runtime.wait_for_nodes: 2 of 3 nodes are there after 1.5 s; `ray status` says")


def test_gpus_that_do_not_come(answers):
    first, *_, last = answers[1]["gpus"]
    assert first == "waiting up to 1.5 s for 2 GPUs; there: 2 nodes, 2 CPUs, 0 GPUs"
    assert last.startswith("error: runtime.wait_for_gpus: not 2 free GPUs after 1.5 s (there: 2 nodes, 2 CPUs, 0 GPUs)")


def test_a_head_that_cannot_work_asks_for_a_gpu_and_lets_it_go(tmp_path):
    """A head without CPUs whose workers start from zero; the GPU is free for work once it is there."""
    cases = {"zero": ("Store", str(tmp_path), {"wait_s": 60})}
    with RayCluster(num_cpus=0) as cluster:
        words = [sys.executable, "-c", JOIN, cluster.address, json.dumps(cases)]
        driver = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=cluster.env)
        assert driver.stdout.readline() == "zero waiting up to 60 s for 1 GPU; there: 1 node, 0 CPUs, 0 GPUs\n"
        cluster.add(num_gpus=1)
        joined, *rest = driver.communicate(timeout=120)[0].splitlines()
    assert joined.startswith("zero joined: ")
    assert joined.endswith("(1 CPU, 1 GPU)")
    assert rest == ["zero cluster: 2 nodes, 1 CPU, 1 GPU", "zero free GPUs: 1"]


def test_a_private_cluster_waits_for_nobody(tmp_path):
    gather(RuntimeConfig(), Store(str(tmp_path)), pytest.fail)


def test_waiting_without_a_cluster_to_join_is_refused():
    with pytest.raises(ConfigError, match="wait_for_nodes and wait_for_gpus have no effect without an address"):
        load_config("digits-demo", ["runtime.wait_for_nodes=2"])


def test_what_is_remembered_of_a_run_does_not_wait():
    waited = load_config("digits-demo", ["runtime.address=auto", "runtime.wait_for_nodes=2", "runtime.wait_for_gpus=1"])
    assert without_place(waited) == load_config("digits-demo")


def test_a_cluster_in_words():
    one = {"Resources": {"CPU": 8.0, "GPU": 2.0, "accelerator_type:A10G": 1.0}}
    assert describe([one, {"Resources": {"CPU": 1.5}}]) == "2 nodes, 9.5 CPUs, 2 GPUs (A10G)"
    assert describe([]) == "0 nodes, 0 CPUs, 0 GPUs"
