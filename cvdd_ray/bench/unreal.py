"""What a benchmark works on: seeded random networks and images, and a run without its data.

Statistics of BatchNorm are those of one batch of noise. Times do not depend on any of it.

Legend: N images, C channels, S pixels.
"""

import numpy as np
import torch
from PIL import Image
from torch import nn

from cvdd_ray.config import RunConfig
from cvdd_ray.core.costs import Network
from cvdd_ray.core.experts import ExpertSpec, work_device
from cvdd_ray.core.models import build_seeded, save_weights
from cvdd_ray.data.outlines import outline
from cvdd_ray.stages.context import Run


def random_network(network: Network, device: torch.device | None = None) -> nn.Module:
    """Return it with seeded weights and the BatchNorm statistics of a batch of noise, in eval mode."""
    model = build_seeded(network.name, network.num_classes, network.image_size, width=network.width, seed=0).train()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        model(torch.randn(8, 3, network.image_size, network.image_size, generator=draw))
    return model.eval().to(device or work_device())


def random_pixels(num_images: int, size: int) -> np.ndarray:
    """Return uint8 images (N, 3, S, S)."""
    return np.random.default_rng(0).integers(0, 256, (num_images, 3, size, size), np.uint8)


def as_pil(images_NCSS: np.ndarray) -> list[Image.Image]:
    """Return uint8 images (N, 3, S, S) as PIL images."""
    return [Image.fromarray(pixels.transpose(1, 2, 0)) for pixels in images_NCSS]


def random_expert(network: Network) -> ExpertSpec:
    """Return it as an expert with random weights."""
    weights = save_weights(random_network(network, torch.device("cpu")))
    return ExpertSpec(network.name, network.num_classes, network.image_size, network.width, weights)


def unreal_run(config: RunConfig, num_classes: int | None) -> Run:
    """Return the run of a configuration without its images; `num_classes` where nothing says how many there are."""
    counts = {"num_classes": num_classes, "train_images": 2 * num_classes, "test_images": 1} if num_classes else {}
    return Run(config, "bench", real=outline(config.data, **counts))
