"""The report of a run: numbers against results.json recomputed by hand, pictures against the stored pixels."""

import hashlib
import io
import json
import shutil
import statistics
from dataclasses import FrozenInstanceError
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cvdd_ray.config import RunConfig
from cvdd_ray.data.imagesets import ImageSet, read_image_set
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError
from cvdd_ray.stages.arms import TRAINING_SETS
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pictures import contact_sheet
from cvdd_ray.stages.pipeline import run_all
from cvdd_ray.stages.report import accuracy_table, markdown_table, rich_summary, rich_table, write_report
from cvdd_ray.stages.summary import summarize_run
from cvdd_ray.stages.synthesize import synthesize

EXPERTS = ("resnet18", "shufflenet_v2")
CONFIG = RunConfig(
    seed=3,
    ipc=(1, 2),
    data={"source": "digits", "max_per_class": 20, "max_test": 60},
    committee={"experts": EXPERTS, "width": 0.25},
    pretrain={"epochs": 2, "batch_size": 64},
    prior={"method": "given", "values": {"resnet18": 50.0, "shufflenet_v2": 45.0}},
    initialize={"images_per_class": 5},
    synthesize={"iterations": 3},
    relabel={"epochs": 3, "batch_size": 10},
    evaluate={"seeds": 2, "test_every": 1, "baselines": ("random_soft", "random_hard")},
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report") / "run"
    run_all(Run(CONFIG, str(folder)))
    return folder


@pytest.fixture
def copy(finished, tmp_path) -> Path:
    """A copy of the run that a test may damage."""
    return Path(shutil.copytree(finished, tmp_path / "run", ignore=shutil.ignore_patterns("report")))


def results(folder: Path, ipc: int) -> dict:
    return json.loads((folder / f"evaluate/ipc{ipc}/results.json").read_text())


def manifest(folder: Path, stage: str) -> dict:
    return json.loads((folder / stage / "manifest.json").read_text())


def picture(path: str) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def find(sheet_HWC: np.ndarray, tile_HWC: np.ndarray) -> tuple[int, int] | None:
    """Return (y, x) where a picture holds a tile pixel for pixel, or None."""
    sheet_HW, tile_HW = (image.astype(np.int64) @ [65536, 256, 1] for image in (sheet_HWC, tile_HWC))
    (height, width), (rows, columns) = sheet_HW.shape, tile_HW.shape
    y_P, x_P = np.nonzero(sheet_HW[: height - rows + 1, : width - columns + 1] == tile_HW[0, 0])
    for y, x in np.ndindex(rows, columns):
        same = sheet_HW[y_P + y, x_P + x] == tile_HW[y, x]
        y_P, x_P = y_P[same], x_P[same]
    return (int(y_P[0]), int(x_P[0])) if len(y_P) else None


def enlarged(pixels_CSS: np.ndarray, scale: int) -> np.ndarray:
    return np.kron(pixels_CSS.transpose(1, 2, 0), np.ones((scale, scale, 1), np.uint8))


def test_summary_says_what_the_run_is(finished):
    summary = summarize_run(Store(str(finished)))
    assert (summary.dataset, summary.image_size, summary.seed) == ("digits", 16, 3)
    assert summary.classes == tuple("0123456789")
    assert [e.name for e in summary.experts] == list(EXPERTS)
    assert [e.prior for e in summary.experts] == [50.0, 45.0]
    for expert in summary.experts:
        made = manifest(finished, f"pretrain/{expert.name}")
        assert (expert.holdout_accuracy, expert.wall_s) == (made["facts"]["holdout_accuracy"], made["wall_s"])
    assert set(summary.stages.values()) == {"done"}
    assert not summary.unfinished()
    assert summary.versions["torch"] == manifest(finished, "prior")["versions"]["torch"]
    with pytest.raises(FrozenInstanceError):
        summary.seed = 4


def test_summary_per_ipc(finished):
    one, two = summarize_run(Store(str(finished))).ipcs
    assert (one.ipc, one.images, two.ipc, two.images) == (1, 10, 2, 20)
    assert [vote.image_index for vote in two.votes] == [0, 1]
    share = 1 / (1 + np.exp(-1.0))  # softmax of (50, 45) / 5
    assert dict(zip(two.votes[0].voters, two.votes[0].weights, strict=True)) == pytest.approx(
        {"resnet18": share, "shufflenet_v2": 1 - share}, abs=1e-6
    )
    assert two.image_bytes == (finished / "synthesize/ipc2/distilled.arrow").stat().st_size
    sizes = {name: (finished / f"relabel/ipc2/{name}/labels.arrow").stat().st_size for name in ("distilled", "random")}
    assert {name: labels.bytes for name, labels in two.labels.items()} == sizes
    assert {labels.full_bytes for labels in two.labels.values()} == {None}  # they are what is stored
    assert two.wall_s["synthesize/ipc2"] == manifest(finished, "synthesize/ipc2")["wall_s"]
    assert set(two.wall_s) == {
        "initialize/ipc2", "synthesize/ipc2", "relabel/ipc2/distilled", "relabel/ipc2/random", "evaluate/ipc2",
    }  # fmt: skip


def test_rows_are_the_students_recomputed(finished):
    for one in summarize_run(Store(str(finished))).ipcs:
        assert [row.arm for row in one.rows] == ["distilled", "random_soft", "random_hard"]
        for row in one.rows:
            curves = [[e[3] for e in r["curve"]] for r in results(finished, one.ipc)["runs"] if r["arm"] == row.arm]
            last, best = [curve[-1] for curve in curves], [max(curve) for curve in curves]
            assert row.seeds == len(curves) == 2
            assert (row.last_mean, row.best_mean) == pytest.approx((sum(last) / 2, sum(best) / 2))
            assert (row.last_std, row.best_std) == pytest.approx((statistics.stdev(last), statistics.stdev(best)))
        assert [row.regime for row in one.rows] == ["soft", "soft", "hard"]
        highest = max(row.last_mean for row in one.rows[:2])
        assert [row.is_best for row in one.rows] == [*(row.last_mean == highest for row in one.rows[:2]), True]


def test_markdown_table_parses(finished):
    summary = summarize_run(Store(str(finished)))
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown_table(summary).splitlines()]
    assert lines[0] == ["IPC", "training set", "student", "last %", "best %", "seeds"]
    assert all(set(cell) <= set("-:") for cell in lines[1])
    rows = [row for one in summary.ipcs for row in one.rows]
    assert len(lines) == 2 + len(rows)
    for cells, row in zip(lines[2:], rows, strict=True):
        assert all(cell.startswith("**") == row.is_best for cell in cells)
        ipc, training_set, student, last, best, seeds = (cell.strip("*") for cell in cells)
        assert (ipc, training_set, student) == (str(row.ipc), TRAINING_SETS[row.arm].title, row.student)
        assert last == f"{row.last_mean:.1f} ± {row.last_std:.1f}"
        assert best == f"{row.best_mean:.1f} ± {row.best_std:.1f}"
        assert seeds == "2"


