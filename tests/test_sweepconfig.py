"""Sweep files: what ships loads, what cannot work is refused in one line before anything runs."""

from pathlib import Path

import pytest
import yaml

from cvdd_ray.errors import ConfigError
from cvdd_ray.recipes import dump_config, load_config, parse_config
from cvdd_ray.space import samples
from cvdd_ray.sweepconfig import SweepConfig, load_sweep, named, settings_of

TUNE_CONFIGS = sorted((Path(__file__).parent.parent / "tune_configs").glob("*.yaml"))
PROMISED = {
    "temperature", "schedule", "learning_rate", "post_eval", "voter_temperature", "voters", "bssl", "committee",
    "students", "eta", "pbt", "demo", "labels", "experts", "augmentation", "architectures", "cross",
}  # fmt: skip


def sweep_file(tmp_path, **sweep) -> str:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"base": "digits-demo", "sweep": sweep}))
    return str(path)


def test_the_promised_files_are_there():
    assert {path.stem for path in TUNE_CONFIGS} == PROMISED


@pytest.mark.parametrize("path", TUNE_CONFIGS, ids=lambda path: path.stem)
def test_every_file_says_what_it_is_for_and_loads(path):
    text = path.read_text()
    assert text.startswith("# What it answers: ")
    assert f"# Command: cvdd sweep tune_configs/{path.name} --out runs/" in text
    assert "# Time: " in text
    config = load_sweep(str(path))
    assert config.num_trials() > 1
    assert parse_config(dump_config(config), "copy", model=SweepConfig) == config


def test_trials_differ_from_the_run_in_the_swept_settings_alone(tmp_path):
    config = load_sweep(sweep_file(tmp_path, space={"evaluate.temperature": {"grid": [4, 20]}}))
    trial, base = config.trial_config({"evaluate.temperature": 4}), config.run_config()
    assert trial.evaluate.temperature == 4
    assert base == trial.model_copy(update={"evaluate": trial.evaluate.model_copy(update={"temperature": 20.0})})
    assert base.evaluate.baselines == ()
    assert base.model_copy(update={"evaluate": load_config("digits-demo").evaluate}) == load_config("digits-demo")


def test_a_mapping_changes_several_settings_of_a_section(tmp_path):
    space = {"voting": {"grid": [{"weighting": "equal"}, {"size": 3, "temperature": 1}]}}
    config = load_sweep(sweep_file(tmp_path, space=space))
    second = config.trial_config(settings_of(config.sweep.space, {"voting": "size=3 temperature=1"}))
    assert (second.voting.size, second.voting.temperature, second.voting.weighting) == (3, 1.0, "prior")


def test_another_base_takes_the_place_of_the_files_own():
    config = load_sweep(str(TUNE_CONFIGS[0].parent / "temperature.yaml"), base="digits-demo")
    assert config.data.source == "digits"
    assert config.num_trials() == 5


def test_grids_and_trials_multiply(tmp_path):
    space = {"evaluate.temperature": {"grid": [1, 2]}, "evaluate.lr": {"loguniform": [1e-4, 1e-2]}}
    assert load_sweep(sweep_file(tmp_path, space=space, search="random", num_trials=5)).num_trials() == 10


