"""An expert as a value: everything needed to build it anywhere, weights included."""

import ctypes
import sys
from dataclasses import dataclass

import torch
from torch import nn

KEPT_BYTES = 2**28
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h


@dataclass(frozen=True)
class ExpertSpec:
    """A trained backbone: model name, number of classes, input side in pixels, channel multiplier, safetensors bytes, and
    those of the statistics it is to match besides BatchNorm's, if any (stages/statistics.py)."""

    name: str
    num_classes: int
    image_size: int
    width: float
    weights: bytes
    statistics: bytes | None = None

    def build(self, device: str | torch.device = "cpu") -> nn.Module:
        """Return the network in eval mode on `device`."""
        # here, since it loads torchvision: seconds that an actor which asks others is spared
        from cvdd_ray.core.models import build_model, weights_from_bytes

        with torch.random.fork_rng(devices=[]):
            model = build_model(self.name, self.num_classes, self.image_size, width=self.width)
        weights_from_bytes(model, self.weights)
        return model.eval().to(device)


def work_device() -> torch.device:
    """Return the GPU that is visible to this process, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_torch(threads: int, *, keep_memory: bool = True) -> torch.device:
    """Set this process up for reproducible work and return its device: torch threads as given, cuDNN deterministic,
    without autotuning or TF32, and, unless told otherwise, memory that is freed kept (`keep_freed_memory`)."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    if keep_memory:
        keep_freed_memory()
    return work_device()


def keep_freed_memory() -> None:
    """Let this process keep what it frees, in blocks of up to 256 MiB, instead of giving it back to the system.

    A CPU step allocates the same large tensors again and again; by default every one is zeroed page by page by the system
    each time, a sixth of the time of labelling. Works with glibc's allocator, and does nothing with another.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, KEPT_BYTES)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
