"""The same seed gives the same bytes: in process and on Ray, one or several actors of an expert, spread over either wire and
colocated, on one node and on three, left alone and disturbed. The sha256 of the files of images and labels are compared."""

import json
import os
import subprocess
import sys

import distilling
import pytest
import ray
from clusters import RayCluster

from cvdd_ray.runner import crews
from cvdd_ray.stages.context import Run


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """What synthesis begins with, and the hashes of what this process makes of it."""
    run = distilling.prepared(tmp_path_factory.mktemp("local") / "run")
    return run, distilling.distil(run)


@pytest.fixture(scope="module")
def three_nodes():
    """Three nodes with a core each."""
    with RayCluster() as cluster:
        for _ in range(2):
            cluster.add()
        yield cluster


def test_the_reference_has_every_file(local):
    assert sorted(local[1]) == [
        "relabel/ipc2/distilled/labels.arrow", "synthesize/ipc2/distilled.arrow", "synthesize/ipc2/trace.json",
    ]  # fmt: skip


def test_an_interruption_in_process(local, tmp_path):
    """Every checkpoint of the run is followed by an end of the process' work."""

    class EndError(Exception):
        pass

    class Interrupting(type(local[0].store)):
        def write(self, name, content):
            super().write(name, content)
            if name.endswith(".checkpoint"):
                raise EndError

    run = distilling.beside(local[0], tmp_path, distilling.config(engine="local"))
    interruptions = 0
    while True:
        again = Run(run.config, str(tmp_path))
        again.store = Interrupting(run.store.root)
        try:
            hashes = distilling.distil(again)
            break
        except EndError:
            interruptions += 1
    assert interruptions == 4 * 5  # groups, checkpoints of each
    assert hashes == local[1]


@pytest.mark.parametrize(
    ("placement", "places", "disturbed", "wire"),
    [
        ("spread", 2, False, "ray"),
        ("spread", 4, True, "ray"),
        ("colocate", 2, True, "ray"),
        ("spread", 2, False, "torch"),
        ("spread", 4, True, "torch"),
    ],
)
def test_one_node(placement, places, disturbed, wire, local, tmp_path, ray_runtime, monkeypatch):
    """`places` for actors of experts: two make one of each, four make three of the dearer one."""
    monkeypatch.setattr(crews, "worker_places", lambda c: places)
    settings = distilling.config(placement=placement, wire=wire)
    monkeypatch.setattr(ray_runtime, "_c", settings.runtime)
    monkeypatch.setattr(ray_runtime, "_muster", ray_runtime._muster)  # a killer's is taken away again
    ray_runtime.release()
    killer, failures = distilling.Killer(ray_runtime, seed=places), []

    def calm(event, facts):
        failures.extend([facts] if event == "failure" else [])

    monkeypatch.setattr(ray_runtime, "_on_event", killer if disturbed else calm)
    assert distilling.distil(distilling.beside(local[0], tmp_path, settings, ray_runtime)) == local[1]
    assert len(killer.killed) == (distilling.KILLS if disturbed else 0)
    experts = [actor for actors in ray_runtime._experts.actors.values() for actor in actors]
    assert len(experts) == (places if placement == "spread" else 0)
    assert failures == []
    if not disturbed:  # a new life may have begun when there was nothing more to ask
        met = [
            e.__ray_call__.remote(lambda self: bool(sys.modules["cvdd_ray.runner.connection"]._devices))
            for e in experts
        ]
        assert ray.get(met) == [wire == "torch"] * places
    ray_runtime.release()


@pytest.mark.parametrize(
    ("placement", "disturbed", "wire"), [("spread", False, "ray"), ("colocate", True, "ray"), ("spread", True, "torch")]
)
def test_three_nodes(placement, disturbed, wire, local, tmp_path, three_nodes):
    """Disturbed: actors are killed; one node is told that it will be taken away, is taken away, and another one joins."""
    words = [three_nodes.address, placement, wire, "3" if disturbed else "", local[0].store.root, str(tmp_path)]
    env = {
        **three_nodes.env,
        "PYTHONPATH": three_nodes.env["PYTHONPATH"] + os.pathsep + os.path.dirname(__file__),
        "CLUSTER_TOKEN": three_nodes.env["RAY_AUTH_TOKEN"],
    }
    command = [sys.executable, distilling.__file__, *words]
    driver = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)

    def let_go_on():
        driver.stdin.write("\n")
        driver.stdin.flush()

    said = {}
    for line in driver.stdout:
        kind, _, text = line.strip().partition(" ")
        if disturbed and kind not in said:
            if kind == "checkpoint":
                three_nodes.announce()
                let_go_on()
            elif kind == "nodes_leaving":
                three_nodes.lose()
                three_nodes.add()
                let_go_on()
        said[kind] = text
    assert driver.wait(60) == 0
    assert json.loads(said["hashes"]) == local[1]
    assert ("nodes_leaving" in said) == disturbed
    assert int(said["killed"]) == (distilling.KILLS if disturbed else 0)
