"""An expert as a value: everything needed to build it anywhere, weights included."""

from dataclasses import dataclass

import torch
from torch import nn

from cvdd_ray.core.models import build_model, weights_from_bytes


@dataclass(frozen=True)
class ExpertSpec:
    """A trained backbone: model name, number of classes, input side in pixels, channel multiplier, safetensors bytes."""

    name: str
    num_classes: int
    image_size: int
    width: float
    weights: bytes

    def build(self, device: str | torch.device = "cpu") -> nn.Module:
        """Return the network in eval mode on `device`."""
        with torch.random.fork_rng(devices=[]):
            model = build_model(self.name, self.num_classes, self.image_size, width=self.width)
        weights_from_bytes(model, self.weights)
        return model.eval().to(device)


def work_device() -> torch.device:
    """Return the GPU that is visible to this process, or else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def prepare_torch(threads: int) -> torch.device:
    """Set this process up for reproducible work and return its device: torch threads as given, cuDNN deterministic,
    without autotuning or TF32."""
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    return work_device()
