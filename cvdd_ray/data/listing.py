"""What a reader finds out about a split before any image is read, and where it looks. Shapes: N images, S pixels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cvdd_ray.config import DataConfig
from cvdd_ray.data.images import RealImages, Source, in_memory, load_images
from cvdd_ray.data.remote import Remote, is_uri, without_secrets
from cvdd_ray.errors import ConfigError, DataError

DOWNLOADED = ("cifar10", "cifar100", "imagenette")
LOCAL_ONLY = ("cifar10", "cifar100")


@dataclass(frozen=True, eq=False)
class Listing:
    """One split before its images are read; `pixels` uint8 (N, 3, S, S) for sources that are in memory anyway."""

    title: str
    classes: tuple[str, ...]
    labels: np.ndarray
    source: Source | None = None
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


def numbered(labels: np.ndarray, num_classes: int, where: str) -> tuple[str, ...]:
    """Return the names of classes that have none: their numbers, `num_classes` of them (0: as many as there are labels).

    Raises DataError for a label that leaves some class without an image, whatever the others are.
    """
    highest = int(labels.max())
    if not num_classes and highest >= len(labels):
        raise DataError(
            f"{where} has label {highest}, but only {len(labels)} images: classes are numbered from 0 and each needs "
            f"images; correct the labels, or name the classes"
        )
    return tuple(map(str, range(num_classes or highest + 1)))


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


def data_root(data: DataConfig) -> Path | Remote:
    """Return `data.path`, absolute, or what is behind its URI.  Raises ConfigError or DataError when that cannot be."""
    if data.path is None:
        raise ConfigError(f"data.path is not set, but data.source {data.source!r} reads from it; set the directory")
    if is_uri(data.path):
        return _remote_root(data)
    root = Path(data.path).expanduser().absolute()  # absolute: workers may run elsewhere
    if not root.exists() and not data.download:
        hint = "set data.download=true or " if data.source in DOWNLOADED else ""
        raise DataError(f"data.path {root} does not exist; {hint}give the path where {data.source} data lies")
    return root


def _remote_root(data: DataConfig) -> Remote:
    where = without_secrets(data.path)
    if data.source in LOCAL_ONLY or data.download:
        raise ConfigError(
            f"data.path {where}: {'data.download' if data.download else f'data.source {data.source!r}'} needs a local "
            f"directory; from an object store read folder, imagenet, imagenette, parquet or webdataset"
        )
    try:
        return Remote(data.path)
    except (ValueError, OSError) as error:  # pyarrow's own messages repeat the URI, credentials and all
        reason = str(error) if data.path.startswith("s3://") else type(error).__name__
        raise ConfigError(
            f"data.path: cannot open {where!r} ({reason}); give a directory or an s3://bucket/prefix URI"
        ) from None
