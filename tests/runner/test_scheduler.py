"""Groups of unequal cost on real workers: who gets what when, and that the images are those of this process."""

import os
import subprocess
import sys
import time

import pytest
import ray
from clusters import RayCluster

from cvdd_ray.runner import crews
from cvdd_ray.runner.cluster import Share, room, worker_places
from cvdd_ray.stages import synthesize as module
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.initialize import initialize
from cvdd_ray.stages.pretrain import load_experts, pretrain

PAIR, ONE = (("resnet18", "shufflenet_v2"), (0.5, 0.5)), (("shufflenet_v2",), (1.0,))
# Five groups of one job: three of ShuffleNet alone, two of both experts, which cost most and are not the first by name.
VOTES = (ONE, PAIR, ONE, PAIR, ONE)


def prepared(config, folder, runtime=None) -> Run:
    run = Run(config, str(folder), runtime=runtime)
    pretrain(run)
    initialize(run, 5)
    return run


def distil(run: Run) -> str:
    """Return the content hash of five images per class."""
    specs, _ = load_experts(run)
    jobs = module.image_jobs(run, 5, lambda i: VOTES[i])
    with run.stage(run.plan("unequal", {}, {}), "unequal") as work:
        _, content, _ = module.distill(run, work, {"u": jobs}, 5, run.config.synthesize.iterations, specs, 1)["u"]
    return content


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    """A run in this process with its images' hash, and what a run on Ray starts from."""
    from conftest import tiny_config

    run = prepared(tiny_config(ipc=[5], synthesize={"iterations": 30}), tmp_path_factory.mktemp("local"))
    return run, distil(run)


def beside(local: Run, folder, runtime, config) -> Run:
    """Return a run that has what the local one has begun with."""
    run = Run(config, str(folder), runtime=runtime)
    for stage in ("pretrain/resnet18", "pretrain/shufflenet_v2", "initialize/ipc5"):
        for name in local.store.names(stage):
            run.store.write(name, local.store.read(name))
    return run


@pytest.mark.parametrize("placement", ["colocate", "spread", "auto"])
def test_the_longest_begin_and_every_byte_is_the_local_one(placement, local, tmp_path, ray_runtime, monkeypatch):
    events = []
    monkeypatch.setattr(ray_runtime, "_on_event", lambda event, facts: events.append((event, facts)))
    config = local[0].config.model_copy(
        update={"runtime": local[0].config.runtime.model_copy(update={"placement": placement})}
    )
    monkeypatch.setattr(ray_runtime, "_c", config.runtime)
    assert distil(beside(local[0], tmp_path, ray_runtime, config)) == local[1]
    begun = [facts["what"] for event, facts in events if event == "group_assigned"]
    assert sorted(begun) == [f"u-group{k:05d}" for k in range(5)]
    workers = {facts["worker"] for event, facts in events if event == "group_assigned"}
    if placement == "spread":  # kinds take turns
        assert begun[:2] == ["u-group00001", "u-group00000"]
        assert workers <= {"coordinator 0", "coordinator 1"}
    else:
        assert begun[:3] == ["u-group00001", "u-group00003", "u-group00000"]
        assert workers == {"worker 0", "worker 1"}


def test_a_lost_workers_group_is_finished_by_the_other(local, tmp_path, ray_runtime, monkeypatch):
    """One of two colocated workers dies for good in the middle of a dear group."""
    events, crews = [], []
    config = local[0].config.model_copy(
        update={"runtime": local[0].config.runtime.model_copy(update={"placement": "colocate"})}
    )
    monkeypatch.setattr(ray_runtime, "_c", config.runtime)
    muster = ray_runtime._muster
    monkeypatch.setattr(ray_runtime, "_muster", lambda *a: (made := muster(*a), crews.append(made[0]))[0])

    def kill_once(event: str, facts: dict) -> None:
        events.append((event, facts))
        if event == "checkpoint" and sum(kind == "checkpoint" for kind, _ in events) == 1:
            owner = next(f["worker"] for kind, f in events if kind == "group_assigned" and f["what"] == facts["what"])
            ray.kill(crews[0].workers.actors[owner])

    monkeypatch.setattr(ray_runtime, "_on_event", kill_once)
    assert distil(beside(local[0], tmp_path, ray_runtime, config)) == local[1]
    ((lost, returned),) = ((f["what"], f["groups"]) for event, f in events if event == "worker_lost")
    assert len(returned) == 1
    takers = [f["worker"] for event, f in events if event == "group_assigned" and f["what"] == returned[0]]
    assert takers[0] == lost != takers[-1]
    assert len(crews[0].workers.actors) == 0  # ended with the stage


