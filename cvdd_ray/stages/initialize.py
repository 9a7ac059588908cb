"""initialize: starting images from patches of real ones (RDED), and the random real images they are compared with.

Real images are read in the order they are stored, twice at most: once to score crops, of which only losses are kept, once
to cut those that were chosen. So a set of any size passes through as a stream. Rows of every image set are ordered by image
index, then by class.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain, groupby

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cvdd_ray.config import InitializeConfig
from cvdd_ray.core.coresets import CORESETS
from cvdd_ray.core.experts import ExpertSpec, work_device
from cvdd_ray.core.keys import generator
from cvdd_ray.core.patches import mosaic_ranks, noise_image, observer_losses, random_patches, rank_window, tile
from cvdd_ray.data.artifacts import Manifest
from cvdd_ray.data.datasets import DatasetInfo, denormalize, normalize
from cvdd_ray.data.images import THREADS, RealImages
from cvdd_ray.data.imagesets import ImageSet, image_table
from cvdd_ray.data.shards import ShardTask, cuts, load_images, read_batches, write_piece, write_shard
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError
from cvdd_ray.stages.context import Run, StageWork
from cvdd_ray.stages.coresets import choose_coresets
from cvdd_ray.stages.pretrain import load_experts
from cvdd_ray.stages.real import SMALL, split_for_workers

START, RANDOM = "start", "random"
KINDS = (START, RANDOM)
OBSERVED = {"patches", *CORESETS}  # methods that ask the observer
MAX_PIECES = 100  # pieces of work that reading is divided into
BLOCK = 64  # images whose crops are in memory at once; fewer make no piece
CUT_SCHEMA = pa.schema([("label", pa.int32()), ("cell", pa.int32()), ("pixels", pa.binary())])

Images = np.ndarray | RealImages  # uint8 stack (N, C, S, S), or decoded on demand


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


@dataclass(frozen=True, order=True)
class Cut:
    """One thing to take from real image `index`: crop number `crop` (None: the whole image), as cell `cell` of image
    `image_index` of its class in the set `kind`."""

    index: int
    kind: str
    image_index: int
    label: int
    cell: int = 0
    crop: int | None = None


def initialize(run: Run, ipc: int) -> Manifest:
    """Make `initialize/ipc<n>`: start.arrow (starting images) and random.arrow (random real images), n per class; large
    sets as several files.

    Raises ConfigError when a class has too few real images.  Source: spec sections 4 and 9.3.
    """
    c = run.config.initialize
    specs, hashes = load_experts(run) if c.method in OBSERVED else ({}, {})
    observer = observer_name(run)
    inputs = {"train": run.real.train.fingerprint}
    if specs:
        inputs["observer"] = hashes[f"pretrain/{observer}"]
    factor = tiles_per_side(run)
    settings = {"ipc": ipc, "initialize": {**c.counted(), "observer": observer, "factor": factor}}
    plan = run.plan(f"initialize/ipc{ipc}", settings, inputs)
    found = run.artifacts.finished(plan)
    if found is not None:
        return found
    patching = Patching(c, ipc, factor, run.config.seed, run.info)
    classes = class_items(run, ipc)
    images = split_for_workers(run.real.train, run.info)[0]
    with run.stage(plan, f"initialize ipc {ipc}") as work:
        if work is None:
            return run.artifacts.manifest(plan.stage)
        losses = score_patches(work, classes, images, patching, specs[observer]) if c.method == "patches" else None
        if c.method in CORESETS:
            classes = by_features(work, classes, images, patching, specs[observer])
        pieces = cut_images(work, chosen_cuts(classes, losses, patching), images, patching)
        files, contents = {}, {}
        for kind in KINDS:
            of_set, contents[kind] = work.image_set(kind, ipc, tile_shard, (pieces, patching), {"kind": kind})
            files |= of_set
        scored = sum(len(one.scored) for one in classes) if specs else 0
        return work.commit(files, content=contents, scored_images=scored)


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
    if c.pool and c.pool < ipc:
        raise ConfigError(
            f"initialize.pool: got {c.pool}, fewer than IPC {ipc}; use at least the largest IPC, or leave it out"
        )
    wanted = (c.pool or ipc) * tiles_per_side(run) ** 2 if c.method == "patches" else ipc
    by_label = np.argsort(labels_N, kind="stable")
    ends = np.cumsum(np.bincount(labels_N, minlength=len(run.classes)))
    items = []
    for label, (name, members) in enumerate(zip(run.classes, np.split(by_label, ends[:-1]), strict=True)):
        limit = min(len(members), c.images_per_class) if c.method in OBSERVED else len(members)
        if limit < wanted or len(members) < ipc:
            raise ConfigError(
                f"ipc: {c.pool or ipc} images of class {name!r} need {wanted} real images, there are {limit} (train split, at "
                f"most initialize.images_per_class={c.images_per_class}); lower ipc or initialize.factor, or give more images"
            )
        scored = members[torch.randperm(len(members), generator=generator(seed, "patch-source", label)).numpy()]
        random = members[torch.randperm(len(members), generator=generator(seed, "random-real", label)).numpy()]
        items.append(ClassImages(label, scored[: c.images_per_class], random[:ipc]))
    return items


# ------------------------------------------------------------------------------------------------- scoring


def by_features(
    work: StageWork, classes: Sequence[ClassImages], images: Images, patching: Patching, observer: ExpertSpec
) -> list[ClassImages]:
    """Return the classes with those images first that a coreset method chooses."""
    candidates = [(one.label, one.scored) for one in classes]
    c = patching.c
    chosen = choose_coresets(work, candidates, images, patching.info, c.method, patching.ipc, observer)
    return [replace(one, scored=one.scored[chosen[one.label]]) for one in classes]


def score_patches(
    work: StageWork, classes: Sequence[ClassImages], images: Images, patching: Patching, observer: ExpertSpec
) -> dict[int, np.ndarray]:
    """Return per label the rows (loss, crop number) of the best crop of every scored image, float64 (images, 2)."""
    places = sorted((int(index), one.label, at) for one in classes for at, index in enumerate(one.scored))
    items = {f"losses{number:05d}": places[cut.start : cut.stop] for number, cut in enumerate(portions(len(places)))}
    scored = work.stream(
        read_crops, Scorer, items, (images, patching, observer), stream=not isinstance(images, np.ndarray),
        doing="score patches",
    )  # fmt: skip
    rows = np.concatenate([np.load(io.BytesIO(data), allow_pickle=False) for data in scored.values()])
    rows = rows[np.lexsort((rows[:, 1], rows[:, 0]))]
    ends = np.cumsum([len(one.scored) for one in classes])
    return {one.label: own[:, 2:] for one, own in zip(classes, np.split(rows, ends[:-1]), strict=True)}


def portions(num_images: int) -> list[range]:
    """Return 0..num_images divided into pieces of work: at most 100, of at least a block."""
    return cuts(num_images, max(BLOCK, -(-num_images // MAX_PIECES)))


def read_crops(
    places: Sequence[tuple[int, int, int]], images: Images, patching: Patching, observer: ExpertSpec
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the crops of images at (index, label, position in the class's list) in blocks: label, position and crops
    (n, M, C, P, P)."""
    for block in cuts(len(places), BLOCK):
        rows = places[block.start : block.stop]
        yield {
            "label": np.array([label for _, label, _ in rows]),
            "position": np.array([position for _, _, position in rows]),
            "crops": np.stack(
                side_by_side(images, lambda row: crops_of(images, row[0], row[1], patching).numpy(), rows)
            ),
        }