def test_rich_table_fits_80_columns(finished):
    summary = summarize_run(Store(str(finished)))
    out = io.StringIO()
    Console(file=out, width=80).print(rich_table(summary))
    printed = out.getvalue()
    assert max(len(line.rstrip()) for line in printed.splitlines()) <= 80
    for cells in accuracy_table(summary):
        line = next(line for line in printed.splitlines() if cells[1] in line and line.split()[0] == cells[0])
        assert all(cell in line for cell in cells)  # nothing cut, nothing wrapped
    for part in rich_summary(summary):
        Console(file=out, width=80).print(part)
    assert "resnet18 (hold-out" in out.getvalue()


def test_table_of_given_results(copy):
    """Order, marking and rounding, on numbers that differ (students this small are often all at chance)."""
    found, made = results(copy, 1), manifest(copy, "evaluate/ipc1")
    given = [
        ("random_hard", "resnet18", 40.04, 1.26, 41.0, 0.5),
        ("distilled", "resnet18", 50.0, 2.0, 50.0, 2.0),
        ("random_hard", "shufflenet_v2", 20.0, None, 60.0, None),
        ("distilled", "shufflenet_v2", 30.0, None, 31.0, None),
    ]
    names = ("arm", "student", "last_mean", "last_std", "best_mean", "best_std")
    found["table"] = [{**dict(zip(names, row, strict=True)), "seeds": 2 if row[3] else 1} for row in given]
    content = json.dumps(found).encode()
    (copy / "evaluate/ipc1/results.json").write_bytes(content)
    with pytest.raises(ArtifactError, match="sha256"):  # an edited result is refused ...
        summarize_run(Store(str(copy)))
    made["files"]["results.json"] = hashlib.sha256(content).hexdigest()
    (copy / "evaluate/ipc1/manifest.json").write_text(json.dumps(made))
    summary = summarize_run(Store(str(copy)))
    assert accuracy_table(summary)[:4] == [
        ("1", "distilled, soft labels (BSSL)", "resnet18", "50.0 ± 2.0", "50.0 ± 2.0", "2"),
        ("1", "distilled, soft labels (BSSL)", "shufflenet_v2", "30.0", "31.0", "1"),
        ("1", "random real, hard labels", "resnet18", "40.0 ± 1.3", "41.0 ± 0.5", "2"),
        ("1", "random real, hard labels", "shufflenet_v2", "20.0", "60.0", "1"),
    ]
    assert [row.is_best for row in summary.ipcs[0].rows] == [True, False, True, False]  # by last, not best, per regime


def test_report_files(finished):
    paths = write_report(Store(str(finished)))
    assert sorted(paths) == [
        "contact_sheet_ipc1.png", "contact_sheet_ipc2.png", "curves_ipc1.png", "curves_ipc2.png", "results.json",
        "table.md",
    ]  # fmt: skip
    for name, path in paths.items():
        assert Path(path) == finished / "report" / name
        if name.endswith(".png"):
            pixels = picture(path)
            assert min(pixels.shape[:2]) >= 600
            assert pixels.std() > 10
    text = Path(paths["table.md"]).read_text()
    assert markdown_table(summarize_run(Store(str(finished)))) in text
    assert "test set is used by the final evaluation only" in text
    assert "last epoch is the primary" in text
    for name in ("contact_sheet_ipc1.png", "| prior |", "0.73", "prior 50.0 %", "torch "):
        assert name in text


