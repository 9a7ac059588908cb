"""One trial of a sweep: the stages its settings need, then its students side by side, measured on the hold-out.

Nothing here sees the test set: it is for the final evaluation of the winner alone (decision 6 of the architecture).
"""

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from cvdd_ray.config import PriorConfig, RunConfig
from cvdd_ray.core.experts import work_device
from cvdd_ray.core.students import StudentTraining
from cvdd_ray.core.training import accuracy
from cvdd_ray.data.artifacts import Artifacts, Manifest
from cvdd_ray.data.datasets import network_inputs
from cvdd_ray.data.sources import RealData
from cvdd_ray.data.states import read_state, write_state
from cvdd_ray.evaluateconfig import MUTABLE_SETTINGS
from cvdd_ray.recipes import with_settings
from cvdd_ray.stages.arms import OURS
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.evaluate import build_student, load_arms, on_device, student_settings
from cvdd_ray.stages.pipeline import STAGES, check
from cvdd_ray.stages.pretrain import pretrain
from cvdd_ray.stages.prior import measure_priors
from cvdd_ray.stages.real import split_for_workers, test_batches
from cvdd_ray.stages.votes import needs_priors, read_priors
from cvdd_ray.sweepconfig import CHECKPOINT_EVERY, require_one_worker

SHARED_STAGES = ("pretrain", "prior", "initialize", "synthesize", "relabel")
# What a section changes first. Priors are measured with the settings of the unchanged run, unless the experts or the
# measurement itself are swept: one thing varies at a time, and voting, synthesis and labels never cost new priors.
FIRST_STAGE = {
    "data": "pretrain", "committee": "pretrain", "pretrain": "pretrain", "prior": "prior",
    "initialize": "initialize", "ipc": "initialize", "voting": "synthesize", "synthesize": "synthesize",
    "relabel": "relabel", "evaluate": "evaluate",
}  # fmt: skip
UPSTREAM = {section for section, stage in FIRST_STAGE.items() if stage in ("pretrain", "prior")}


def untouched_stages(keys: Sequence[str]) -> tuple[str, ...]:
    """Return the stages before the students that do not depend on any of these dotted settings."""
    first = min((list(STAGES).index(FIRST_STAGE[key.split(".")[0]]) for key in keys), default=len(STAGES))
    return tuple(stage for stage in SHARED_STAGES if list(STAGES).index(stage) < first)


def prepare(
    run_of: Callable[[RunConfig], Run], base: RunConfig, values: Mapping[str, Any], stages: Sequence[str] = SHARED_STAGES
) -> tuple[Run, dict[str, Manifest]]:  # fmt: skip
    """Make what a trial's students need, as far as `stages` goes, and return its run and the stages it rests on.

    `run_of` gives the Run of a configuration; all of them share one set of artifacts, so that what is there is not made
    again. Measured priors become given ones in the run's configuration: it can be repeated as it is.  Raises what the
    stages raise, and ConfigError for settings that do not fit together.
    """
    config = with_settings(base, values)
    first = run_of(with_settings(base, {key: v for key, v in values.items() if key.split(".")[0] in UPSTREAM}))
    used: dict[str, Manifest] = {}
    if "pretrain" in stages:
        pretrain(first)
    if "prior" in stages and needs_priors(config) and config.prior.method == "distill":
        measure_priors(first)
        used = {"prior": first.artifacts.used["prior"]}  # what was measured, not that it is given from here on
        config = with_given_priors(config, read_priors(first))
    run = run_of(config)
    check(run)
    for stage in stages:
        if stage != "pretrain":  # the experts are those of the first run
            STAGES[stage](run)
    return run, {**run.artifacts.used, **used}


def run_beside(base: RunConfig, real: RealData | None, config: RunConfig, artifacts: Artifacts, **options: Any) -> Run:
    """Return the run of a configuration, with the real data of the unchanged run where it is the same."""
    same_data = (config.data, config.seed) == (base.data, base.seed)
    return Run(config, artifacts, real=real if same_data else None, **options)


def with_given_priors(config: RunConfig, priors: Mapping[str, float]) -> RunConfig:
    """Return the configuration with these priors (percent) in place of a measurement; votes and labels stay the same."""
    given = PriorConfig(method="given", values={name: priors[name] for name in config.committee.experts})
    return config.model_copy(update={"prior": given})


@dataclass(frozen=True)
class Measurement:
    """A trial after an epoch: number of finished epochs, hold-out accuracy of every student in percent, their mean training
    loss and agreement with the labels in percent, the epoch's learning rate, and the history of what may change in
    mid-training: (first epoch, settings)."""

    epoch: int
    epochs: int
    holdout_accuracies: tuple[float, ...]
    train_loss: float
    train_agreement: float
    lr: float
    history: tuple[tuple[int, Mapping[str, float]], ...]

    def metrics(self) -> dict[str, Any]:
        """Return plain values by name; `holdout_accuracy` is what a sweep maximises."""
        spread = statistics.stdev(self.holdout_accuracies) if len(self.holdout_accuracies) > 1 else 0.0
        return {
            "epoch": self.epoch,
            "epochs": self.epochs,
            "holdout_accuracy": statistics.fmean(self.holdout_accuracies),
            "holdout_std": spread,
            **{f"holdout_accuracy_{seed}": value for seed, value in enumerate(self.holdout_accuracies)},
            "train_loss": self.train_loss,
            "train_agreement": self.train_agreement,
            "lr": self.lr,
            "history": json.dumps(self.history),
        }


