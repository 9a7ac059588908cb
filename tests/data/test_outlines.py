"""How many images a run has, without reading one: against the data itself, and the ways to say it."""

import numpy as np
import pytest

from cvdd_ray.config import DataConfig
from cvdd_ray.data.outlines import NUM_IMAGES, outline
from cvdd_ray.data.sources import load_real
from cvdd_ray.errors import ConfigError, DataError


def counts(real):
    return [np.bincount(split.labels, minlength=real.info.num_classes).tolist() for split in (real.train, real.holdout)]


@pytest.mark.parametrize("changes", [{"max_per_class": 40, "max_test": 97}, {"max_per_class": 30, "holdout": 0.3}])
def test_choices_are_those_of_the_run(changes):
    """With `max_per_class` all classes of the digits have one size, as the table assumes."""
    data = DataConfig(source="digits", **changes)
    planned, real = outline(data), load_real(data, seed=0)
    assert counts(planned) == counts(real)
    assert len(planned.test) == len(real.test)
    assert planned.info == real.info


def test_the_table_has_the_digits_that_there_are():
    real = load_real(DataConfig(source="digits"), seed=0)
    assert NUM_IMAGES["digits"] == (len(real.train) + len(real.holdout), len(real.test))


def test_imagenet_is_known_without_a_path():
    real = outline(DataConfig(source="imagenet", holdout=0.01))
    assert len(real.train) + len(real.holdout) == 1_281_167
    assert (len(real.holdout), len(real.test)) == (13_000, 50_000)
    assert len(outline(DataConfig(source="parquet", dataset="cifar10", path="/no/such")).test) == 10_000


@pytest.fixture
def listed(tmp_path):
    """Class folders with files that no reader could open."""
    for split, name, count in (("train", "a", 5), ("train", "b", 3), ("test", "a", 1), ("test", "b", 2)):
        folder = tmp_path / split / name
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"{i}.jpg").write_text("no image")
    return DataConfig(source="folder", path=str(tmp_path), image_size=32)


def test_a_folder_is_listed_and_no_image_opened(listed):
    real = outline(listed)
    assert counts(real) == [[4, 2], [1, 1]]
    assert real.test.labels.tolist() == [0, 1, 1]
    assert (real.train.classes, real.info.num_classes, real.info.class_chunk) == (("a", "b"), 2, 2)


def test_given_numbers_come_before_the_listing(listed):
    real = outline(listed, num_classes=4, train_images=41, test_images=8)
    assert [sum(part) for part in zip(*counts(real), strict=True)] == [11, 10, 10, 10]
    assert len(real.test) == 8
    assert len(outline(listed, test_images=8).test) == 8
    with pytest.raises(ConfigError, match="--classes 4: folder has 2"):
        outline(listed, num_classes=4)


@pytest.mark.parametrize(
    ("data", "given", "message"),
    [
        ({"source": "folder", "image_size": 224}, {}, "data.path is not set.; give --classes"),
        (
            {"source": "folder", "image_size": 224, "path": "/no/such"},
            {"num_classes": 5},
            "/no/such does not exist here",
        ),
        ({"source": "folder", "image_size": 224, "classes": ["a", "b"]}, {}, "give --train-images"),
        ({"source": "parquet", "dataset": "imagenet100", "path": "/no"}, {}, "give --train-images"),
        ({"source": "cifar10"}, {"num_classes": 7}, "--classes 7: cifar10 has 10"),
        (
            {"source": "folder", "image_size": 224},
            {"num_classes": 5, "train_images": 9},
            "give at least 10 for 5 classes",
        ),
    ],
)
def test_what_is_missing_is_asked_for(data, given, message):
    with pytest.raises(ConfigError, match=message):
        outline(DataConfig(**data), **given)


def test_a_path_that_cannot_be_listed_is_an_error(tmp_path):
    with pytest.raises(DataError, match="has no folder train"):
        outline(DataConfig(source="folder", path=str(tmp_path), image_size=32))