T = {"evaluate.temperature": {"grid": [4, 20]}}
DRAWN = {"evaluate.lr": {"loguniform": [1e-4, 1e-2]}}
BAD = {
    "unknown key": ({"space": {"evaluate.temprature": {"grid": [1]}}}, r"did you mean 'temperature'"),
    "unknown section": ({"space": {"evalute.lr": {"grid": [1]}}}, r"evalute.*unknown key"),
    "wrong value": ({"space": {"evaluate.lr": {"grid": [0.1, -1]}}}, r"evaluate\.lr=-1: evaluate\.lr: got -1"),
    "no domain": ({"space": {"evaluate.lr": 3}}, r"space\.evaluate\.lr"),
    "two kinds": ({"space": {"evaluate.lr": {"grid": [1], "choice": [1]}}}, r"exactly one of"),
    "empty": ({"space": {}}, r"space is empty"),
    "impossible together": (
        {"space": {"relabel.bn_group": {"grid": [4, 64]}}}, r"relabel\.bn_group=64: relabel: bn_group 64 is larger",
    ),
    "two students": ({"space": {"evaluate.students": {"grid": [["resnet18", "resnet50"]]}}}, r"a trial measures one"),
    "two ipcs": ({"space": {"ipc": {"grid": [[1, 10]]}}}, r"a trial measures one"),
    "place": ({"space": {"runtime.num_cpus": {"grid": [1, 2]}}}, r"where work runs"),
    "another hold-out": ({"space": {"data.holdout": {"grid": [0.1, 0.2]}}}, r"changes the hold-out"),
    "another seed": ({"space": {"seed": {"grid": [0, 1]}}}, r"changes the hold-out"),
    "no effect on a trial": ({"space": {"evaluate.seeds": {"grid": [1, 2]}}}, r"set sweep\.seeds"),
    "no effect in a mapping": ({"space": {"evaluate": {"grid": [{"test_every": 3}]}}}, r"set sweep\.report_every"),
    "workers in a trial": ({"space": {"evaluate.workers": {"grid": [1, 2]}}}, r"students train in one process"),
    "linear below 0": (
        {"space": {"evaluate": {"grid": [{"schedule": "linear", "eta": 0.5}]}}}, r"below 0; use at least 1",
    ),
    "grace beyond the end": ({"space": T, "scheduler": "asha", "grace_epochs": 99}, r"a trial has 40 epochs; at most 40"),
    "a population of one": (
        {"space": DRAWN, "search": "random", "num_trials": 1, "scheduler": "pbt"}, r"at least 2",
    ),
    "optuna has no grids": ({"space": T, "search": "optuna", "num_trials": 3}, r"search 'optuna' takes choice"),
    "a grid has no draws": ({"space": DRAWN}, r"search 'grid' takes grid, got loguniform"),
    "trials missing": ({"space": DRAWN, "search": "random"}, r"needs num_trials"),
    "trials of a grid": ({"space": T, "num_trials": 3}, r"leave num_trials out"),
    "no effect": ({"space": T, "grace_epochs": 3}, r"grace_epochs has no effect with scheduler 'fifo'"),
    "no effect of pbt": ({"space": T, "perturb_epochs": 3, "scheduler": "asha"}, r"it is for 'pbt'"),
    "asha over epochs": ({"space": {"evaluate.epochs": {"grid": [5, 9]}}, "scheduler": "asha"}, r"equal epochs"),
    "pbt of labels": (
        {"space": {"relabel.batch_size": {"choice": [10, 20]}}, "search": "random", "num_trials": 4, "scheduler": "pbt"},
        r"changes running students",
    ),
    "pbt of a grid": ({"space": T, "scheduler": "pbt"}, r"needs search 'random'"),
    "pbt has its own checkpoints": (
        {"space": DRAWN, "search": "random", "num_trials": 4, "scheduler": "pbt", "checkpoint_every": 5}, r"no effect",
    ),
    "twice": ({"space": {"evaluate": {"grid": [{"eta": 1}]}, "evaluate.eta": {"grid": [1]}}}, r"also changed by"),
    "unknown option": ({"space": T, "schedular": "asha"}, r"sweep\.schedular: unknown key; did you mean 'scheduler'"),
    "unknown kind": ({"space": {"evaluate.lr": {"grd": [1]}}}, r"grd: unknown key; did you mean 'grid'"),
    "constant with eta": (
        {"space": {"evaluate.schedule": {"grid": ["cosine", "constant"]}, "evaluate.eta": {"grid": [1, 2]}}},
        r"eta 2 has no effect with schedule 'constant'",
    ),
    "too many": (
        {"space": {f"evaluate.{k}": {"grid": list(range(1, 60))} for k in ("temperature", "eta", "lr")}}, r"at most 10000",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_sweeps_are_refused_in_one_line(tmp_path, case):
    sweep, message = BAD[case]
    with pytest.raises(ConfigError, match=message) as caught:
        load_sweep(sweep_file(tmp_path, **sweep))
    assert "\n" not in str(caught.value)


def test_a_base_with_several_workers_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"evaluate\.workers: got 2, but a trial trains .* set evaluate\.workers=1"
    ) as caught:
        load_sweep(sweep_file(tmp_path, space=T), ["evaluate.workers=2"])
    assert "\n" not in str(caught.value)


def test_runs_and_sweeps_are_not_taken_for_each_other(tmp_path):
    with pytest.raises(ConfigError, match="run it with `cvdd sweep`"):
        load_config(sweep_file(tmp_path, space=T))
    with pytest.raises(ConfigError, match="sweep: is missing"):
        load_sweep("digits-demo")


def test_values_are_named_in_messages():
    assert named({"evaluate.lr": 0.001, "voting": {"size": 3}}) == "evaluate.lr=0.001, voting=size=3"


SEVERAL = {"settings": {"grid": [{"voting.size": 1, "synthesize.lr": 0.2}, {"voting.size": 2}]}}


def test_settings_of_several_sections_change_together(tmp_path):
    path = tmp_path / "sweep.yaml"
    space = {**SEVERAL, "relabel.batchnorm": {"grid": ["batch", "eval"]}}
    path.write_text(yaml.safe_dump({"base": "digits-demo", "sweep": {"space": space}}, sort_keys=False))
    config = load_sweep(str(path))
    assert config.num_trials() == 4
    assert set(config.sweep.changed()) == {"voting.size", "synthesize.lr", "relabel.batchnorm"}
    found = [config.trial_config(values) for values in samples(config.sweep.space, 10)]
    assert sorted((c.voting.size, c.synthesize.lr) for c in found) == [(1, 0.2)] * 2 + [(2, 0.1)] * 2
    at = {"settings": "voting.size=1 synthesize.lr=0.2", "relabel.batchnorm": "eval"}
    assert settings_of(config.sweep.space, at) == {"voting.size": 1, "synthesize.lr": 0.2, "relabel.batchnorm": "eval"}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"settings": {"grid": [1, 2]}}, "lists mappings of dotted settings"),
        ({**SEVERAL, "voting.size": {"grid": [1, 2]}}, "also changed by space.settings"),
        ({"settings": {"grid": [{"data.holdout": 0.5}]}}, "changes the hold-out"),
        ({"settings": {"grid": [{"evaluate.seeds": 2}]}}, "set sweep.seeds"),
        ({"settings": {"grid": [{"voting.sise": 2}]}}, "did you mean 'size'"),
    ],
)
def test_impossible_settings_of_several_sections_are_refused(tmp_path, space, message):
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": "digits-demo", "sweep": {"space": space}}))
    with pytest.raises(ConfigError, match=message):
        load_sweep(str(path))
