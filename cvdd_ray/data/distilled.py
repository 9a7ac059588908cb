"""Distilled sets as a user of torch wants them: a Dataset of images, and batches with their soft labels.

Legend: N images, B images of a batch, C channels, K classes, S pixels.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cvdd_ray.core.softlabels import batch_views
from cvdd_ray.data.artifacts import Artifacts
from cvdd_ray.data.imagesets import ImageSet, read_image_set
from cvdd_ray.data.labels import SoftLabels
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError

IMAGES_NAME, LABELS_NAME = "distilled.arrow", "labels.arrow"


class DistilledDataset(Dataset):
    """Images of a distilled set: item i is (image_CSS uint8, label int). `labels` is set when soft labels are there."""

    def __init__(self, images: ImageSet, labels: SoftLabels | None):
        self.images, self.labels = images, labels
        self.pixels_NCSS = torch.from_numpy(images.images_NCHW.copy())
        self.classes = images.classes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels_NCSS[index], int(self.images.labels_N[index])

    def normalized(self) -> Tensor:
        """Return all images (N, C, S, S) as float32 network input, with the mean and std stored beside them."""
        mean, std = (torch.tensor(self.images.metadata[name])[:, None, None] for name in ("mean", "std"))
        return (self.pixels_NCSS.to(torch.float32) / 255 - mean) / std

    def soft_batches(self, epoch: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (views_BCSS, logits_BK) of one epoch: exactly the views the teachers labelled, in their order.

        Raises ArtifactError when the run has no soft labels, or none for this epoch.
        """
        if self.labels is None:
            raise ArtifactError("this distilled set has no soft labels; make them with `cvdd relabel`")
        pixels = self.normalized().to(device)
        for plan, logits_BK in self.labels.epoch(epoch):
            yield batch_views(pixels, plan), logits_BK.to(device)


def load_distilled(path: str, ipc: int | None = None) -> DistilledDataset:
    """Return the distilled set of a run directory (or s3:// URI), or of one .arrow file (then without soft labels).

    `ipc` picks one of several; None takes the only one there is.  Raises ArtifactError when there is none, when several
    could be meant, when a file was altered, or when soft labels belong to other images.
    """
    path = str(path)
    if path.endswith(".arrow"):
        folder, _, name = path.rpartition("/")
        return DistilledDataset(read_image_set(Store(folder or ".").read(name), path), None)
    if "://" not in path and not Path(path).is_dir():
        raise ArtifactError(f"{path}: no such directory; give a run's directory or the .arrow file of a distilled set")
    store = Store(path)
    found = [name.split("/")[1] for name in store.names("synthesize") if name.endswith(f"/{IMAGES_NAME}")]
    wanted = [name for name in found if ipc is None or name == f"ipc{ipc}"]
    if len(wanted) != 1:
        there = ", ".join(name.removeprefix("ipc") for name in found) or "none"
        raise ArtifactError(
            f"{path}: distilled sets for IPC {there}; name one with ipc=, or make it with `cvdd synthesize`"
        )
    artifacts = Artifacts(store)
    manifest = artifacts.require(f"synthesize/{wanted[0]}", "synthesize")
    images = read_image_set(artifacts.read(manifest, IMAGES_NAME), store.display(f"{manifest.stage}/{IMAGES_NAME}"))
    labelled = artifacts.manifest(f"relabel/{wanted[0]}/distilled")
    if labelled is None:
        return DistilledDataset(images, None)
    label_file = artifacts.verify(labelled, LABELS_NAME)
    return DistilledDataset(images, SoftLabels(store.open(label_file), store.display(label_file), images.content()))
