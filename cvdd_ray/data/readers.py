"""One reader per kind of source: lists both splits (classes, labels, where the images lie) and reads no image yet.

Shapes: N images, S side of the network input in pixels.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from cvdd_ray.config import DataConfig
from cvdd_ray.data.choices import DIGITS_TEST, pick, shares
from cvdd_ray.data.datasets import DatasetInfo
from cvdd_ray.data.images import Files, ParquetRows, RealImages, in_memory, load_images
from cvdd_ray.errors import ConfigError, DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
DIGITS_TEST_SHARE = 0.2
DIGITS_TEST_SEED = 20250107  # fixed: the test split must not depend on the run's seed


@dataclass(frozen=True, eq=False)
class Listing:
    """One split before its images are read; `pixels` uint8 (N, 3, S, S) for sources that are in memory anyway."""

    title: str
    classes: tuple[str, ...]
    labels: np.ndarray
    source: Files | ParquetRows | None = None
    pixels: np.ndarray | None = None

    def read(self, indices: np.ndarray, size: int, on_bad_image: str) -> RealImages:
        if self.source is not None:
            return load_images(self.classes, self.labels[indices], self.source.take(indices), size, on_bad_image)
        return in_memory(self.title, self.pixels, self.labels, self.classes).subset(indices)


def short(names: Sequence[str]) -> str:
    """A list for a message: all of it up to 12 names, else the first ones and the number."""
    names = [str(name) for name in names]
    shown = names if len(names) <= 12 else [*names[:8], "..."]
    return f"[{', '.join(shown)}]" + (f" ({len(names)} in all)" if len(names) > 12 else "")


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

    root, kind = _root(data), {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[data.source]
    listings = []
    for split in ("train", "test"):
        try:
            part = kind(str(root), train=split == "train", download=data.download)
        except (RuntimeError, OSError) as error:
            advice = "check the network or fetch it by hand" if data.download else "set data.download=true"
            raise DataError(
                f"{root} does not hold {data.source} in torchvision's layout (folder {kind.base_folder}): "
                f"{_one_line(error)}; {advice}, or give another data.path"
            ) from None
        pixels = np.ascontiguousarray(part.data.transpose(0, 3, 1, 2))
        labels = np.asarray(part.targets, dtype=np.int64)
        listings.append(Listing(f"{data.source} {split}", tuple(part.classes), labels, pixels=pixels))
    return listings[0], listings[1]


def _read_imagenette(data: DataConfig, info: DatasetInfo) -> tuple[Listing, Listing]:
    """torchvision's Imagenette (imagenette2, -320 or -160 below `data.path`, or its train/ and val/ right there)."""
    root = _root(data)
    candidates = [root, *(root / name for name in ("imagenette2", "imagenette2-320", "imagenette2-160"))]
    found = next((folder for folder in candidates if (folder / "train").is_dir()), None)
    if found is None and data.download:
        from torchvision.datasets import Imagenette

        try:
            Imagenette(str(root), split="train", size="full", download=True)
        except (RuntimeError, OSError) as error:
            raise DataError(
                f"Imagenette could not be downloaded to {root}: {_one_line(error)}; check the network or fetch it "
                "by hand"
            ) from None
        found = root / "imagenette2"
    if found is None:
        raise DataError(
            f"{root} does not hold Imagenette (folder imagenette2, imagenette2-320 or imagenette2-160, or train/ and "
            "val/); set data.download=true, or give another data.path"
        )
    return _list_folders(found, ("val", "test"))


def _read_imagenet(data: DataConfig, info: DatasetInfo) -> tuple[Listing, Listing]:
    """The ILSVRC class folders below train/ and val/; a test/ beside them has no labels and is not looked at."""
    return _list_folders(_root(data), ("val",))


def _read_folder(data: DataConfig, info: DatasetInfo) -> tuple[Listing, Listing]:
    return _list_folders(_root(data), ("test", "val"))


def _list_folders(root: Path, test_names: tuple[str, ...]) -> tuple[Listing, Listing]:
    """Class folders of train and of the first of `test_names` that exists. Label: the folder's lexicographic rank."""
    test_name = next((name for name in test_names if (root / name).is_dir()), None)
    missing = [
        name for name, there in (("train", (root / "train").is_dir()), ("/".join(test_names), test_name)) if not there
    ]
    if missing:
        raise DataError(
            f"{root} has no folder {' and no folder '.join(missing)}; data.path must hold train/CLASS/* and "
            f"{' or '.join(f'{name}/CLASS/*' for name in test_names)} images"
        )
    return _list_folder(root, "train"), _list_folder(root, test_name)


def _list_folder(root: Path, split: str) -> Listing:
    """Images directly in the class folders, sorted; hidden files, subfolders and other extensions are no images."""
    classes = sorted(entry.name for entry in os.scandir(root / split) if entry.is_dir() and entry.name[0] != ".")
    if not classes:
        raise DataError(f"{root / split} has no class folders; put the images into {root / split}/CLASS/")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        entries = os.scandir(root / split / name)
        files = sorted(e.name for e in entries if e.name[0] != "." and e.name.lower().endswith(EXTENSIONS))
        if not files:
            raise DataError(
                f"class folder {root / split / name} has no images ({', '.join(EXTENSIONS)}, directly in it); add "
                "images or remove the folder from every split"
            )
        names += [f"{split}/{name}/{file}" for file in files]
        labels += [label] * len(files)
    return Listing(str(root / split), tuple(classes), np.array(labels, np.int64), Files(str(root), tuple(names)))