def test_contact_sheet_shows_the_stored_pixels(finished):
    sheet = picture(write_report(Store(str(finished)))["contact_sheet_ipc2.png"])
    files = ("initialize/ipc2/random.arrow", "initialize/ipc2/start.arrow", "synthesize/ipc2/distilled.arrow")
    sets = [read_image_set((finished / file).read_bytes(), file).images_NCHW for file in files]
    places = {row: [find(sheet, enlarged(images[row], 8)) for images in sets] for row in (0, 9, 10, 19)}
    for (y, x), *others in places.values():  # random real, start and distilled in one row, 8 times as large
        assert others == [(y, x + 132), (y, x + 264)]
    assert places[0][0][0] == places[10][0][0] < places[9][0][0] == places[19][0][0]  # a row per class
    assert places[0][2][1] < places[10][0][1]  # image index 1 is right of index 0
    assert find(sheet, 255 - enlarged(sets[2][0], 8)) is None


def test_contact_sheet_of_many_classes_is_cut_evenly():
    rng = np.random.default_rng(0)
    classes = tuple(f"costs ${label}_$ {'long name ' * (label % 5)}" for label in range(12))  # not mathematics
    labels = np.tile(np.arange(12), 4)
    sets = [ImageSet(rng.integers(0, 256, (48, 3, 32, 32), np.uint8), labels, classes) for _ in range(3)]
    data = contact_sheet(*sets, [["resnet18 1.00"]] * 4, title="many")
    sheet = picture(io.BytesIO(data))
    shown = [row for row in range(48) if find(sheet, enlarged(sets[2].images_NCHW[row], 4))]
    assert len(shown) == 30  # ten classes, three indices
    assert {0, 11} <= {row % 12 for row in shown}
    assert {row // 12 for row in shown} == {0, 1, 2}


def test_unfinished_run_says_what_is_missing(copy):
    shutil.rmtree(copy / "evaluate/ipc2")
    shutil.rmtree(copy / "synthesize/ipc1")
    (copy / "report").mkdir()
    (copy / "report/contact_sheet_ipc1.png").write_bytes(b"of an older state")
    (copy / "report/notes.txt").write_bytes(b"the user's own")
    store = Store(str(copy))
    summary = summarize_run(store)
    missing = {stage for stage, state in summary.unfinished().items() if state == "missing"}
    assert missing == {"evaluate/ipc2", "synthesize/ipc1"}
    assert [len(one.rows) for one in summary.ipcs] == [3, 0]
    assert (summary.ipcs[0].images, summary.ipcs[0].votes) == (0, ())
    paths = write_report(store)
    assert sorted(paths) == ["contact_sheet_ipc2.png", "curves_ipc1.png", "curves_ipc2.png", "results.json", "table.md"]
    assert {f.name for f in (copy / "report").iterdir()} == {*paths, "notes.txt"}
    assert "evaluate/ipc2" in Path(paths["table.md"]).read_text().split("not finished: ")[1].splitlines()[0]


def test_run_that_has_only_begun(copy):
    for folder in ("pretrain", "prior", "initialize", "synthesize", "relabel", "evaluate"):
        shutil.rmtree(copy / folder)
    partial = copy / "synthesize/ipc1/partial/0123"
    partial.mkdir(parents=True)
    (partial / "set-group00000").write_bytes(b"x")
    summary = summarize_run(Store(str(copy)))
    assert summary.stages["synthesize/ipc1"] == "begun"
    assert summary.stages["pretrain/resnet18"] == "missing"
    assert "No results yet" in Path(write_report(Store(str(copy)))["table.md"]).read_text()
    assert len(rich_summary(summary)) > 3


def test_results_of_replaced_images_are_called_outdated(copy):
    changed = CONFIG.model_copy(update={"synthesize": CONFIG.synthesize.model_copy(update={"iterations": 4})})
    synthesize(Run(changed, str(copy), overwrite=True), 2)
    states = summarize_run(Store(str(copy))).unfinished()
    assert states == {"relabel/ipc2/distilled": "outdated", "evaluate/ipc2": "outdated"}


@pytest.mark.parametrize("kind", ["empty", "absent", "file"])
def test_not_a_run(tmp_path, kind):
    folder = tmp_path / "somewhere"
    if kind == "empty":
        folder.mkdir()
    elif kind == "file":
        folder.write_text("x")
    with pytest.raises(ArtifactError) as raised:
        write_report(Store(str(folder)))
    message = str(raised.value)
    assert "\n" not in message
    assert str(folder) in message
    assert "--out" in message
    assert not (tmp_path / "somewhere" / "report").exists()
