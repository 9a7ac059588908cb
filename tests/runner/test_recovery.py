"""What is tried again, what is given up without harm to the others, and what is saved before an end."""

import os
import signal
import time
from types import SimpleNamespace

import numpy as np
import pytest
import ray
import torch
from conftest import tiny_config
from ray.exceptions import WorkerCrashedError

from cvdd_ray.core.committee import Ballot
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import NumericsError
from cvdd_ray.recipes import dump_config
from cvdd_ray.runner import recovery
from cvdd_ray.runner.actors import Health
from cvdd_ray.runner.committee import RayCommittee
from cvdd_ray.runner.recovery import Leaving, Poisoned, is_device_error
from cvdd_ray.stages import grouptask
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.grouptask import decode_state
from cvdd_ray.stages.initialize import initialize
from cvdd_ray.stages.pretrain import load_experts, pretrain
from cvdd_ray.stages.scheduling import GroupClock, Scheduler
from cvdd_ray.stages.synthesize import distill, image_jobs


def test_three_tries_and_numerics_once():
    poisoned = Poisoned()
    poisoned.raise_first()
    assert [poisoned.again("a", ValueError("a")) for _ in range(3)] == [True, True, False]
    assert not poisoned.again("b", NumericsError("b"))
    assert [poisoned.again("c", WorkerCrashedError()) for _ in range(20)] == [True] * 19 + [False]
    with pytest.raises(ValueError, match=r"^a$"):
        poisoned.raise_first()


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("CUDA error: an illegal memory access was encountered"), True),
        (RuntimeError("cuBLAS: CUBLAS_STATUS_EXECUTION_FAILED"), True),
        (getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: unspecified launch failure"), True),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), False),
        (ValueError("shape"), False),
    ],
)
def test_errors_after_which_a_gpu_needs_a_new_process(error, lost):
    assert is_device_error(error) == lost


def test_a_process_that_has_lost_its_gpu_ends_at_the_next_call(monkeypatch):
    ended = []
    monkeypatch.setattr(os, "_exit", ended.append)
    health = Health()
    for error, expected in ((ValueError("x"), []), (RuntimeError("CUDA error: x"), []), (None, [1])):
        with pytest.raises(type(error)) if error else pytest.MonkeyPatch.context(), health.watched():
            if error:
                raise error
        assert ended == expected


def test_a_piece_that_always_fails_lets_the_others_finish(ray_runtime, tmp_path):
    def work(item, folder, *, report):
        with open(f"{folder}/{item}", "a") as tries:
            tries.write("x")
        if item == "bad" or (item == "once" and os.path.getsize(f"{folder}/{item}") == 1):
            raise ZeroDivisionError(f"the trouble with {item}")
        return item

    done = []
    results = ray_runtime.map(work, {k: k for k in ("bad", "once", "c", "d")}, (str(tmp_path),))
    with pytest.raises(ZeroDivisionError, match="the trouble with bad") as error:
        done.extend(name for name, _ in results)
    assert sorted(done) == ["c", "d", "once"]
    assert "in work" in str(error.value)  # the remote traceback
    assert {path.name: len(path.read_text()) for path in tmp_path.iterdir()} == {"bad": 3, "once": 2, "c": 1, "d": 1}


@pytest.fixture(scope="module")
def started(tmp_path_factory):
    """A run that synthesis can begin with."""
    run = Run(tiny_config(synthesize={"iterations": 20, "checkpoint_every": 1000}), str(tmp_path_factory.mktemp("run")))
    pretrain(run)
    initialize(run, 2)
    return run


@pytest.mark.parametrize("engine", ["local", "ray"])
def test_a_group_whose_numbers_blow_up_lets_the_others_finish(engine, started, request, tmp_path, monkeypatch):
    """Job 0 has a weight that is not a number; job 1 finishes."""
    run = Run(
        started.config, str(tmp_path), runtime=request.getfixturevalue("ray_runtime") if engine == "ray" else None
    )
    for name in started.store.all_names():
        run.store.take(started.store, name, name)
    specs, _ = load_experts(run)
    jobs = image_jobs(run, 2, lambda i: (("resnet18",), (float("nan") if i == 0 else 1.0,)))
    with (
        run.stage(run.plan("poisoned", {}, {}), "poisoned") as work,
        pytest.raises(NumericsError, match=r"^image index 0, class chunk 0, iteration 0: every vote is finite"),
    ):
        distill(run, work, {"p": jobs}, 2, 20, specs, run.config.synthesize.jobs_per_group)
    assert [name.rsplit("/", 1)[1] for name in run.store.names("poisoned")] == ["p-group00001", "p-group00001.arrow"]


