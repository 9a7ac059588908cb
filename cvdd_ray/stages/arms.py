"""The rows of the table: what students of `evaluate` may be trained on. Images, labels and their regime are said here alone.

Rows are compared at equal images per class, with the same students and views; only the ceiling has all real images.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cvdd_ray.config import RunConfig
from cvdd_ray.stages.initialize import RANDOM, START
from cvdd_ray.stages.synthesize import DISTILLED

OURS, OURS_HARD, CEILING = "distilled", "distilled_hard", "real_hard"
Source = tuple[str, str, str]  # stage (with {ipc}), image set, verb that makes it

DISTILLED_IMAGES: Source = ("synthesize/ipc{ipc}", DISTILLED, "synthesize")
START_IMAGES: Source = ("initialize/ipc{ipc}", START, "initialize")
RANDOM_IMAGES: Source = ("initialize/ipc{ipc}", RANDOM, "initialize")

PLAIN = {"cutmix": False, "crop_scale": (1.0, 1.0)}  # a crop of the whole area is the image itself
REGIMES = {"soft": "fixed soft", "online": "soft, teachers online", "hard": "hard"}
"""Label regimes in the order in which they are reported, apart from each other: logits stored for every view, teachers that
are asked as students train, class indices."""


@dataclass(frozen=True)
class LabelSet:
    """A set of soft labels of one run: its images, what differs from the settings of `relabel`, and whether views may be
    mirrored at all."""

    images: Source
    changes: Mapping[str, Any] = field(default_factory=dict)
    flip: bool = True


LABEL_SETS = {
    "distilled": LabelSet(DISTILLED_IMAGES),
    "distilled-eval": LabelSet(DISTILLED_IMAGES, {"batchnorm": "eval", "scope": "bn"}),
    "random": LabelSet(RANDOM_IMAGES),
    "start": LabelSet(START_IMAGES),
    "distilled-plain": LabelSet(DISTILLED_IMAGES, PLAIN, flip=False),
    "random-plain": LabelSet(RANDOM_IMAGES, PLAIN, flip=False),
}


@dataclass(frozen=True)
class TrainingSet:
    """One row: what it is in words, its images (None: the whole real training set), its label set (None: hard labels)."""

    title: str
    images: Source | None
    label_set: str | None = None

    def regime(self, online: bool) -> str:
        """Return the key of its label regime in `REGIMES`; `online`: soft labels are asked of teachers."""
        if self.label_set is None:
            return "hard"
        return "online" if online else "soft"


def _soft(title: str, label_set: str) -> TrainingSet:
    return TrainingSet(title, LABEL_SETS[label_set].images, label_set)


TRAINING_SETS = {
    OURS: _soft("distilled, soft labels (BSSL)", "distilled"),
    "eval_labels": _soft("distilled, eval-mode labels", "distilled-eval"),
    "start_soft": _soft("starting images, soft labels", "start"),
    "random_soft": _soft("random real, soft labels", "random"),
    "distilled_plain": _soft("distilled, soft, no augmentation", "distilled-plain"),
    "random_plain": _soft("random real, soft, no augment.", "random-plain"),
    OURS_HARD: TrainingSet("distilled, hard labels", DISTILLED_IMAGES),
    "random_hard": TrainingSet("random real, hard labels", RANDOM_IMAGES),
    CEILING: TrainingSet("all real images, hard labels", None),
}


def sized_rows(c: RunConfig) -> list[str]:
    """Return the rows of a run that have `ipc` images per class, ours first."""
    ours = OURS if c.labels_are_soft else OURS_HARD
    return [ours, *(name for name in c.evaluate.baselines if name != CEILING)]


def label_sets(c: RunConfig) -> list[str]:
    """Return the label sets that the rows of a run need, ours first."""
    return [TRAINING_SETS[name].label_set for name in sized_rows(c) if TRAINING_SETS[name].label_set]
