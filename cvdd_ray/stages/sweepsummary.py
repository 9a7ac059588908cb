"""What a sweep has found, as plain values read from its directory alone."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cvdd_ray.config import RunConfig
from cvdd_ray.data.artifacts import MANIFEST, read_manifest
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError
from cvdd_ray.recipes import parse_config, validate
from cvdd_ray.space import SEVERAL, point
from cvdd_ray.sweepconfig import SweepConfig

SWEEP, RESULTS, BEST, FINAL, TRIALS = "sweep.yaml", "results.parquet", "best.yaml", "final.json", "trials"
FIXED_COLUMNS = (
    ("trial", pa.string()), ("state", pa.string()), ("epoch", pa.int32()), ("epochs", pa.int32()),
    ("holdout_accuracy", pa.float64()), ("holdout_std", pa.float64()), ("train_loss", pa.float64()),
    ("train_agreement", pa.float64()), ("lr", pa.float64()), ("seconds", pa.float64()),
)  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """One trial: its point of the space (numbers, or names of listed values), `finished`, `stopped` (early) or `failed`,
    all epochs it would have had, rows (finished epochs, hold-out accuracy in percent: mean and standard deviation over
    its students), the history of what changed in mid-training: (first epoch, settings), and what it failed of."""

    name: str
    point: Mapping[str, Any]
    state: str
    epochs: int
    curve: tuple[tuple[int, float, float], ...]
    history: tuple[tuple[int, Mapping[str, float]], ...] = ()
    error: str | None = None

    @property
    def accuracy(self) -> float | None:
        """Hold-out accuracy in percent after the last epoch it reached."""
        return self.curve[-1][1] if self.curve else None


@dataclass(frozen=True)
class StageUse:
    """One kind of stage in a sweep: how often trials needed it, how many different ones there are, seconds they took, and
    seconds that sharing them saved."""

    stage: str
    needed: int
    made: int
    made_s: float
    saved_s: float


@dataclass(frozen=True)
class FinalTest:
    """Test accuracy in percent of fresh students of the winner or of the default, last epoch and best: mean and standard
    deviation (None for one student)."""

    name: str
    point: Mapping[str, Any]
    last_mean: float
    last_std: float | None
    best_mean: float
    best_std: float | None
    seeds: int


@dataclass(frozen=True)
class SweepSummary:
    """A sweep in plain values: trials best first, `default` is the point of the unchanged run."""

    where: str
    config: SweepConfig
    default: Mapping[str, Any]
    trials: tuple[Trial, ...]
    stages: tuple[StageUse, ...]
    final: tuple[FinalTest, ...]

    @property
    def winner(self) -> Trial | None:
        return winner_of(self.trials)


def winner_of(trials: Sequence[Trial]) -> Trial | None:
    """Return the trial with the highest hold-out accuracy after its last epoch; trials that were stopped early do not
    count, and of equals the first wins. None when no trial has finished."""
    finished = [trial for trial in trials if trial.state == "finished"]
    return max(finished, key=lambda trial: trial.accuracy, default=None)


def default_point(c: SweepConfig) -> dict[str, Any]:
    """Return where the unchanged run lies in the space: its own value of every swept setting, `(as is)` for a section."""
    plain = c.run_config().model_dump(mode="json")
    found = {}
    for key in c.sweep.space:
        value = plain
        for part in key.split(".") if key != SEVERAL else ():
            value = value[part]
        found[key] = "(as is)" if isinstance(value, Mapping) else point(value)
    return found


def results_table(c: SweepConfig, rows: Sequence[Mapping[str, Any]]) -> bytes:
    """Return the results as Parquet: one row per trial and measured epoch, a column per swept setting (text where
    one of its values is), and per-student accuracies in percent."""
    columns = {name: pa.array([row[name] for row in rows], kind) for name, kind in FIXED_COLUMNS}
    columns["holdout_accuracies"] = pa.array([row["holdout_accuracies"] for row in rows], pa.list_(pa.float64()))
    for key in c.sweep.space:
        values = [row["point"][key] for row in rows]
        is_text = any(isinstance(value, str) for value in values)
        columns[key] = pa.array([str(value) for value in values] if is_text else [float(value) for value in values])
    for name in ("history", "error"):
        columns[name] = pa.array([row[name] for row in rows], pa.string())
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def trials_of(c: SweepConfig, table: pa.Table) -> tuple[Trial, ...]:
    """Return the trials in a results table: finished ones first, best first."""
    found: dict[str, list[dict]] = {}
    for row in table.to_pylist():
        found.setdefault(row["trial"], []).append(row)
    trials = [
        Trial(
            name,
            {key: rows[-1][key] for key in c.sweep.space},
            rows[-1]["state"],
            rows[-1]["epochs"],
            tuple((r["epoch"], r["holdout_accuracy"], r["holdout_std"]) for r in rows if r["epoch"]),
            tuple((epoch, changes) for epoch, changes in json.loads(rows[-1]["history"] or "[]")),
            rows[-1]["error"],
        )
        for name, rows in found.items()
    ]
    order = {"finished": 0, "stopped": 1, "failed": 2}
    return tuple(sorted(trials, key=lambda trial: (order[trial.state], -(trial.accuracy or 0.0))))


def is_sweep(store: Store) -> bool:
    """Return whether a directory is that of a sweep."""
    return store.exists(SWEEP)


def read_sweep_config(store: Store) -> SweepConfig:
    """Return the configuration a sweep's directory remembers.  Raises ArtifactError when there is none."""
    if not is_sweep(store):
        raise ArtifactError(f"{store.display('').rstrip('/')} holds no sweep ({SWEEP} is missing)")
    return parse_config(store.read(SWEEP), store.display(SWEEP), model=SweepConfig)