class TrialStudents:
    """The students of one trial (`evaluate.first_seed` and on), one epoch after the other; can be saved and taken up again.

    Taken up with another learning rate, weight decay, eta or temperature than it was saved with (population-based
    training), it goes on with the new ones and remembers from which epoch.  Raises ConfigError for several workers.
    """

    def __init__(self, run: Run, num_seeds: int):
        require_one_worker(run.config)
        c, self._info, ipc = run.config, run.info, run.config.ipc[0]
        arm = load_arms(run, ipc)[0][OURS]
        self._epoch_rows = arm.soft_labels(run.store, run.info)
        self._holdout = split_for_workers(run.real.holdout, self._info)
        self._device = work_device()
        pixels = network_inputs(arm.images_NCHW, self._info, self._device)
        self._settings = student_settings(run, c.student_epochs, len(pixels))
        self._asked = {name: getattr(c.evaluate, name) for name in MUTABLE_SETTINGS}
        numbers = range(c.evaluate.first_seed, c.evaluate.first_seed + num_seeds)
        students = [build_student(c.evaluate.students[0], n, self._info, c.seed, run.width) for n in numbers]
        labels_N = torch.from_numpy(np.array(arm.labels_N))
        self._trainings = [
            StudentTraining(model, pixels, self._settings, seed, labels_N=labels_N) for model, seed in students
        ]
        self._last = (0.0, 0.0)

    @property
    def next_epoch(self) -> int:
        return self._trainings[0].next_epoch

    @property
    def epochs(self) -> int:
        return self._settings.epochs

    def run_epoch(self) -> None:
        """Train every student for one epoch on the same labelled views."""
        rows = list(on_device(self._epoch_rows(self.next_epoch), self._device))
        both = [training.run_epoch(rows, self._settings) for training in self._trainings]
        self._last = tuple(statistics.fmean(values) for values in zip(*both, strict=True))

    def measure(self) -> Measurement:
        """Return where the students are, with their accuracy on the hold-out."""
        accuracies = []
        for training in self._trainings:
            with training.averaged() as student:
                accuracies.append(accuracy(student, test_batches(self._holdout, self._info, self._device)))
        lr = self._settings.lr_at(self.next_epoch - 1)
        return Measurement(self.next_epoch, self.epochs, tuple(accuracies), *self._last, lr, self._history())

    def state(self) -> bytes:
        """Return everything the next epochs depend on, as safetensors bytes."""
        tensors = {
            f"{seed}/{name}": value
            for seed, training in enumerate(self._trainings)
            for name, value in training.state().items()
        }
        return write_state(tensors, {"history": self._history(), "asked": self._asked, "last": self._last})

    def load(self, data: bytes) -> None:
        """Go on from a `state()` of the same trial, or of one that differs in what may change in mid-training.

        Raises ArtifactError when it is damaged.
        """
        tensors, about = read_state(data, "a trial's checkpoint is damaged; drop the sweep's trials with --overwrite")
        for seed, training in enumerate(self._trainings):
            prefix = f"{seed}/"
            training.load({n.removeprefix(prefix): value for n, value in tensors.items() if n.startswith(prefix)})
        (_, first), *phases = about["history"]
        self._last = tuple(about["last"])
        changes = {name: value for name, value in self._asked.items() if value != about["asked"][name]}
        phases = [(epoch, changed) for epoch, changed in phases] + ([(self.next_epoch, changes)] if changes else [])
        self._settings = replace(self._settings, **first, phases=tuple(phases))

    def _history(self) -> tuple[tuple[int, Mapping[str, float]], ...]:
        first = {name: getattr(self._settings, name) for name in MUTABLE_SETTINGS}
        return (0, first), *self._settings.phases


def with_history(config: RunConfig, history: Sequence[tuple[int, Mapping[str, float]]]) -> RunConfig:
    """Return the configuration whose students train as a trial with this history did; what was changed after the last epoch
    (population-based training copies finished students, too) never counted."""
    (_, first), *rest = history
    phases = [{"from_epoch": epoch, **changes} for epoch, changes in rest if epoch < config.student_epochs]
    return with_settings(config, {"evaluate": {**first, "phases": phases}})


def run_trial(
    students: TrialStudents,
    report: Callable[[Measurement, bytes | None], None],
    *,
    report_every: int = 1,
    checkpoint_every: int = CHECKPOINT_EVERY,
    keep_last: bool = False,
) -> None:
    """Train to the last epoch. `report` gets a measurement every `report_every` epochs and after the last, and with it a
    state every `checkpoint_every` epochs (after the last only with `keep_last`). Students that were taken up after their
    last epoch (population-based training copies finished ones, too) are measured once."""
    if students.next_epoch == students.epochs:
        report(students.measure(), None)
    while students.next_epoch < students.epochs:
        students.run_epoch()
        done, is_last = students.next_epoch, students.next_epoch == students.epochs
        is_saved = done % checkpoint_every == 0 and (keep_last or not is_last)
        if is_saved or is_last or done % report_every == 0:
            report(students.measure(), students.state() if is_saved else None)
