"""What a running sweep shows: one line with best, trials and time left, and on a terminal a table of trials."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from cvdd_ray.runner.trainable import METRIC
from cvdd_ray.space import label
from cvdd_ray.stages.context import Progress, Silent

MAX_ROWS = 12
ENDED = (Trial.TERMINATED, Trial.ERROR)


@dataclass
class Row:
    """The latest of one trial: its point, finished epochs, hold-out accuracy in percent, and whether it goes on."""

    point: Mapping[str, Any]
    epoch: int = 0
    epochs: int = 1
    accuracy: float | None = None
    state: str = "running"

    @property
    def share(self) -> float:
        """Share of its work that is done; one that ended has none left."""
        return self.epoch / self.epochs if self.state == "running" else 1.0


class SweepDisplay:
    """Shows the trials of one sweep as their results come in."""

    def __init__(self, progress: Progress, num_trials: int):
        self._progress, self._num_trials = progress, num_trials
        self._rows: dict[str, Row] = {}
        self.was_interrupted = False

    def result(self, trial: Trial, metrics: Mapping[str, Any]) -> None:
        """Take note of what a trial has reported."""
        row = self._rows.setdefault(trial.trial_id, Row(trial.config))
        row.point, row.state = dict(trial.config), "running"
        row.epoch, row.epochs, row.accuracy = metrics["epoch"], metrics["epochs"], metrics[METRIC]
        self._show()

    def end(self, trial: Trial) -> None:
        """Take note that a trial has ended, at its last epoch, early or in failure."""
        row = self._rows.setdefault(trial.trial_id, Row(trial.config))
        row.state = "failed" if trial.status == Trial.ERROR else "done" if row.epoch == row.epochs else "stopped"
        self._show()

    def found(self, trials: list[Trial]) -> None:
        """Take up the trials of an earlier session."""
        for trial in trials:
            if "epoch" in (trial.last_result or {}):
                self.result(trial, trial.last_result)
            if trial.status in ENDED:
                self.end(trial)

    def step(self, trials: list[Trial]) -> None:
        """Note after every step whether anything is left to do: if so at the last, the sweep was interrupted (Tune itself
        ends all trials then, and returns as if nothing had been)."""
        self.was_interrupted = len(trials) < self._num_trials or any(trial.status not in ENDED for trial in trials)

    def _show(self) -> None:
        self._progress.update(sum(row.share for row in self._rows.values()), self.note(), self.table())

    def note(self) -> str:
        """Return one line: the best finished trial, or else the best so far, and how many are in which state."""
        states = [row.state for row in self._rows.values()]
        counts = {state: states.count(state) for state in ("running", "stopped", "failed") if state in states}
        waiting = self._num_trials - len(states)
        left = ", ".join(
            [*(f"{n} {state}" for state, n in counts.items()), *([f"{waiting} waiting"] if waiting > 0 else [])]
        )
        best = self._ranked()[:1]
        leader = f"best so far {best[0][1].accuracy:.1f} % ({values_of(best[0][1].point)})" if best else "no result yet"
        return f"{leader}; {left}" if left else leader

    def table(self) -> str:
        """Return the leading trials as lines of text."""
        rows = self._ranked()[:MAX_ROWS]
        if not rows:
            return ""
        keys = list(rows[0][1].point)
        cells = [["epoch", "hold-out %", "state", *(key.split(".")[-1] for key in keys)]]
        cells += [
            [f"{row.epoch}/{row.epochs}", f"{row.accuracy:.1f}", row.state, *(label(row.point[key]) for key in keys)]
            for _, row in rows
        ]
        widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
        lines = ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells]
        hidden = len(self._ranked()) - len(rows)
        return "\n".join(f"  {line}".rstrip() for line in [*lines, *([f"and {hidden} more"] if hidden else [])])

    def _ranked(self) -> list[tuple[str, Row]]:
        """Trials with a result: finished ones first, then the others, each by accuracy."""
        measured = [(name, row) for name, row in self._rows.items() if row.accuracy is not None]
        return sorted(measured, key=lambda pair: (pair[1].epoch < pair[1].epochs, -pair[1].accuracy))


def values_of(point: Mapping[str, Any]) -> str:
    """Return a trial's values as short text."""
    return " ".join(f"{key.split('.')[-1]}={label(value)}" for key, value in point.items())


class DisplayCallback(tune.Callback):
    """Passes what Tune tells on to the display of the sweep that runs in this process.

    Tune pickles its callbacks and brings them back when an experiment is restored; a display cannot travel, so the
    callback has no state and finds the current one.
    """

    current = SweepDisplay(Silent(), 0)

    def setup(self, stop=None, num_samples=None, total_num_samples=None, **info):
        self._greeted = False

    def on_step_begin(self, iteration, trials, **info):
        if not self._greeted:
            self._greeted = True
            self.current.found(trials)

    def on_trial_result(self, iteration, trials, trial, result, **info):
        self.current.result(trial, result)

    def on_trial_complete(self, iteration, trials, trial, **info):
        self.current.end(trial)

    def on_trial_error(self, iteration, trials, trial, **info):
        self.current.end(trial)

    def on_step_end(self, iteration, trials, **info):
        self.current.step(trials)