def read_sweep(store: Store) -> SweepSummary:
    """Return the summary of a sweep.  Raises ArtifactError when it has no results yet, or they are damaged."""
    c = read_sweep_config(store)
    if not store.exists(RESULTS):
        raise ArtifactError(f"{store.display(RESULTS)} is not there yet; run the same `cvdd sweep` again to finish it")
    try:
        trials = trials_of(c, pq.read_table(io.BytesIO(store.read(RESULTS))))
    except (pa.ArrowInvalid, KeyError) as error:
        raise ArtifactError(
            f"{store.display(RESULTS)} is damaged ({type(error).__name__}); run the same `cvdd sweep` again"
        ) from None
    uses = stage_uses(store, [trial.name for trial in trials])
    final = tuple(FinalTest(**row) for row in json.loads(store.read(FINAL))) if store.exists(FINAL) else ()
    return SweepSummary(store.display("").rstrip("/"), c, default_point(c), trials, uses, final)


def trial_files(store: Store) -> dict[str, dict[str, Any]]:
    """Return what every trial noted when it began: its values, the stages it rests on, its resolved configuration."""
    names = [name for name in store.names(TRIALS) if name.endswith(".json")]
    return {name.removeprefix(f"{TRIALS}/").removesuffix(".json"): json.loads(store.read(name)) for name in names}


def trial_run_config(store: Store, trial: str) -> RunConfig:
    """Return the resolved configuration of a trial."""
    return validate(trial_files(store)[trial]["config"])


def stage_uses(store: Store, trials: Sequence[str]) -> tuple[StageUse, ...]:
    """Return how often each kind of stage was needed by these trials and made; `pretrain/...` counts together."""
    needs: dict[str, list[str]] = {}
    files = trial_files(store)
    for trial in trials:
        for stage, folder in files.get(trial, {"stages": {}})["stages"].items():
            needs.setdefault(stage.split("/")[0], []).append(folder)
    uses = []
    for stage, folders in needs.items():
        walls = {folder: _wall_s(store, folder) for folder in set(folders)}
        made_s, asked_s = sum(walls.values()), sum(walls[folder] for folder in folders)
        uses.append(StageUse(stage, len(folders), len(walls), made_s, asked_s - made_s))
    return tuple(uses)


def _wall_s(store: Store, folder: str) -> float:
    stage = folder.removeprefix("stages/").rpartition("/")[0]
    manifest = read_manifest(store, folder, stage) if store.exists(f"{folder}/{MANIFEST}") else None
    return manifest.wall_s if manifest else 0.0
