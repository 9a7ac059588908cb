"""Sweeps on Ray: every file that ships, shrunken; your own Tuner; kills, failures, and what trials share."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import boto3
import pyarrow.parquet as pq
import pytest
import yaml
from moto.server import ThreadedMotoServer
from ray import tune

import cvdd_ray
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError, NumericsError
from cvdd_ray.recipes import dump_config, load_config
from cvdd_ray.runner.cluster import Share
from cvdd_ray.runner.trainable import placement
from cvdd_ray.stages.analyze import analyze
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pipeline import run_all
from cvdd_ray.stages.sweepsummary import read_sweep, trial_files
from cvdd_ray.sweepconfig import SweepConfig, load_sweep

TUNE_CONFIGS = sorted((Path(__file__).parent.parent.parent / "tune_configs").glob("*.yaml"))
EXPERTS = ["resnet18", "resnet50", "shufflenet_v2", "mobilenet_v2", "densenet121"]
EPOCHS = 3
PAPER_TABLES = {
    **{name: name for name in ("architectures", "experts", "voters", "bssl", "committee", "cross")},
    "students": "architectures",
    "augmentation": "images",
}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """(YAML file of a tiny run with five experts, directory of the finished run)."""
    from conftest import tiny_config

    folder = tmp_path_factory.mktemp("base")
    config = tiny_config(
        committee={"experts": EXPERTS},
        synthesize={"iterations": 2, "jobs_per_group": 2},
        prior={"iterations": 1},
        relabel={"epochs": EPOCHS, "batch_size": 16},
        evaluate={"baselines": [], "seeds": 1},
        runtime={"engine": "local"},
    )
    run_all(Run(config, str(folder / "run")))
    on_ray = config.model_copy(update={"runtime": tiny_config().runtime})
    (folder / "tiny.yaml").write_text(dump_config(on_ray))
    return str(folder / "tiny.yaml"), str(folder / "run")


def tiny_sweep(tmp_path, tiny, overrides=(), **sweep) -> SweepConfig:
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump({"base": tiny[0], "sweep": {"final_seeds": 1, "checkpoint_every": 1, **sweep}}))
    return load_sweep(str(path), overrides)


def shrunken(path: Path, tiny, folder: Path) -> SweepConfig:
    """Return a sweep file with two values per grid, two or three trials and a few epochs, over the tiny run."""
    raw = yaml.safe_load(path.read_text())
    s = raw["sweep"]
    for key, domain in s["space"].items():
        if "grid" in domain:
            domain["grid"] = [domain["grid"][0], domain["grid"][-1]]
        if key == "evaluate.epochs":
            domain["grid"] = [2, EPOCHS]
        if key == "evaluate.warmup_epochs":
            domain["grid"] = [0, 1]
    smaller = {"seeds": 1, "report_every": 1, "checkpoint_every": 1, "final_seeds": 1, "num_trials": 3, "grace_epochs": 1,
               "perturb_epochs": 1}  # fmt: skip
    s |= {name: value for name, value in smaller.items() if name in s or name == "final_seeds"}
    small = folder / path.name
    small.write_text(yaml.safe_dump(raw))
    return load_sweep(str(small), ["ipc=[2]"], base=tiny[0])


@pytest.mark.parametrize("path", TUNE_CONFIGS, ids=lambda path: path.stem)
def test_every_file_runs_shrunken(path, tiny, tmp_path, ray_runtime):
    config = shrunken(path, tiny, tmp_path)
    out = tmp_path / "out"
    results = cvdd_ray.sweep(config, str(out), reuse=[tiny[1]])
    assert isinstance(results, tune.ResultGrid)
    assert not results.errors
    summary = read_sweep(Store(str(out)))
    assert len(summary.trials) == config.num_trials() == len(results)
    assert summary.winner
    table = pq.read_table(out / "results.parquet")
    assert set(config.sweep.space) <= set(table.column_names)
    rows = list(zip(table["trial"].to_pylist(), table["epoch"].to_pylist(), strict=True))
    assert len(rows) == len(set(rows)) >= config.num_trials()
    assert [test.name for test in summary.final] == ["winner", "default"]
    best = load_config(str(out / "best.yaml"))
    assert best.evaluate.first_seed == config.sweep.seeds  # students the search has not seen
    for name in ("values", "parallel_coordinates", "learning_curves"):
        assert (out / "report" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert list((out / "tune").rglob("events.out.tfevents.*"))  # TensorBoard
    made = {use.stage: use.made for use in summary.stages}
    swept = {key.split(".")[0] for key in config.sweep.changed()}
    distinct = config.num_trials()
    assert made["pretrain"] == len(EXPERTS)
    kinds = 2 if path.stem == "cross" else distinct  # of images
    assert made["synthesize"] == (kinds if swept & {"voting", "committee", "synthesize"} else 1)
    if not swept & {"voting", "committee", "synthesize", "relabel"}:
        assert made["relabel"] == 1
    if path.stem == "bssl":
        assert made["relabel"] == distinct
    if what := PAPER_TABLES.get(path.stem):
        found = analyze([str(out)], what)
        mean = {trial.accuracy for trial in summary.trials}
        assert {number["mean"] for number in found.numbers or ()} in (mean, set())
        assert found.picture.startswith(b"\x89PNG")
        assert not any(
            row[-1] for row in found.rows if what not in ("images", "cross")
        )  # the digits are none of the paper's data
    changed = [epoch for epoch, _ in summary.winner.history[1:]]  # of population-based training; none otherwise
    changes = [epoch for epoch in changed if epoch < best.student_epochs]  # a finished student may have been copied
    assert [phase.from_epoch for phase in best.evaluate.phases] == changes
    assert best.evaluate.lr == summary.winner.history[0][1]["lr"]


def test_the_trainable_in_your_own_tuner(tiny, tmp_path, ray_runtime):
    """Nothing is prepared: the first trials make the stages, once, and the others find them."""
    config = load_config(tiny[0])
    tuner = tune.Tuner(
        cvdd_ray.trainable(config, str(tmp_path / "stages"), seeds=2, reuse=[tiny[1]]),
        param_space={"evaluate.temperature": tune.grid_search([4, 20]), "relabel": {"cutmix": False}},
        tune_config=tune.TuneConfig(metric="holdout_accuracy", mode="max"),
        run_config=tune.RunConfig(name="mine", storage_path=str(tmp_path / "tune"), verbose=0),
    )
    results = tuner.fit()
    assert not results.errors
    best = results.get_best_result()
    assert 0 <= best.metrics["holdout_accuracy"] <= 100
    assert best.metrics["epoch"] == EPOCHS
    files = trial_files(Store(str(tmp_path / "stages")))
    assert {about["config"]["evaluate"]["temperature"] for about in files.values()} == {4, 20}
    assert not any(about["config"]["relabel"]["cutmix"] for about in files.values())
    assert len({about["stages"]["relabel/ipc2/distilled"] for about in files.values()}) == 1
    frames = [result.metrics_dataframe for result in results]
    assert [list(frame["epoch"]) for frame in frames] == [[1, 2, 3], [1, 2, 3]]


def accuracies(out) -> dict:
    table = pq.read_table(Path(out) / "results.parquet").to_pylist()
    return {(row["evaluate.temperature"], row["epoch"]): row["holdout_accuracies"] for row in table}


def test_an_interrupted_and_killed_sweep_goes_on_and_finds_the_same(tiny, tmp_path, ray_runtime):
    """Ctrl-C in the first trial, SIGKILL in the second; the same command continues, and reports what an undisturbed sweep
    reports."""
    path = tmp_path / "sweep.yaml"
    sweep = {"space": {"evaluate.temperature": {"grid": [2, 4, 20, 40]}}, "seeds": 2, "final_seeds": 1,
             "checkpoint_every": 2, "max_concurrent": 1}  # fmt: skip
    path.write_text(yaml.safe_dump({"base": tiny[0], "relabel": {"epochs": 12}, "sweep": sweep}))
    out, calm = tmp_path / "out", tmp_path / "calm"
    command = [sys.executable, "-m", "cvdd_ray.cli", "sweep", str(path), "--out", str(out), "--reuse", tiny[1]]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}

    def end_after(reports: int, how: signal.Signals) -> tuple[int, str]:
        with (tmp_path / "log").open("w") as log:
            driver = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            deadline = time.monotonic() + 240
            while sum(p.read_text().count("\n") for p in out.glob("tune/*/result.json")) < reports:
                assert driver.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.1)
            os.killpg(driver.pid, how)
            code = driver.wait(timeout=120)
        return code, (tmp_path / "log").read_text()

    code, said = end_after(3, signal.SIGINT)
    assert code == 130, said
    assert "the same command continues where it stopped" in said
    assert not (out / "best.yaml").exists()
    assert end_after(17, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not (out / "results.parquet").exists()
    again = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert "winner" in again.stdout
    cvdd_ray.sweep(load_sweep(str(path)), str(calm), reuse=[tiny[1]])
    assert accuracies(out) == accuracies(calm)
    assert len(accuracies(out)) == 4 * 12


def test_a_trial_that_fails_does_not_take_the_others_along(tiny, tmp_path, ray_runtime):
    space = {"pretrain.lr": {"grid": [0.005, 1e30]}}
    config = tiny_sweep(tmp_path, tiny, space=space, max_failures=0)
    results = cvdd_ray.sweep(config, str(tmp_path / "out"), reuse=[tiny[1]])
    assert len(results.errors) == 1
    summary = read_sweep(Store(str(tmp_path / "out")))
    assert {trial.point["pretrain.lr"]: trial.state for trial in summary.trials} == {0.005: "finished", 1e30: "failed"}


def test_when_every_trial_fails_the_first_error_is_raised_as_itself(tiny, tmp_path, ray_runtime):
    config = tiny_sweep(tmp_path, tiny, space={"pretrain.lr": {"grid": [1e30, 2e30]}}, max_failures=0)
    with pytest.raises(NumericsError, match="pretraining diverged"):
        cvdd_ray.sweep(config, str(tmp_path / "out"))
    assert not (tmp_path / "out" / "results.parquet").exists()


def test_another_sweep_is_not_mixed_in(tiny, tmp_path, ray_runtime):
    space = {"evaluate.temperature": {"grid": [4, 20]}}
    out = str(tmp_path / "out")
    cvdd_ray.sweep(tiny_sweep(tmp_path, tiny, space=space, final_seeds=0), out, reuse=[tiny[1]])
    assert not (tmp_path / "out" / "final.json").exists()
    other = tiny_sweep(tmp_path, tiny, space=space, seeds=2, final_seeds=0)
    with pytest.raises(ArtifactError, match=r"sweep\.seeds = 1, now asked for 2"):
        cvdd_ray.sweep(other, out)
    cvdd_ray.sweep(other, out, overwrite=True)  # its stages are still there
    table = pq.read_table(io.BytesIO(Store(out).read("results.parquet")))
    assert {len(values) for values in table["holdout_accuracies"].to_pylist()} == {2}


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"evaluate.students": {"grid": [["resnet18"], ["vgg99"]]}}, r"evaluate\.students=vgg99: .*vgg99"),
        ({"relabel.teachers": {"grid": [["vgg99"]]}}, r"relabel\.teachers"),
        ({"voting.size": {"grid": [2, 9]}}, r"voting\.size=9: voting\.size: got 9"),
        ({"ipc": {"grid": [[500]]}}, r"ipc=500: ipc: 500 images"),
    ],
)
def test_values_that_cannot_work_are_refused_before_anything_starts(tiny, tmp_path, ray_runtime, space, message):
    with pytest.raises(ConfigError, match=message):
        cvdd_ray.sweep(tiny_sweep(tmp_path, tiny, space=space), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_missing_extra_is_named(tiny, tmp_path, ray_runtime, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    space = {"evaluate.lr": {"loguniform": [0.001, 0.01]}}
    config = tiny_sweep(tmp_path, tiny, space=space, search="optuna", num_trials=2)
    with pytest.raises(ConfigError, match=r"pip install 'cvdd_ray\[optuna\]'"):
        cvdd_ray.sweep(config, str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("point", "gpus", "engine", "bundles"),
    [
        ({"evaluate.lr": 1}, 0.0, "ray", [{"CPU": 1.0}]),
        ({"evaluate.lr": 1}, 0.25, "ray", [{"CPU": 1.0, "GPU": 0.25}]),
        ({"voting": "size=3"}, 0.0, "ray", [{}, {"CPU": 1.0}, {"CPU": 1.0}]),
        ({"voting.size": 3, "evaluate.lr": 1}, 0.25, "ray", [{"GPU": 0.25}, *[{"CPU": 1.0, "GPU": 0.75}] * 2]),
        ({"voting.size": 3}, 0.25, "local", [{"CPU": 1.0, "GPU": 0.25}]),
    ],
)  # fmt: skip
def test_what_a_trial_asks_for(tiny, monkeypatch, point, gpus, engine, bundles):
    monkeypatch.setattr("cvdd_ray.runner.trainable.task_share", lambda c: Share(1.0, gpus))
    config = load_config(tiny[0], [f"runtime.engine={engine}"])
    asked = placement(config, point, None, 2)
    assert asked.bundles == [bundle for bundle in bundles if bundle]
    assert asked.head_bundle_is_empty == (bundles[0] == {})


def test_results_also_go_to_wandb_and_mlflow(tiny, tmp_path, ray_runtime, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")  # a server or a database is the rule; neither is here
    space = {"evaluate.temperature": {"grid": [4, 20]}}
    config = tiny_sweep(tmp_path, tiny, space=space, final_seeds=0, loggers=["wandb", "mlflow"])
    cvdd_ray.sweep(config, str(tmp_path / "out"), reuse=[tiny[1]])
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 2
    assert len(list((tmp_path / "mlruns").glob("*/*/metrics/holdout_accuracy"))) == 2


def test_a_sweep_in_an_object_store(tiny, tmp_path, ray_runtime, monkeypatch):
    """Stages, trials, results and Tune's own files in a bucket; a second call finds all of it."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush")
        boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-east-1").create_bucket(Bucket="bucket")
        out = f"s3://bucket/some/sweep?endpoint_override={host}%3A{port}&scheme=http&region=us-east-1"
        space = {"evaluate.temperature": {"grid": [4, 20]}}
        config = tiny_sweep(tmp_path, tiny, ["runtime.engine=local"], space=space)
        results = cvdd_ray.sweep(config, out, reuse=[tiny[1]])
        again = cvdd_ray.sweep(config, out)
        accuracies = [[r.metrics["holdout_accuracy"] for r in grid] for grid in (results, again)]
        assert accuracies[0] == accuracies[1]
        store = Store(out)
        assert all(store.exists(name) for name in ("results.parquet", "best.yaml", "final.json", "report/values.png"))
        names = [name for folder in ("stages", "trials", "tune") for name in store.names(folder)]
        assert "tune/tuner.pkl" in names
        assert not [name for name in names if b"hush" in store.read(name)]
        with pytest.raises(ConfigError, match="standard chain") as caught:
            cvdd_ray.sweep(config, out.replace("s3://", "s3://me:hush@"))
        assert "hush" not in str(caught.value)
    finally:
        server.stop()


