"""The rows of the table: one place that knows them, their images and labels, and the ceiling of all real images."""

import json
import math
from typing import get_args

import numpy as np
import pytest
import torch

from cvdd_ray.data.labels import SoftLabels
from cvdd_ray.errors import ConfigError
from cvdd_ray.evaluateconfig import Baseline
from cvdd_ray.stages.arms import CEILING, LABEL_SETS, OURS, TRAINING_SETS, label_sets, sized_rows
from cvdd_ray.stages.ceiling import check_ceiling
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.evaluate import load_arms
from cvdd_ray.stages.pictures import ARM_COLOURS
from cvdd_ray.stages.pipeline import run_all
from cvdd_ray.stages.plancounts import count_stages
from cvdd_ray.stages.report import accuracy_table, write_report
from cvdd_ray.stages.scores import Scores, scores_of
from cvdd_ray.stages.summary import summarize_run

MORE = ("distilled_hard", "distilled_plain", "random_plain", CEILING)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from conftest import tiny_config

    c = tiny_config(data={"flip": True}, evaluate={"seeds": 1, "test_every": 2, "baselines": ("random_soft", *MORE)})
    run = Run(c, str(tmp_path_factory.mktemp("arms")))
    run_all(run)
    return run


def test_every_row_a_configuration_may_name_is_in_the_table():
    assert set(TRAINING_SETS) == {OURS, *get_args(Baseline)} == set(ARM_COLOURS)
    assert {one.label_set for one in TRAINING_SETS.values()} == {None, *LABEL_SETS}
    assert all(one.images == LABEL_SETS[one.label_set].images for one in TRAINING_SETS.values() if one.label_set)


def test_rows_of_one_ipc_have_equally_many_images_and_their_own_labels(finished):
    arms, _ = load_arms(finished, 2)
    assert list(arms) == [OURS, "random_soft", *MORE[:3]] == sized_rows(finished.config)
    assert {len(arm.labels_N) for arm in arms.values()} == {20}
    pairs = ((OURS, "distilled_plain"), (OURS, "distilled_hard"), ("random_soft", "random_plain"))
    assert all(np.array_equal(arms[a].images_NCHW, arms[b].images_NCHW) for a, b in pairs)
    assert not np.array_equal(arms[OURS].images_NCHW, arms["random_soft"].images_NCHW)
    assert [name for name, arm in arms.items() if arm.soft_labels(finished.store, finished.info) is None] == [
        "distilled_hard"
    ]


def test_labels_without_augmentation_are_of_whole_images(finished):
    assert label_sets(finished.config) == ["distilled", "random", "distilled-plain", "random-plain"]
    for name in label_sets(finished.config):
        file = f"relabel/ipc2/{name}/labels.arrow"
        plans = [plan for plan, _ in SoftLabels(finished.store.open(file), file, None).epoch(1)]
        boxes = torch.cat([plan.views.boxes_N4 for plan in plans])
        is_whole = torch.equal(boxes, torch.tensor([0, 0, 16, 16]).expand_as(boxes))
        is_mixed = any(plan.box[2] > plan.box[0] and plan.box[3] > plan.box[1] for plan in plans)
        is_mirrored = any(bool(plan.views.flips_N.any()) for plan in plans)
        assert (is_whole, is_mixed, is_mirrored) == ((True, False, False) if "plain" in name else (False, True, True))


def test_the_ceiling_is_trained_as_experts_are_and_made_once(finished):
    results = json.loads(finished.store.read("evaluate/real/results.json"))
    (only,) = results["runs"]
    assert (only["arm"], only["student"], [row[0] for row in only["curve"]]) == (CEILING, "resnet18", [0])
    identity = finished.artifacts.manifest("evaluate/real").identity
    assert identity["settings"]["pretrain"]["epochs"] == 1
    assert identity["inputs"] == {"train": finished.real.train.fingerprint, "test": finished.real.test.fingerprint}
    sized = finished.artifacts.manifest("evaluate/ipc2").identity["settings"]["evaluate"]["baselines"]
    assert CEILING not in sized  # so that a finished run may be given its ceiling later
    planned = {stage.stage: stage for stage in count_stages(finished)}
    assert planned["evaluate/real"].counts == {
        "students": 1,
        "iterations": 6,
        "tests": 1,
    }  # 360 images in batches of 64


