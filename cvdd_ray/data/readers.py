"""One reader per kind of source: lists both splits (classes, labels, where the images lie) and reads no image yet.

Shapes: N images, S side of the network input in pixels.
"""

from collections.abc import Callable

import numpy as np
from PIL import Image

from cvdd_ray.config import DataConfig
from cvdd_ray.data.choices import DIGITS_TEST, pick, shares
from cvdd_ray.data.datasets import DatasetInfo
from cvdd_ray.data.folders import list_folders, open_tree
from cvdd_ray.data.listing import Listing, data_root, one_line
from cvdd_ray.data.parquet import list_parquet
from cvdd_ray.data.webdataset import list_webdataset
from cvdd_ray.errors import DataError

DIGITS_TEST_SHARE = 0.2
DIGITS_TEST_SEED = 20250107  # fixed: the test split must not depend on the run's seed


def _read_digits(data: DataConfig, info: DatasetInfo) -> tuple[Listing, Listing]:
    """scikit-learn's 1,797 handwritten digits: 8x8 grey levels 0..16, enlarged, 20 % of every class as test."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    labels = digits.target.astype(np.int64)
    grey = np.round(digits.images * (255 / 16)).astype(np.uint8)
    side = (info.image_size, info.image_size)
    large = np.stack([np.asarray(Image.fromarray(image).resize(side, Image.Resampling.BILINEAR)) for image in grey])
    pixels = np.repeat(large[:, None], 3, axis=1)
    test = pick(labels, shares(np.bincount(labels), DIGITS_TEST_SHARE), DIGITS_TEST_SEED, DIGITS_TEST)
    train = np.setdiff1d(np.arange(len(labels)), test)
    classes = tuple(str(digit) for digit in range(10))
    return (
        Listing("digits train", classes, labels[train], pixels=pixels[train]),
        Listing("digits test", classes, labels[test], pixels=pixels[test]),
    )


def _read_cifar(data: DataConfig, info: DatasetInfo) -> tuple[Listing, Listing]:
    """torchvision's CIFAR-10/100 below `data.path`."""
    from torchvision import datasets

    root, kind = data_root(data), {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data.source]
    listings = []
    for split in ("train", "test"):
        try:
            part = kind(str(root), train=split == "train", download=data.download)
        except (RuntimeError, OSError) as error:
            advice = "check the network or fetch it by hand" if data.download else "set data.download=true"
            raise DataError(
                f"{root} does not hold {data.source} in torchvision's layout (folder {kind.base_folder}): "
                f"{one_line(error)}; {advice}, or give another data.path"
            ) from None
        pixels = np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))
        labels = np.asarray(part.targets, dtype=np.int64)
        listings.append(Listing(f"{data.source} {split}", tuple(part.classes), labels, pixels=pixels))
    return listings[0], listings[1]


def _read_imagenette(data: DataConfig, info: DatasetInfo) -> tuple[Listing, Listing]:
    """torchvision's Imagenette (imagenette2, -320 or -160 below `data.path`, or its train/ and val/ right there)."""
    tree = open_tree(data_root(data))
    names = ("", "imagenette2", "imagenette2-320", "imagenette2-160")
    found = next((below for below in map(tree.below, names) if below.has("train")), None)
    if found is None and data.download:
        from torchvision.datasets import Imagenette

        try:
            Imagenette(str(tree.root), split="train", size="full", download=True)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"Imagenette could not be downloaded to {tree.root}: {one_line(error)}; check the network or fetch it "
                "by hand"
            ) from None
        found = tree.below("imagenette2")
    if found is None:
        raise DataError(
            f"{tree.root} does not hold Imagenette (folder imagenette2, imagenette2-320 or imagenette2-160, or train/ "
            "and val/); set data.download=true, or give another data.path"
        )
    return list_folders(found, ("val", "test"))


def _read_imagenet(data: DataConfig, info: DatasetInfo) -> tuple[Listing, Listing]:
    """The ILSVRC class folders below train/ and val/; a test/ beside them has no labels and is not looked at."""
    return list_folders(open_tree(data_root(data)), ("val",))


def _read_folder(data: DataConfig, info: DatasetInfo) -> tuple[Listing, Listing]:
    return list_folders(open_tree(data_root(data)), ("test", "val"))


def _read_parquet(data: DataConfig, info: DatasetInfo) -> tuple[Listing, Listing]:
    return list_parquet(data_root(data), info.num_classes)


def _read_webdataset(data: DataConfig, info: DatasetInfo) -> tuple[Listing, Listing]:
    return list_webdataset(data_root(data), info.num_classes, data.classes)


READERS: dict[str, Callable[[DataConfig, DatasetInfo], tuple[Listing, Listing]]] = {
    "digits": _read_digits,
    "cifar10": _read_cifar,
    "cifar100": _read_cifar,
    "imagenette": _read_imagenette,
    "imagenet": _read_imagenet,
    "folder": _read_folder,
    "parquet": _read_parquet,
    "webdataset": _read_webdataset,
}
