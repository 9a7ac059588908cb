"""Views of images: crop, flip, roll and CutMix as pure functions of integers.

Crop-and-resize, flip and roll act on rows and columns separately, so a view is `rows @ image @ columns.T` with two small
matrices. The same code serves synthesis (where autograd needs the transpose, which a matrix product has exactly and
deterministically on every device), labelling and replay.

Legend: N images, C channels, H W input pixels, S output pixels.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

CROP_RATIO = (3 / 4, 4 / 3)


@dataclass(frozen=True)
class Views:
    """Geometry of N views. boxes_N4: top, left, height, width in pixels; flips_N: mirrored; rolls_N2: down, right."""

    boxes_N4: Tensor
    flips_N: Tensor
    rolls_N2: Tensor

    def __len__(self) -> int:
        return len(self.boxes_N4)


def draw_boxes(
    num: int, height: int, width: int, generator: torch.Generator, scale=(0.08, 1.0), ratio=CROP_RATIO
) -> Tensor:
    """Return boxes_N4 (int64: top, left, height, width) distributed as a random resized crop: ten tries of a uniform
    area share and a log-uniform aspect ratio, then the largest centred box of allowed ratio. `scale` is the range of the
    area share; its low end may be one number per box.  Source: spec 5.3."""
    low, high = scale
    if isinstance(low, Tensor):
        share_NT = torch.rand(num, 10, dtype=torch.float64, generator=generator)
        area_NT = (low[:, None] + (high - low[:, None]) * share_NT) * (height * width)
    else:
        area_NT = torch.empty(num, 10, dtype=torch.float64).uniform_(low, high, generator=generator) * (height * width)
    log_ratio = (math.log(ratio[0]), math.log(ratio[1]))
    ratio_NT = torch.empty(num, 10, dtype=torch.float64).uniform_(*log_ratio, generator=generator).exp()
    place_N2 = torch.rand(num, 2, dtype=torch.float64, generator=generator)
    w_NT = (area_NT * ratio_NT).sqrt().round().long()
    h_NT = (area_NT / ratio_NT).sqrt().round().long()
    fits_NT = (w_NT > 0) & (w_NT <= width) & (h_NT > 0) & (h_NT <= height)
    first_N1 = fits_NT.to(torch.uint8).argmax(1, keepdim=True)
    h_N, w_N = h_NT.gather(1, first_N1)[:, 0], w_NT.gather(1, first_N1)[:, 0]
    none_N = ~fits_NT.any(1)
    if none_N.any():
        aspect = min(max(width / height, ratio[0]), ratio[1])
        h_N = torch.where(none_N, min(height, round(width / aspect)), h_N)
        w_N = torch.where(none_N, min(width, round(height * aspect)), w_N)
        place_N2 = torch.where(none_N[:, None], 0.5, place_N2)
    top_N = (place_N2[:, 0] * (height - h_N + 1)).long().clamp(max=height - h_N)
    left_N = (place_N2[:, 1] * (width - w_N + 1)).long().clamp(max=width - w_N)
    return torch.stack([top_N, left_N, h_N, w_N], 1)


def draw_views(
    num: int, size: int, generator: torch.Generator, *, crop: bool, flip: bool, roll: int, scale=(0.08, 1.0),
    roll_both_ways: bool = False, pad: int | None = None,
) -> Views:  # fmt: skip
    """Draw `num` views of size x size images; `scale` as in `draw_boxes`. The roll is uniform over {0..roll} squared, never
    negative (spec 5.3), or over {-roll..roll} squared (spec 9.1). With `pad` a crop is a shift by up to so many pixels, with
    zeros where it leaves the image (spec 9.4)."""
    if crop and pad is not None:
        corners_N2 = torch.randint(2 * pad + 1, (num, 2), generator=generator) - pad
        boxes_N4 = torch.cat([corners_N2, torch.full((num, 2), size)], 1)
    elif crop:
        boxes_N4 = draw_boxes(num, size, size, generator, scale)
    else:
        boxes_N4 = torch.tensor([0, 0, size, size]).repeat(num, 1)
    flips_N = torch.rand(num, generator=generator) < 0.5 if flip else torch.zeros(num, dtype=torch.bool)
    rolls_N2 = torch.randint(-roll if roll_both_ways else 0, roll + 1, (num, 2), generator=generator)
    return Views(boxes_N4, flips_N, rolls_N2)


def resample_matrix(start_N: Tensor, length_N: Tensor, in_size: int, out_size: int) -> Tensor:
    """Return matrices_NSH (float32) that cut [start, start+length) out of `in_size` pixels and resize it bilinearly to
    `out_size`, with antialiasing where it shrinks: a triangle filter, normalised inside the cut. What lies outside of the
    image is 0."""
    step_N = length_N.double() / out_size
    support_N11 = step_N.clamp(min=1.0)[:, None, None]
    centre_NS1 = ((torch.arange(out_size, device=step_N.device) + 0.5)[None, :] * step_N[:, None])[:, :, None]
    pixel_H = torch.arange(in_size, device=step_N.device)
    inside_N1H = (pixel_H >= start_N[:, None]) & (pixel_H < (start_N + length_N)[:, None])
    offset_N1H = (pixel_H - start_N[:, None])[:, None, :] + 0.5
    weight_NSH = (1.0 - (offset_N1H - centre_NS1).abs() / support_N11).clamp(min=0.0) * inside_N1H[:, None, :]
    return (weight_NSH / weight_NSH.sum(2, keepdim=True).clamp(min=1e-9)).float()


def view_matrices(views: Views, height: int, width: int, size: int) -> tuple[Tensor, Tensor]:
    """Return rows_NSH and columns_NSW that crop, then flip, then roll (row r of the output comes from r - roll)."""
    top_N, left_N, h_N, w_N = views.boxes_N4.unbind(1)
    rows_NSH = resample_matrix(top_N, h_N, height, size)
    columns_NSW = resample_matrix(left_N, w_N, width, size)
    columns_NSW = torch.where(views.flips_N[:, None, None], columns_NSW.flip(1), columns_NSW)
    source_S = torch.arange(size, device=top_N.device)
    row_NS = (source_S - views.rolls_N2[:, :1]) % size
    column_NS = (source_S - views.rolls_N2[:, 1:]) % size
    rows_NSH = rows_NSH.gather(1, row_NS[:, :, None].expand(-1, -1, height))
    columns_NSW = columns_NSW.gather(1, column_NS[:, :, None].expand(-1, -1, width))
    return rows_NSH, columns_NSW


def apply_views(images: Tensor, views: Views, size: int) -> Tensor:
    """Return the views (N, ..., C, S, S) of images (N, ..., C, H, W); all inner images of n share view n.

    Differentiable and linear in the images; the geometry may live on another device than the images.
    """
    rows, columns = view_matrices(views, images.shape[-2], images.shape[-1], size)
    inner = (1,) * (images.dim() - 3)
    rows = rows.to(images.device).view(len(views), *inner, *rows.shape[1:])
    columns = columns.to(images.device).view(len(views), *inner, *columns.shape[1:])
    return rows @ images @ columns.transpose(-1, -2)


def draw_cutmix_box(size: int, generator: torch.Generator) -> tuple[int, int, int, int]:
    """Return one CutMix box (top, left, bottom, right; possibly empty): lambda ~ Beta(1,1), side int(S sqrt(1-lambda)),
    uniform centre, clipped at the borders.  Source: spec 6.1 step 3."""
    lam = float(torch.rand((), generator=generator, dtype=torch.float64))
    side = int(size * math.sqrt(1.0 - lam))
    row, column = (int(v) for v in torch.randint(size, (2,), generator=generator))
    top, left = max(row - side // 2, 0), max(column - side // 2, 0)
    return top, left, min(row + side // 2, size), min(column + side // 2, size)


def cutmix(images_BCHW: Tensor, partner_B: Tensor, box: tuple[int, int, int, int]) -> Tensor:
    """Return a new tensor in which the box of every image is that of its partner; the input is left unchanged."""
    top, left, bottom, right = box
    mixed_BCHW = images_BCHW.clone()
    mixed_BCHW[:, :, top:bottom, left:right] = images_BCHW[partner_B, :, top:bottom, left:right]
    return mixed_BCHW
