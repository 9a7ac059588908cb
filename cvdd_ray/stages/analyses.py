"""Analyses of finished runs: tables and pictures as the paper has them, from the artifacts alone.

Each takes the runs (most take one), and returns an `Analysis`; `analyze.py` lists them.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from cvdd_ray.core.costs import Network, image_flops, view_flops, weight_bytes
from cvdd_ray.core.experts import ExpertSpec, work_device
from cvdd_ray.core.inspection import class_similarity, embeddings, statistics_gaps
from cvdd_ray.core.keys import generator
from cvdd_ray.data.datasets import Normalization, normalize
from cvdd_ray.data.imagesets import ImageSet
from cvdd_ray.errors import ArtifactError, ConfigError
from cvdd_ray.stages.analysispictures import (
    class_figure,
    fit_figure,
    image_grid,
    layer_figure,
    parameter_figure,
)
from cvdd_ray.stages.arms import OURS
from cvdd_ray.stages.costsheet import times_asked
from cvdd_ray.stages.evaluate import RESULTS
from cvdd_ray.stages.initialize import RANDOM, START
from cvdd_ray.stages.paper import PAPER, paper, paper_note
from cvdd_ray.stages.planreport import flops
from cvdd_ray.stages.pretrain import WEIGHTS
from cvdd_ray.stages.report import spread
from cvdd_ray.stages.summary import RunReader, read_summary, training_set
from cvdd_ray.stages.synthesize import DISTILLED

BATCH = 100  # images in one call of an expert


@dataclass(frozen=True)
class Analysis:
    """A table as text, a picture as PNG bytes if there is one, and what a reader should know."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = ()
    picture: bytes | None = None
    numbers: Any = field(default=None, compare=False)
    """What the table says, as plain numbers."""


@dataclass(frozen=True)
class OneRun:
    """A run under analysis: its short name, its reader, the IPC that was asked for (None: its largest finished one)."""

    name: str
    reader: RunReader
    ipc: int

    @property
    def dataset(self) -> str | None:
        summary = read_summary(self.reader)
        return summary.dataset

    def require(self, stage: str, verb: str):
        """Return the manifest of a finished stage.  Raises ArtifactError."""
        return self.reader.artifacts.require(stage, verb)

    def sets(self) -> dict[str, ImageSet]:
        """Return distilled, starting and random images of the IPC, those that are there."""
        found = {}
        for title, stage, base in (
            ("distilled", f"synthesize/ipc{self.ipc}", DISTILLED),
            ("start", f"initialize/ipc{self.ipc}", START),
            ("random real", f"initialize/ipc{self.ipc}", RANDOM),
        ):  # fmt: skip
            if stage in self.reader.manifests:
                found[title] = self.reader.images(stage, base)
        if "distilled" not in found:
            self.require(f"synthesize/ipc{self.ipc}", "synthesize")
        return found

    def expert(self, name: str | None) -> tuple[str, torch.nn.Module]:
        """Return an expert of the committee (default: the first), ready for work.  Raises ConfigError for another."""
        known = self.reader.experts()
        name = name or known[0]
        if name not in known:
            raise ConfigError(f"--expert {name}: {self.name} has {', '.join(known)}")
        made = self.require(f"pretrain/{name}", "pretrain")
        info, classes = made.identity["settings"]["dataset"], made.identity["classes"]
        weights = self.reader.artifacts.read(made, WEIGHTS)
        width = self.reader.config.committee.width
        return name, ExpertSpec(name, len(classes), info["image_size"], width, weights).build(work_device())

    def batches(self, images: ImageSet, order: np.ndarray, size: int) -> list[torch.Tensor]:
        """Return normalised images in this order, `size` at a time, on the work device."""
        info = self.require(f"initialize/ipc{self.ipc}", "initialize").identity["settings"]["dataset"]
        constants = Normalization(tuple(info["mean"]), tuple(info["std"]))
        cuts = [order[start : start + size] for start in range(0, len(order), size)]
        return [normalize(torch.from_numpy(images.images_NCHW[cut]), constants).to(work_device()) for cut in cuts]


def similarity(runs: Sequence[OneRun], expert: str | None) -> Analysis:
    """Fig. 4: mean cosine similarity of an expert's embeddings over pairs of images of a class, per set of images.

    Raises ConfigError for one image per class.
    """
    first = runs[0]
    if first.ipc < 2:
        raise ConfigError(f"--what similarity: needs two images per class, IPC is {first.ipc}; name another with --ipc")
    name, model = first.expert(expert)
    found: dict[str, np.ndarray] = {}
    for run in runs:
        for title, images in run.sets().items():
            label = title if len(runs) == 1 else f"{run.name}: {title}"
            if run is first or title == "distilled":
                features = embeddings(model, run.batches(images, np.arange(len(images)), BATCH))
                found[label] = class_similarity(features, torch.from_numpy(np.array(images.labels_N))).numpy()
    rows = tuple(
        (label, f"{values.mean():.3f}", f"{values.min():.3f}", f"{values.max():.3f}") for label, values in found.items()
    )
    title = f"Similarity of images of a class, IPC {first.ipc}"
    return Analysis(
        title, ("images", "mean over classes", "lowest class", "highest class"), rows,
        (f"Mean cosine similarity of {name}'s embeddings over all pairs of a class; lower is more diverse (paper Fig. 4, "
         f"which shows ImageNet-1K at IPC 10 and no numbers).",),
        class_figure(found, title=title, label=f"mean cosine similarity ({name})"),
        {label: values.tolist() for label, values in found.items()},
    )  # fmt: skip


