"""Schedulers that remember over a restart, and settings that stay inside their ranges."""

import json
from types import SimpleNamespace

import pytest
from pyarrow.fs import LocalFileSystem
from ray.tune.schedulers import TrialScheduler

from cvdd_ray.recipes import validate
from cvdd_ray.runner.search import SCHEDULERS, param_space, recorded_results
from cvdd_ray.sweepconfig import SweepConfig


def sweep_config(make_config, **sweep) -> SweepConfig:
    space = {"evaluate.lr": {"loguniform": [1e-3, 1e-2]}, "evaluate.temperature": {"choice": [1, 4, 20]}}
    settings = {**make_config(relabel={"epochs": 16}).model_dump(), "sweep": {"space": space, **sweep}}
    return validate(settings, SweepConfig)


def trial(tmp_path, name, accuracies=()):
    """A trial as Tune brings it back, with what it had reported (epoch 1, 2, ...) in its folder."""
    folder = tmp_path / name
    folder.mkdir()
    rows = [{"epoch": epoch, "holdout_accuracy": value} for epoch, value in enumerate(accuracies, 1)]
    if rows:
        (folder / "result.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    storage = SimpleNamespace(
        storage_filesystem=LocalFileSystem(), trial_fs_path=str(folder), trial_dir_name=name if rows else None
    )
    return SimpleNamespace(trial_id=name, storage=storage, last_result=rows[-1] if rows else {})


@pytest.fixture
def asha(make_config):
    config = sweep_config(make_config, search="random", num_trials=8, scheduler="asha", grace_epochs=4)
    scheduler = SCHEDULERS["asha"](config)
    scheduler.set_search_properties("holdout_accuracy", "max")
    return scheduler


def decide(scheduler, new, epoch, accuracy):
    return scheduler.on_trial_result(None, new, {"epoch": epoch, "holdout_accuracy": accuracy})


EARLIER = {
    "a": [30.0] * 3 + [60.0, 85.0, 90.0],
    "b": [30.0] * 3 + [62.0, 85.0, 90.0],
    "c": [30.0] * 3 + [50.0, 80.0, 88.0],
}


def test_after_a_restart_asha_judges_by_what_trials_had_at_the_rung(tmp_path, asha):
    """Trials that have gone on to 90 % had 60 % at the rung of epoch 4: a new one with 65 % there is a good one."""
    for name, accuracies in EARLIER.items():
        resumed = trial(tmp_path, name, accuracies)
        asha.on_trial_add(None, resumed)
        decide(asha, resumed, 7, 91.0)
    new = trial(tmp_path, "new")
    asha.on_trial_add(None, new)
    assert decide(asha, new, 4, 65.0) == TrialScheduler.CONTINUE
    lagging = trial(tmp_path, "lagging")
    asha.on_trial_add(None, lagging)
    assert decide(asha, lagging, 4, 40.0) == TrialScheduler.STOP


def test_results_are_read_once_per_epoch_the_last_one_counting(tmp_path):
    one = trial(tmp_path, "one", [10.0, 20.0])
    with open(tmp_path / "one" / "result.json", "a") as file:  # epoch 2 again, after a restart
        file.write(json.dumps({"epoch": 2, "holdout_accuracy": 21.0}) + "\n")
    assert [(r["epoch"], r["holdout_accuracy"]) for r in recorded_results(one)] == [(1, 10.0), (2, 21.0)]
    assert recorded_results(trial(tmp_path, "new")) == []
    lost = trial(tmp_path, "lost", [1.0])
    (tmp_path / "lost" / "result.json").unlink()
    assert recorded_results(lost) == []


def test_perturbed_settings_stay_in_their_range(make_config):
    config = sweep_config(make_config, search="random", num_trials=4, scheduler="pbt", perturb_epochs=2)
    explore = SCHEDULERS["pbt"](config)._custom_explore_fn
    point = {"evaluate.lr": 0.012, "evaluate.temperature": 4}
    assert explore(point) == {"evaluate.lr": 0.01, "evaluate.temperature": 4}
    assert explore({**point, "evaluate.lr": 0.0008})["evaluate.lr"] == 0.001
    assert SCHEDULERS["pbt"](config)._hyperparam_mutations["evaluate.temperature"] == [1, 4, 20]


def test_the_space_of_tune_has_names_for_values_that_are_not_numbers(make_config):
    space = {"voting": {"grid": [{"size": 1}, {"weighting": "equal"}]}, "evaluate.lr": {"grid": [0.1, 0.2]}}
    config = validate({**make_config().model_dump(), "sweep": {"space": space}}, SweepConfig)
    assert param_space(config) == {
        "voting": {"grid_search": ["size=1", "weighting=equal"]}, "evaluate.lr": {"grid_search": [0.1, 0.2]},
    }  # fmt: skip
