"""Real images chosen by an expert's features as starting images: k-centre and herding, class by class."""

import json
from collections.abc import Callable, Sequence

import numpy as np
import torch

from cvdd_ray.core.coresets import CORESETS, features
from cvdd_ray.core.experts import ExpertSpec, work_device
from cvdd_ray.data.datasets import DatasetInfo, normalize
from cvdd_ray.data.images import RealImages
from cvdd_ray.data.shards import cuts
from cvdd_ray.stages.context import StageWork

TOGETHER = 64  # images in one call of the network
MAX_PIECES = 100  # of work that classes are divided into

Candidates = Sequence[tuple[int, np.ndarray]]  # label, and indices of real images, class by class


def choose_coresets(
    work: StageWork, candidates: Candidates, images: np.ndarray | RealImages, info: DatasetInfo, method: str, number: int,
    observer: ExpertSpec,
) -> dict[int, list[int]]:  # fmt: skip
    """Return by label the positions, in the class's candidates, of `number` images in the order they were chosen."""
    items = {
        f"coresets{piece:05d}": [candidates[k] for k in classes]
        for piece, classes in enumerate(class_portions(len(candidates)))
    }
    made = work.each(choose_of_classes, items, (images, info, method, number, observer), doing="choose images")
    return {int(label): chosen for data in made.values() for label, chosen in json.loads(data).items()}


def class_portions(num_classes: int) -> list[range]:
    """Return the classes divided into pieces of work."""
    return cuts(num_classes, -(-num_classes // MAX_PIECES))


def choose_of_classes(
    classes: Candidates, images: np.ndarray | RealImages, info: DatasetInfo, method: str, number: int, observer: ExpertSpec,
    report: Callable[[dict], None],
) -> bytes:  # fmt: skip
    """Return as JSON what `choose_coresets` does, for some classes."""
    device, chosen = work_device(), {}
    network = observer.build(device)
    for done, (label, index_N) in enumerate(classes, 1):
        blocks = []
        for block in cuts(len(index_N), TOGETHER):
            some = index_N[block.start : block.stop]
            pixels = images[some] if isinstance(images, np.ndarray) else images.subset(some).stack(info.image_size)
            blocks.append(features(network, normalize(torch.from_numpy(pixels).to(device), info)).cpu())
        chosen[label] = CORESETS[method](torch.cat(blocks), number)
        report({"done": done / len(classes)})
    return json.dumps(chosen).encode()