def batchnorm(runs: Sequence[OneRun], expert: str | None) -> Analysis:
    """Figs. 5, 10, 11: how far statistics of batches of distilled images are from an expert's running ones, layer by layer."""
    (run,) = runs
    name, model = run.expert(expert)
    size = run.reader.config.relabel.resolved_batch_size(run.ipc * len(run.sets()["distilled"].classes))
    gaps = {}
    for title, images in run.sets().items():
        order = torch.randperm(len(images), generator=generator(0, "analysis", "batches")).numpy()
        batches = [batch for batch in run.batches(images, order, size) if len(batch) == size]
        gaps[title] = tuple(gap.numpy() for gap in statistics_gaps(model, batches))
    rows = tuple(
        (str(layer), *(f"{values[:, layer].mean():.3g}" for mean_var in gaps.values() for values in mean_var))
        for layer in range(next(iter(gaps.values()))[0].shape[1])
    )
    title = f"BatchNorm statistics against {name}'s running ones, IPC {run.ipc}"
    columns = tuple(f"{label}, {what}" for label in gaps for what in ("mean", "variance"))
    return Analysis(
        title, ("layer", *columns), rows,
        (f"Mean absolute difference over channels, mean over batches of {size} images (paper Figs. 5, 10, 11).",),
        layer_figure(gaps, title=title, batch=size),
        {label: {"mean": mean.tolist(), "variance": var.tolist()} for label, (mean, var) in gaps.items()},
    )  # fmt: skip


def curves(runs: Sequence[OneRun], expert: str | None) -> Analysis:
    """Fig. 6: students' agreement with their labels in training, and test accuracy, by epoch; of one run every row, of
    several their distilled images."""
    found: dict[str, dict] = {}
    for run in runs:
        made = run.require(f"evaluate/ipc{run.ipc}", "evaluate")
        results = json.loads(run.reader.artifacts.read(made, RESULTS))["runs"]
        student = results[0]["student"]
        for arm in dict.fromkeys(result["arm"] for result in results):
            if len(runs) > 1 and arm != OURS:
                continue
            seeds = [result["curve"] for result in results if (result["arm"], result["student"]) == (arm, student)]
            label = training_set(run.reader, run.ipc, arm) if len(runs) == 1 else f"{run.name}, {student}"
            found[label] = {"epochs": [row[0] + 1 for row in seeds[0]], "train": [[r[2] for r in s] for s in seeds],
                            "test": [[r[3] for r in s] for s in seeds]}  # fmt: skip
    rows = []
    for label, curve in found.items():
        train, test = (np.array(curve[which])[:, -1] for which in ("train", "test"))
        cells = [spread(v.mean(), v.std(ddof=1) if len(v) > 1 else None) for v in (train, test)]
        rows.append((label, *cells, f"{train.mean() - test.mean():+.1f}"))
    title = f"Training and test, IPC {runs[0].ipc}"
    return Analysis(
        title, ("trained on", "train agreement %", "test accuracy %", "gap"), tuple(rows),
        ("After the last epoch. Train agreement: the student's class is that of its label on augmented views (paper Fig. 6, "
         "CIFAR-10 at IPC 50).",),
        fit_figure(found, title=title), found,
    )  # fmt: skip


def images(runs: Sequence[OneRun], expert: str | None) -> Analysis:
    """Figs. 7, 8, 12-16: distilled images in a grid, a row per class; several runs side by side."""
    sets = {run.name: run.sets()["distilled"] for run in runs}
    rows = tuple((name, str(len(images)), str(len(images.classes))) for name, images in sets.items())
    title = "Distilled images" if len(runs) > 1 else f"Distilled images of {runs[0].dataset}, IPC {runs[0].ipc}"
    return Analysis(title, ("run", "images", "classes"), rows, picture=image_grid(sets, title=title))


