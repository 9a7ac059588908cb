"""The 224-pixel path: full-size torchvision experts on a small folder of images of many sizes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from cvdd_ray import load_distilled
from cvdd_ray.core.models import build_seeded, save_weights
from cvdd_ray.data.imagesets import read_image_set
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pipeline import STAGES, check

EXPERTS = ("resnet18", "mobilenet_v2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of noisy colour gradients, 6 train and 3 test images each, no two of one size."""
    root, draw = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 6), ("test", 3)):
        for label, name in enumerate(("daisy", "tulip")):
            target = root / split / name
            target.mkdir(parents=True)
            for i in range(count):
                height, width = 230 + 7 * i, 260 + 11 * i
                ramp = np.linspace(0, 255, width)[None, :, None] * np.array([1 - label, label, 0.5])
                pixels = np.clip(ramp + draw.normal(0, 20, (height, width, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(target / f"{i}.jpg")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the two networks, as a user would bring them; BatchNorm statistics of one real batch."""
    root = tmp_path_factory.mktemp("weights")
    for name in EXPERTS:
        model = build_seeded(name, 2, 224, seed=0).train()
        with torch.no_grad():
            model(torch.randn(4, 3, 224, 224, generator=torch.Generator().manual_seed(0)))
        (root / f"{name}.safetensors").write_bytes(save_weights(model))
    return root


def test_a_few_iterations_of_two_full_size_experts(folder, weights, make_config, tmp_path):
    config = make_config(
        ipc=[1],
        data={"source": "folder", "path": str(folder), "image_size": 224, "holdout": 0.2, "max_per_class": None,
              "max_test": None, "flip": True},
        committee={"experts": EXPERTS, "width": 1.0,
                   "weights": {name: str(weights / f"{name}.safetensors") for name in EXPERTS}},
        prior={"method": "given", "values": {"resnet18": 43.1, "mobilenet_v2": 39.15}, "ipc": 10},
        initialize={"images_per_class": 5, "num_crops": 2},
        synthesize={"iterations": 3},
        relabel={"epochs": 1, "batch_size": 4},
        evaluate={"seeds": 1, "baselines": ["random_soft"]},
    )  # fmt: skip
    run = Run(config, str(tmp_path))
    check(run)
    assert (run.info.roll, run.info.image_size) == (32, 224)
    for stage in STAGES.values():
        stage(run)
    start = read_image_set(run.store.read("initialize/ipc1/start.arrow"), "start")
    distilled = read_image_set(run.store.read("synthesize/ipc1/distilled.arrow"), "distilled")
    assert distilled.images_NCHW.shape == (2, 3, 224, 224)
    assert distilled.classes == ("daisy", "tulip")
    assert distilled.columns["voters"].to_pylist() == [list(EXPERTS)] * 2
    assert distilled.columns["voter_weights"][0].as_py()[0] == pytest.approx(1 / (1 + np.exp(-3.95 / 5)), abs=1e-6)
    moved = np.abs(distilled.images_NCHW.astype(int) - start.images_NCHW)
    assert moved.mean() > 1
    trace = json.loads(run.store.read("synthesize/ipc1/trace.json"))
    assert {row[3] for row in trace} == set(EXPERTS)
    assert all(np.isfinite(row[4]) and row[5] > 0 for row in trace)
    (views, logits), *_ = load_distilled(str(tmp_path)).soft_batches(0)
    assert views.shape == (2, 3, 224, 224)
    assert logits.shape == (2, 2)
    rows = json.loads(run.store.read("evaluate/ipc1/results.json"))["table"]
    assert {row["arm"] for row in rows} == {"distilled", "random_soft"}


def test_starting_images_are_two_by_two_patches(folder, make_config, tmp_path):
    """At 224 px one starting image holds four patches: its middle lines are seams (spec section 4: factor 2)."""
    from cvdd_ray.stages.initialize import tiles_per_side

    config = make_config(data={"source": "folder", "path": str(folder), "image_size": 224, "holdout": 0.2})
    assert tiles_per_side(Run(config, str(tmp_path))) == 2
