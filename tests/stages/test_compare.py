"""Runs side by side: what is ranked, what is not and why, as text and as numbers."""

import csv
import io
import json
import shutil
import statistics

import pytest

from cvdd_ray.errors import ArtifactError
from cvdd_ray.stages.compare import HEADER, _belongs, compare, differing, short_names
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pipeline import STAGES, run_all
from cvdd_ray.stages.synthesize import synthesize


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two methods under one protocol: a committee, and one expert that also labels alone, from whole real images."""
    from conftest import tiny_config

    folder = tmp_path_factory.mktemp("runs")
    measured = {"seeds": 2, "baselines": ("random_hard",)}
    one = tiny_config(evaluate=measured, prior={"method": "given", "values": {"resnet18": 50, "shufflenet_v2": 45}})
    single = {"size": 1, "selection": "fixed", "fixed": ("resnet18",)}
    other = tiny_config(
        evaluate=measured, voting=single, relabel={"teachers": ("resnet18",)}, initialize={"method": "real"}
    )
    for name, config in {"committee": one, "single": other}.items():
        run_all(Run(config, str(folder / name)))
    return folder


def test_one_protocol_is_ranked_by_the_last_epoch(runs, cvdd):
    found = compare([str(runs / "single"), str(runs / "committee")])
    assert found.notes == ()
    assert len(found.entries) == 2
    for entry in found.entries:
        results = json.loads((runs / entry.run / "evaluate/ipc2/results.json").read_text())
        last = [r["last"] for r in results["runs"] if r["arm"] == "distilled"]
        assert (entry.row.last_mean, entry.row.last_std) == pytest.approx(
            (statistics.fmean(last), statistics.stdev(last))
        )
        assert entry.label_bytes == (runs / entry.run / "relabel/ipc2/distilled/labels.arrow").stat().st_size
    first, second = found.entries
    assert first.row.last_mean >= second.row.last_mean
    assert (first.rank, second.rank) == (1, 2 if first.row.last_mean > second.row.last_mean else 1)
    by_run = {entry.run: entry for entry in found.entries}
    assert by_run["single"].made_flops < by_run["committee"].made_flops  # one voter, one teacher, no patches to score
    code, out, err = cvdd("compare", str(runs / "single"), str(runs / "committee"), "--row", "random_hard")
    assert (code, err) == (0, "")
    assert "not ranked" not in out
    assert "hard" in out


def test_what_differs_is_said_and_not_ranked(runs, tmp_path, cvdd):
    other = tmp_path / "longer"
    shutil.copytree(runs / "committee", other)
    config = Run(compare_config(other), str(other), overwrite=True)
    STAGES["evaluate"](config)
    folders = [str(runs / "committee"), str(other)]
    (note,) = compare(folders).notes
    assert note.startswith("not ranked, IPC 2, resnet18, labels fixed soft: the runs differ in evaluate.lr (")
    assert "longer: 0.002" in note
    assert "committee: 0.001" in note
    assert {entry.rank for entry in compare(folders).entries} == {None}
    assert "number of images" not in note
    code, out, _ = cvdd("compare", *folders, "--markdown")
    assert code == 0
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines() if line.startswith("|")]
    assert tuple(lines[0]) == HEADER
    assert [cells[0] for cells in lines[2:]] == ["", ""]
    assert note in out
    code, out, _ = cvdd("compare", *folders, "--csv")
    rows = list(csv.DictReader(line for line in io.StringIO(out) if not line.startswith("#")))
    assert [(row["rank"], row["student"], row["ipc"]) for row in rows] == [("", "resnet18", "2")] * 2
    assert out.splitlines()[-1] == f"# {note}"
    code, out, _ = cvdd("compare", *folders, "--json")
    plain = json.loads(out)
    assert plain["notes"] == [note]
    assert {entry["protocol"]["evaluate.lr"] for entry in plain["entries"]} == {0.001, 0.002}


def compare_config(folder):
    from cvdd_ray.recipes import parse_config

    return parse_config((folder / "config.yaml").read_text(), "config", ["evaluate.lr=0.002"])


def test_other_students_or_sizes_are_ranked_with_none(runs, tmp_path):
    from cvdd_ray.recipes import parse_config

    other = tmp_path / "convnet"
    shutil.copytree(runs / "committee", other)
    c = parse_config((other / "config.yaml").read_text(), "config", ["evaluate.students=[convnet3]"])
    STAGES["evaluate"](Run(c, str(other), overwrite=True))
    found = compare([str(runs / "single"), str(other)])
    assert {entry.rank for entry in found.entries} == {None}
    assert len(found.notes) == 2
    assert "convnet alone has it" in found.notes[0]
    assert "resnet18 at IPC 2, fixed soft" in found.notes[0]


def test_hard_labels_of_a_method_are_its_own_row_and_ranked_apart(runs, tmp_path):
    from cvdd_ray.recipes import dump_config, parse_config

    hard = []
    for name in ("first", "second"):
        folder = tmp_path / name
        shutil.copytree(runs / "committee", folder)
        settings = ["evaluate.labels=hard", "evaluate.baselines=[]"]
        c = parse_config((folder / "config.yaml").read_text(), "config", settings)
        STAGES["evaluate"](Run(c, str(folder), overwrite=True))
        (folder / "config.yaml").write_text(dump_config(c))
        hard.append(str(folder))
    found = compare([str(runs / "committee"), hard[0], str(runs / "single"), hard[1]])
    assert [e.row.arm for e in found.entries] == ["distilled"] * 2 + ["distilled_hard"] * 2
    assert [e.row.regime for e in found.entries] == ["soft"] * 2 + ["hard"] * 2
    assert found.entries[0].rank == 1
    assert [e.rank for e in found.entries[2:]] == [1, 1]
    assert found.notes == ()
    (alone,) = compare([str(runs / "committee"), hard[0], str(runs / "single")]).notes
    assert alone == (
        "not ranked, IPC 2, resnet18, labels hard: first alone has it; the others have resnet18 at IPC 2, fixed soft"
    )
    with pytest.raises(ArtifactError, match="first has no results of 'distilled'"):
        compare([str(runs / "committee"), hard[0]], "distilled")


def test_results_that_are_out_of_date_or_not_there_are_refused(runs, tmp_path):
    other = tmp_path / "old"
    shutil.copytree(runs / "committee", other)
    changed = compare_config(other)
    s = changed.synthesize.model_copy(update={"iterations": 2})
    synthesize(Run(changed.model_copy(update={"synthesize": s}), str(other), overwrite=True), 2)
    with pytest.raises(ArtifactError, match=r"evaluate/ipc2 is out of date"):
        compare([str(runs / "single"), str(other)])
    with pytest.raises(ArtifactError, match=r"single has no results of 'start_soft'.*evaluate\.baselines"):
        compare([str(runs / "single"), str(other)], "start_soft")


def test_differences_of_protocols():
    assert differing([{"a": 1, "b": [2]}, {"a": 1, "b": [2]}]) == {}
    assert differing([{"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}]) == {"b": [2, 3], "c": [None, 4]}


def test_what_a_row_rests_on_is_counted():
    of_all = ["pretrain/resnet18", "prior", "statistics", "trajectories"]
    own = ["initialize/ipc2", "calibrate/ipc2", "synthesize/ipc2", "relabel/ipc2/distilled"]
    others = ["initialize/ipc5", "synthesize/ipc5", "relabel/ipc2/random", "relabel/ipc5/distilled"]
    assert [stage for stage in [*of_all, *own, *others] if _belongs(stage, 2, "distilled")] == [*of_all, *own]


def test_names_of_runs_tell_them_apart():
    assert short_names(["runs/a", "other/b/"]) == ["a", "b"]
    assert short_names(["x/one/run", "x/two/run"]) == ["one/run", "two/run"]
    assert short_names(["s3://me:secret@bucket/run?region=x", "here/run"]) == ["bucket/run", "here/run"]
