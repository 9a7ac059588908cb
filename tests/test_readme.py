"""What the README tells a newcomer to type works; what it names is there."""

import re
import shlex
from pathlib import Path

import datasets
import pytest
import typer

import cvdd_ray
from cvdd_ray import cli
from cvdd_ray.data.labels import epoch_bytes
from cvdd_ray.labelconfig import RelabelConfig
from cvdd_ray.recipes import load_config
from cvdd_ray.stages.planreport import size
from cvdd_ray.stages.relabel import label_encoding
from cvdd_ray.stages.speeds import GPUS
from cvdd_ray.sweepconfig import load_sweep

REPOSITORY = Path(__file__).parent.parent
README = (REPOSITORY / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return [text for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", README, re.S | re.M) if kind == language]


def in_braces(word: str) -> list[str]:
    """The words that a shell makes of one with {a,b}."""
    found = re.match(r"(.*?)\{([^{}:]*,[^{}:]*)\}(.*)", word)
    if not found:
        return [word]
    before, inside, after = found.groups()
    return [one for part in inside.split(",") for one in in_braces(before + part + after)]


def commands(program: str) -> list[list[str]]:
    """Every command of the README's console blocks that starts with `program`, as words."""
    lines = [line for block in blocks("console") for line in block.replace("\\\n", "").splitlines()]
    words = [[one for word in shlex.split(line, comments=True) for one in in_braces(word)] for line in lines]
    return [word for word in words if word and Path(word[0]).name == program]


def test_the_first_thing_is_the_two_commands():
    first = blocks("console")[0].splitlines()
    assert [line.split("#")[0].strip() for line in first] == ["make demo", "make test"]
    targets = re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M)
    assert {words[1] for words in commands("make")} <= set(targets)


@pytest.mark.parametrize("words", commands("cvdd"), ids=" ".join)
def test_every_cvdd_command_is_accepted(words):
    """Its verb and options exist, its recipe loads with its changes (the run itself is `make demo` and other tests)."""
    group = typer.main.get_command(cli.app)
    verb = group.commands[words[1]]
    given = verb.make_context(words[1], list(words[2:])).params
    for recipe in given.get("recipes") or filter(None, [given.get("recipe")]):
        load_config(recipe, given["set_"] or [])
    if given.get("file"):
        load_sweep(given["file"], given["set_"] or [], base=given["base"])


def test_every_verb_of_the_table_exists_and_none_is_missing():
    rows = re.findall(r"^\| `cvdd (.*?)\|", README, re.M)
    named = set(
        re.findall(
            r"\b(run|pretrain|prior|initialize|synthesize|relabel|evaluate|sweep|plan|bench|show|compare|analyze|share|export|recipes|schema)\b",
            " ".join(rows),
        )
    )
    assert named == set(typer.main.get_command(cli.app).commands)


def test_the_library_example_runs(make_config, tmp_path, monkeypatch, ray_runtime):
    """The Python blocks, word for word but for the size of the run and where it goes."""
    real = cvdd_ray.load_config

    def small(recipe, changes=()):
        real(recipe, changes)
        return make_config(ipc=[10], runtime={"engine": "local"}, evaluate={"seeds": 1, "baselines": []})

    monkeypatch.setattr(cvdd_ray, "load_config", small)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), names)
    assert len(names["dataset"]) == len(names["images"]) == 100
    assert names["views"].shape[1:] == (3, 16, 16)


def test_every_file_of_the_tree_exists_and_none_is_missing():
    tree = next(block for block in blocks("") if block.startswith("cvdd_ray/\n"))
    named = set(re.findall(r"\b([a-z0-9_]+\.py)\b", tree)) - {"run.py"}
    there = {path.name for path in (REPOSITORY / "cvdd_ray").rglob("*.py")} - {"__init__.py"}
    assert named == there