class Scorer:
    """The observer, ready to score blocks of crops: every image by itself, so that no result depends on its neighbours."""

    def __init__(self, images: Images, patching: Patching, observer: ExpertSpec):
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


def crops_of(images: Images, index: int, label: int, patching: Patching) -> Tensor:
    """Return the random crops (M, C, P, P) of one real image, a function of (seed, label, index)."""
    pixels = images[index] if isinstance(images, np.ndarray) else images.read(index).transpose(2, 0, 1)
    image_CHW = normalize(torch.from_numpy(np.array(pixels))[None], patching.info)[0]
    patch_size = patching.info.image_size // patching.factor
    draw = generator(patching.seed, "patch", label, index)
    return random_patches(image_CHW, patching.c.num_crops, patch_size, draw)


# ------------------------------------------------------------------------------------------------- cutting and tiling


def chosen_cuts(classes: Iterable[ClassImages], losses: dict[int, np.ndarray] | None, patching: Patching) -> list[Cut]:
    """Return what the sets are made of, in storage order: of the best crops of every class, sorted by loss, a rank window,
    dealt to the cells of its images; and the whole random images."""
    c, wanted = patching.c, []
    pool = c.pool or patching.ipc
    mosaics = mosaic_ranks(pool, patching.factor)[: patching.ipc]
    for one in classes:
        if c.method == "patches":
            rows = losses[one.label]
            ranks = np.argsort(rows[:, 0], kind="stable")
            ranks = ranks[list(rank_window(len(ranks), pool * patching.factor**2, c.difficulty))]
            wanted += [
                Cut(int(one.scored[ranks[rank]]), START, i, one.label, cell, int(rows[ranks[rank], 1]))
                for i, cells in enumerate(mosaics)
                for cell, rank in enumerate(cells)
            ]
        elif c.method != "noise":
            wanted += [Cut(int(index), START, i, one.label) for i, index in enumerate(one.scored[: patching.ipc])]
        wanted += [Cut(int(index), RANDOM, i, one.label) for i, index in enumerate(one.random)]
    return sorted(wanted, key=lambda cut: (cut.index, cut.kind, cut.image_index, cut.label, cut.cell))


