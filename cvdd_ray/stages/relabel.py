"""relabel: soft labels from the committee, every BatchNorm on its small batch's own statistics (BSSL; spec section 6)."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cvdd_ray.config import RelabelConfig
from cvdd_ray.core.experts import ExpertSpec, work_device
from cvdd_ray.core.keys import key
from cvdd_ray.core.softlabels import (
    BatchPlan,
    Teacher,
    batch_views,
    batches_together,
    committee_logits,
    epoch_plans,
)
from cvdd_ray.core.voting import prior_weights
from cvdd_ray.data.artifacts import Written
from cvdd_ray.data.datasets import DatasetInfo, network_inputs
from cvdd_ray.data.labels import label_batch, write_label_file
from cvdd_ray.data.shards import cuts, per_shard, shard_name
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.initialize import RANDOM, START, load_image_set
from cvdd_ray.stages.pretrain import load_experts
from cvdd_ray.stages.synthesize import DISTILLED
from cvdd_ray.stages.votes import load_priors

LABELS = "labels"
MAX_EPOCHS_PER_PIECE = 10


@dataclass(frozen=True)
class LabelSet:
    """A set of soft labels of one run: where its images are, and the BatchNorm mode of its teachers."""

    images: tuple[str, str, str]  # stage (with {ipc}), file, verb that makes it
    batchnorm: str | None  # None: as configured


DISTILLED_IMAGES = ("synthesize/ipc{ipc}", DISTILLED, "synthesize")
LABEL_SETS = {
    "distilled": LabelSet(DISTILLED_IMAGES, None),
    "distilled-eval": LabelSet(DISTILLED_IMAGES, "eval"),
    "random": LabelSet(("initialize/ipc{ipc}", RANDOM, "initialize"), None),
    "start": LabelSet(("initialize/ipc{ipc}", START, "initialize"), None),
}
BASELINE_LABELS = {"random_soft": "random", "start_soft": "start", "eval_labels": "distilled-eval"}


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


def label_sets(run: Run) -> list[str]:
    """Return the label sets this run needs: ours, and one per soft baseline."""
    return ["distilled", *(BASELINE_LABELS[b] for b in run.config.evaluate.baselines if b in BASELINE_LABELS)]


def relabel(run: Run, ipc: int, label_set: str = "distilled") -> None:
    """Make `relabel/ipc<n>/<label set>`: labels.arrow, one record batch per epoch, bound to its images by hash; many
    labels as several files, which workers write side by side.

    Raises ArtifactError when images, experts or priors are missing, ConfigError for teachers outside the committee.
    """
    c = run.config.relabel
    kind = LABEL_SETS[label_set]
    if kind.batchnorm:
        c = c.model_copy(update={"batchnorm": kind.batchnorm, "scope": "bn"})
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
    settings = {"label_set": label_set, "relabel": {**c.model_dump(), **resolved}, "data.flip": run.config.data.flip}
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
                 "teacher_weights": list(weights), "relabel": c.model_dump(), "classes": run.classes}  # fmt: skip
        spans, sharded = label_spans(c.epochs, len(images), len(run.classes))
        if sharded:
            about |= {"epochs": c.epochs, "epochs_per_shard": len(spans[0])}
        pieces = {f"epochs{span.start:05d}": span for span in spans}
        items = {name: (span, work.piece(name)) for name, span in pieces.items()}
        views = ViewSettings(run.config.seed, run.config.data.flip, run.info.image_size, c)
        shared = (images.images_NCHW, run.info, [specs[n] for n in names], weights, views, about, run.store)
        receipts = work.each(label_epochs, items, shared)
        written = {name: Written(work.piece(name), receipts[name].decode()) for name in pieces}
        if sharded:
            files = {shard_name(LABELS, k, len(spans)): file for k, file in enumerate(written.values())}
        else:
            files = {shard_name(LABELS, 0, 1): join_labels(run.store, work.piece(LABELS), written.values(), about)}
        work.commit(files, epochs=c.epochs, teachers=names)


def label_bytes(num_images: int, num_classes: int) -> int:
    """Return about how many bytes an epoch of labels takes: fp16 logits, image index, crop, flip and partner per image."""
    return num_images * (2 * num_classes + 24)


def label_spans(epochs: int, num_images: int, num_classes: int) -> tuple[list[range], bool]:
    """Return which epochs one worker writes together, and whether each such file is a shard of the set or they are joined."""
    most = per_shard(label_bytes(num_images, num_classes))
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

    def batches() -> Iterator[pa.RecordBatch]:
        for done, rows in enumerate(labelled_epochs(images_NCHW, info, teachers, weights, views, epochs), 1):
            yield label_batch(rows)
            report({"done": done / len(epochs)})

    with store.writer(name) as stream:
        write_label_file(stream, batches(), about)
        return stream.sha256().encode()


def labelled_epochs(
    images_NCHW: np.ndarray, info: DatasetInfo, teachers: list[ExpertSpec], weights, views: ViewSettings, epochs: range
) -> Iterator[list[tuple[BatchPlan, Tensor]]]:
    """Yield the (plan, logits_BK in fp32) of every batch, epoch by epoch, for a set of uint8 images."""
    device = work_device()
    c = views.c
    networks = [Teacher(spec.build(device), batchnorm=c.batchnorm, scope=c.scope) for spec in teachers]
    pixels = network_inputs(images_NCHW, info, device)
    bn_group = c.resolved_bn_group(len(pixels))
    together = batches_together(c.resolved_batch_size(len(pixels)), bn_group)
    for epoch in epochs:
        plans = views.plans(epoch, len(pixels))
        logits: list[Tensor] = []
        with torch.random.fork_rng(enabled=c.scope == "full"):  # dropout draws from torch's own generator
            if c.scope == "full":
                torch.manual_seed(key(views.seed, "dropout", epoch))
            for some in cuts(len(plans), together):
                batches = [batch_views(pixels, plans[k]) for k in some]
                logits += [part.cpu() for part in committee_logits(networks, weights, batches, bn_group)]
        yield list(zip(plans, logits, strict=True))
