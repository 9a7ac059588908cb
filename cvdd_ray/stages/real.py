"""Real images as batches: whole uint8 stacks up to 64 px, decoded on demand above.

Legend: N images, B images of a batch, C channels, S pixels.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from cvdd_ray.core.augment import Views, apply_views, draw_boxes
from cvdd_ray.core.training import padded_crops, resized_crops, shuffled_batches
from cvdd_ray.core.workers import ALONE, Workers
from cvdd_ray.data.datasets import DatasetInfo, normalize
from cvdd_ray.data.images import RealImages

SMALL = 64  # largest side in pixels that is kept in memory as one stack
TEST_BATCH = 256

Split = tuple[np.ndarray | RealImages, np.ndarray]  # images (uint8 stack_NCSS, or decoded on demand) and labels_N


def split_for_workers(real: RealImages, info: DatasetInfo) -> Split:
    """Return what a worker needs of a split: pixels if they are small, else where to read them."""
    return (real.stack(info.image_size) if info.image_size <= SMALL else real), np.asarray(real.labels)


def test_batches(
    split: Split,
    info: DatasetInfo,
    device: torch.device,
    workers: Workers = ALONE,  # noqa: PT028, it is no test
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (images_BCSS normalised, labels_B) of the whole split in order; no augmentation (spec section 1). Of several
    workers each gets its share of the batches."""
    images, labels_N = split
    for batch in workers.own(math.ceil(len(labels_N) / TEST_BATCH)):
        start = batch * TEST_BATCH
        chosen = np.arange(start, min(start + TEST_BATCH, len(labels_N)))
        pixels = images[chosen] if isinstance(images, np.ndarray) else images.subset(chosen).stack(info.image_size)
        yield normalize(torch.from_numpy(pixels).to(device), info), torch.from_numpy(labels_N[chosen]).to(device)


def train_batches(
    split: Split, info: DatasetInfo, *, batch_size: int, crop: str, pad: int, flip: bool, seed: int, epoch: int,
    device: torch.device, workers: Workers = ALONE,
) -> Iterator[tuple[Tensor, Tensor]]:  # fmt: skip
    """Yield augmented (images_BCSS normalised, labels_B) of one epoch, a pure function of (seed, epoch); of several workers
    this one's part of every batch.

    Padded crops put zeros around the pixels, before normalisation. Images decoded on demand always take random resized
    crops of their own size.  Source: spec section 2.
    """
    images, labels_N = split
    batches, draw = shuffled_batches(len(labels_N), batch_size, seed, epoch, workers)
    for index_B in batches:
        labels_B = torch.from_numpy(labels_N[index_B.numpy()]).to(device)
        if isinstance(images, np.ndarray):
            pixels_BCSS = torch.from_numpy(images[index_B.numpy()]).to(device)
            if crop == "pad":
                yield normalize(padded_crops(pixels_BCSS, pad, draw, flip=flip), info), labels_B
            else:
                yield resized_crops(normalize(pixels_BCSS, info), draw, flip=flip), labels_B
        else:
            yield _decoded_crops(images, index_B.tolist(), info, draw, flip).to(device), labels_B


def _decoded_crops(images: RealImages, index_B: list[int], info: DatasetInfo, draw, flip: bool) -> Tensor:
    with ThreadPoolExecutor() as pool:
        decoded = list(pool.map(images.read, index_B))
    crops = []
    for pixels_HWC in decoded:
        image_1CHW = normalize(torch.from_numpy(pixels_HWC.copy()).permute(2, 0, 1)[None], info)
        box_14 = draw_boxes(1, *image_1CHW.shape[-2:], draw)
        mirrored = torch.rand(1, generator=draw) < (0.5 if flip else 0.0)
        crops.append(
            apply_views(image_1CHW, Views(box_14, mirrored, torch.zeros(1, 2, dtype=torch.long)), info.image_size)
        )
    return torch.cat(crops)
