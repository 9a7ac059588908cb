"""initialize: starting images from patches of real ones (RDED), and the random real images they are compared with.

Patches are scored image by image, as a stream: only losses are kept, and the crops that are chosen are drawn again. Rows of
every image set are ordered by image index, then by class.
"""

import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cvdd_ray.config import InitializeConfig
from cvdd_ray.core.experts import ExpertSpec, work_device
from cvdd_ray.core.keys import generator
from cvdd_ray.core.patches import mosaic_ranks, noise_image, observer_losses, random_patches, rank_window, tile
from cvdd_ray.data.artifacts import Manifest
from cvdd_ray.data.datasets import DatasetInfo, denormalize, normalize
from cvdd_ray.data.imagesets import ImageSet, image_table
from cvdd_ray.data.shards import cuts, load_images, write_piece
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError
from cvdd_ray.stages.context import Run, StageWork
from cvdd_ray.stages.pretrain import load_experts
from cvdd_ray.stages.real import SMALL, split_for_workers

START, RANDOM = "start", "random"
MAX_PIECES = 100  # a piece of work is a run of classes: one class each up to 100 of them
BLOCK = 64  # images whose crops are in memory at once


@dataclass(frozen=True)
class ClassImages:
    """The real images of one class that matter: indices (into the train split) to score, and the random ones."""

    label: int
    scored: np.ndarray
    random: np.ndarray


@dataclass(frozen=True)
class Patching:
    """What decides the patches besides the images: settings, IPC, patches per side, seed, the dataset's constants."""

    c: InitializeConfig
    ipc: int
    factor: int
    seed: int
    info: DatasetInfo


def initialize(run: Run, ipc: int) -> Manifest:
    """Make `initialize/ipc<n>`: start.arrow (starting images) and random.arrow (random real images), n per class; large
    sets as several files.

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
    runs = cuts(len(run.classes), -(-len(run.classes) // MAX_PIECES))
    everything = class_items(run, ipc)
    items = {f"classes{of.start:05d}": everything[of.start : of.stop] for of in runs}
    patching = Patching(c, ipc, factor, run.config.seed, run.info)
    images = split_for_workers(run.real.train, run.info)[0]
    with run.stage(plan, f"initialize ipc {ipc}") as work:
        if work is None:
            return run.artifacts.manifest(plan.stage)
        losses = score_patches(work, items, images, patching, specs[observer]) if specs else {}
        pieces = {
            name: (classes, [losses[item.label] for item in classes] if specs else None, work.piece(name))
            for name, classes in items.items()
        }
        work.each(start_piece, pieces, (images, patching, run.store), doing="choose and write")
        files, contents = {}, {}
        for kind, base in enumerate((START, RANDOM)):
            where = {
                (i, classes[0].label): (work.piece(name), 2 * i + kind)
                for name, classes in items.items()
                for i in range(ipc)
            }
            of_set, contents[base] = work.image_set(base, ipc, where, {"kind": base})
            files |= of_set
        return work.commit(files, content=contents)


def load_image_set(run: Run, stage: str, base: str, verb: str) -> ImageSet:
    """Return an image set of a finished stage, with its class list checked against the data's."""
    return load_images(run.artifacts, run.require(stage, verb), base)


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


def class_items(run: Run, ipc: int) -> list[ClassImages]:
    """Return the real images that matter, class by class.

    Raises ConfigError when a class has too few real images.
    """
    labels_N, seed, c = np.asarray(run.real.train.labels), run.config.seed, run.config.initialize
    wanted = ipc * tiles_per_side(run) ** 2 if c.method == "patches" else ipc
    by_label = np.argsort(labels_N, kind="stable")
    ends = np.cumsum(np.bincount(labels_N, minlength=len(run.classes)))
    items = []
    for label, (name, members) in enumerate(zip(run.classes, np.split(by_label, ends[:-1]), strict=True)):
        limit = min(len(members), c.images_per_class) if c.method == "patches" else len(members)
        if limit < wanted or len(members) < ipc:
            raise ConfigError(
                f"ipc: {ipc} images of class {name!r} need {wanted} real images, there are {limit} (train split, at most "
                f"initialize.images_per_class={c.images_per_class}); lower ipc or initialize.factor, or give more images"
            )
        scored = members[torch.randperm(len(members), generator=generator(seed, "patch-source", label)).numpy()]
        random = members[torch.randperm(len(members), generator=generator(seed, "random-real", label)).numpy()]
        items.append(ClassImages(label, scored[: c.images_per_class], random[:ipc]))
    return items


# ------------------------------------------------------------------------------------------------- scoring


