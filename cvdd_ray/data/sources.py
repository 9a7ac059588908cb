"""Real data of a run: train, hold-out and test, checked and chosen by seed. Shapes: N images, K classes."""

from dataclasses import dataclass, replace

import numpy as np

from cvdd_ray.config import DataConfig
from cvdd_ray.data.choices import HOLDOUT, MAX_PER_CLASS, MAX_TEST, pick, scaled_down, shares
from cvdd_ray.data.datasets import SMALL_SIDE, DatasetInfo, dataset_info
from cvdd_ray.data.images import RealImages
from cvdd_ray.data.listing import DOWNLOADED, Listing, short
from cvdd_ray.data.readers import READERS
from cvdd_ray.errors import ConfigError, DataError

__all__ = ["RealData", "RealImages", "load_real"]


@dataclass(frozen=True)
class RealData:
    """The real images of a run; `info` holds the source's number of classes even where the table has none."""

    train: RealImages
    holdout: RealImages
    test: RealImages
    info: DatasetInfo


def load_real(data: DataConfig, seed: int) -> RealData:
    """Train, hold-out and test images of the configured source.

    Order of choices: `max_per_class` and `max_test` (both class by class), then reading - so only chosen images are
    checked -, then the hold-out: a share of every class of train, at least one image, at least one left. Every choice
    is a pure function of (seed, purpose, class), and a smaller `max_per_class` takes a subset of a larger one's.
    How much is read at load: see `load_images`.

    Raises ConfigError: settings that contradict each other. DataError: data that is missing, damaged, of the wrong
    size, or has other classes than given. Source: spec section 1; the hold-out is this project's (spec section 3).
    """
    info = dataset_info(data)
    if data.download and data.source not in DOWNLOADED:
        raise ConfigError(
            f"data.download has no effect with data.source {data.source!r}; it is for cifar10, cifar100 and imagenette"
        )
    train, test = READERS[data.source](data, info)
    info = _check_classes(data, info, train, test)
    for listing in (train, test):
        _check_listing(listing, info)

    per_class = np.bincount(train.labels, minlength=info.num_classes)
    if data.max_per_class is not None:
        per_class = np.minimum(per_class, data.max_per_class)
    chosen_train = pick(train.labels, per_class, seed, MAX_PER_CLASS)
    per_class = np.bincount(test.labels, minlength=info.num_classes)
    chosen_test = pick(test.labels, scaled_down(per_class, data.max_test), seed, MAX_TEST)

    real = train.read(chosen_train, info.image_size, data.on_bad_image)
    kept, held_out = _split_holdout(real, data.holdout, seed)
    test_images = test.read(chosen_test, info.image_size, data.on_bad_image)
    if not len(test_images):
        raise DataError(f"{test.title} has no readable image; evaluation needs a test split, give one that has images")
    return RealData(real.subset(kept), real.subset(held_out), test_images, info)


def _check_classes(data: DataConfig, info: DatasetInfo, train: Listing, test: Listing) -> DatasetInfo:
    if train.classes != test.classes:
        pairs = ((train, test), (test, train))
        only = [(a.title, sorted(set(a.classes) - set(b.classes))) for a, b in pairs]
        differing = "; ".join(f"only in {title}: {short(names)}" for title, names in only if names)
        raise DataError(
            f"{train.title} and {test.title} have different classes ({differing or 'same names in another order'}); "
            "labels are ranks, so give both the same classes"
        )
    found = train.classes
    if data.classes is not None and data.classes != found:
        both = list(zip(data.classes, found, strict=False))
        first = next((label for label, (given, has) in enumerate(both) if given != has), len(both))
        raise DataError(
            f"data.classes is {short(data.classes)}, but {train.title} has {short(found)} in this order (first "
            f"difference at label {first}); correct the list, or leave data.classes out to take the source's"
        )
    if info.num_classes == 0:
        return replace(info, num_classes=len(found), class_chunk=min(info.class_chunk, len(found)))
    if info.num_classes != len(found):
        raise DataError(
            f"{train.title} has {len(found)} classes, but dataset {info.name!r} has {info.num_classes}; give the "
            "complete data, or use data.source=folder or parquet with a fitting data.dataset (or none and "
            "data.image_size)"
        )
    return info


def _check_listing(listing: Listing, info: DatasetInfo) -> None:
    wrong = np.flatnonzero((listing.labels < 0) | (listing.labels >= info.num_classes))
    if len(wrong):
        name = listing.source.name(wrong[0]) if listing.source else f"{listing.title} image {wrong[0]}"
        raise DataError(
            f"{name} has label {listing.labels[wrong[0]]}, but {info.num_classes} classes allow "
            f"0..{info.num_classes - 1} ({len(wrong)} such images); correct the labels, or remove a split that has none"
        )
    if listing.pixels is not None and info.image_size <= SMALL_SIDE:
        side = listing.pixels.shape[-1]
        if side != info.image_size:
            raise DataError(
                f"{listing.title} image 0 is {side}x{side} pixels, but data.image_size is {info.image_size}; inputs up "
                f"to {SMALL_SIDE} px are never resized, leave data.image_size out"
            )


def _split_holdout(real: RealImages, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    counts = np.bincount(real.labels, minlength=len(real.classes))
    poor = [real.classes[label] for label in np.flatnonzero(counts < 2)]
    if poor:
        left_out = f" ({len(real.bad)} bad ones were left out)" if real.bad else ""
        raise DataError(
            f"a class needs at least 2 train images, one to train on and one to hold out{left_out}, but these have "
            f"fewer: {short(poor)}; add images, drop the classes, or raise data.max_per_class"
        )
    held_out = pick(real.labels, np.clip(shares(counts, share), 1, counts - 1), seed, HOLDOUT)
    return np.setdiff1d(np.arange(len(real)), held_out), held_out
