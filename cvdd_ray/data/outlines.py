"""The splits of a run without their images: how many there are, for planning."""

from pathlib import Path

import numpy as np

from cvdd_ray.config import DataConfig
from cvdd_ray.data.choices import holdout_counts, scaled_down
from cvdd_ray.data.datasets import DatasetInfo, dataset_info
from cvdd_ray.data.images import Arrays, RealImages
from cvdd_ray.data.sources import RealData, list_real, with_classes
from cvdd_ray.errors import ConfigError, require_within
from cvdd_ray.recipes import without_login

# Train and test images of the rows of the dataset table, as published (test: the labelled validation split where the test
# split has no labels).
NUM_IMAGES = {
    "digits": (1438, 359),
    "cifar10": (50_000, 10_000),
    "cifar100": (50_000, 10_000),
    "tiny_imagenet": (100_000, 10_000),
    "imagenette": (9469, 3925),
    "imagewoof": (9025, 3929),
    "imagenet1k": (1_281_167, 50_000),
}

MOST_IMAGES = 100_000_000  # of one split, and classes


def outline(
    data: DataConfig, *, num_classes: int | None = None, train_images: int | None = None, test_images: int | None = None
) -> RealData:
    """Return the splits of a run with labels and no images, hold-out and `max_per_class` taken as in `load_real`.

    Numbers come from the arguments, from the table of known data sets (classes of equal size), or from a listing of
    `data.path`, in this order.  Raises ConfigError when none of them knows, DataError for a path that cannot be listed.
    """
    for option, given, low in (("--classes", num_classes, 2), ("--train-images", train_images, 1),
                               ("--test-images", test_images, 1)):  # fmt: skip
        require_within(option, given, low, MOST_IMAGES)
    info = dataset_info(data)
    known = NUM_IMAGES.get(info.name)
    if known is None and train_images is None and data.path and Path(data.path).expanduser().exists():
        train, test, info = list_real(data)
        info = _with_classes(data, info, num_classes)
        tested = test.labels if test_images is None else _even(test_images, info)
        return _splits(data, info, train.classes, train.labels, tested)
    info = _with_classes(data, info, num_classes)
    if known is None and train_images is None:
        raise _unknown(data, "how many images it has", "--train-images")
    train, test = known or (0, 0)
    train, test = train_images or train, test if test_images is None else test_images
    if train < 2 * info.num_classes:
        raise ConfigError(
            f"--train-images {train}: a class needs at least 2, one to train on and one to hold out; give at least "
            f"{2 * info.num_classes} for {info.num_classes} classes"
        )
    classes = data.classes or tuple(str(label) for label in range(info.num_classes))
    return _splits(data, info, classes, _even(train, info), _even(test, info))


def _even(num_images: int, info: DatasetInfo) -> np.ndarray:
    return np.arange(num_images) % info.num_classes


def _with_classes(data: DataConfig, info: DatasetInfo, num_classes: int | None) -> DatasetInfo:
    given = num_classes or (len(data.classes) if data.classes else None)
    if info.num_classes == 0:
        if given is None:
            raise _unknown(data, "how many classes it has", "--classes")
        return with_classes(info, given)
    if given not in (None, info.num_classes):
        raise ConfigError(f"--classes {given}: {info.name} has {info.num_classes}; leave it out")
    return info


def _unknown(data: DataConfig, what: str, option: str) -> ConfigError:
    where = f"data.path {without_login(data.path)} does not exist here" if data.path else "data.path is not set"
    return ConfigError(
        f"data.source {data.source!r} does not say {what} ({where}); give {option}, or a data.path or data.dataset"
    )


def _splits(data: DataConfig, info: DatasetInfo, classes, train_N: np.ndarray, test_N: np.ndarray) -> RealData:
    train_K = np.bincount(train_N, minlength=info.num_classes)
    test_K = scaled_down(np.bincount(test_N, minlength=info.num_classes), data.max_test)
    if data.max_per_class is not None:
        train_K = np.minimum(train_K, data.max_per_class)
    holdout_K = holdout_counts(train_K, data.holdout)

    def split(count_K: np.ndarray) -> RealImages:
        labels = np.repeat(np.arange(info.num_classes), count_K)
        return RealImages(classes, labels, Arrays("outline", labels), np.empty((len(labels), 0), np.uint8))

    return RealData(split(train_K - holdout_K), split(holdout_K), split(test_K), info)