def test_experts_get_more_actors_when_places_come(local, tmp_path, ray_runtime, monkeypatch):
    """Room for two actors at first, for three after the first group has begun: ResNet-18, which costs most, gets the third,
    and the coordinators know of it before the last group begins."""
    places, events, known = [2], [], []
    monkeypatch.setattr(crews, "GROW_S", 0.0)
    monkeypatch.setattr(crews, "worker_places", lambda c: places[0])
    monkeypatch.setattr(crews, "room", lambda share: places[0])
    config = local[0].config.model_copy(
        update={"runtime": local[0].config.runtime.model_copy(update={"placement": "spread"})}
    )
    monkeypatch.setattr(ray_runtime, "_c", config.runtime)
    ray_runtime.release()
    muster, made = ray_runtime._muster, []
    monkeypatch.setattr(ray_runtime, "_muster", lambda *a: (mustered := muster(*a), made.append(mustered[0]))[0])

    def tell(event: str, facts: dict) -> None:
        events.append((event, facts))
        if event == "group_assigned":
            there = made[0]._there
            known.append({name: len(actors) for name, actors in there.items()})
            deadline = time.monotonic() + 120
            while places[0] == 3 and len(there["resnet18"]) < 2 and time.monotonic() < deadline:
                made[0].grow(1)
                time.sleep(0.1)
            places[0] = 3

    monkeypatch.setattr(ray_runtime, "_on_event", tell)
    assert distil(beside(local[0], tmp_path, ray_runtime, config)) == local[1]
    assert known[0] == {"resnet18": 1, "shufflenet_v2": 1}
    assert known[-1] == {"resnet18": 2, "shufflenet_v2": 1}
    ray_runtime.release()


GROWING = """
import json, os, sys, time
token = os.environ["RAY_AUTH_TOKEN"]
from conftest import tiny_config
from test_scheduler import beside, distil
os.environ["RAY_AUTH_TOKEN"] = token  # of the cluster, not of the tests
import ray
from cvdd_ray.runner import crews, runtime
from cvdd_ray.stages.context import Run

crews.GROW_S = 0.0
assign = runtime.Scheduler.assign
handed_out = []

def one_until_another_is_there(scheduler):
    if handed_out and "worker 1" not in scheduler._room:
        return []
    handed_out.extend(new := assign(scheduler))
    return new

def tell(event, facts):
    if event == "group_assigned":
        print("assigned", facts["worker"], flush=True)
        while len(ray.nodes()) < 2:
            time.sleep(0.1)

runtime.Scheduler.assign = one_until_another_is_there
address, there, folder = sys.argv[1:]
where = {"num_cpus": None, "address": address, "placement": "colocate"}
config = tiny_config(ipc=[5], synthesize={"iterations": 30}, runtime=where)
print("hash", distil(beside(Run(config, there), folder, runtime.RayRuntime(config.runtime, tell), config)), flush=True)
"""


def test_nodes_that_join_are_used(local, tmp_path):
    """A head with one core begins; a second node joins: a second worker takes groups, the images are the same."""
    with RayCluster(num_cpus=1) as cluster:
        path = {"PYTHONPATH": cluster.env["PYTHONPATH"] + os.pathsep + os.path.dirname(__file__)}
        words = [sys.executable, "-c", GROWING, cluster.address, local[0].store.root, str(tmp_path)]
        driver = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env={**cluster.env, **path})
        said = []
        for line in driver.stdout:
            said.append(line.split(" ", 1))
            if line.startswith("assigned") and len(said) == 1:
                cluster.add(num_cpus=1)
        assert driver.wait(60) == 0
    workers = [text.strip() for kind, text in said if kind == "assigned"]
    assert workers[0] == "worker 0"
    assert set(workers) == {"worker 0", "worker 1"}
    assert len(workers) == 5
    assert [text.strip() for kind, text in said if kind == "hash"] == [local[1]]


class TestPlaces:
    """How many workers there is room for, without a cluster."""

    def have(self, monkeypatch, *nodes):
        monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": resources} for resources in nodes])

    @pytest.mark.parametrize(
        ("nodes", "runtime", "places"),
        [
            ([{"CPU": 4.0}, {"CPU": 2.0}], {}, 6),
            ([{"CPU": 4.0}], {"threads_per_actor": 2}, 2),
            ([{"CPU": 4.0, "GPU": 8.0}, {"CPU": 9.0}], {}, 8),
            ([{"CPU": 4.0, "GPU": 2.0}], {"gpus_per_actor": 0.5}, 4),
            ([{"CPU": 4.0, "GPU": 2.0}], {"gpus_per_actor": 2}, 1),
            ([{"CPU": 4.0, "GPU": 2.0}], {"gpus_per_actor": 0}, 4),
        ],
    )
    def test_a_place_is_a_gpu_or_the_cores_of_a_worker(self, monkeypatch, make_config, nodes, runtime, places):
        self.have(monkeypatch, *nodes)
        assert worker_places(make_config(runtime=runtime).runtime) == places

    def test_room_grows_with_nodes(self, monkeypatch):
        for nodes in (1, 3):
            self.have(monkeypatch, *[{"CPU": 2.0, "GPU": 2.0}] * nodes)
            assert room(Share(0.0, 1.0)) == 2 * nodes
            assert room(Share(0.9, 0.0)) == 2 * nodes
            assert room(Share(0.0, 0.0)) == 0  # they hold nothing, so nothing says how many there should be
