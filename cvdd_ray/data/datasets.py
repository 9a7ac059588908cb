"""The one table of dataset constants, and the way from pixels to the networks' input and back.

Shapes: N images, C = 3 channels (RGB), H W pixels.
"""

import warnings
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch

from cvdd_ray.config import DataConfig
from cvdd_ray.errors import ConfigError

NORMALIZED_BYTES = 1 << 30
SMALL_SIDE = 64
"""Up to this input side images are used as they are; above it they are resized and cropped (spec section 1)."""


@dataclass(frozen=True)
class DatasetInfo:
    """Constants of one dataset: all that the algorithm knows about its images (spec section 1)."""

    name: str
    num_classes: int
    """Number of classes; 0 only before the source was asked (see `dataset_info`)."""
    image_size: int
    """Side of the square network input in pixels."""
    mean: tuple[float, float, float]
    """Mean of R, G, B for pixels scaled to [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of R, G, B for pixels scaled to [0, 1]."""
    roll: int
    """Largest circular shift of a synthetic view in pixels ("recover jitter")."""
    class_chunk: int
    """Classes optimised together, one image each ("recover batch")."""

    @property
    def image_bytes(self) -> int:
        """Pixels of one image as uint8."""
        return 3 * self.image_size**2

    @property
    def index_bytes(self) -> int:
        """Pixels of one image index, an image of every class, as uint8: what shards of image sets are counted in."""
        return self.num_classes * self.image_bytes


IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def _imagenet_like(name: str, num_classes: int, size: int, roll: int, class_chunk: int) -> DatasetInfo:
    return DatasetInfo(name, num_classes, size, IMAGENET_MEAN, IMAGENET_STD, roll, class_chunk)


_ROWS = (
    # Greyscale; measured at 16 px on all that is not test (tests/data/test_sources.py measures again).
    DatasetInfo("digits", 10, 16, (0.3053, 0.3053, 0.3053), (0.3188, 0.3188, 0.3188), 1, 10),
    DatasetInfo("cifar10", 10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 4, 10),
    DatasetInfo("cifar100", 100, 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 4, 100),
    _imagenet_like("tiny_imagenet", 200, 64, 4, 100),
    _imagenet_like("imagenette", 10, 224, 32, 10),
    _imagenet_like("imagewoof", 10, 224, 32, 10),
    _imagenet_like("imagenet100", 100, 224, 32, 100),
    _imagenet_like("imagenet1k", 1000, 224, 32, 100),
)
DATASETS: dict[str, DatasetInfo] = {row.name: row for row in _ROWS}

_ROW_OF_SOURCE = {
    "digits": "digits",
    "cifar10": "cifar10",
    "cifar100": "cifar100",
    "imagenette": "imagenette",
    "imagenet": "imagenet1k",
}


def dataset_info(data: DataConfig) -> DatasetInfo:
    """Constants for the configured source, before any file is looked at.

    `folder`, `parquet` and `webdataset` take the row `data.dataset`; without one they get ImageNet statistics, `num_classes` 0
    (the source is asked later) and `image_size` from the config. `data.image_size` overrides a row's; when that
    moves a row across 64 px, its roll becomes the usual one of that side (4 up to 64 px, 32 above). So do `data.mean` and
    `data.std`.

    Raises ConfigError: unknown dataset, a dataset that contradicts the source, or no image size.
    Source: spec section 1.
    """
    name = _ROW_OF_SOURCE.get(data.source, data.dataset)
    if data.dataset is not None and data.dataset not in DATASETS:
        raise ConfigError(
            f"data.dataset {data.dataset!r} is unknown; use one of {', '.join(DATASETS)}, or leave it out"
        )
    if data.dataset not in (None, name):
        raise ConfigError(
            f"data.dataset {data.dataset!r} contradicts data.source {data.source!r}, whose constants are those of "
            f"{name!r}; leave data.dataset out, or use data.source=folder or parquet"
        )
    if name is None:
        if data.image_size is None:
            raise ConfigError(
                f"data.source {data.source!r} has no image size; set data.image_size, or data.dataset to one of "
                f"{', '.join(DATASETS)}"
            )
        row = _imagenet_like(data.source, 0, data.image_size, _usual_roll(data.image_size), 100)
    else:
        row = DATASETS[name]
    row = replace(row, mean=data.mean or row.mean, std=data.std or row.std)
    size = data.image_size or row.image_size
    crossed = (size <= SMALL_SIDE) != (row.image_size <= SMALL_SIDE)
    return replace(row, image_size=size, roll=_usual_roll(size) if crossed else row.roll)


def _usual_roll(size: int) -> int:
    return 4 if size <= SMALL_SIDE else 32


def normalize(images: torch.Tensor, info: "DatasetInfo | Normalization") -> torch.Tensor:
    """Pixels uint8 (N, 3, H, W) -> network input float32 (N, 3, H, W): (pixel / 255 - mean) / std.

    Raises TypeError for anything but uint8, which would silently be scaled wrongly. Source: spec section 1.
    """
    if images.dtype != torch.uint8:
        raise TypeError(f"normalize takes uint8 pixels, got {images.dtype}; floats count as normalised already")
    mean, std = _mean_std(info, images.device)
    return (images.to(torch.float32) / 255 - mean) / std


class Normalization(NamedTuple):
    """Mean and standard deviation of R, G, B for pixels scaled to [0, 1], where no more of a dataset is known."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class Pixels:
    """uint8 images (N, 3, S, S) on a device that are normalised as they are picked: a quarter of the memory."""

    def __init__(self, images: torch.Tensor, info: DatasetInfo | Normalization):
        self._images, self._info = images, info
        self.shape, self.device = images.shape, images.device

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return normalize(self._images[index], self._info)


def network_inputs(
    images: np.ndarray, info: DatasetInfo | Normalization, device: torch.device
) -> "torch.Tensor | Pixels":
    """Return uint8 images (N, 3, S, S) on `device`, to be indexed by a tensor of rows for normalised float32 images:
    normalised beforehand as long as they take at most 1 GiB, with equal bits either way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of arrays that may not be written to; nothing here writes
        pixels = torch.from_numpy(images).to(device)  # no copy on the CPU, where workers of a node share one array
    return normalize(pixels, info) if network_input_bytes(pixels.numel()) > pixels.numel() else Pixels(pixels, info)


def network_input_bytes(num_values: int) -> int:
    """Bytes that `network_inputs` takes on the device for so many values."""
    return 4 * num_values if 4 * num_values <= NORMALIZED_BYTES else num_values


def denormalize(x: torch.Tensor, info: DatasetInfo) -> torch.Tensor:
    """Network input float (N, 3, H, W) -> pixels uint8 (N, 3, H, W): round(255 clamp(x std + mean, 0, 1)).

    Rounded, not truncated, so that `denormalize(normalize(p)) == p` for every pixel value p.
    """
    mean, std = _mean_std(info, x.device)
    return (255 * (x.to(torch.float32) * std + mean).clamp(0, 1)).round().to(torch.uint8)


def pixel_bounds(info: DatasetInfo) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalised values of black and white per channel: float32 (3,) low = -mean/std and high = (1 - mean)/std."""
    mean, std = torch.tensor(info.mean), torch.tensor(info.std)
    return -mean / std, (1 - mean) / std


def _mean_std(info: DatasetInfo | Normalization, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    mean, std = (torch.tensor(values, device=device).view(1, 3, 1, 1) for values in (info.mean, info.std))
    return mean, std
