"""Composed recipes from end to end, shrunk: two classes, two iterations, slim networks; every dataset with every method."""

import json
import math

import numpy as np
import pytest
from PIL import Image

import cvdd_ray
from cvdd_ray.core.models import SMALL_MAX_PX
from cvdd_ray.data.datasets import DATASETS as TABLE
from cvdd_ray.data.datasets import dataset_info
from cvdd_ray.data.imagesets import read_image_set
from cvdd_ray.recipes import load_config, with_settings
from cvdd_ray.recipes.composed import DATASETS, methods_of, part
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pipeline import run_all

REAL = ("random", "kcenter", "herding")  # on one dataset each
METHODS = ("", *(method for method in part("methods") if method not in REAL))
SIDE = 16
LARGE = ("resnet50", "densenet121")  # experts that are left out here
STAND_IN = {
    "efficientnet_b0": "wide_resnet16_2",
    "shufflenet_v2_x0_5": "shufflenet_v2",
    "alexnet": "convnet3",
}  # up to 64 px
FEW_TRAJECTORIES = {
    "synthesize": {"iterations": 2, "trajectories": {
        "experts": 2, "epochs": 3, "batch_size": 8, "max_start": 2, "target_epochs": 2, "steps": 2}},
}  # fmt: skip
SMALL_IPC = {1: 1, 10: 2, 50: 3}


def names():
    """Every dataset with every method, and both sides of every dataset that has them; IPC and student take turns."""
    for d, dataset in enumerate(DATASETS):
        for m, method in enumerate(METHODS):
            if method not in methods_of(dataset):
                continue
            ipc, student = (1, 10, 50)[(d + m) % 3], ("r18", "r18", "r18", "r50")[(d + 2 * m) % 4]
            yield "-".join(filter(None, (dataset, f"ipc{ipc}", student, method)))
    for dataset in part("variants")["code"]["datasets"]:
        yield f"{dataset}-ipc1-r18-sre2l++-code"
    yield from (
        "cifar10-ipc10-r18-random",
        "cifar10-ipc1-r18-mtt-cpu",
        "cifar10-ipc10-r18-kcenter-cpu",
        "imagenette-ipc1-r18-herding",
        "tinyimagenet-ipc10-r18-paper",
        "imagenette-ipc10-r50-code",
        "cifar10-ipc10-r18-sre2l++-committeelabels",
    )


@pytest.fixture(scope="module", params=[SIDE])
def folder(request, tmp_path_factory):
    return image_folder(tmp_path_factory.mktemp("images"), request.param)


