"""Distilled sets as a user of torch wants them: a Dataset of images, and batches with their soft labels.

Legend: N images, B images of a batch, C channels, K classes, S pixels.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset

from cvdd_ray.core.softlabels import batch_views
from cvdd_ray.data.artifacts import MANIFEST, Artifacts
from cvdd_ray.data.datasets import Normalization, network_inputs, normalize
from cvdd_ray.data.imagesets import ImageSet, read_image_set
from cvdd_ray.data.labels import ONLINE, SoftLabels
from cvdd_ray.data.remote import is_uri, without_secrets
from cvdd_ray.data.shards import label_files, load_images, open_labels
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError

IMAGES, LABELS = "distilled", "labels"


class DistilledDataset(Dataset):
    """Images of a distilled set: item i is (image_CSS uint8, label int). `labels` is set when soft labels are there;
    `is_online`: a run's students ask the teachers instead, and nothing is stored."""

    def __init__(self, images: ImageSet, labels: SoftLabels | None, is_online: bool = False):
        self.images, self.labels, self.is_online = images, labels, is_online
        self.pixels_NCSS = torch.from_numpy(images.images_NCHW.copy())
        self.classes = images.classes
        self.normalization = Normalization(*(tuple(images.metadata[name]) for name in ("mean", "std")))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.pixels_NCSS[index], int(self.images.labels_N[index])

    def normalized(self) -> Tensor:
        """Return all images (N, C, S, S) as float32 network input, with the mean and std stored beside them."""
        return normalize(self.pixels_NCSS, self.normalization)

    def soft_batches(self, epoch: int, device: torch.device | str = "cpu") -> Iterator[tuple[Tensor, Tensor]]:
        """Yield (views_BCSS, logits_BK) of one epoch: exactly the views the teachers labelled, in their order. A class whose
        logit was not stored has -1e30: probability 0 at any temperature.

        Raises ArtifactError when the run has no soft labels, or none for this epoch.
        """
        if self.is_online:
            raise ArtifactError(
                "this distilled set has online labels: teachers say them as students train, and none are stored; store some "
                "with `cvdd relabel --overwrite --set relabel.online=false`"
            )
        if self.labels is None:
            raise ArtifactError("this distilled set has no soft labels; make them with `cvdd relabel`")
        pixels = network_inputs(self.images.images_NCHW, self.normalization, torch.device(device))
        for plan, logits_BK in self.labels.epoch(epoch):
            yield batch_views(pixels, plan), logits_BK.to(device)


def load_distilled(path: str, ipc: int | None = None) -> DistilledDataset:
    """Return the distilled set of a run directory (or s3:// URI), or of one .arrow file (then without soft labels).

    From an object store files come through the local cache (`data.cache`): fetched and verified once, label files when one
    of their epochs is asked for, and memory-mapped afterwards.
    `ipc` picks one of several; None takes the only one there is.  Raises ArtifactError when there is none, when several
    could be meant, when a file was altered, or when soft labels belong to other images.
    """
    path = str(path)
    place, mark, options = path.partition("?") if is_uri(path) else (path, "", "")
    if place.endswith(".arrow"):
        folder, _, name = place.rpartition("/")
        store = Store(f"{folder or '.'}{mark}{options}")
        return DistilledDataset(read_image_set(store.read(name), store.where(name)), None)
    if not is_uri(path) and not Path(path).is_dir():
        raise ArtifactError(f"{path}: no such directory; give a run's directory or the .arrow file of a distilled set")
    store = Store(path)
    found = [name.split("/")[1] for name in store.names("synthesize") if name.endswith(f"/{MANIFEST}")]
    wanted = [name for name in found if ipc is None or name == f"ipc{ipc}"]
    if len(wanted) != 1:
        where = without_secrets(path) if is_uri(path) else path
        there = ", ".join(name.removeprefix("ipc") for name in found) or "none"
        raise ArtifactError(
            f"{where}: distilled sets for IPC {there}; name one with ipc=, or make it with `cvdd synthesize`"
        )
    artifacts = Artifacts(store, cached=True)
    manifest = artifacts.require(f"synthesize/{wanted[0]}", "synthesize")
    images = load_images(artifacts, manifest, IMAGES)
    labelled = artifacts.manifest(f"relabel/{wanted[0]}/distilled")
    if labelled is None:
        return DistilledDataset(images, None)
    if ONLINE in labelled.files:
        return DistilledDataset(images, None, is_online=True)
    return DistilledDataset(images, open_labels(store, label_files(artifacts, labelled, LABELS), images.content()))
