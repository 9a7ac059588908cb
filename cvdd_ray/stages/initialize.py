"""initialize: starting images from patches of real ones (RDED), and the random real images they are compared with.

Rows of every image set are ordered by image index, then by class.
"""

import io
from collections.abc import Callable

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cvdd_ray.config import InitializeConfig
from cvdd_ray.core.experts import ExpertSpec, work_device
from cvdd_ray.core.keys import generator
from cvdd_ray.core.patches import mosaic_ranks, observer_losses, random_patches, rank_window, tile
from cvdd_ray.data.artifacts import Manifest
from cvdd_ray.data.datasets import DatasetInfo, denormalize, normalize
from cvdd_ray.data.imagesets import ImageSet, read_image_set, write_image_set
from cvdd_ray.errors import ConfigError
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pretrain import load_experts
from cvdd_ray.stages.real import SMALL, split_for_workers

START, RANDOM = "start.arrow", "random.arrow"


def initialize(run: Run, ipc: int) -> Manifest:
    """Make `initialize/ipc<n>`: start.arrow (starting images) and random.arrow (random real images), n per class.

    Raises ConfigError when a class has too few real images.  Source: spec sections 4 and 9.3.
    """
    c = run.config.initialize
    specs, hashes = load_experts(run) if c.method == "patches" else ({}, {})
    observer = observer_name(run)
    inputs = {"train": run.real.train.fingerprint}
    if specs:
        inputs["observer"] = hashes[f"pretrain/{observer}"]
    factor = tiles_per_side(run)
    settings = {"ipc": ipc, "initialize": {**c.model_dump(), "observer": observer, "factor": factor}}
    plan = run.plan(f"initialize/ipc{ipc}", settings, inputs)
    found = run.artifacts.finished(plan)
    if found is not None:
        return found
    items = {f"class{label:05d}": item for label, item in enumerate(class_items(run, ipc))}
    shared = (
        split_for_workers(run.real.train, run.info)[0],
        run.info,
        specs.get(observer),
        c,
        ipc,
        factor,
        run.config.seed,
    )
    with run.stage(plan, f"initialize ipc {ipc}") as work:
        if work is None:
            return run.artifacts.manifest(plan.stage)
        done = work.each(start_class, items, shared)
        pixels = np.stack(
            [np.load(io.BytesIO(data), allow_pickle=False) for data in done.values()]
        )  # K, 2, ipc, C, S, S
        sets = {}
        for kind, name in enumerate((START, RANDOM)):
            sets[name] = write_image_set(image_set(run, pixels[:, kind].swapaxes(0, 1), {"kind": name.split(".")[0]}))
        return work.commit(sets)


def image_set(run: Run, pixels_IKCSS: np.ndarray, about: dict, columns: dict | None = None) -> ImageSet:
    """Return the image set of pixels (image index, class, C, S, S), rows by image index and then class."""
    ipc, num_classes = pixels_IKCSS.shape[:2]
    index = {"image_index": pa.array(np.repeat(np.arange(ipc, dtype=np.int32), num_classes))}
    labels_N = np.tile(np.arange(num_classes), ipc)
    about = {"dataset": run.info.name, "mean": run.info.mean, "std": run.info.std, "ipc": ipc, **about}
    return ImageSet(
        pixels_IKCSS.reshape(-1, *pixels_IKCSS.shape[2:]), labels_N, run.classes, {**index, **(columns or {})}, about
    )


def load_image_set(run: Run, stage: str, name: str, verb: str) -> ImageSet:
    """Return an image set of a finished stage, with its class list checked against the data's."""
    manifest = run.require(stage, verb)
    return read_image_set(run.artifacts.read(manifest, name), run.store.display(f"{stage}/{name}"))


def observer_name(run: Run) -> str:
    """Return the expert that scores the patches.  Raises ConfigError when it is not in the committee."""
    experts = run.config.committee.experts
    observer = run.config.initialize.observer or experts[0]
    if observer not in experts:
        raise ConfigError(f"initialize.observer: got {observer!r}, the committee has {', '.join(experts)}")
    return observer


def tiles_per_side(run: Run) -> int:
    """Return the patches per side of one starting image."""
    return run.config.initialize.factor or (1 if run.info.image_size <= SMALL else 2)


