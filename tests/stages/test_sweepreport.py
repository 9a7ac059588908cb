"""A sweep's summary and report from made-up results: who wins, what is counted, what is written."""

import io
import json

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from cvdd_ray.data.artifacts import Artifacts, StagePlan
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError
from cvdd_ray.recipes import dump_config, validate
from cvdd_ray.stages.sweepreport import best_yaml, rich_sweep, savings_table, trials_table, write_sweep_report
from cvdd_ray.stages.sweepsummary import Trial, default_point, read_sweep, results_table, winner_of
from cvdd_ray.sweepconfig import SweepConfig


@pytest.fixture
def config(make_config):
    space = {"evaluate.temperature": {"grid": [4, 20]}, "voting": {"grid": [{"weighting": "equal"}, {"size": 1}]}}
    return validate({**make_config().model_dump(), "sweep": {"space": space, "seeds": 2}}, SweepConfig)


def row(trial, state, epoch, accuracy, temperature=4, voting="size=1"):
    return {
        "trial": trial, "state": state, "epoch": epoch, "epochs": 10, "holdout_accuracy": accuracy, "holdout_std": 1.0,
        "train_loss": 0.5, "train_agreement": 90.0, "lr": 0.001, "seconds": 2.5, "history": '[[0, {"lr": 0.001}]]', "error": None,
        "holdout_accuracies": [accuracy - 1, accuracy + 1], "point": {"evaluate.temperature": temperature, "voting": voting},
    }  # fmt: skip


def failed(trial):
    nothing = dict.fromkeys(
        ("holdout_accuracy", "holdout_std", "train_loss", "train_agreement", "lr", "seconds", "history")
    )
    return {
        **row(trial, "failed", 0, 0.0),
        **nothing,
        "holdout_accuracies": [],
        "epochs": 0,
        "error": "the loss is not finite",
    }


ROWS = [
    row("a", "finished", 5, 50.0), row("a", "finished", 10, 60.0),
    row("b", "stopped", 5, 99.0, 20), failed("c"), row("d", "finished", 10, 61.5, 20, "weighting=equal"),
]  # fmt: skip


@pytest.fixture
def store(tmp_path, config):
    store = Store(str(tmp_path))
    store.write("sweep.yaml", dump_config(config).encode())
    store.write("results.parquet", results_table(config, ROWS))
    return store


def test_the_winner_has_the_best_last_epoch_and_was_not_stopped(store):
    summary = read_sweep(store)
    assert summary.winner.name == "d"
    assert summary.winner.point == {"evaluate.temperature": 20.0, "voting": "weighting=equal"}
    assert [trial.name for trial in summary.trials] == ["d", "a", "b", "c"]
    a = summary.trials[1]
    assert a.curve == ((5, 50.0, 1.0), (10, 60.0, 1.0))
    assert a.history == ((0, {"lr": 0.001}),)
    assert summary.trials[3].accuracy is None


def test_of_equals_the_first_wins_and_none_without_a_finished_trial():
    def trial(name, state, accuracy):
        return Trial(name, {}, state, 1, ((1, accuracy, 0.0),))

    assert winner_of([trial("a", "finished", 50.0), trial("b", "finished", 50.0)]).name == "a"
    assert winner_of([trial("a", "stopped", 50.0)]) is None
    assert winner_of([]) is None


def test_results_are_one_row_per_trial_and_epoch_with_a_column_per_setting(store):
    table = pq.read_table(store.path("results.parquet"))
    assert table.num_rows == len(ROWS)
    assert table["evaluate.temperature"].to_pylist() == [4.0, 4.0, 20.0, 4.0, 20.0]
    assert table["voting"].to_pylist()[-1] == "weighting=equal"
    assert table["holdout_accuracies"].to_pylist()[0] == [49.0, 51.0]


def test_the_default_lies_where_the_unchanged_run_does(config):
    assert default_point(config) == {"evaluate.temperature": 20.0, "voting": "(as is)"}


def test_saved_stage_runs_are_counted_from_what_trials_noted(store):
    artifacts = Artifacts(store, variants=True)

    def made(stage, ipc, wall_s):
        plan = StagePlan(stage, {"ipc": ipc}, {}, ("x",), 0)
        return artifacts.folder(artifacts.commit(plan, {"f": b"1"}, wall_s=wall_s, facts={}).identity)

    experts = {f"pretrain/{name}": made(f"pretrain/{name}", 1, 100.0) for name in ("r18", "r50")}
    votes = [made("synthesize/ipc2", ipc, 30.0 + ipc) for ipc in (1, 2)]
    for trial, vote in (("a", votes[0]), ("b", votes[0]), ("d", votes[1]), ("of a lost session", votes[1])):
        about = {"values": {}, "stages": {**experts, "synthesize/ipc2": vote}, "config": {}}
        store.write(f"trials/{trial}.json", json.dumps(about).encode())
    summary = read_sweep(store)
    assert savings_table(summary) == [("pretrain", "6", "2", "4", "400"), ("synthesize", "3", "2", "1", "31")]


def test_the_report_has_tables_and_pictures(store):
    files = write_sweep_report(store)
    assert set(files) == {
        "table.md", "values.png", "parallel_coordinates.png", "learning_curves.png", "results.parquet",
    }  # fmt: skip
    text = store.read("report/table.md").decode()
    assert "| 20 | weighting=equal | 10/10 | 61.5 ± 1.0 | finished |" in text
    assert "4 (2 finished, 1 stopped early, 1 failed), 2 students each" in text
    assert "Not tested." in text
    assert "- first failure: evaluate.temperature=4, voting=size=1: the loss is not finite" in text
    assert store.read("report/values.png").startswith(b"\x89PNG")


def test_the_final_test_is_shown(store):
    final = [
        {"name": name, "point": {"evaluate.temperature": t, "voting": "(as is)"}, "last_mean": mean, "last_std": 0.5,
         "best_mean": mean + 1, "best_std": None, "seeds": 3}
        for name, t, mean in (("winner", 20, 62.0), ("default", 20, 58.0))
    ]  # fmt: skip
    store.write("final.json", json.dumps(final).encode())
    write_sweep_report(store)
    text = store.read("report/table.md").decode()
    assert "| winner | 20 | (as is) | 62.0 ± 0.5 | 63.0 | 3 |" in text
    console = Console(width=100, record=True, file=io.StringIO())
    for part in rich_sweep(read_sweep(store)):
        console.print(part)
    shown = console.export_text()
    assert "winner   20" in shown
    assert "the test set is touched once" in shown
    assert trials_table(read_sweep(store))[0] == ("20", "weighting=equal", "10/10", "61.5 ± 1.0", "finished")


def test_the_winner_as_a_recipe_is_the_whole_configuration(store, config):
    from cvdd_ray.recipes import parse_config

    summary = read_sweep(store)
    best = config.trial_config({"evaluate.temperature": 20, "voting.weighting": "equal"})
    text = best_yaml(summary, best)
    assert parse_config(text, "best.yaml") == best
    assert "evaluate.temperature=20, voting=weighting=equal" in text.splitlines()[0]


@pytest.mark.parametrize("content", [b"", b"no parquet", None])
def test_missing_or_damaged_results_say_what_to_do(store, content):
    store.delete("results.parquet")
    if content is not None:
        store.write("results.parquet", content)
    with pytest.raises(ArtifactError, match="run the same `cvdd sweep` again"):
        read_sweep(store)
