"""Starting images from patches of real ones, scored by an observer (RDED; spec sections 4 and 9.3).

Legend: M crops of one image, C channels, H W pixels of the real image, P pixels of a patch, S pixels of the result.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvdd_ray.core.augment import Views, apply_views, draw_boxes
from cvdd_ray.core.keys import generator


def noise_image(seed: int, image_index: int, label: int, size: int) -> Tensor:
    """Return one image (C, S, S) from N(0, 1) in normalised space: a function of (seed, index, label)."""
    return torch.randn((3, size, size), generator=generator(seed, "noise", image_index, label))


def random_patches(image_CHW: Tensor, num_crops: int, patch_size: int, draw: torch.Generator) -> Tensor:
    """Return patches_MCPP: square random resized crops with area share .08-1 (antialiased, since crops shrink)."""
    height, width = image_CHW.shape[-2:]
    boxes_M4 = draw_boxes(num_crops, height, width, draw, ratio=(1.0, 1.0))
    still = Views(boxes_M4, torch.zeros(num_crops, dtype=torch.bool), torch.zeros(num_crops, 2, dtype=torch.long))
    return apply_views(image_CHW.expand(num_crops, -1, -1, -1), still, patch_size)


@torch.no_grad()
def observer_losses(observer: nn.Module, patches_NCPP: Tensor, label: int, size: int) -> Tensor:
    """Return loss_N = -log p(label), the patch zero-padded (mean colour) to the middle of a size x size input."""
    before = (size - patches_NCPP.shape[-1]) // 2
    after = size - patches_NCPP.shape[-1] - before
    logits_NK = observer(F.pad(patches_NCPP, (before, after, before, after)))
    return -F.log_softmax(logits_NK, 1)[:, label]


def rank_window(num_candidates: int, needed: int, difficulty: str) -> range:
    """Return the ranks taken from the list sorted by ascending loss: `easy` the first, `hard` the last, `medium` the
    centred window (spec section 4: the published word is undefined, this is the project's reading)."""
    start = {"easy": 0, "medium": (num_candidates - needed) // 2, "hard": num_candidates - needed}[difficulty]
    return range(start, start + needed)


def mosaic_ranks(num_images: int, factor: int) -> list[list[int]]:
    """Return for every image the ranks of its factor*factor cells, row by row: image t holds t, t+n, t+2n ..."""
    return [[t + cell * num_images for cell in range(factor * factor)] for t in range(num_images)]


def tile(patches: Sequence[Tensor], factor: int, size: int) -> Tensor:
    """Return one image (C, S, S) of factor x factor patches; cells are resized (nearest) only if S % factor is not 0,
    the first cells getting the extra pixel."""
    edges = [size // factor + (1 if cell < size % factor else 0) for cell in range(factor)]
    rows = []
    for row in range(factor):
        cells = []
        for column in range(factor):
            patch = patches[row * factor + column]
            if patch.shape[-2:] != (edges[row], edges[column]):
                patch = F.interpolate(patch[None], (edges[row], edges[column]), mode="nearest")[0]
            cells.append(patch)
        rows.append(torch.cat(cells, 2))
    return torch.cat(rows, 1)