def test_the_table_of_sizes_is_what_plan_says():
    """GPUs, jobs for the one with most, balance, busy, hours of three stages and of all, and those of all at 9 %."""
    recipe, changes = "imagenet1k-ipc10", ["runtime.gpus_per_actor=1"]
    assert f"cvdd plan {recipe} --set {changes[0]} --gpu h100" in README
    rows = re.findall(r"^\| (\d+) \| (\d+) \|(.*)\|$", README.split("## How large a run is")[1], re.M)
    assert [int(gpus) for gpus, _, _ in rows] == [1, 8, 64]
    for gpus, most, cells in rows:
        machines = {"nodes": max(1, int(gpus) // 8), "gpus_per_node": min(8, int(gpus)), "gpu": "h100"}
        planned = cvdd_ray.plan(load_config(recipe, changes), **machines)
        slower = cvdd_ray.plan(load_config(recipe, changes), **machines, utilization=0.09)
        made, labels, students = (
            planned.stage(name) for name in ("synthesize/ipc10", "relabel/ipc10/distilled", "evaluate/ipc10")
        )
        assert int(most) == -(-made.counts["jobs"] // int(gpus))
        assert [cell.strip() for cell in cells.split("|")] == [
            f"{made.balance:.0%}", f"{made.busy:.0%}",
            *(f"{hours:.2g}" for hours in (made.wall_hours, labels.wall_hours, students.wall_hours, planned.wall_hours)),
            f"{slower.wall_hours:.2g}",
        ]  # fmt: skip


def test_the_table_of_label_sizes_is_what_files_take():
    """300 epochs of ImageNet-1K at IPC 10, in batches of 16."""
    rows = re.findall(r"^\|(.*?)\|.*\| ([\d.]+ [MG]B) \|$", README.split("### Smaller soft labels")[1], re.M)
    settings = [dict(re.findall(r"(\w+)=(\w+)", cell)) for cell, _ in rows]
    assert rows[-1][0].strip() == "all four"
    settings[-1] = {name: value for row in settings for name, value in row.items()}
    for about, (_, stated) in zip(settings, rows, strict=True):
        c = RelabelConfig(**about)
        taken = c.labelled_epochs * epoch_bytes(10_000, 625, 1000, label_encoding(c, 1000))
        assert size(taken) == stated, about


def test_the_table_of_busy_gpus_is_what_plan_simulates():
    changes = ([], ["synthesize.class_chunk=50"], ["ipc=[50]"])
    alone = ["runtime.gpus_per_actor=1"]
    plans = [
        cvdd_ray.plan(load_config("imagenet1k-ipc10", [*alone, *more]), gpu="h100", simulate=True) for more in changes
    ]
    rows = re.findall(r"^\| (\d+) \| ([\d.]+%) \| ([\d.]+%) \| ([\d.]+%) \| ([\d.]+%) \|$", README, re.M)
    expected = [
        (str(each[0].gpus), *(f"{one.busy['colocate']:.1%}" for one in each), f"{each[0].busy['spread']:.1%}")
        for each in zip(*(planned.simulated for planned in plans), strict=True)
    ]
    assert rows == expected[3:]


def test_the_utilization_of_the_published_code_is_what_plan_says():
    """8.2 s per image of 4,000 iterations on a card with 82.6 TFLOP/s."""
    made = cvdd_ray.plan(load_config("imagenet1k-ipc10")).stage("synthesize/ipc10")
    per_view = made.flops / made.counts["image_views"]
    sustained = per_view * 4000 / 8.2
    assert f"4,000 x {per_view / 1e9:.1f} GFLOP" in README
    assert f"{sustained / 1e12:.1f} TFLOP/s, {sustained / GPUS['rtx4090'].flops_per_s:.1%}" in README


def test_recipes_named_in_the_text_exist():
    for name in re.findall(r"cvdd run ([a-z0-9+-]+)(?![a-z0-9+{-])", README):
        load_config(name)


def test_the_commands_for_the_papers_tables_are_accepted():
    """Those in the text and its table; the second above stands for table 1."""
    section = README.split("### The paper's tables")[1].split("###")[0]
    lines = re.findall(r"`cvdd (run .*?)`", section)
    assert len(lines) == 7
    for line in lines:
        words = [one for word in shlex.split(line) for one in in_braces(word)]
        given = typer.main.get_command(cli.app).commands["run"].make_context("run", words[1:]).params
        for recipe in given["recipes"]:
            load_config(recipe, given["set_"] or [])


def test_words_in_braces_are_those_of_a_shell():
    import subprocess

    for word in ("a{1,10}-r{18,50}{,-b}", "plain", "--set=x={a: 1}"):
        asked = ["bash", "-c", f"printf '%s\\n' {word if ':' not in word else shlex.quote(word)}"]
        assert in_braces(word) == subprocess.run(asked, capture_output=True, text=True, check=True).stdout.splitlines()


def test_the_sweep_example_loads(tmp_path):
    for block in blocks("yaml"):
        (tmp_path / "sweep.yaml").write_text(block)
        assert load_sweep(str(tmp_path / "sweep.yaml")).num_trials() == 50


def test_the_sweep_files_of_the_table_exist_and_none_is_missing():
    table = README.split("| file | what it answers |")[1].split("\n\n")[0]
    named = set(re.findall(r"`([a-z_]+)`", table))
    assert named == {path.stem for path in (REPOSITORY / "tune_configs").glob("*.yaml")}


def test_the_table_of_metrics_is_the_one_that_is_recorded():
    from ray.util.metrics import Counter

    from cvdd_ray.runner.metrics import METRICS

    rows = re.findall(r"^\| (`ray_cvdd.*?) \| ?(.*?) ?\|", README, re.M)
    named = {name: tags for names, tags in rows for name in re.findall(r"`(\w+)`", names)}
    assert named == {
        f"ray_{name}{'_total' if row.kind is Counter else ''}": ", ".join(row.tags) for name, row in METRICS.items()
    }