def test_the_report_keeps_regimes_apart(finished):
    summary = summarize_run(finished.store)
    assert not summary.unfinished()
    (one,) = summary.ipcs
    assert [row.regime for row in one.rows] == ["soft"] * 4 + ["hard"] * 2
    assert [row.arm for row in one.rows][-2:] == ["distilled_hard", CEILING]
    assert [row.is_best for row in one.rows][-2:] == [True, False]  # the ceiling competes with nothing
    assert [cells[1] for cells in accuracy_table(summary)][-1] == "all real images, hard labels"
    assert "curves_ipc2.png" in write_report(finished.store)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"evaluate": {"baselines": (CEILING,), "workers": 2}}, r"evaluate\.workers: got 2"),
        ({"evaluate": {"baselines": (CEILING,)}, "data": {"source": "folder", "image_size": 96}}, r"random_resized"),
    ],
)
def test_a_ceiling_that_cannot_be_trained_is_refused(make_config, tmp_path, sections, message):
    run = Run(make_config(**sections), str(tmp_path))
    if "data" in sections:
        from cvdd_ray.data.outlines import outline

        run.real = outline(run.config.data, num_classes=10, train_images=100, test_images=10)
    with pytest.raises(ConfigError, match=message):
        check_ceiling(run)


@pytest.mark.parametrize(
    ("evaluate", "message"),
    [(("distilled_plain",), "nothing is augmented"), (("random_hard", "random_hard"), "without repeats")],
)
def test_rows_that_would_be_another_once_more_are_refused(make_config, evaluate, message):
    with pytest.raises(ValueError, match=message):
        make_config(relabel={"cutmix": False, "crop_scale": (1, 1)}, evaluate={"baselines": evaluate})


def test_scores_are_those_of_the_rows(finished):
    results = json.loads(finished.store.read("report/results.json"))
    last = {row["arm"]: row["last_mean"] / 100 for row in results["rows"]}
    (scores,) = results["scores"]
    gains = last["distilled"] - last["random_soft"], last["distilled_plain"] - last["random_plain"]
    hlr = last["real_hard"] - last["distilled_hard"]
    assert scores["hlr"] == pytest.approx(100 * hlr)
    assert scores["ior"] == pytest.approx(100 * gains[0])
    alpha, beta = (gains[0] - hlr) / 2, sum(gains) / 2
    for name, gain in (("lrs", alpha), ("ars", beta)):
        assert scores[name] == pytest.approx(100 * (math.exp(gain) - math.exp(-1)) / (math.e - math.exp(-1)))
    assert scores["missing"] == []
    assert scores_of([row for row in summarize_run(finished.store).ipcs[0].rows if row.arm != CEILING]) == [
        Scores(2, "resnet18", None, pytest.approx(scores["ior"]), None, pytest.approx(scores["ars"]), (CEILING,))
    ]


def test_costs_of_a_finished_run_are_those_that_were_planned(finished):
    planned = {
        stage.stage: sum(sum(unit.values()) for phase in stage.phases for unit in phase.units)
        for stage in count_stages(finished)
    }
    results = json.loads(finished.store.read("report/results.json"))
    there = {cost["stage"]: cost for cost in results["stages"]}
    experts = ("pretrain/resnet18", "pretrain/shufflenet_v2")
    assert planned.pop("pretrain") == pytest.approx(sum(there[name]["flops"] for name in experts), rel=1e-6)
    assert {name: there[name]["flops"] for name in planned} == pytest.approx(planned, rel=1e-6)
    assert {*there} == {*planned, *experts}
    for stage, cost in there.items():
        manifest = finished.artifacts.manifest(stage)
        assert cost["wall_s"] == manifest.wall_s
        assert cost["bytes"] == sum(len(finished.store.read(f"{stage}/{name}")) for name in manifest.files)
    images = len(finished.store.read("synthesize/ipc2/distilled.arrow"))
    labels = len(finished.store.read("relabel/ipc2/distilled/labels.arrow"))
    storage = results["storage_bytes"]["2"]
    assert (storage["images"], storage["labels"]["distilled"]) == (images, labels)
