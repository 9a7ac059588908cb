"""The command line as a user meets it: verbs, one-line errors, exit codes, nothing written on bad input."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from cvdd_ray import cli
from cvdd_ray.recipes import dump_config

REPOSITORY = Path(__file__).parent.parent
VERBS = [
    "run", "pretrain", "prior", "initialize", "synthesize", "relabel", "evaluate", "sweep", "plan", "bench", "show", "compare",
    "analyze", "share", "export", "recipes", "schema",
]  # fmt: skip


@pytest.fixture
def tiny_yaml(make_config, tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(dump_config(make_config(runtime={"engine": "local"})))
    return str(path)


def test_help_names_every_verb(cvdd):
    code, out, _ = cvdd("--help")
    assert code == 0
    assert not [verb for verb in VERBS if verb not in out]


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(cvdd, verb):
    code, out, _ = cvdd(verb, "--help")
    assert code == 0
    assert "Usage" in out


def test_bench_compares_every_kind_of_work(cvdd, tiny_yaml):
    code, out, err = cvdd("bench", tiny_yaml, "--rounds", "1", "--iterations", "1", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert list(found["works"]) == ["synthesis", "relabel", "evaluate", "pretrain"]
    for work in found["works"].values():
        (theirs,), (ours,) = work["reference"]["unit_s"], work["ours"]["unit_s"]
        assert work["ratio"] == pytest.approx(theirs / ours)
    assert 0 < found["works"]["synthesis"]["shares_of_peak"][0] < 1
    code, out, _ = cvdd("bench", tiny_yaml, "relabel", "--rounds", "1")
    assert code == 0
    assert "GFLOP/s" in out
    assert "relabel  image and epoch" in out


def test_run_show_and_single_verbs(cvdd, tiny_yaml, tmp_path):
    out_dir = tmp_path / "run"
    code, out, err = cvdd("run", tiny_yaml, "--out", str(out_dir))
    assert code == 0, err
    assert "distilled, soft labels" in out
    assert "contact_sheet_ipc2.png" in out
    assert (out_dir / "report" / "contact_sheet_ipc2.png").stat().st_size > 5000
    assert (out_dir / "report" / "curves_ipc2.png").exists()
    code, _, err = cvdd("synthesize", "--out", str(out_dir))
    assert code == 0
    assert "already there" in err
    code, _, err = cvdd("evaluate", "--out", str(out_dir), "--set", "evaluate.lr=0.5")
    assert code == 2
    assert "evaluate.lr = 0.001, now asked for 0.5" in err
    code, _, err = cvdd("evaluate", "--out", str(out_dir), "--set", "evaluate.lr=0.5", "--overwrite")
    assert code == 0, err
    code, out, _ = cvdd("show", str(out_dir))
    assert code == 0
    assert "resnet18" in out
    code, out, err = cvdd("export", str(out_dir), "--to", "hub", "--dest", str(tmp_path / "hub"), "--license", "mit")
    assert (code, out) == (0, f"exported to {tmp_path / 'hub'}\n")
    assert "export soft labels of ipc 2: 2 epochs" in err
    assert (tmp_path / "hub" / "README.md").read_text().startswith("---\nlicense: mit\n")


def test_several_recipes_run_one_after_another_and_share_stages(cvdd, tiny_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.yaml").write_text(f"base: {tiny_yaml}\nevaluate: {{eta: 2}}\n")
    code, out, err = cvdd("run", tiny_yaml, "other.yaml", "--out", "table")
    assert code == 0, err
    assert out.count("distilled, soft labels") == 2
    made = [json.loads((tmp_path / "table" / name / "relabel/ipc2/distilled/manifest.json").read_text())
            for name in ("tiny", "other")]  # fmt: skip
    assert made[0]["wall_s"] == made[1]["wall_s"], "the second run takes the first one's labels over"
    assert (tmp_path / "table" / "other" / "evaluate" / "ipc2" / "results.json").exists()
    for words, message in (
        (("run", tiny_yaml, "nope"), "neither packaged nor a file"),
        (("run", "digits-demo", "digits-demo"), "recipes of one name go to one directory"),
    ):
        there = sorted(tmp_path.rglob("*"))
        code, _, err = cvdd(*words, "--out", "none")
        assert (code, message in err, err.count("\n")) == (2, True, 1)
        assert sorted(tmp_path.rglob("*")) == there


def test_plan_prints_tables_or_json(cvdd, tiny_yaml, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = sorted(tmp_path.iterdir())
    code, out, err = cvdd("plan", tiny_yaml, "--gpus-per-node", "2", "--gpu", "l4", "--utilization", "0.1")
    assert code == 0, err
    assert "10.0% of the 30.3 TFLOP/s" in out
    assert "synthesize/ipc2" in out
    code, out, err = cvdd("plan", tiny_yaml, "--json", "--set", "synthesize.iterations=12")
    assert code == 0, err
    planned = json.loads(out)
    made = next(stage for stage in planned["stages"] if stage["stage"] == "synthesize/ipc2")
    assert made["counts"]["iterations"] == 24
    assert (planned["speed"], planned["totals"]["wall_hours"]) == (None, None)
    assert sorted(tmp_path.iterdir()) == there


def test_recipes_and_schema(cvdd):
    code, out, _ = cvdd("recipes")
    assert code == 0
    assert "digits-demo" in out
    assert "DATASET-ipcN-STUDENT" in out
    assert len(out.splitlines()) < 60
    code, out, _ = cvdd("recipes", "cifar10-cpu")
    assert code == 0
    assert "max_per_class: 2000" in out
    assert cvdd("recipes", "show", "cifar10-cpu") == (0, out, "")
    code, out, _ = cvdd("recipes", "show", "cifar100-ipc10-r50")
    assert (code, "- resnet50\n  width: null" in out) == (0, True)
    code, _, err = cvdd("recipes", "show")
    assert (code, err.count("\n")) == (2, 1)
    code, out, _ = cvdd("schema")
    assert code == 0
    assert json.loads(out)["properties"]["synthesize"]
    code, out, _ = cvdd("schema", "--sweep")
    assert code == 0
    assert json.loads(out)["properties"]["sweep"]


BAD = [
    (["run", "nope"], "neither packaged nor a file"),
    (["run", "cifar10-ipc1-r19"], "student 'r19' is not one of r18, r50, r101"),
    (["recipes", "show", "a", "b"], "give one recipe"),
    (["run", "digits-demo", "--set", "synthesize.iterations=x"], "synthesize.iterations: got 'x'"),
    (["run", "digits-demo", "--set", "nothing"], "give section.key=value"),
    (["run", "digits-demo", "--set", "data.classes=[b, a]"], "data.classes"),
    (["run", "digits-demo", "--set", "committee.experts=[resnet18]", "--set", "runtime.engine=local"], "voting.size"),
    (["run", "cifar10-cpu", "--set", "data.path=/no/such/folder"], "/no/such/folder"),
    (["run", "cifar10", "--set", "data.download=false", "--set", "data.path=/no/such"], "/no/such"),
    (["run", "folder224", "--set", "data.path=/no/such/images"], "/no/such/images"),
    (["run", "digits-demo", "--set", "ipc=[500]"], "ipc"),
    (["run", "digits-demo", "--set", "committee.weights={resnet18: /no/weights.pth}"], "/no/weights.pth"),
    (["run", "digits-demo", "--set", "initialize.observer=vgg"], "initialize.observer"),
    (["run", "digits-demo", "--set", "prior.method=given"], "prior.values"),
    (["run", "tune_configs/temperature.yaml"], "run it with `cvdd sweep`"),
    (["sweep", "digits-demo"], "sweep: is missing"),
    (["sweep", "nope.yaml"], "neither packaged nor a file"),
    (["sweep", "tune_configs/demo.yaml", "--set", "sweep.schedular=asha"], "did you mean 'scheduler'"),
    (["sweep", "tune_configs/demo.yaml", "--base", "nope"], "neither packaged nor a file"),
    (["sweep", "tune_configs/temperature.yaml", "--base", "cifar10-cpu", "--set", "data.path=/no/such"], "/no/such"),
    (["sweep", "tune_configs/demo.yaml", "--reuse"], "--reuse"),
    (["sweep", "tune_configs/demo.yaml", "--reuse=/no/such/run"], "/no/such/run has no finished stage"),
    (["run", "digits-demo", "--reuse=/no/such/run"], "/no/such/run has no finished stage"),
    (["plan", "nope"], "neither packaged nor a file"),
    (["plan", "cifar10", "--gpu", "h1000"], "known are t4, v100"),
    (["plan", "folder224"], "give --classes"),
    (["plan", "folder224", "--classes", "20"], "give --train-images"),
    (["bench", "digits-demo", "wire2"], "bench knows no 'wire2'; it knows synthesis, relabel"),
    (["bench", "digits-demo", "--rounds", "0"], "--rounds 0: give at least 1"),
    (["bench", "digits-demo", "relabel", "--iterations", "3"], "--iterations 3 has no effect without synthesis"),
    (["bench", "digits-demo", "pretrain", "--ipc", "3"], "--ipc 3 has no effect on pretrain"),
    (["bench", "folder224"], "give --classes"),
    (["plan", "digits-demo", "--nodes", "0"], "--nodes 0: give at least 1"),
    (["plan", "digits-demo", "--nodes", "many"], "--nodes"),
    (["plan", "digits-demo", "--utilization", "0.5"], "share of the peak of --gpu"),
    (["plan", "digits-demo", "--calibrate", "--flops-per-s", "1e12"], "give one of them"),
    (["plan", "digits-demo", "--classes", "7"], "digits has 10"),
    (["synthesize"], "give a recipe"),
    (["run"], "RECIPE_OR_YAML"),
    (["fly"], "fly"),
    (["run", "digits-demo", "--speed", "9"], "--speed"),
    (["show", "/no/such/run"], "/no/such/run"),
    (["analyze", "/no/such/run", "--what", "colours"], "of sweeps: experts, voters"),
    (["analyze", "/no/such/run", "--what", "curves"], "/no/such/run holds no run"),
    (["analyze", "/no/such/run"], "--what"),
    (["compare", "/no/such/run"], "give two or more different runs"),
    (["compare", "/no/such/run", "/no/such/run"], "give two or more different runs"),
    (["compare", "/no/such/run", "/no/such/other"], "/no/such/run holds no run"),
    (["compare", "a", "b", "--row", "real_hard"], "choose one of distilled, eval_labels"),
    (["compare", "a", "b", "--csv", "--json"], "give one of them"),
    (["share", "/no/such/run"], "not in an S3 bucket"),
    (["export", "/no/such/run", "--to", "hub"], "--dest"),
    (["export", "/no/such/run", "--dest", "out"], "--to"),
    (["export", "/no/such/run", "--to", "zip", "--dest", "out"], "--to zip: unknown layout; choose one of hub"),
    (["export", "/no/such/run", "--to", "hub", "--dest", "out"], "/no/such/run holds no run"),
    (["recipes", "nope"], "neither packaged"),
]


@pytest.mark.parametrize(
    ("words", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bad_input_is_one_clear_line_and_nothing_is_written(cvdd, words, message, tmp_path, monkeypatch):
    out_dir = tmp_path / "out"
    monkeypatch.chdir(REPOSITORY)
    if words[0] in ("run", "sweep") and len(words) > 1 and "--reuse" not in words and "--speed" not in words:
        words = [*words, "--out", str(out_dir), "--set", "runtime.engine=local"]
    code, _, err = cvdd(*words)
    assert code == 2, err
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert "Traceback" not in err
    assert not out_dir.exists()


def test_ctrl_c_ends_with_130(cvdd, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_with_run", interrupted)
    code, _, err = cvdd("run", "digits-demo")
    assert code == 130
    assert "the same command continues" in err


def test_the_installed_command_runs():
    done = subprocess.run([sys.executable, "-m", "cvdd_ray.cli", "recipes"], capture_output=True, text=True, check=True)
    assert "digits-demo" in done.stdout
