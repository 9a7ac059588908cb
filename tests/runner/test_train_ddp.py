"""One student on several workers: Ray Train against one process, a worker lost on the way, and what is refused."""

import json
import os
import signal
from types import SimpleNamespace

import pytest
import ray
from helpers import Interrupted, in_processes

from cvdd_ray.data.artifacts import Artifacts
from cvdd_ray.errors import ConfigError, DataError
from cvdd_ray.runner import cluster, dataparallel
from cvdd_ray.runner.cluster import Share, student_share
from cvdd_ray.stages.context import Run, Silent
from cvdd_ray.stages.evaluate import RESULTS, evaluate, run_student
from cvdd_ray.stages.pipeline import STAGES, check
from cvdd_ray.stages.runtime import LocalRuntime

EPOCHS = 6


def config_of(make_config, **evaluating):
    """30 images in batches of 12, 12 and 6, BatchNorm groups of 4: 3, 3 and 2 micro-batches. No priors to be measured."""
    return make_config(
        ipc=[3],
        prior={"method": "given", "values": {"resnet18": 50, "shufflenet_v2": 50}, "ipc": 10},
        relabel={"epochs": EPOCHS, "batch_size": 12, "bn_group": 4},
        evaluate={"seeds": 1, "baselines": [], "test_every": 2, "checkpoint_minutes": 0, **evaluating},
    )


@pytest.fixture(scope="module")
def labelled(tmp_path_factory):
    """A store with everything before the students."""
    from conftest import tiny_config

    run = Run(config_of(tiny_config), str(tmp_path_factory.mktemp("labelled")))
    for stage in ("pretrain", "prior", "initialize", "synthesize", "relabel"):
        STAGES[stage](run)
    return run.store


def row_of(config, store, runtime, progress=None):
    """The row of the only student, evaluated anew."""
    run = Run(config, Artifacts(store, overwrite=True), runtime=runtime, progress=progress)
    evaluate(run, 3)
    (row,) = json.loads(store.read(f"evaluate/ipc3/{RESULTS}"))["runs"]
    return row


def test_a_lost_worker_costs_nothing_but_time(make_config, labelled, tmp_path, ray_runtime, monkeypatch):
    """Worker 1 is killed after half of the epochs. All go on from the last checkpoint, to the bits of two undisturbed
    processes; they differ from one process's by rounding."""
    marker, log, given, failures = tmp_path / "killed", tmp_path / "log", {}, []
    train = ray_runtime.train
    monkeypatch.setattr(
        ray_runtime, "_on_event", lambda event, facts: failures.append(facts) if event == "failure" else None
    )

    def disturbed(function, items, shared, num_workers, on_report):
        def dying(task, *rest, workers, report):
            def last_words(said):
                report(said)
                with open(log, "a") as file:
                    file.write(f"{workers.rank} {round(EPOCHS * said['done'])}\n")
                if workers.rank == 1 and said["done"] >= 0.5 and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            return function(task, *rest, workers=workers, report=last_words)

        given.update(items=items, shared=shared)
        return train(dying, items, shared, num_workers, on_report)

    monkeypatch.setattr(ray_runtime, "train", disturbed)
    two = row_of(config_of(make_config, workers=2), labelled, ray_runtime)
    assert marker.exists()
    done = [int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("1")]
    assert done[:3] == [1, 2, 3]
    assert done[3:] in ([4, 5, 6], [3, 4, 5, 6])  # worker 0 has or has not kept the third epoch
    assert {facts["kind"] for facts in failures} == {"actor_restarted"}
    assert {facts["what"][:8] for facts in failures} == {"worker 0", "worker 1"}
    assert not [name for name in labelled.names("evaluate") if "partial" in name]

    ((_, task),) = given["items"].items()
    calm = in_processes(2, tmp_path, undisturbed, task, given["shared"])
    assert calm[0] == calm[1]
    assert two["curve"] == calm[0]

    one = row_of(config_of(make_config), labelled, LocalRuntime(1))
    for (epoch, loss, agreement, accuracy), theirs in zip(one["curve"], two["curve"], strict=True):
        # rounding grows from step to step (tests/core/test_workers.py compares single steps)
        assert theirs == [
            epoch,
            pytest.approx(loss, rel=2e-2),
            pytest.approx(agreement, abs=10),
            pytest.approx(accuracy, abs=5),
        ]


def undisturbed(workers, task, shared):
    return json.loads(run_student(task, *shared, report=lambda said: None, workers=workers))["curve"]