@pytest.mark.parametrize(("bundles", "places"), [([{}, {"CPU": 0.5}, {"CPU": 0.5}], 2), ([{"CPU": 1}], 0)])
def test_a_trial_sees_the_places_it_asked_for(ray_runtime, tmp_path, bundles, places):
    def count(config):
        from cvdd_ray.runner.cluster import expert_share, worker_bundles

        found = worker_bundles()
        share = expert_share(load_config("digits-demo").runtime, 5).num_cpus if found else 0.0
        tune.report({"places": len(found), "share": share})

    resources = tune.PlacementGroupFactory(bundles)
    run_config = tune.RunConfig(name="count", storage_path=str(tmp_path), verbose=0)
    (result,) = tune.Tuner(tune.with_resources(count, resources), run_config=run_config).fit()
    assert result.metrics["places"] == places
    assert result.metrics["share"] == (0.166 if places else 0.0)  # three experts on half a core


def test_more_than_the_machine_has_is_refused(tiny, tmp_path, ray_runtime):
    config = tiny_sweep(tmp_path, tiny, space={"voting.temperature": {"grid": [1, 5]}}, workers_per_trial=9)
    with pytest.raises(ConfigError, match=r"a trial asks for 9 CPU, this machine has 2"):
        cvdd_ray.sweep(config, str(tmp_path / "out"))
    config = tiny_sweep(tmp_path, tiny, space={"evaluate.eta": {"grid": [1, 2]}}, gpus_per_trial=0.5)
    with pytest.raises(ConfigError, match=r"0\.5 GPU, this machine has 0"):
        cvdd_ray.sweep(config, str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