def _read_parquet(data: DataConfig, info: DatasetInfo) -> tuple[Listing, Listing]:
    """Hub-style Parquet: train*.parquet, and test*.parquet or validation*.parquet, in `data.path` or its data/."""
    root = _root(data)
    if not root.is_dir():
        raise DataError(f"{root} is not a directory; data.path must hold train*.parquet and test*.parquet files")
    folder = root if any(root.glob("train*.parquet")) else root / "data"
    train_files = sorted(folder.glob("train*.parquet"))
    test_files = next(filter(None, (sorted(folder.glob(f"{name}*.parquet")) for name in ("test", "validation"))), [])
    if not train_files or not test_files:
        present = short(sorted(path.name for path in root.iterdir())) if any(root.iterdir()) else "nothing"
        raise DataError(
            f"{root} holds {present}; data.path must hold train*.parquet and test*.parquet (or validation*.parquet)"
        )
    names, labels, source = _list_parquet(train_files)
    test_names, test_labels, test_source = _list_parquet(test_files)
    if names is None and test_names is None:
        names = tuple(str(label) for label in range(info.num_classes or int(labels.max()) + 1))
    names, test_names = names or test_names, test_names or names  # one split's names do for both
    return (
        Listing(f"{folder}/train*.parquet", names, labels, source),
        Listing(f"{folder}/{test_files[0].name}", test_names, test_labels, test_source),
    )


def _list_parquet(paths: list[Path]) -> tuple[tuple[str, ...] | None, np.ndarray, ParquetRows]:
    """Class names (None if the schema has none), labels (N,) and rows of one split's files."""
    all_names, labels, groups, row = [], [], [], 0
    for number, path in enumerate(paths):
        try:
            file = pq.ParquetFile(path)
            image, label = _columns(path, file.schema_arrow)
            column = file.read(columns=[label]).column(label)
        except (pa.ArrowException, OSError) as error:
            raise DataError(f"{path} is no readable Parquet file: {_one_line(error)}; replace it") from None
        if column.null_count:
            raise DataError(f"{path} has {column.null_count} rows without a {label}; remove or label them")
        labels.append(column.to_numpy().astype(np.int64))
        all_names.append((image, _class_names(file.schema_arrow, label)))
        for index in range(file.num_row_groups):
            groups.append((number, index, row))
            row += file.metadata.row_group(index).num_rows
    if len(set(all_names)) > 1:
        raise DataError(
            f"{paths[0].parent}: the files {paths[0].name} ... {paths[-1].name} name different image columns or "
            "classes; keep the files of one data set only"
        )
    if not row:
        raise DataError(f"{paths[0]} has no rows; give files with images")
    group_file, group_index, group_start = np.array(groups, np.int64).reshape(-1, 3).T
    image, names = all_names[0]
    files = tuple(str(path) for path in paths)
    return (
        names,
        np.concatenate(labels),
        ParquetRows(files, image, group_file, group_index, group_start, np.arange(row)),
    )


def _columns(path: Path, schema: pa.Schema) -> tuple[str, str]:
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    for found, allowed in ((image, IMAGE_COLUMNS), (label, LABEL_COLUMNS)):
        if found is None:
            raise DataError(
                f"{path} has the columns {short(schema.names)}, but none called {' or '.join(allowed)}; rename the "
                "right one"
            )
    kind = schema.field(image).type
    if not pa.types.is_struct(kind) or kind.get_field_index("bytes") < 0:
        raise DataError(f"{path} column {image} is {kind}, but must be struct<bytes, path>; write it as a Hub image")
    if not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"{path} column {label} is {schema.field(label).type}, but must be an integer class number")
    return image, label


def _class_names(schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """`info.features.<label>.names` of the `huggingface` schema metadata, if it is there."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(features[label]["names"])
    except (KeyError, TypeError, ValueError):
        return None


def _root(data: DataConfig) -> Path:
    if data.path is None:
        raise ConfigError(f"data.path is not set, but data.source {data.source!r} reads from it; set the directory")
    root = Path(data.path).expanduser().absolute()  # absolute: workers may run elsewhere
    if not root.exists() and not data.download:
        hint = "set data.download=true or " if data.source in ("cifar10", "cifar100", "imagenette") else ""
        raise DataError(f"data.path {root} does not exist; {hint}give the path where {data.source} data lies")
    return root


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


READERS: dict[str, Callable[[DataConfig, DatasetInfo], tuple[Listing, Listing]]] = {
    "digits": _read_digits,
    "cifar10": _read_cifar,
    "cifar100": _read_cifar,
    "imagenette": _read_imagenette,
    "imagenet": _read_imagenet,
    "folder": _read_folder,
    "parquet": _read_parquet,
}