def cut_images(work: StageWork, wanted: Sequence[Cut], images: Images, patching: Patching) -> list[str]:
    """Take what is wanted from the real images; return the pieces with it, whose record batches are those of `batch_of`."""
    items = {
        f"cuts{number:05d}": (wanted[cut.start : cut.stop], work.piece(f"cuts{number:05d}"))
        for number, cut in enumerate(portions(len(wanted)))
    }
    work.each(cut_piece, items, (images, patching, work.run.store), doing="cut patches")
    return [piece for _, piece in items.values()]


def batch_of(kind: str, image_index: int, ipc: int) -> int:
    """Return which record batch of a piece of cuts is for this image index of this set."""
    return KINDS.index(kind) * ipc + image_index


def cut_piece(
    item: tuple[Sequence[Cut], str], images: Images, patching: Patching, store: Store, report: Callable[[dict], None]
) -> bytes:
    """Write the piece of some cuts: per set and image index a batch of pixels with label and cell."""
    wanted, piece = item
    by_image = [(index, list(cuts_of)) for index, cuts_of in groupby(wanted, key=lambda cut: cut.index)]
    rows: dict[int, list[tuple[int, int, bytes]]] = {batch: [] for batch in range(len(KINDS) * patching.ipc)}
    for block in cuts(len(by_image), BLOCK):
        taken = side_by_side(images, lambda of: take_cuts(images, *of, patching), by_image[block.start : block.stop])
        for cut, pixels in chain.from_iterable(taken):
            rows[batch_of(cut.kind, cut.image_index, patching.ipc)].append((cut.label, cut.cell, pixels))
        report({"done": block.stop / len(by_image)})
    columns = [list(zip(*batch, strict=True)) or [(), (), ()] for batch in rows.values()]
    write_piece(store, piece, [pa.table(list(map(pa.array, batch, CUT_SCHEMA.types)), CUT_SCHEMA) for batch in columns])
    return b"{}"


def take_cuts(images: Images, index: int, wanted: Sequence[Cut], patching: Patching) -> list[tuple[Cut, bytes]]:
    """Return every cut of one real image with its uint8 pixels."""
    crops, taken = {}, []
    for cut in wanted:
        if cut.crop is None:
            pixels = whole_image(images, index, patching.info)
        else:
            crops = crops or dict(enumerate(crops_of(images, index, cut.label, patching)))
            pixels = denormalize(crops[cut.crop][None], patching.info)[0].numpy()
        taken.append((cut, pixels.tobytes()))
    return taken


def side_by_side(images: Images, function: Callable, rows: Sequence) -> list:
    """Return function(row) for every row; images that are read on demand are read several at a time, since a disk far away
    is mostly waited for."""
    if isinstance(images, np.ndarray):
        return [function(row) for row in rows]
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(function, rows))


def tile_shard(
    task: ShardTask, store: Store, classes: Sequence[str], metadata: dict, pieces: Sequence[str], patching: Patching,
    report: Callable[[dict], None] | None,
) -> bytes:  # fmt: skip
    """Write one file of starting or random images from the pieces of cuts; return its receipt."""
    kind, size = metadata["kind"], patching.info.image_size
    is_tiled = kind == START and patching.c.method == "patches"
    factor = patching.factor if is_tiled else 1
    tables = []
    for i in task.indices:
        if kind == START and patching.c.method == "noise":
            noise = [noise_image(patching.seed, i, label, size) for label in range(len(classes))]
            pixels = denormalize(torch.stack(noise), patching.info).numpy()
        else:
            cells = cells_of(store, [(piece, batch_of(kind, i, patching.ipc)) for piece in pieces], size // factor)
            cells_KFCPP = cells.reshape(len(classes), factor**2, *cells.shape[1:])
            pixels = np.stack([tile(torch.from_numpy(mine), factor, size).numpy() for mine in cells_KFCPP])
        index = pa.array([i] * len(classes), pa.int32())
        tables.append(image_table(ImageSet(pixels, np.arange(len(classes)), (), {"image_index": index})))
    return write_shard(store, task.name, pa.concat_tables(tables), classes, metadata)


def cells_of(store: Store, batches: Iterable[tuple[str, int]], side: int) -> np.ndarray:
    """Return the pixels (cells, C, P, P) of record batches of pieces, ordered by label and cell."""
    table = pa.Table.from_batches(read_batches(store, batches)).sort_by([("label", "ascending"), ("cell", "ascending")])
    return np.stack([np.frombuffer(data.as_buffer(), np.uint8).reshape(3, side, side) for data in table["pixels"]])


def whole_image(images: Images, index: int, info: DatasetInfo) -> np.ndarray:
    """Return one real image (C, S, S) uint8 as the test transform shows it."""
    return images[index] if isinstance(images, np.ndarray) else images.subset([index]).stack(info.image_size)[0]
