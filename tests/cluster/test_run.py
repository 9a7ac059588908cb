"""cluster/run.py, the driver: its words, one-line errors, and a run on two nodes that continues when submitted again."""

import runpy
import shutil
import subprocess
import sys

import pytest
import ray
import typer
from clusters import REPOSITORY, RayCluster

from cvdd_ray import cli
from cvdd_ray.recipes import dump_config, load_config

RUN = REPOSITORY / "cluster" / "run.py"


@pytest.fixture(scope="module")
def driver():
    return runpy.run_path(str(RUN))


def words_for_cvdd(driver, *words):
    return driver["command"](driver["parse"](list(words)))


def test_the_words_become_those_of_cvdd_run(driver):
    assert words_for_cvdd(driver, "--recipe", "r", "--out", "o", "--set", "a=1", "--set", "b=[1, 2]") == [
        "run", "r", "--out", "o", "--address", "auto", "--set", "a=1", "--set", "b=[1, 2]",
    ]  # fmt: skip


def test_all_options_reach_cvdd_run(driver):
    given = "--recipe digits-demo --out o --wait-for-nodes 3 --gpus 8 --wait-s 60 --reuse a --reuse b --overwrite --address x:1"
    words = words_for_cvdd(driver, *given.split())
    taken = typer.main.get_command(cli.app).commands["run"].make_context("run", words[1:]).params
    assert (taken["out"], taken["address"], taken["reuse"], taken["overwrite"]) == ("o", "x:1", ["a", "b"], True)
    (recipe,) = taken["recipes"]
    runtime = load_config(recipe, [*taken["set_"], f"runtime.address={taken['address']}"]).runtime
    assert (runtime.wait_for_nodes, runtime.wait_for_gpus, runtime.wait_s) == (3, 8, 60.0)


def test_a_sweep_file_makes_it_cvdd_sweep(driver):
    assert words_for_cvdd(driver, "--sweep", "f", "--out", "o") == ["sweep", "f", "--out", "o", "--address", "auto"]
    words = words_for_cvdd(driver, "--sweep", "f", "--recipe", "r", "--out", "o", "--overwrite")
    assert words == ["sweep", "f", "--base", "r", "--out", "o", "--address", "auto", "--overwrite"]
    typer.main.get_command(cli.app).commands["sweep"].make_context("sweep", words[1:])


BAD = [
    (["--recipe", "digits-demo"], "--out"),
    (["--out", "o"], "give --recipe NAME or --sweep FILE"),
    (["--recipe", "digits-demo", "--out", "o", "--gpu", "8"], "unrecognized arguments: --gpu 8"),
    (["--recipe", "nope", "--out", "o"], "neither packaged nor a file"),
    (["--sweep", "nope.yaml", "--out", "o"], "neither packaged nor a file"),
    (["--recipe", "digits-demo", "--out", "o", "--set", "ipc"], "give section.key=value"),
    (["--recipe", "digits-demo", "--out", "o", "--set", "ipc=[500]"], "ipc"),
    (["--recipe", "digits-demo", "--out", "o", "--wait-for-nodes", "two"], "runtime.wait_for_nodes: got 'two'"),
    (["--recipe", "digits-demo", "--out", "o", "--gpus", "0"], "runtime.wait_for_gpus: got 0"),
    (["--recipe", "digits-demo", "--out", "o", "--address", "127.0.0.1:1"], "no Ray cluster at '127.0.0.1:1'"),
    (["--recipe", "digits-demo", "--out", "s3://"], "s3://bucket/prefix"),
    (["--recipe", "digits-demo", "--out", "o", "--reuse", "/no/such/run"], "/no/such/run has no finished stage"),
]


@pytest.mark.parametrize(
    ("words", "message"), BAD, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_mistakes_are_one_line_and_nothing_is_written(driver, words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # other tests may have left one, which would be used
    with pytest.raises(SystemExit) as end:
        driver["main"](words)
    out, err = capsys.readouterr()
    assert end.value.code == 2, err
    assert message in err
    assert len(err.strip().splitlines()) == 1, err
    assert "results:" not in out
    assert list(tmp_path.iterdir()) == []


def test_it_explains_itself_when_copied_to_another_place_alone(tmp_path):
    """As `ray submit` does it: the file by itself, in a home directory, beside the installed package."""
    shutil.copy(RUN, tmp_path)
    env = {"PYTHONPATH": str(REPOSITORY), "HOME": str(tmp_path), "PATH": ""}
    done = subprocess.run(
        [sys.executable, "run.py", "--help"], cwd=tmp_path, env=env, capture_output=True, text=True, check=True
    )
    for option in (
        "--recipe",
        "--sweep",
        "--out",
        "--set",
        "--reuse",
        "--overwrite",
        "--wait-for-nodes",
        "--gpus",
        "--wait-s",
    ):
        assert option in done.stdout
    assert "ray submit cluster/cluster.yaml cluster/run.py -- --recipe" in done.stdout


def test_a_run_on_two_nodes_and_the_same_command_again(make_config, tmp_path):
    given = {"method": "given", "values": {"resnet18": 40, "shufflenet_v2": 41}}
    config = make_config(prior=given, evaluate={"seeds": 1, "baselines": []}, synthesize={"iterations": 2})
    (tmp_path / "tiny.yaml").write_text(dump_config(config))
    out = tmp_path / "run"
    words = ["--recipe", str(tmp_path / "tiny.yaml"), "--out", str(out), "--wait-for-nodes", "2"]
    with RayCluster() as cluster:
        stranger = cluster.driver(*words, RAY_AUTH_TOKEN="", HOME=str(tmp_path))
        assert not out.exists()
        cluster.add()
        first = cluster.driver(*words)
        manifest = out / "evaluate" / "ipc2" / "manifest.json"
        made = manifest.stat().st_mtime_ns
        again = cluster.driver(*words)
    assert stranger.returncode == 2
    assert "give its token if it has one (RAY_AUTH_MODE=token" in stranger.stderr.splitlines()[-1]
    assert first.returncode == 0, first.stderr
    assert "cluster: 2 nodes, 2 CPUs, 0 GPUs" in first.stderr
    assert "distilled, soft labels" in first.stdout
    assert first.stdout.splitlines()[-1] == f"results: {out}"
    assert again.returncode == 0, again.stderr
    assert "already there" in again.stderr
    assert manifest.stat().st_mtime_ns == made
    assert not list(out.glob("probe-*"))