def test_an_expert_that_hangs_is_started_again(ray_runtime, tmp_path):
    class Slow:  # inside the test, so that the worker need not import this file
        """An expert that hangs in its first life."""

        def __init__(self, marker):
            self._first = not os.path.exists(marker)
            with open(marker, "w"):
                pass

        def vote(self, views, labels):
            while self._first:
                time.sleep(1)
            return views, labels[:, 0].astype(np.float32), labels[:, 0].astype(np.float32)

    actor = ray.remote(num_cpus=0, max_restarts=20, max_task_retries=-1)(Slow).remote(str(tmp_path / "lived"))
    hung = []
    committee = RayCommittee({"a": [actor]}, hung_s=4.0, on_failure=lambda kind, name: hung.append((kind, name)))
    ballot = Ballot(torch.rand(1, 2, 3, 4, 4), torch.tensor([[3, 1]]))
    vote = committee.vote({"a": ballot})["a"]
    assert torch.equal(vote.gradient_GBCHW, ballot.views_GBCHW)
    assert vote.cross_entropy_G.tolist() == [3.0]
    assert set(hung) == {("expert_hung", "a")}
    ray.kill(actor)


def test_ctrl_c_writes_a_checkpoint_and_exits_with_130(started, tmp_path, cvdd, monkeypatch):
    """SIGINT after iteration 7 of the first group, which has no checkpoint of its own before iteration 1000."""
    config = started.config.model_copy(
        update={
            "runtime": started.config.runtime.model_copy(update={"engine": "local"}),
            "voting": started.config.voting.model_copy(update={"weighting": "equal"}),
            "relabel": started.config.relabel.model_copy(update={"weighting": "equal"}),
        }
    )
    (tmp_path / "run.yaml").write_text(dump_config(config))
    for name in started.store.all_names():
        Store(str(tmp_path / "run")).take(started.store, name, name)
    real, interrupted, began = grouptask.distill_group, [], []

    def distill_group(committee, jobs, state, settings, *, on_progress, on_checkpoint):
        began.append(state.iteration)

        def progress(state):
            if state.iteration == 7 and not interrupted:
                interrupted.append(os.kill(os.getpid(), signal.SIGINT))
            on_progress(state)

        return real(committee, jobs, state, settings, on_progress=progress, on_checkpoint=on_checkpoint)

    monkeypatch.setattr(grouptask, "distill_group", distill_group)
    words = ("synthesize", str(tmp_path / "run.yaml"), "--out", str(tmp_path / "run"))
    ignored = signal.signal(signal.SIGINT, signal.default_int_handler)  # as it is where tests run in the background
    code, _, err = cvdd(*words)
    assert signal.signal(signal.SIGINT, ignored) is signal.default_int_handler
    assert code == 130, err
    assert err.splitlines()[-1] == "interrupted; the same command continues where it stopped"
    store = Store(str(tmp_path / "run"))
    (checkpoint,) = [name for name in store.all_names() if name.endswith(".checkpoint")]
    assert decode_state(store.read(checkpoint)).iteration == 7
    code, _, err = cvdd(*words)
    assert code == 0, err
    assert began == [0, 7, 0]


def test_nodes_that_will_leave_are_told_once(ray_runtime, monkeypatch):
    assert recovery._draining() == []  # what Ray says
    now, draining = [0.0], ["old"]
    monkeypatch.setattr(recovery, "_draining", lambda: list(draining))
    leaving = Leaving(clock=lambda: now[0])
    said = []
    for now[0], new in ((1, "a"), (3, "b"), (4, None), (9, None)):
        draining.extend([new] if new else [])
        said.append(leaving.news())
    assert said == [[], ["a", "b"], [], []]


def test_groups_that_fail_leave_room():
    scheduler = Scheduler({"a": {"x": 2.0}, "b": {"x": 1.0}})
    scheduler.join("worker")
    assert scheduler.assign() == [("a", "worker")]
    scheduler.give_back("a")
    assert scheduler.assign() == [("a", "worker")]
    scheduler.give_up("a")
    assert scheduler.assign() == [("b", "worker")]
    assert scheduler.unfinished == 1


def test_silence_is_counted_from_the_last_report():
    clock = SimpleNamespace(now=0.0)
    watch = GroupClock(lambda name, report: None, clock=lambda: clock.now)
    watch.begin("a")
    clock.now = 5.0
    assert watch.silent_s("a") == 5
    watch.report("a", {"done": 0.5})
    clock.now = 7.0
    assert watch.silent_s("a") == 2
