"""Several micro-batches of a student in one call, each normalised as if it were alone.

A student's BatchNorm must see the small groups that the teachers saw (spec section 7). One call per group leaves a machine
idle between many small operations; here the groups share all layers but BatchNorm, which takes them one after the other.

Legend: N images of a call, M micro-batches in it.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import StochasticDepth

MAX_PIXELS = (
    2**21
)  # of a call's images: 2,048 of 32 x 32, 41 of 224 x 224; bounds what a step keeps for its backward pass


def draws_numbers(student: nn.Module) -> bool:
    """Return whether the network draws random numbers while it trains (dropout, stochastic depth)."""
    kinds = (nn.modules.dropout._DropoutNd, StochasticDepth)
    return any(isinstance(layer, kinds) and layer.p > 0 for layer in student.modules())


def micro_batches_per_call(student: nn.Module, bn_group: int, image_size: int) -> int:
    """Return how many micro-batches of `bn_group` images, `image_size` pixels high and wide, a call takes: as many as
    `MAX_PIXELS` holds, or one where the network draws numbers, since each micro-batch has its own."""
    return 1 if draws_numbers(student) else max(1, MAX_PIXELS // (bn_group * image_size**2))


@contextmanager
def own_statistics(student: nn.Module) -> Iterator[list[int]]:
    """Yield a list that says of how many images each of a call's micro-batches is; the caller fills it before each call.

    Inside, the student's BatchNorm layers in training normalise every micro-batch with its own statistics, and add them to
    the running ones in turn: what as many calls would do, to the bit. Outside, the layers are what they were.
    """
    sizes_M: list[int] = []
    layers = [layer for layer in student.modules() if isinstance(layer, _BatchNorm)]

    def grouped(layer: _BatchNorm):
        alone = layer.forward

        def forward(x_N: Tensor) -> Tensor:
            if len(sizes_M) == 1:
                return alone(x_N)
            return torch.cat([alone(x) for x in x_N.split(sizes_M)])

        return forward

    try:
        for layer in layers:
            layer.forward = grouped(layer)
        yield sizes_M
    finally:
        for layer in layers:
            del layer.forward
