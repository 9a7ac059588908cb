"""Analyses of runs and sweeps: numbers against the artifacts, the paper's apart from ours, pictures that show what they say."""

import csv
import io
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvdd_ray.core.costs import Network, image_flops, view_flops, weight_bytes
from cvdd_ray.core.models import build_model
from cvdd_ray.data.imagesets import read_image_set
from cvdd_ray.errors import ConfigError, CvddError
from cvdd_ray.stages.analyses import Analysis
from cvdd_ray.stages.analyze import RUNS, analyze, markdown_analysis
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.paper import PAPER, paper, paper_note
from cvdd_ray.stages.pipeline import run_all


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from conftest import tiny_config

    c = tiny_config(evaluate={"seeds": 2, "students": ("resnet18", "convnet3"), "baselines": ("random_hard",)})
    run = Run(c, str(tmp_path_factory.mktemp("analyzed") / "run"))
    run_all(run)
    return run


def picture(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("what", RUNS)
def test_every_analysis_is_one_command(finished, cvdd, what):
    code, out, err = cvdd("analyze", finished.store.root, "--what", what)
    assert (code, err) == (0, "")
    found = analyze([finished.store.root], what)
    folder = f"{finished.store.root}/analysis/{what}"
    rows = list(csv.reader(io.StringIO(Path(f"{folder}.csv").read_text())))
    assert rows == [list(found.header), *map(list, found.rows)]
    assert all(len(row) == len(found.header) for row in rows)
    text = Path(f"{folder}.md").read_text()
    assert all(note in text for note in found.notes)
    if found.picture:
        assert picture(found.picture).std() > 10
        assert f"({what}.png)" in text
        assert f"{what}.png: " in out


def test_the_grid_shows_the_stored_pixels(finished):
    images = read_image_set(finished.store.read("synthesize/ipc2/distilled.arrow"), "x").images_NCHW
    found = analyze([finished.store.root], "images")
    assert found.rows == (("run", "20", "10"),)
    colours = {tuple(pixel) for pixel in images[13].reshape(3, -1).T}
    shown = {tuple(pixel) for pixel in picture(found.picture).reshape(-1, 3)}
    assert len(colours & shown) > 0.9 * len(colours)


def test_curves_are_those_of_the_results(finished):
    results = json.loads(finished.store.read("evaluate/ipc2/results.json"))["runs"]
    mine = [r["curve"] for r in results if (r["arm"], r["student"]) == ("distilled", "resnet18")]
    found = analyze([finished.store.root], "curves")
    assert [row[0] for row in found.rows] == ["distilled, soft labels (BSSL)", "random real, hard labels"]
    test = [curve[-1][3] for curve in mine]
    assert found.rows[0][2] == f"{statistics.fmean(test):.1f} ± {statistics.stdev(test):.1f}"
    assert found.numbers["distilled, soft labels (BSSL)"]["train"] == [[row[2] for row in curve] for curve in mine]


def test_efficiency_is_wall_time_and_flops_per_image_and_iteration(finished):
    found = analyze([finished.store.root], "efficiency").numbers["run"]
    wall_s = finished.artifacts.manifest("synthesize/ipc2").wall_s
    votes = sum(image_flops(Network(name, 10, 16, 0.125)).vote for name in ("resnet18", "shufflenet_v2"))
    assert (found["images"], found["iterations"]) == (20, 6)
    assert found["ms"] == pytest.approx(1000 * wall_s / 120)
    assert found["flops"] == pytest.approx(votes + 2 * view_flops(16))


def test_parameters_of_students(finished):
    found = analyze([finished.store.root], "architectures")
    assert [row[0] for row in found.rows] == ["resnet18", "convnet3"]
    network = build_model("convnet3", 10, 16, width=0.125)
    assert found.numbers["convnet3"][0] == pytest.approx(sum(p.numel() for p in network.parameters()) / 1e6)
    assert weight_bytes(Network("convnet3", 10, 16, 0.125))[1] == 4 * sum(p.numel() for p in network.parameters())


def test_priors_of_other_data_have_no_paper_column(finished):
    found = analyze([finished.store.root], "priors")
    priors = json.loads(finished.store.read("prior/priors.json"))["priors"]
    assert found.numbers == priors
    assert found.header[-1] == "paper, prior %"
    assert {row[-1] for row in found.rows} == {""}
    assert "here digits at IPC 2" in found.notes[0]


def test_similarity_and_statistics_have_every_set(finished):
    found = analyze([finished.store.root], "similarity", expert="shufflenet_v2")
    assert list(found.numbers) == ["distilled", "start", "random real"]
    assert "shufflenet_v2's embeddings" in found.notes[0]
    assert all(-1 <= value <= 1 for values in found.numbers.values() for value in values)
    gaps = analyze([finished.store.root], "batchnorm").numbers
    assert len(gaps["distilled"]["mean"]) == 2  # 20 images in batches of 10
    assert len(gaps["distilled"]["mean"][0]) == 20  # BatchNorm layers of ResNet-18


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"what": "colours"}, "of runs: images, similarity"),
        ({"what": "priors", "expert": "resnet18"}, "has no effect on priors"),
        ({"what": "similarity", "expert": "vgg"}, "run has resnet18, shufflenet_v2"),
        ({"what": "images", "ipc": 7}, "has distilled images for IPC 2"),
        ({"what": "voters"}, "is a run; a run has images"),
    ],
)
def test_what_cannot_be_analysed_is_refused(finished, options, message):
    with pytest.raises(CvddError, match=message):
        analyze([finished.store.root], **options)
    with pytest.raises(ConfigError, match="takes one run, got 2"):
        analyze([finished.store.root, "other"], "priors")


def test_the_papers_numbers():
    """A sample of every table, from the paper itself."""
    assert paper("efficiency")["cifar100"]["CV-DD"] == 0.52
    assert len(paper("architectures")["students"]) == 11
    assert paper("experts")["values"][50] == {2: 65.1, 3: 64.3}
    assert paper("voters")["values"][10]["equal"] == 53.8
    assert paper("bssl")["values"][10] == {"eval": 49.3, "batch": 54.3}
    assert paper("committee")["sizes"][5] == {"resnet18": 65.1, "resnet50": 64.83}
    assert paper("priors")["values"]["cifar10"]["densenet121"] == 67.57
    assert "cifar100" in paper_note("voters", "digits", 10)


def test_a_table_without_a_picture():
    found = Analysis("Title", ("a", f"{PAPER}, %"), (("x", "1"),), ("a note",))
    assert markdown_analysis(found, None) == "# Title\n\n| a | paper, % |\n| --- | ---: |\n| x | 1 |\n\na note\n"