def image_folder(root, side):
    """Two classes of noisy colours, 12 train and 4 test images each."""
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label, name in enumerate(("daisy", "tulip")):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = np.clip(draw.normal(90 + 60 * label, 40, (side, side, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / name / f"{i:02d}.png")
    return root


def shrunken(name, folder, side=SIDE, **changes):
    """The recipe with less of everything: of its choices none is changed, of its numbers only how many and how large."""
    c = load_config(name)
    info = dataset_info(c.data)
    stand_in = {} if side > SMALL_MAX_PX else STAND_IN
    experts, teachers = (
        [stand_in.get(expert, expert) for expert in chosen if expert not in LARGE]
        for chosen in (c.committee.experts, c.relabel.teachers or [])
    )
    small = {
        "committee.experts": experts,
        "voting.fixed": experts[-2:] if c.voting.fixed and c.voting.size == 2 else c.voting.fixed,
        "ipc": [SMALL_IPC[n] for n in c.ipc],
        "data": {"source": "folder", "dataset": None, "path": str(folder), "download": False, "image_size": side,
                 "mean": info.mean, "std": info.std, "holdout": 0.25},
        "committee.width": 0.125,
        "committee.weights": {},
        "pretrain": {"epochs": 2, "batch_size": 5, "warmup_epochs": min(c.pretrain.warmup_epochs, 1),
                     "cosine_epochs": c.pretrain.cosine_epochs and 1},
        "prior.values": {expert: c.prior.values[expert] for expert in experts if c.prior.values},
        "prior": {} if c.prior.method == "given" else {"ipc": 1, "epochs": 1},
        "initialize": {"images_per_class": 14, "num_crops": 1, "pool": c.initialize.pool and 3, "factor": 1},
        "synthesize": {"iterations": min(2, c.synthesize.iterations), "class_chunk": 2, "roll": info.roll},
        **(FEW_TRAJECTORIES if c.synthesize.method == "trajectories" else {}),
        "relabel": {"epochs": 1, "teachers": teachers or None},
        "evaluate": {"seeds": 1, "phases": []},  # of later epochs
        "runtime": {"engine": "local", "placement": "auto"},
    }  # fmt: skip
    return with_settings(c, small | changes)


def result(run, ipc):
    """(starting images, distilled images, loss curves, the one row of the table) of a finished run."""
    start, distilled = (
        read_image_set(run.store.read(name), name).images_NCHW
        for name in (f"initialize/ipc{ipc}/start.arrow", f"synthesize/ipc{ipc}/distilled.arrow")
    )
    (row,) = json.loads(run.store.read(f"evaluate/ipc{ipc}/results.json"))["table"]
    return start, distilled, json.loads(run.store.read(f"synthesize/ipc{ipc}/trace.json")), row


def test_all_pairs_are_there():
    pairs = {(name.split("-")[0], method) for name in names() for method in METHODS[1:] if f"-{method}" in name}
    there = {(dataset, method) for dataset in DATASETS for method in methods_of(dataset) if method in METHODS[1:]}
    assert there <= pairs
    assert ("tinyimagenet", "mtt") in there
    assert {info.name for info in TABLE.values()} - {"digits"} == {
        dataset_info(load_config(f"{dataset}-ipc1-r18").data).name for dataset in DATASETS
    }


@pytest.mark.parametrize("name", names())
def test_a_shrunken_recipe_runs_from_end_to_end(name, folder, tmp_path):
    config = shrunken(name, folder)
    (ipc,) = config.ipc
    run = Run(config, str(tmp_path))
    run_all(run)
    start, distilled, trace, row = result(run, ipc)
    ours = "distilled" if config.labels_are_soft else "distilled_hard"
    assert (row["arm"], row["student"]) == (ours, config.evaluate.students[0])
    assert row["last_mean"] in [100 * k / 8 for k in range(9)]
    assert distilled.shape == start.shape == (2 * ipc, 3, SIDE, SIDE)
    if not config.synthesize.iterations:
        assert any(method in name for method in ("rded", *REAL))
        assert np.array_equal(distilled, start), "these images are patches or real images as they are"
        assert not trace
    else:
        assert not np.array_equal(distilled, start)
        voters = {expert for _, _, _, expert, _, _ in trace}
        if "-mtt" in name:
            assert voters == {"convnet4" if "tiny" in name else "convnet3"}
            assert not config.labels_are_soft
            assert not (tmp_path / "relabel").exists()
            return
        assert voters == {"resnet18"} if "-sre2l" in name or "-cda" in name else len(voters) > 1
        assert all(math.isfinite(ce) and bn > 0 for *_, ce, bn in trace)
    labelled = sorted(path.name for path in (tmp_path / f"relabel/ipc{ipc}/distilled").iterdir())
    assert ("online.json" in labelled) == config.relabel.online
    assert (
        cvdd_ray.plan(config, num_classes=2, train_images=24, test_images=8).stage(f"synthesize/ipc{ipc}") is not None
    )


@pytest.mark.parametrize("name", ["imagenet1k-ipc10-r18-rded", "imagenette-ipc1-r18-sre2l++-code"])
def test_at_224_pixels_a_recipe_runs_with_the_published_network(name, tmp_path):
    """Full-size ResNet-18 on mosaics of two by two patches."""
    folder = image_folder(tmp_path / "images", 230)
    config = shrunken(
        name, folder, side=224, **{"committee.width": 1.0, "data.holdout": 0.09, "pretrain.epochs": 1},
    )  # fmt: skip
    config = with_settings(config, {"initialize.factor": None, "initialize.pool": config.initialize.pool and 2})
    run = Run(config, str(tmp_path / "run"))
    run_all(run)
    start, distilled, _, _ = result(run, config.ipc[0])
    assert distilled.shape[1:] == (3, 224, 224)
    assert np.array_equal(start, distilled) == ("rded" in name)


def test_sets_of_different_ipc_are_nested(folder, tmp_path):
    """Decision 27: images of IPC 1 are the first of IPC 3, patches and all; without a pool they are not."""
    for pool in (3, None):
        config = shrunken("cifar10-ipc1-r18-sre2l++", folder, ipc=[1, 3])
        run = Run(with_settings(config, {"initialize.pool": pool}), str(tmp_path / str(pool)))
        run_all(run)
        (start1, one, _, _), (start3, three, _, _) = result(run, 1), result(run, 3)
        assert np.array_equal(start1, start3[:2]) == np.array_equal(one, three[:2]) == (pool == 3)
    with pytest.raises(
        cvdd_ray.ConfigError, match=r"initialize\.pool: got 2, fewer than IPC 3; use at least the largest"
    ):
        run_all(Run(with_settings(config, {"initialize.pool": 2}), str(tmp_path / "less")))


def test_priors_are_the_same_for_every_ipc_and_student(folder, tmp_path):
    """They are measured once: a run of another row takes them over."""
    ids = []
    for name in ("cifar100-ipc10-r50", "cifar100-ipc1-r101", "cifar100-ipc50-r18-1000epochs"):
        config = shrunken(
            name, folder, voting={"weighting": "prior"}, **{"committee.experts": ["resnet18", "shufflenet_v2"]}
        )
        config = with_settings(config, {"voting.fixed": None, "synthesize.iterations": 1})
        run = Run(config, str(tmp_path / name))
        cvdd_ray.pretrain(run)
        cvdd_ray.prior(run)
        ids.append(run.artifacts.manifest("prior").identity)
    assert ids[0] == ids[1] == ids[2]
    assert ids[0]["settings"]["evaluate"]["lr"] == 0.001
    assert ids[0]["settings"]["evaluate"]["eta"] == 1.0