def efficiency(runs: Sequence[OneRun], expert: str | None) -> Analysis:
    """Table 3: milliseconds of wall time and FLOPs per image and iteration of synthesis."""
    rows, numbers = [], {}
    for run in runs:
        made = run.require(f"synthesize/ipc{run.ipc}", "synthesize")
        c, info = made.identity["settings"]["synthesize"], made.identity["settings"]["dataset"]
        votes = run.reader.votes(made.stage)
        steps = len(votes) * c["iterations"]
        if not steps:
            raise ConfigError(f"--what efficiency: {run.name} has no iterations of synthesis")
        if run.reader.config.synthesize.method != "committee":
            raise ConfigError(f"--what efficiency: {run.name} has no votes on its images; leave it out")
        width, num_classes = run.reader.config.committee.width, len(made.identity["classes"])
        calls = sum(
            asked * image_flops(Network(name, num_classes, info["image_size"], width)).vote
            for _, voters, _ in votes
            for name, asked in zip(
                voters, times_asked(c["iterations"], len(voters), run.reader.config.voting.turns), strict=True
            )
        )
        each = calls / steps + 2 * view_flops(info["image_size"])
        ms = 1e3 * made.wall_s / steps
        known = paper("efficiency").get(info["name"], {}).get("CV-DD")
        numbers[run.name] = {"ms": ms, "flops": each, "images": len(votes), "iterations": c["iterations"]}
        rows.append(
            (run.name, info["name"], str(len(votes)), str(c["iterations"]), f"{ms:.3g}", flops(round(each)),
             "" if known is None else f"{known:g}")
        )  # fmt: skip
    return Analysis(
        "Efficiency of synthesis", ("run", "data", "images", "iterations", "ms per image and iteration", "FLOPs", f"{PAPER}, ms"),
        tuple(rows),
        ("Wall time of the whole stage, on whatever it ran, with all its workers at once; checkpoints, start-up and "
         "interruptions are in it. " + paper_note("efficiency", runs[0].dataset, None) + " One RTX 4090.",),
        numbers=numbers,
    )  # fmt: skip


def priors(runs: Sequence[OneRun], expert: str | None) -> Analysis:
    """Table 19: the prior of every expert."""
    (run,) = runs
    summary, c = read_summary(run.reader), run.reader.config.prior
    if not any(one.prior is not None for one in summary.experts):
        raise ArtifactError(f"{summary.where} has no priors; make them with `cvdd prior`")
    known = paper("priors")["values"].get(summary.dataset, {})
    if c.method == "distill" and paper("priors")["ipc"].get(summary.dataset) != c.ipc:
        known = {}
    rows = tuple(
        (one.name, "" if one.holdout_accuracy is None else f"{one.holdout_accuracy:.1f}",
         "" if one.prior is None else f"{one.prior:.1f}", f"{known[one.name]:g}" if one.name in known else "")
        for one in summary.experts
    )  # fmt: skip
    how = (
        f"measured on the hold-out, {c.ipc} images per class, student {c.student}" if c.method == "distill" else "given"
    )
    return Analysis(
        "Priors", ("expert", "hold-out accuracy %", "prior %", f"{PAPER}, prior %"), rows,
        (f"Ours: {how}. {paper_note('priors', summary.dataset, c.ipc if c.method == 'distill' else None)}",),
        numbers={one.name: one.prior for one in summary.experts},
    )  # fmt: skip


def architectures(runs: Sequence[OneRun], expert: str | None) -> Analysis:
    """Table 4 and Fig. 9: test accuracy of every student network, and against its parameters."""
    (run,) = runs
    summary = read_summary(run.reader)
    rows = [row for one in summary.ipcs if one.ipc == run.ipc for row in one.rows if row.arm == OURS]
    if not rows:
        run.require(f"evaluate/ipc{run.ipc}", "evaluate")
    settings = run.reader.manifests[f"evaluate/ipc{run.ipc}"].identity["settings"]["evaluate"]
    counted = {
        row.student: parameters(row.student, len(summary.classes), summary.image_size, settings["width"])
        for row in rows
    }
    table = paper("architectures")
    known = table["students"] if (summary.dataset, run.ipc) == (table["dataset"], table["ipc"]) else {}
    shown = tuple(
        (row.student, f"{counted[row.student]:.2f}", spread(row.last_mean, row.last_std), spread(row.best_mean, row.best_std),
         f"{known[row.student]['CV-DD']:g}" if row.student in known else "")
        for row in rows
    )  # fmt: skip
    title = f"Accuracy and size of students, {summary.dataset} at IPC {run.ipc}"
    points = {row.student: (counted[row.student], row.last_mean, row.last_std) for row in rows}
    theirs = {name: (one["parameters"], one["CV-DD"]) for name, one in known.items() if name in points}
    return Analysis(
        title, ("student", "parameters in millions", "last %", "best %", f"{PAPER}, CV-DD"), shown,
        (paper_note("architectures", summary.dataset, run.ipc),),
        parameter_figure(points, theirs, title=title, label="test accuracy in %, last epoch"), points,
    )  # fmt: skip


def parameters(student: str, num_classes: int, image_size: int, width: float) -> float:
    """Return the trained parameters of a network in millions."""
    return weight_bytes(Network(student, num_classes, image_size, width))[1] / 4e6
