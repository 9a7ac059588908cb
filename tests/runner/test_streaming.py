"""Streams on Ray Data: the rows of the reference, whatever blocks they travelled in; errors as themselves."""

import numpy as np
import pytest
from PIL import Image

from cvdd_ray.errors import DataError
from cvdd_ray.stages import initialize as module
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.initialize import initialize
from cvdd_ray.stages.pretrain import pretrain
from cvdd_ray.stages.runtime import LocalRuntime


def read(item, factor):  # inside Ray's workers these come by value
    for block in range(3):
        yield {"at": np.arange(4 * block, 4 * block + 4), "x": np.full((4, 2, 5), item * factor, np.float32)}


class Sum:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, block):
        return np.stack([block["at"].astype(float), block["x"].sum((1, 2)) + self.factor], 1)


@pytest.fixture(autouse=True)
def by_value():
    """Let Ray send this file's functions themselves, since its workers cannot import it."""
    import sys

    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    yield
    cloudpickle.unregister_pickle_by_value(sys.modules[__name__])


def test_rows_are_those_of_the_reference(ray_runtime):
    items = {f"item{k}": k for k in range(5)}
    found = dict(ray_runtime.stream(read, Sum, items, (10.0,)))
    expected = dict(LocalRuntime(1).stream(read, Sum, items, (10.0,)))
    assert found.keys() == expected.keys()
    for name, rows in found.items():
        assert np.array_equal(rows[np.argsort(rows[:, 0])], expected[name])
    assert expected["item3"].tolist() == [[at, 310.0] for at in range(12)]


def test_an_error_of_the_data_is_raised_as_itself(ray_runtime):
    def refuse(item, *shared):
        raise DataError(f"{item}.png cannot be read; remove it")
        yield

    with pytest.raises(DataError, match=r"^cat\.png cannot be read; remove it$"):
        list(ray_runtime.stream(refuse, Sum, {"x": "cat"}, (1.0,)))


def test_patches_of_images_on_disk_are_those_of_the_reference(ray_runtime, make_config, tmp_path, monkeypatch):
    draw = np.random.default_rng(0)
    for split, count in (("train", 12), ("val", 1)):
        for name in ("cat", "dog", "eel"):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 256, (70 + i, 75, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "images" / split / name / f"{i}.png")
    config = make_config(
        ipc=[2],
        data={"source": "folder", "path": str(tmp_path / "images"), "image_size": 66, "max_per_class": None, "max_test": None},
        committee={"experts": ["shufflenet_v2"], "width": 1.0},
        pretrain={"epochs": 1, "batch_size": 32, "crop": "random_resized"},
        voting={"size": 1, "weighting": "equal", "selection": "enumerate"},
        initialize={"images_per_class": 10, "num_crops": 2},
    )  # fmt: skip
    local = Run(config, str(tmp_path / "local"))
    pretrain(local)
    streamed = Run(config, str(tmp_path / "ray"), runtime=ray_runtime)
    for name in local.store.names("pretrain"):
        streamed.store.write(name, local.store.read(name))
    calls = []
    monkeypatch.setattr(module, "BLOCK", 8)
    original = ray_runtime.stream
    ray_runtime.stream = lambda *given: calls.append(len(given[2])) or original(*given)
    try:
        assert initialize(streamed, 2).files == initialize(local, 2).files
    finally:
        del ray_runtime.stream
    assert calls == [4]  # 30 images, read in runs of 8