def test_when_the_actor_over_the_workers_is_lost_the_rest_goes_to_another(tmp_path, ray_runtime, monkeypatch):
    """Without Ray Train: the first actor finishes one item and dies, its other workers' place is given back."""
    place, attempt = ray.util.placement_group([{"CPU": 1}]), tmp_path / "attempt"

    class Groups:
        def __init__(self, num_workers, share, threads):
            self.is_first = not attempt.exists()
            attempt.touch()

        def run(self, name, item, function, shared_refs, mailbox):
            import os
            import time

            import ray

            if self.is_first and name == "lost":
                ray.get(mailbox.put.remote(name, {"done": 0.3, "place": place}))
                time.sleep(2)  # longer than the driver waits between two looks
                os._exit(1)
            return function(item, *ray.get(shared_refs))

    monkeypatch.setattr(dataparallel, "WorkerGroups", Groups)
    reports = []
    found = list(
        ray_runtime.train(pow, {"kept": 2, "lost": 3}, (2,), 2, lambda name, report: reports.append(report["done"]))
    )
    assert found == [("kept", 4), ("lost", 9)]
    assert reports == [0.3]
    assert ray.util.placement_group_table(place)["state"] == "REMOVED"


# --- a worker, without Ray -------------------------------------------------------------------------------------------


class Called:
    """An actor's method that is called at once."""

    def __init__(self, method):
        self.remote = method

    def options(self, **options):
        return self


@pytest.fixture
def groups(monkeypatch):
    """The actor that workers report to, and the mailbox; this process is the worker that `rank` says."""
    plain = dataparallel.WorkerGroups(2, Share(1.0, 0.0), 1)
    rank = [0]
    context = SimpleNamespace(get_world_rank=lambda: rank[0], get_world_size=lambda: 2)
    monkeypatch.setattr(dataparallel.train, "get_context", lambda: context)
    monkeypatch.setattr(dataparallel.ray, "get", lambda value: value)
    monkeypatch.setattr(dataparallel.ray.util, "get_current_placement_group", lambda: "place")
    calls = {name: Called(getattr(plain, name)) for name in ("keep", "fail", "has_failed")}
    said = []
    mailbox = SimpleNamespace(
        put=Called(lambda name, report: said.append((name, report))), tell=Called(lambda event: None)
    )
    return SimpleNamespace(plain=plain, rank=rank, actor=SimpleNamespace(**calls), mailbox=mailbox, said=said)


def work(groups, function):
    dataparallel._work(function, "item", "name", ["shared"], groups.actor, groups.mailbox, "call", 1)


def test_the_first_worker_alone_reports_and_leaves_the_result(groups):
    def function(item, shared, *, workers, report):
        report({"done": 0.5})
        return item, shared, workers.rank, workers.world_size

    for groups.rank[0] in (1, 0):
        work(groups, function)
    assert groups.plain._results == {"name": ("item", "shared", 0, 2)}
    assert groups.said == [("name", {"place": "place"}), ("name", {"done": 0.5, "place": "place"})]


def test_an_error_a_user_can_mend_is_not_tried_again(groups):
    calls = []

    def refuse(item, shared, *, workers, report):
        calls.append(workers.rank)
        raise DataError("cat.png cannot be read; remove it")

    groups.rank[0] = 1
    with pytest.raises(DataError):
        work(groups, refuse)
    for groups.rank[0] in (0, 1):  # Ray Train starts all workers again
        work(groups, refuse)
    assert calls == [1]
    assert str(groups.plain._errors["name"]) == "cat.png cannot be read; remove it"


def test_other_errors_are_ray_trains_to_count(groups):
    def lose(item, shared, *, workers, report):
        raise RuntimeError("connection closed by peer")

    with pytest.raises(RuntimeError):
        work(groups, lose)
    assert not groups.plain.has_failed("name")


# --- places ----------------------------------------------------------------------------------------------------------


