"""Differentiable Siamese augmentation (DSA): one operation, with the same numbers for all images of a batch (spec 9.6).

Everything is linear in the images but `color`, and made of matrix products, sums and slices, so that its gradient is exact and
deterministic on every device.

Legend: B images of a batch, C channels, S pixels.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

SHIFT, CUT = 0.125, 0.5  # of the side: the largest shift of a crop, the side of the box that is cut out
ZOOM, DEGREES = 1.2, 15.0  # largest enlargement per axis, and its inverse; largest turn
Drawn = tuple[str, tuple[float, float, float]]
"""An operation by name and its three random numbers, uniform in [0, 1)."""


def color(images_BCSS: Tensor, brightness: float, saturation: float, contrast: float) -> Tensor:
    """Return images made up to 0.5 brighter or darker, with up to twice the distance of channels from their mean, and with
    0.5 to 1.5 of the distance of all values from theirs."""
    x = images_BCSS + (brightness - 0.5)
    grey = x.mean(1, keepdim=True)
    x = grey + (x - grey) * (2 * saturation)
    mean = x.mean((1, 2, 3), keepdim=True)
    return mean + (x - mean) * (contrast + 0.5)


def crop(images_BCSS: Tensor, down: float, right: float, _: float) -> Tensor:
    """Return images moved by up to an eighth of their side, with zeros where they leave it."""
    size = images_BCSS.shape[-1]
    most = math.floor(SHIFT * size + 0.5)
    top, left = (math.floor(number * (2 * most + 1)) for number in (down, right))
    return F.pad(images_BCSS, (most,) * 4)[:, :, top : top + size, left : left + size]


def cutout(images_BCSS: Tensor, row: float, column: float, _: float) -> Tensor:
    """Return images with zeros in a box of half their side around a uniform centre, as far as it is inside."""
    size = images_BCSS.shape[-1]
    side = math.floor(CUT * size + 0.5)
    keep_SS = images_BCSS.new_ones(size, size)
    top, left = (math.floor(number * (size + 1 - side % 2)) - side // 2 for number in (row, column))
    keep_SS[max(top, 0) : max(top + side, 0), max(left, 0) : max(left + side, 0)] = 0
    return images_BCSS * keep_SS


def flip(images_BCSS: Tensor, number: float, *_: float) -> Tensor:
    """Return images mirrored with probability one half."""
    return images_BCSS.flip(3) if number < 0.5 else images_BCSS


def scale(images_BCSS: Tensor, down: float, right: float, _: float) -> Tensor:
    """Return images enlarged or shrunk about their centre, each axis by its own factor, with zeros around."""
    factors = (1 / ZOOM + number * (ZOOM - 1 / ZOOM) for number in (down, right))
    return resampled(images_BCSS, torch.diag(torch.tensor(list(factors))))


def rotate(images_BCSS: Tensor, number: float, *_: float) -> Tensor:
    """Return images turned about their centre, with zeros around."""
    angle = math.radians((2 * number - 1) * DEGREES)
    turn_22 = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    return resampled(images_BCSS, turn_22)


def resampled(images_BCSS: Tensor, source_22: Tensor) -> Tensor:
    """Return images whose pixel at p, counted from the centre as (down, right), is what was at source_22 @ p: bilinear, 0
    outside. One matrix (S^2, S^2) for the whole batch."""
    size = images_BCSS.shape[-1]
    place_S = torch.arange(size) - (size - 1) / 2
    place_P2 = torch.cartesian_prod(place_S, place_S) @ source_22.T.to(place_S) + (size - 1) / 2
    rows_PS, columns_PS = ((1 - (place_P2[:, axis, None] - torch.arange(size)).abs()).clamp(min=0) for axis in (0, 1))
    weights_PP = (rows_PS[:, :, None] * columns_PS[:, None, :]).flatten(1).to(images_BCSS)
    return (images_BCSS.flatten(2) @ weights_PP.T).view_as(images_BCSS)


OPERATIONS: dict[str, Callable[..., Tensor]] = {
    "color": color, "crop": crop, "cutout": cutout, "flip": flip, "scale": scale, "rotate": rotate,
}  # fmt: skip


def operations(flip_allowed: bool) -> tuple[str, ...]:
    """Return the names of all operations, without `flip` where a mirrored image does not keep its label."""
    return tuple(name for name in OPERATIONS if flip_allowed or name != "flip")


def draw_operation(names: Sequence[str], draw: torch.Generator) -> Drawn:
    """Return one operation of `names` and its numbers, a function of the generator's state."""
    name = names[int(torch.randint(len(names), (), generator=draw))]
    return name, tuple(torch.rand(3, generator=draw, dtype=torch.float64).tolist())


def augmented(images_BCSS: Tensor, drawn: Drawn) -> Tensor:
    """Return the images under an operation that was drawn, the same for all of them; differentiable."""
    name, numbers = drawn
    return OPERATIONS[name](images_BCSS, *numbers)
