"""In which arithmetic votes are computed: float32, TF32 (CUDA), or bfloat16 autocast.

Whatever is chosen, images and their gradients, Adam, losses and the statistics that are matched are float32.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from cvdd_ray.errors import ConfigError

Precision = Literal["float32", "tf32", "bfloat16"]


def require_tf32_device(precision: Precision, device: torch.device) -> None:
    """Raise ConfigError for tf32 where there is no GPU: a CPU has no such arithmetic, and what it made in float32 would be
    recorded as something else."""
    if precision == "tf32" and device.type != "cuda":
        raise ConfigError(
            "synthesize.precision: got 'tf32', which is arithmetic of CUDA GPUs, but the work would be done on a CPU; use float32"
        )


@contextmanager
def tensor_cores(precision: Precision) -> Iterator[None]:
    """With tf32 matrix products and convolutions on CUDA are TF32 inside, and what they were outside; nothing else changes.

    This is a setting of the process, and other threads see it, too.
    """
    if precision != "tf32":
        yield
        return
    places = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [place.fp32_precision for place in places]
    try:
        for place in places:
            place.fp32_precision = "tf32"
        yield
    finally:
        for place, value in zip(places, before, strict=True):
            place.fp32_precision = value


def lowered(precision: Precision, device: torch.device) -> AbstractContextManager:
    """Return the context of a forward pass: bfloat16 autocast where that is the precision."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


def not_lowered(device: torch.device) -> AbstractContextManager:
    """Return a context in which an autocast around it has no effect."""
    return torch.autocast(device.type, enabled=False) if device.type in ("cpu", "cuda") else nullcontext()


def widened(x: Tensor) -> Tensor:
    """Return a bfloat16 tensor as float32; wider ones as they are."""
    return x.float() if x.dtype == torch.bfloat16 else x