def score_patches(
    work: StageWork, items: dict[str, list[ClassImages]], images, patching: Patching, observer: ExpertSpec
) -> dict[int, np.ndarray]:
    """Return per label the rows (loss, crop number) of the best crop of every scored image, float64 (images, 2)."""
    scored = work.stream(
        read_crops, Scorer, {f"{name}-losses": classes for name, classes in items.items()}, (images, patching, observer),
        stream=not isinstance(images, np.ndarray), doing="score patches",
    )  # fmt: skip
    losses = {}
    for name, classes in items.items():
        rows = np.load(io.BytesIO(scored[f"{name}-losses"]), allow_pickle=False)
        for item in classes:
            own = rows[rows[:, 0] == item.label]
            losses[item.label] = own[np.argsort(own[:, 1])][:, 2:]
    return losses


def read_crops(
    classes: list[ClassImages], images, patching: Patching, observer: ExpertSpec
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the crops of the scored images in blocks: label, position in the class's list, crops (n, M, C, P, P)."""
    places = [(item.label, position, int(index)) for item in classes for position, index in enumerate(item.scored)]
    for block in cuts(len(places), BLOCK):
        rows = [places[at] for at in block]
        crops = np.stack([crops_of(images, index, label, patching).numpy() for label, _, index in rows])
        yield {
            "label": np.array([label for label, _, _ in rows]),
            "position": np.array([position for _, position, _ in rows]),
            "crops": crops,
        }


class Scorer:
    """The observer, ready to score blocks of crops: every image by itself, so that no result depends on its neighbours."""

    def __init__(self, images, patching: Patching, observer: ExpertSpec):
        self._device, self._size = work_device(), patching.info.image_size
        self._observer = observer.build(self._device)

    def __call__(self, block: dict[str, np.ndarray]) -> np.ndarray:
        """Return rows (label, position, lowest loss, its crop number), float64."""
        rows = []
        for label, position, crops in zip(block["label"], block["position"], block["crops"], strict=True):
            crops_MCPP = torch.from_numpy(np.array(crops)).to(self._device)
            loss_M = observer_losses(self._observer, crops_MCPP, int(label), self._size).cpu()
            best = int(loss_M.argmin())
            rows.append((label, position, float(loss_M[best]), best))
        return np.array(rows, np.float64)


def crops_of(images, index: int, label: int, patching: Patching) -> Tensor:
    """Return the random crops (M, C, P, P) of one real image, a function of (seed, label, index)."""
    pixels = images[index] if isinstance(images, np.ndarray) else images.read(index).transpose(2, 0, 1)
    image_CHW = normalize(torch.from_numpy(np.array(pixels))[None], patching.info)[0]
    patch_size = patching.info.image_size // patching.factor
    draw = generator(patching.seed, "patch", label, index)
    return random_patches(image_CHW, patching.c.num_crops, patch_size, draw)


# ------------------------------------------------------------------------------------------------- starting images


def start_piece(
    item: tuple[list[ClassImages], list[np.ndarray] | None, str], images, patching: Patching, store: Store,
    report: Callable[[dict], None],
) -> bytes:  # fmt: skip
    """Write the piece of a run of classes: of every image index the starting images, then the random real ones."""
    classes, losses, piece = item
    pixels = []
    for done, one in enumerate(classes):
        if patching.c.method == "patches":
            start = patch_images(one, losses[done], images, patching)
        elif patching.c.method == "real":
            start = whole_images(images, one.scored[: patching.ipc], patching.info)
        else:
            size = patching.info.image_size
            noise = [noise_image(patching.seed, i, one.label, size) for i in range(patching.ipc)]
            start = denormalize(torch.stack(noise), patching.info).numpy()
        pixels.append(np.stack([start, whole_images(images, one.random, patching.info)], 1))
        report({"done": (done + 1) / (len(classes) + 1)})
    labels = np.array([one.label for one in classes])
    tables = [
        image_table(ImageSet(rows, labels, (), {"image_index": pa.array([i] * len(labels), pa.int32())}))
        for i, kinds in enumerate(np.stack(pixels, 2))
        for rows in kinds
    ]
    write_piece(store, piece, tables)
    return json.dumps({"images": len(tables) * len(labels)}).encode()


def patch_images(one: ClassImages, losses: np.ndarray, images, patching: Patching) -> np.ndarray:
    """Return (ipc, C, S, S) uint8: the best crop of every scored image, sorted by loss, a rank window of them, tiled."""
    ranks = np.argsort(losses[:, 0], kind="stable")
    window = rank_window(len(ranks), patching.ipc * patching.factor**2, patching.c.difficulty)
    chosen = []
    for rank in window:
        position = ranks[rank]
        crops_MCPP = crops_of(images, int(one.scored[position]), one.label, patching)
        chosen.append(crops_MCPP[int(losses[position, 1])])
    size = patching.info.image_size
    mosaics = mosaic_ranks(patching.ipc, patching.factor)
    tiled = [tile([chosen[rank] for rank in ranks], patching.factor, size) for ranks in mosaics]
    return denormalize(torch.stack(tiled), patching.info).numpy()


def whole_images(images, indices: np.ndarray, info: DatasetInfo) -> np.ndarray:
    """Return (n, C, S, S) uint8 real images as the test transform shows them."""
    return images[indices] if isinstance(images, np.ndarray) else images.subset(indices).stack(info.image_size)