def class_items(run: Run, ipc: int) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Return per class (label, indices of real images to score, indices of the random real images).

    Raises ConfigError when a class has too few real images.
    """
    labels_N, seed, c = np.asarray(run.real.train.labels), run.config.seed, run.config.initialize
    wanted = ipc * tiles_per_side(run) ** 2 if c.method == "patches" else ipc
    items = []
    for label, name in enumerate(run.classes):
        members = np.flatnonzero(labels_N == label)
        limit = min(len(members), c.images_per_class) if c.method == "patches" else len(members)
        if limit < wanted or len(members) < ipc:
            raise ConfigError(
                f"ipc: {ipc} images of class {name!r} need {wanted} real images, there are {limit} (train split, at most "
                f"initialize.images_per_class={c.images_per_class}); lower ipc or initialize.factor, or give more images"
            )
        scored = members[torch.randperm(len(members), generator=generator(seed, "patch-source", label)).numpy()]
        random = members[torch.randperm(len(members), generator=generator(seed, "random-real", label)).numpy()]
        items.append((label, scored[: c.images_per_class], random[:ipc]))
    return items


def start_class(
    item: tuple[int, np.ndarray, np.ndarray], images, info: DatasetInfo, observer: ExpertSpec | None,
    c: InitializeConfig, ipc: int, factor: int, seed: int, report: Callable[[dict], None],
) -> bytes:  # fmt: skip
    """Return npy bytes (2, ipc, C, S, S) uint8 of one class: starting images, random real images."""
    label, scored, random = item
    if c.method == "patches":
        start = patch_images(label, scored, images, info, observer, c, ipc, factor, seed)
    elif c.method == "real":
        start = whole_images(images, scored[:ipc], info)
    else:
        start = denormalize(noise_images(seed, ipc, label, info), info).numpy()
    buffer = io.BytesIO()
    np.save(buffer, np.stack([start, whole_images(images, random, info)]), allow_pickle=False)
    return buffer.getvalue()


def patch_images(label, scored, images, info, observer, c, ipc, factor, seed) -> np.ndarray:
    """Return (ipc, C, S, S) uint8: the best crop of every scored image, sorted, a rank window of them, tiled."""
    device = work_device()
    network = observer.build(device)
    patch_size = info.image_size // factor
    best: list[tuple[float, Tensor]] = []
    for start in range(0, len(scored), 64):
        crops = [
            random_patches(_normalised(images, index, info), c.num_crops, patch_size, generator(seed, "patch", label, int(index)))
            for index in scored[start : start + 64]
        ]  # fmt: skip
        losses = (
            observer_losses(network, torch.cat(crops).to(device), label, info.image_size).cpu().view(-1, c.num_crops)
        )
        for patches_MCPP, loss_M in zip(crops, losses, strict=True):
            lowest = int(loss_M.argmin())
            best.append((float(loss_M[lowest]), patches_MCPP[lowest]))
    best.sort(key=lambda pair: pair[0])
    window = rank_window(len(best), ipc * factor**2, c.difficulty)
    chosen = [best[rank][1] for rank in window]
    tiled = [tile([chosen[rank] for rank in ranks], factor, info.image_size) for ranks in mosaic_ranks(ipc, factor)]
    return denormalize(torch.stack(tiled), info).numpy()


def whole_images(images, indices: np.ndarray, info: DatasetInfo) -> np.ndarray:
    """Return (n, C, S, S) uint8 real images as the test transform shows them."""
    return images[indices] if isinstance(images, np.ndarray) else images.subset(indices).stack(info.image_size)


def noise_images(seed: int, ipc: int, label: int, info: DatasetInfo) -> Tensor:
    """Return (ipc, C, S, S) from N(0, 1) in normalised space, image by image a function of (seed, index, label)."""
    shape = (3, info.image_size, info.image_size)
    return torch.stack([torch.randn(shape, generator=generator(seed, "noise", i, label)) for i in range(ipc)])


def _normalised(images, index: int, info: DatasetInfo) -> Tensor:
    pixels = images[index] if isinstance(images, np.ndarray) else images.read(int(index)).transpose(2, 0, 1)
    return normalize(torch.from_numpy(np.array(pixels))[None], info)[0]