class TestShares:
    """What workers ask of a cluster, without one."""

    def share(self, monkeypatch, make_config, nodes, num_workers, **runtime):
        monkeypatch.setattr(cluster, "worker_bundles", lambda: None)  # Ray would start to answer that
        monkeypatch.setattr(cluster.ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in nodes])
        return student_share(make_config(runtime=runtime).runtime, num_workers)

    @pytest.mark.parametrize(("workers", "at_once"), [(2, 4), (3, 2), (8, 1)])
    def test_a_whole_gpu_each(self, monkeypatch, make_config, workers, at_once):
        nodes = [{"CPU": 8.0, "GPU": 4.0}, {"CPU": 8.0, "GPU": 4.0}]
        assert self.share(monkeypatch, make_config, nodes, workers) == (Share(0.0, 1.0), at_once)
        assert self.share(monkeypatch, make_config, nodes, workers, gpus_per_actor=0.25)[0] == Share(0.0, 1.0)
        assert self.share(monkeypatch, make_config, nodes, workers, gpus_per_actor=0)[0].num_gpus == 0

    def test_more_than_the_machine_has_is_refused_but_a_cluster_may_grow(self, monkeypatch, make_config):
        nodes = [{"CPU": 8.0, "GPU": 2.0}]
        with pytest.raises(ConfigError, match=r"4 take one GPU each, this machine has 2; use at most 2") as caught:
            self.share(monkeypatch, make_config, nodes, 4)
        assert "\n" not in str(caught.value)
        assert self.share(monkeypatch, make_config, nodes, 4, address="auto") == (Share(0.0, 1.0), 1)

    @pytest.mark.parametrize(
        ("cores", "workers", "threads", "cpus", "at_once"),
        [
            ([2], 2, 1, 1.0, 1),
            ([8], 2, 2, 2.0, 2),
            ([2], 4, 1, 0.5, 1),
            ([4, 4], 4, 3, 2.0, 1),
            ([4, 1], 3, 2, 1.333, 1),  # the small node stays free
            ([1, 1, 1], 3, 2, 1.0, 1),
            ([], 2, 2, 2.0, 1),  # a cluster that has yet to start its nodes
        ],
    )
    def test_cores_so_that_all_can_be_placed(self, monkeypatch, make_config, cores, workers, threads, cpus, at_once):
        nodes = [{"CPU": float(amount)} for amount in cores]
        assert self.share(monkeypatch, make_config, nodes, workers, threads_per_actor=threads) == (
            Share(cpus, 0.0),
            at_once,
        )


# --- refusals before anything is computed ----------------------------------------------------------------------------


def test_more_workers_than_micro_batches_are_refused_at_once(make_config, tmp_path):
    run = Run(config_of(make_config, workers=4), str(tmp_path))
    with pytest.raises(ConfigError) as caught:
        check(run)
    assert str(caught.value) == (
        "evaluate.workers: got 4, but at IPC 3 a batch of 12 images in BatchNorm groups of 4 has work for 3; use at most 3"
    )
    check(Run(config_of(make_config, workers=3), str(tmp_path)))


def test_one_process_cannot_be_several_workers(make_config, labelled):
    with pytest.raises(
        ValueError, match=r"evaluate\.workers 2 needs several processes, runtime\.engine 'local' is one"
    ):
        config_of(make_config, workers=2).model_validate(
            {**config_of(make_config, workers=2).model_dump(), "runtime": {"engine": "local"}}
        )
    with pytest.raises(ConfigError, match=r"2 workers for one network need Ray.*runtime\.engine=ray"):
        row_of(config_of(make_config, workers=2), labelled, LocalRuntime(1))


# --- a student's checkpoint, with one worker as with several -----------------------------------------------------------


def test_an_interrupted_student_goes_on_from_its_checkpoint(make_config, labelled):
    config = config_of(make_config, first_seed=7)
    whole = row_of(config, labelled, LocalRuntime(1))
    labelled.delete_folder("evaluate")
    with pytest.raises(KeyboardInterrupt):
        row_of(config, labelled, Interrupted(3 / EPOCHS))
    (checkpoint,) = [name for name in labelled.names("evaluate") if name.endswith(".checkpoint")]
    done = []
    runtime = LocalRuntime(1)
    run = Run(config, Artifacts(labelled), runtime=runtime)
    original = runtime.map
    runtime.map = lambda function, items, shared, on_report: original(
        function, items, shared, lambda name, said: done.append(round(EPOCHS * said["done"]))
    )
    evaluate(run, 3)
    (row,) = json.loads(labelled.read(f"evaluate/ipc3/{RESULTS}"))["runs"]
    assert done == [4, 5, 6]
    assert row["curve"] == whole["curve"]
    assert not labelled.exists(checkpoint)


def test_checkpoints_come_by_the_clock_and_a_damaged_one_is_begun_again(make_config, labelled, monkeypatch):
    labelled.delete_folder("evaluate")
    whole = row_of(config_of(make_config), labelled, LocalRuntime(1))
    labelled.delete_folder("evaluate")
    with pytest.raises(KeyboardInterrupt):
        row_of(config_of(make_config, checkpoint_minutes=60), labelled, Interrupted(3 / EPOCHS))
    assert not labelled.names("evaluate")
    with pytest.raises(KeyboardInterrupt):
        row_of(config_of(make_config), labelled, Interrupted(3 / EPOCHS))
    (checkpoint,) = labelled.names("evaluate")
    labelled.write(checkpoint, labelled.read(checkpoint)[:1000])
    progress = Silent()
    monkeypatch.setattr(progress, "say", (said := []).append)
    row = row_of(config_of(make_config, checkpoint_minutes=60), labelled, LocalRuntime(1), progress)
    (text,) = [text for text in said if "is damaged" in text]
    assert "seed0.checkpoint, the checkpoint of a student, is damaged (" in text
    assert text.endswith("the student begins again")
    assert row["curve"] == whole["curve"]
