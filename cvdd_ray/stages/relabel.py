"""relabel: soft labels from the committee, every BatchNorm on its small batch's own statistics (BSSL; spec section 6)."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cvdd_ray.core.experts import ExpertSpec, work_device
from cvdd_ray.core.keys import key
from cvdd_ray.core.labelcodes import LabelEncoding
from cvdd_ray.core.softlabels import (
    MAX_IMAGES,
    MAX_IMAGES_ON_CPU,
    BatchPlan,
    Teacher,
    batch_starts,
    batch_views,
    batches_together,
    committee_logits,
    epoch_plans,
    rescaled_logits,
)
from cvdd_ray.core.voting import prior_weights
from cvdd_ray.data.artifacts import Manifest, Written
from cvdd_ray.data.datasets import DatasetInfo, network_inputs
from cvdd_ray.data.labels import (
    FULL,
    ONLINE,
    encoding_metadata,
    epoch_bytes,
    file_bytes,
    label_batch,
    write_label_file,
)
from cvdd_ray.data.shards import cuts, per_shard, shard_name
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError
from cvdd_ray.labelconfig import RelabelConfig
from cvdd_ray.stages.arms import LABEL_SETS
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.initialize import load_image_set
from cvdd_ray.stages.pretrain import load_experts
from cvdd_ray.stages.votes import load_priors

LABELS = "labels"
MAX_EPOCHS_PER_PIECE = 10


@dataclass(frozen=True)
class ViewSettings:
    """What decides the views of an epoch, besides seed and epoch."""

    seed: int
    flip: bool
    size: int
    c: RelabelConfig

    def plans(self, epoch: int, num_images: int) -> list[BatchPlan]:
        """Return the batches of an epoch of a set of `num_images` images."""
        return epoch_plans(
            self.seed, epoch, num_images, self.size, batch_size=self.c.resolved_batch_size(num_images), flip=self.flip,
            use_cutmix=self.c.cutmix, crop_scale=self.c.crop_scale,
        )  # fmt: skip


def relabel(run: Run, ipc: int, label_set: str = "distilled") -> None:
    """Make `relabel/ipc<n>/<label set>`: labels.arrow, one record batch per epoch, bound to its images by hash; many
    labels as several files, which workers write side by side; with `relabel.online` only online.json, what teachers need.

    Raises ArtifactError when images, experts or priors are missing, ConfigError for teachers outside the committee and as
    `label_encoding`.
    """
    kind = LABEL_SETS[label_set]
    c, flip = run.config.relabel.model_copy(update=kind.changes), run.config.data.flip and kind.flip
    stage, name, verb = kind.images
    images = load_image_set(run, stage.format(ipc=ipc), name, verb)
    specs, hashes = load_experts(run)
    priors, prior_hash = load_priors(run)
    names = teacher_names(run)
    weights = (
        prior_weights([priors[n] for n in names], c.temperature)
        if c.weighting == "prior"
        else [1 / len(names)] * len(names)
    )
    resolved = {"teachers": names, "bn_group": c.resolved_bn_group(len(images))}
    encoding = label_encoding(c, len(run.classes))
    settings = {"label_set": label_set, "relabel": {**c.counted(), **resolved}, "data.flip": flip}
    inputs = {
        "images": images.content(),
        "prior": prior_hash,
        **{f"pretrain/{n}": hashes[f"pretrain/{n}"] for n in names},
    }
    plan = run.plan(f"relabel/ipc{ipc}/{label_set}", settings, inputs)
    with run.stage(plan, f"relabel ipc {ipc} {label_set}") as work:
        if work is None:
            return
        about = {"images": images.content(), "num_classes": len(run.classes), "teachers": names,
                 "teacher_weights": list(weights), "relabel": c.counted(), "classes": run.classes}  # fmt: skip
        if c.online:
            experts = {name: hashes[f"pretrain/{name}"] for name in names}
            about |= {"teachers": experts, "seed": run.config.seed, "flip": flip}
            work.commit({ONLINE: json.dumps(about, indent=1).encode()}, epochs=c.epochs, teachers=names)
            return
        about |= encoding_metadata(encoding)
        if c.stored_epochs:
            about["replayed_epochs"] = c.epochs
        spans, sharded = label_spans(c.labelled_epochs, len(images), len(run.classes), encoding)
        if sharded:
            about |= {"epochs": c.labelled_epochs, "epochs_per_shard": len(spans[0])}
        pieces = {f"epochs{span.start:05d}": span for span in spans}
        items = {name: (span, work.piece(name)) for name, span in pieces.items()}
        views = ViewSettings(run.config.seed, flip, run.info.image_size, c)
        shared = (images.images_NCHW, run.info, [specs[n] for n in names], weights, views, about, run.store)

        def piece(name: str, receipt: bytes) -> Written:
            return Written(work.piece(name), receipt.decode())

        receipts = work.each(label_epochs, items, shared, written=piece)
        written = {name: piece(name, receipts[name]) for name in pieces}
        if sharded:
            files = {shard_name(LABELS, k, len(spans)): file for k, file in enumerate(written.values())}
        else:
            files = {shard_name(LABELS, 0, 1): join_labels(run.store, work.piece(LABELS), written.values(), about)}
        work.commit(files, epochs=c.labelled_epochs, teachers=names)


def label_encoding(c: RelabelConfig, num_classes: int) -> LabelEncoding:
    """Return how labels are stored.  Raises ConfigError for a `top_k` that leaves no class out."""
    if c.top_k is not None and c.top_k >= num_classes:
        raise ConfigError(
            f"relabel.top_k: got {c.top_k}, but there are {num_classes} classes; use fewer, or leave it out to store all"
        )
    return LabelEncoding(c.precision, c.top_k, c.tail)


def full_bytes(num_images: int, num_classes: int, c: RelabelConfig) -> int:
    """Return what float16 labels of every class would take for every epoch of a student, in one file."""
    num_batches = len(batch_starts(num_images, c.resolved_batch_size(num_images)))
    return file_bytes(num_classes) + c.epochs * epoch_bytes(num_images, num_batches, num_classes)


def label_spans(
    epochs: int, num_images: int, num_classes: int, encoding: LabelEncoding = FULL
) -> tuple[list[range], bool]:
    """Return which epochs one worker writes together, and whether each such file is a shard of the set or they are joined."""
    most = per_shard(num_images * (encoding.image_bytes(num_classes) + 24))  # 24: index, crop, flip, partner, some room
    return cuts(epochs, min(MAX_EPOCHS_PER_PIECE, most)), epochs > most


def join_labels(store: Store, name: str, pieces: Iterable[Written], about: dict) -> Written:
    """Write one label file from pieces in order, an epoch at a time."""
    readers = [pa.ipc.open_file(store.open(piece.name)) for piece in pieces]
    epochs = (reader.get_batch(row) for reader in readers for row in range(reader.num_record_batches))
    with store.writer(name) as stream:
        write_label_file(stream, epochs, about)
        return Written(name, stream.sha256())


def teacher_names(run: Run) -> list[str]:
    """Return the teachers in committee order.  Raises ConfigError for one that is not in the committee."""
    experts = run.config.committee.experts
    wanted = run.config.relabel.teachers or experts
    unknown = sorted(set(wanted) - set(experts))
    if unknown:
        raise ConfigError(f"relabel.teachers: {unknown} not in the committee; its experts are {', '.join(experts)}")
    return [name for name in experts if name in wanted]


def label_epochs(
    item: tuple[range, str], images_NCHW: np.ndarray, info: DatasetInfo, teachers: list[ExpertSpec], weights: list[float],
    views: ViewSettings, about: dict, store: Store, report: Callable[[dict], None],
) -> bytes:  # fmt: skip
    """Write the labels of some epochs as a label file of the given name, an epoch at a time; return its sha256."""
    epochs, name = item
    encoding = label_encoding(views.c, info.num_classes)

    def batches() -> Iterator[pa.RecordBatch]:
        for done, rows in enumerate(labelled_epochs(images_NCHW, info, teachers, weights, views, epochs), 1):
            yield label_batch(rows, encoding)
            report({"done": done / len(epochs)})

    with store.writer(name) as stream:
        write_label_file(stream, batches(), about)
        return stream.sha256().encode()


def labelled_epochs(
    images_NCHW: np.ndarray,
    info: DatasetInfo,
    teachers: Sequence[ExpertSpec],
    weights,
    views: ViewSettings,
    epochs: range,
) -> Iterator[list[tuple[BatchPlan, Tensor]]]:
    """Yield the (plan, logits_BK in fp32) of every batch, epoch by epoch, for a set of uint8 images."""
    labeller = Labeller(images_NCHW, info, teachers, weights, views)
    for epoch in epochs:
        yield labeller.epoch(epoch)


class Labeller:
    """Teachers, built on the work device, that label a set of uint8 images."""

    def __init__(
        self, images_NCHW: np.ndarray, info: DatasetInfo, teachers: Sequence[ExpertSpec], weights: Sequence[float],
        views: ViewSettings,
    ):  # fmt: skip
        device, c = work_device(), views.c
        self._networks = [Teacher(spec.build(device), batchnorm=c.batchnorm, scope=c.scope) for spec in teachers]
        self._pixels, self._weights, self._views = network_inputs(images_NCHW, info, device), weights, views
        self._bn_group = c.resolved_bn_group(len(self._pixels))
        self._per_call = MAX_IMAGES_ON_CPU if device.type == "cpu" else MAX_IMAGES
        self._together = batches_together(c.resolved_batch_size(len(self._pixels)), self._bn_group, self._per_call)

    def epoch(self, epoch: int) -> list[tuple[BatchPlan, Tensor]]:
        """Return the (plan, logits_BK in fp32) of every batch of an epoch; they depend on nothing but its number."""
        plans = self._views.plans(epoch, len(self._pixels))
        logits: list[Tensor] = []
        is_random = self._views.c.scope == "full"
        combine = rescaled_logits if self._views.c.rescale else committee_logits
        with torch.random.fork_rng(enabled=is_random):  # dropout draws from torch's own generator
            if is_random:
                torch.manual_seed(key(self._views.seed, "dropout", epoch))
            for some in cuts(len(plans), self._together):
                batches = [batch_views(self._pixels, plans[k]) for k in some]
                labelled = combine(self._networks, self._weights, batches, self._bn_group, self._per_call)
                logits += [part.cpu() for part in labelled]
        return list(zip(plans, logits, strict=True))


@dataclass(frozen=True)
class OnlineLabels:
    """What says the labels of a set of images while students train (`relabel.online`)."""

    teachers: tuple[ExpertSpec, ...]
    weights: tuple[float, ...]
    views: ViewSettings


def online_labels(run: Run, labelled: Manifest, images: str) -> OnlineLabels:
    """Return the teachers that a finished stage with online labels names, for images with the content hash `images`.

    Raises ArtifactError when it was made for other images, or with other experts than are there now.
    """
    about: Mapping[str, Any] = json.loads(run.artifacts.read(labelled, ONLINE))
    where = run.store.display(labelled.stage)
    if about["images"] != images:
        raise ArtifactError(
            f"{where} labels image set {about['images'][:12]}, but was asked about {images[:12]}; use the images it was made "
            f"for, or run `cvdd relabel` for these"
        )
    specs, hashes = load_experts(run)
    other = [name for name, content in about["teachers"].items() if hashes.get(f"pretrain/{name}") != content]
    if other:
        raise ArtifactError(
            f"{where} is labelled online by experts that are not there any more: {', '.join(other)}; make it anew with "
            f"`cvdd relabel --overwrite`"
        )
    views = ViewSettings(about["seed"], about["flip"], run.info.image_size, RelabelConfig(**about["relabel"]))
    return OnlineLabels(tuple(specs[name] for name in about["teachers"]), tuple(about["teacher_weights"]), views)
