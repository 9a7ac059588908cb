"""DD-Ranking scores of a run's rows, per IPC and student."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cvdd_ray.core.scores import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
)
from cvdd_ray.stages.arms import CEILING, OURS
from cvdd_ray.stages.summary import ResultRow

NEEDED = {
    "hlr": (CEILING, "distilled_hard"),
    "ior": (OURS, "random_soft"),
    "lrs": (CEILING, "distilled_hard", OURS, "random_soft"),
    "ars": (OURS, "random_soft", "distilled_plain", "random_plain"),
}
"""Rows that a score is made of."""


@dataclass(frozen=True)
class Scores:
    """Scores of one IPC and student, of mean last-epoch accuracies, in percent (HLR and IOR: points); None where a row is
    missing, which `missing` names."""

    ipc: int
    student: str
    hlr: float | None
    ior: float | None
    lrs: float | None
    ars: float | None
    missing: tuple[str, ...]


def scores_of(rows: Sequence[ResultRow]) -> list[Scores]:
    """Return the scores of every IPC and student of a table, in its order."""
    found = []
    for ipc, student in dict.fromkeys((row.ipc, row.student) for row in rows):
        last = {row.arm: row.last_mean / 100 for row in rows if (row.ipc, row.student) == (ipc, student)}
        found.append(_scores(ipc, student, last))
    return found


def _scores(ipc: int, student: str, last: Mapping[str, float]) -> Scores:
    there = {name for name, rows in NEEDED.items() if all(row in last for row in rows)}
    hlr = hard_label_recovery(last[CEILING], last["distilled_hard"]) if "hlr" in there else None
    ior = improvement_over_random(last[OURS], last["random_soft"]) if "ior" in there else None
    values = {"hlr": hlr, "ior": ior, "lrs": label_robust_score(hlr, ior) if "lrs" in there else None, "ars": None}
    if "ars" in there:
        plain = improvement_over_random(last["distilled_plain"], last["random_plain"])
        values["ars"] = augmentation_robust_score(ior, plain)
    missing = tuple(dict.fromkeys(row for rows in NEEDED.values() for row in rows if row not in last))
    return Scores(ipc, student, **{k: None if v is None else 100 * v for k, v in values.items()}, missing=missing)
