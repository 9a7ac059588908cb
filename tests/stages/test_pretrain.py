"""Experts go on from their checkpoints, and several workers train one."""

import json
import os
import signal

import pytest
from helpers import Interrupted, in_processes

from cvdd_ray.errors import ConfigError
from cvdd_ray.runner import cluster
from cvdd_ray.stages.ceiling import ceiling
from cvdd_ray.stages.context import Run, Silent
from cvdd_ray.stages.pretrain import WEIGHTS, expert_plans, pretrain, train_one
from cvdd_ray.stages.runtime import LocalRuntime

EPOCHS = 4


class Heard(Silent):
    def __init__(self):
        self.said = []

    def say(self, text):
        self.said.append(text)


@pytest.fixture
def config(make_config):
    """MobileNetV2 has dropout."""
    return make_config(
        committee={"experts": ["mobilenet_v2", "resnet18"], "width": 0.125},
        pretrain={"epochs": EPOCHS, "batch_size": 64, "lr": 0.005, "pad": 1, "checkpoint_minutes": 0},
        evaluate={"seeds": 1, "baselines": ["real_hard"], "test_every": 2},
    )


def weights_of(run):
    return run.artifacts.read(run.artifacts.manifest("pretrain/mobilenet_v2"), WEIGHTS)


def test_an_interrupted_expert_goes_on_from_its_checkpoint(config, tmp_path):
    whole = Run(config, str(tmp_path / "whole"))
    pretrain(whole)
    place = str(tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        pretrain(Run(config, place, runtime=Interrupted(3 / EPOCHS)))
    again, heard = Run(config, place), []
    (checkpoint,) = [name for name in again.store.all_names() if name.endswith(".checkpoint")]
    assert checkpoint.startswith("pretrain/mobilenet_v2/partial/")

    class Listening(LocalRuntime):
        def map(self, function, items, shared=(), on_report=None):
            def report(name, said):
                heard.append((name, round(EPOCHS * said["done"])))
                on_report(name, said)

            return super().map(function, items, shared, report)

    again = Run(config, place, runtime=Listening(1))
    pretrain(again)
    assert heard == [("mobilenet_v2", 4), *(("resnet18", epoch) for epoch in (1, 2, 3, 4))]
    found, wanted = (run.artifacts.manifest("pretrain/mobilenet_v2").content for run in (again, whole))
    assert found == wanted
    assert not [name for name in again.store.all_names() if name.endswith(".checkpoint")]


def test_a_damaged_checkpoint_is_said_and_begun_anew(config, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pretrain(Run(config, str(tmp_path), runtime=Interrupted(2 / EPOCHS)))
    run = Run(config, str(tmp_path), progress=Heard())
    (checkpoint,) = [name for name in run.store.all_names() if name.endswith(".checkpoint")]
    data = bytearray(run.store.read(checkpoint))
    data[-1] ^= 1
    run.store.write(checkpoint, bytes(data))
    pretrain(run)
    (said,) = [text for text in run.progress.said if "damaged" in text]
    assert said.endswith("the network begins again")
    assert run.artifacts.manifest("pretrain/mobilenet_v2") is not None


def test_a_student_on_all_real_images_goes_on_too(config, tmp_path):
    whole, place = Run(config, str(tmp_path / "whole")), str(tmp_path / "run")
    ceiling(whole)
    with pytest.raises(KeyboardInterrupt):
        ceiling(Run(config, place, runtime=Interrupted(3 / EPOCHS)))
    again = Run(config, place)
    ceiling(again)
    rows = []
    for run in (whole, again):
        (row,) = json.loads(run.store.read("evaluate/real/results.json"))["runs"]
        rows.append(row["curve"])
    assert rows[0] == rows[1]


def test_two_workers_train_an_expert_and_one_of_them_is_lost(config, tmp_path, ray_runtime, monkeypatch):
    """Worker 1 is killed after the second epoch; what comes out is what two undisturbed processes make."""
    marker, train, given = tmp_path / "killed", ray_runtime.train, {}
    config = config.model_copy(update={"pretrain": config.pretrain.model_copy(update={"workers": 2})})

    def disturbed(function, items, shared, num_workers, on_report):
        def dying(task, *rest, workers, report):
            def last_words(said):
                report(said)
                if workers.rank == 1 and said.get("done", 0) >= 0.5 and not marker.exists():
                    marker.touch()
                    os.kill(os.getpid(), signal.SIGKILL)

            return function(task, *rest, workers=workers, report=last_words)

        given.update(task=items["mobilenet_v2"], shared=shared)
        return train(dying, items, shared, num_workers, on_report)

    monkeypatch.setattr(ray_runtime, "train", disturbed)
    run = Run(config, str(tmp_path / "run"), runtime=ray_runtime)
    pretrain(run)
    assert marker.exists()
    calm = in_processes(2, tmp_path, undisturbed, given["task"], given["shared"])
    assert calm[0] == calm[1] == weights_of(run)
    assert run.artifacts.manifest("pretrain/resnet18").facts["holdout_accuracy"] > 20  # 10 classes


def undisturbed(workers, task, shared):
    return train_one(task, *shared, report=lambda said: None, workers=workers)[0]


def test_workers_count_as_settings_and_checkpoints_do_not(config, tmp_path):
    def plan_of(**changes):
        changed = config.model_copy(update={"pretrain": config.pretrain.model_copy(update=changes)})
        return expert_plans(Run(changed, str(tmp_path)), dict.fromkeys(config.committee.experts))[
            "resnet18"
        ].fingerprint()

    assert plan_of() == plan_of(checkpoint_minutes=60)
    assert plan_of() != plan_of(workers=2)


def test_a_trial_of_a_sweep_has_no_room_for_several(config, monkeypatch):
    monkeypatch.setattr(cluster, "worker_bundles", lambda: [{"CPU": 1}])
    with pytest.raises(ConfigError, match=r"pretrain\.workers: got 2, but a trial trains an expert in one process"):
        cluster.student_share(config.runtime, 2)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pretrain": {"workers": 40, "batch_size": 64}}, r"workers 40 would leave each fewer than 2 of batch_size 64"),
        ({"pretrain": {"workers": 2}, "runtime": {"engine": "local"}}, r"pretrain\.workers 2 needs several processes"),
    ],
)
def test_impossible_numbers_are_refused(make_config, changes, message):
    with pytest.raises(ValueError, match=message):
        make_config(**changes)
