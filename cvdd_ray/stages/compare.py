"""Runs side by side, whatever method made them; ranked only where they were measured in the same way.

A protocol is everything besides images and labels that decides a student's accuracy: data, test set, number of images, label
regime, student and how it is trained. Rows of one IPC, student and label regime are ranked if their protocols are equal.
"""

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cvdd_ray.data.remote import without_secrets
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError
from cvdd_ray.stages.arms import CEILING, OURS, REGIMES, TRAINING_SETS, sized_rows
from cvdd_ray.stages.costsheet import StageCost, stage_costs
from cvdd_ray.stages.planreport import flops, size
from cvdd_ray.stages.report import pipes, spread
from cvdd_ray.stages.scores import Scores, scores_of
from cvdd_ray.stages.summary import IpcSummary, ResultRow, RunReader, read_summary
from cvdd_ray.stages.sweepsummary import is_sweep

BESIDE = ("baselines", "seeds", "first_seed", "students", "test_every", "workers")  # of evaluate: no part of a protocol
HEADER = ("rank", "run", "IPC", "student", "labels", "last %", "best %", "seeds", "HLR", "IOR", "LRS %", "ARS %",
          "images", "labels stored", "made in s", "FLOPs")  # fmt: skip
ALIGN = ("---:", "---", "---:", "---", "---", *["---:"] * 11)


@dataclass(frozen=True)
class Entry:
    """One run's students of one IPC and network: accuracies in percent, scores, bytes of images and of their labels, wall time
    in seconds and FLOPs of all stages but `evaluate` (None: not recorded), protocol; `rank` is None where it is not ranked."""

    run: str
    where: str
    ipc: int
    student: str
    row: ResultRow
    scores: Scores
    image_bytes: int | None
    label_bytes: int | None
    made_s: float
    made_flops: int | None
    protocol: Mapping[str, Any]
    rank: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Entries, those of one IPC, student and label regime together, best first; `notes` say what is not ranked, and why."""

    entries: tuple[Entry, ...]
    notes: tuple[str, ...]

    def plain(self) -> dict[str, Any]:
        return {"entries": [asdict(entry) for entry in self.entries], "notes": list(self.notes)}


def compare(folders: Sequence[str], arm: str | None = None) -> Comparison:
    """Compare the row `arm` of the tables of finished runs (directories or s3:// URIs), or without one every run's own: its
    distilled images with soft labels, with hard ones if these are the method's (MTT).

    Raises ConfigError for fewer than two runs, one given twice, a sweep or an unknown row; ArtifactError for a run without
    (up-to-date) results for this row.
    """
    known = [name for name in TRAINING_SETS if name != CEILING]  # which no method has made
    if arm is not None and arm not in known:
        raise ConfigError(f"--row {arm}: no row to compare; choose one of {', '.join(known)}")
    if len(folders) < 2 or len(set(folders)) < len(folders):
        raise ConfigError(f"compare: got {', '.join(folders) or 'nothing'}; give two or more different runs")
    found = [
        entry
        for name, folder in zip(short_names(folders), folders, strict=True)
        for entry in entries_of(name, folder, arm)
    ]
    ranked, notes = [], []
    for kind in sorted({_kind(entry) for entry in found}):
        group = [entry for entry in found if _kind(entry) == kind]
        group.sort(key=lambda entry: -entry.row.last_mean)
        differences = differing([entry.protocol for entry in group])
        what = f"IPC {group[0].ipc}, {group[0].student}, labels {REGIMES[group[0].row.regime]}"
        if differences:
            notes.append(f"not ranked, {what}: the runs differ in {_said(differences, group)}")
        elif len(group) > 1:
            group = [Entry(**{**vars(entry), "rank": _rank(entry, group)}) for entry in group]
        else:
            own = group[0].run
            others = sorted({f"{e.student} at IPC {e.ipc}, {REGIMES[e.row.regime]}" for e in found if e.run != own})
            notes.append(f"not ranked, {what}: {own} alone has it; the others have {'; '.join(others)}")
        ranked += group
    return Comparison(tuple(ranked), tuple(notes))


def _kind(entry: Entry) -> tuple[int, str, int]:
    """Return what entries that may be ranked together share, in the order in which they are shown."""
    return entry.ipc, entry.student, list(REGIMES).index(entry.row.regime)


def short_names(folders: Sequence[str]) -> list[str]:
    """Return the last part of each path, or as many parts as tell the runs apart."""
    shown = [without_secrets(folder).split("?")[0].rstrip("/") for folder in folders]
    for parts in range(1, 20):
        names = ["/".join(path.split("/")[-parts:]) for path in shown]
        if len(set(names)) == len(names):
            return names
    return shown


def entries_of(name: str, folder: str, arm: str | None) -> list[Entry]:
    """Return a run's entries, one per IPC and student; without `arm` those of its own row.  Raises as `compare`."""
    store = Store(folder)
    if is_sweep(store):
        raise ConfigError(
            f"{store.display('').rstrip('/')} is a sweep; run its best.yaml with `cvdd run` and compare that run"
        )
    reader = RunReader(store)
    summary = read_summary(reader)
    own = sized_rows(reader.config)[0] if reader.config else OURS
    arm = arm or own
    costs, entries = stage_costs(reader), []
    for one in summary.ipcs:
        stage = f"evaluate/ipc{one.ipc}"
        if summary.stages.get(stage) == "outdated":
            raise ArtifactError(f"{store.display(stage)} is out of date; make it anew with `cvdd evaluate --overwrite`")
        scores = {score.student: score for score in scores_of(one.rows)}
        for row in one.rows:
            if row.arm == arm:
                entries.append(_entry(name, reader, one, row, scores[row.student], costs))
    if not entries:
        raise ArtifactError(
            f"{summary.where} has no results of {arm!r}; make them with `cvdd evaluate`"
            + ("" if arm in (OURS, own) else f" and {arm} among evaluate.baselines")
        )
    return entries


def _entry(
    name: str, reader: RunReader, one: IpcSummary, row: ResultRow, scores: Scores, costs: Sequence[StageCost]
) -> Entry:  # fmt: skip
    label_set = TRAINING_SETS[row.arm].label_set
    needed = [
        cost for cost in costs if not cost.stage.startswith("evaluate") and _belongs(cost.stage, one.ipc, label_set)
    ]
    counted = [cost.flops for cost in needed]
    return Entry(
        name, reader.store.display("").rstrip("/"), one.ipc, row.student, row, scores, one.image_bytes,
        one.labels[label_set].bytes if label_set in one.labels else None, sum(cost.wall_s for cost in needed),
        None if None in counted else sum(counted), protocol(reader, one.ipc, row),
    )  # fmt: skip


def _belongs(stage: str, ipc: int, label_set: str | None) -> bool:
    """Return whether a row of an IPC rests on a stage."""
    parts = stage.split("/")
    if parts[0] == "relabel":
        return parts[1:] == [f"ipc{ipc}", label_set]
    of_one_ipc = [
        part for part in parts if part.startswith("ipc")
    ]  # experts, priors, statistics, trajectories: of none
    return not of_one_ipc or of_one_ipc == [f"ipc{ipc}"]


def protocol(reader: RunReader, ipc: int, row: ResultRow) -> dict[str, Any]:
    """Return the protocol of a row as plain values by name."""
    made = reader.manifests[f"evaluate/ipc{ipc}"].identity
    labels, started = (reader.manifests.get(stage) for stage in (f"relabel/ipc{ipc}/{OURS}", f"initialize/ipc{ipc}"))
    views = labels.identity["settings"]["relabel"] if labels else {}
    settings = made["settings"]
    info = settings["dataset"]
    return {
        "data": f"{info['name']}, {len(made['classes'])} classes, {info['image_size']} px",
        "classes": made["classes"],
        "real train images": started and started.identity["inputs"].get("train"),
        "test images": made["inputs"]["test"],
        "number of images": ipc * len(made["classes"]),
        "label regime": REGIMES[row.regime],
        "student": row.student,
        **{f"evaluate.{name}": value for name, value in settings["evaluate"].items() if name not in BESIDE},
        "batch_size": settings["batch_size"],
        "bn_group": settings["bn_group"],
        "flip": settings["data.flip"],
        **{f"relabel.{name}": views[name] for name in ("cutmix", "crop_scale") if name in views},
    }


def differing(protocols: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the names whose values are not the same in all protocols, with every protocol's value."""
    names = dict.fromkeys(name for one in protocols for name in one)
    values = {name: [one.get(name) for one in protocols] for name in names}
    return {name: found for name, found in values.items() if any(value != found[0] for value in found)}


def _said(differences: Mapping[str, Sequence[Any]], group: Sequence[Entry]) -> str:
    def short(value: Any) -> str:
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        return "default" if value is None else text if len(text) <= 24 else f"{text[:12]}…"

    return "; ".join(
        f"{name} ({', '.join(f'{e.run}: {short(value)}' for e, value in zip(group, values, strict=True))})"
        for name, values in differences.items()
    )


def _rank(entry: Entry, group: Sequence[Entry]) -> int:
    """Return 1 for the highest accuracy after the last epoch; equal ones share a rank."""
    return 1 + sum(other.row.last_mean > entry.row.last_mean for other in group)


# ------------------------------------------------------------------------------------------------- showing it


def cells(entry: Entry) -> tuple[str, ...]:
    """Return an entry as text, in the order of HEADER."""
    row, scores = entry.row, entry.scores

    def number(value: float | None, form: str) -> str:
        return "" if value is None else f"{value:{form}}"

    return (
        number(entry.rank, "d"), entry.run, str(entry.ipc), entry.student, REGIMES[row.regime],
        spread(row.last_mean, row.last_std), spread(row.best_mean, row.best_std), str(row.seeds),
        number(scores.hlr, "+.1f"), number(scores.ior, "+.1f"), number(scores.lrs, ".1f"), number(scores.ars, ".1f"),
        "" if entry.image_bytes is None else size(entry.image_bytes),
        "" if entry.label_bytes is None else size(entry.label_bytes),
        f"{entry.made_s:.0f}", "?" if entry.made_flops is None else flops(entry.made_flops),
    )  # fmt: skip


def rich_comparison(found: Comparison) -> list:
    """Return what a terminal shows of a comparison."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title, align in zip(HEADER, ALIGN, strict=True):
        table.add_column(title, justify="right" if align == "---:" else "left", overflow="fold")
    for entry in found.entries:
        table.add_row(*cells(entry), style="bold" if entry.rank == 1 else None)
    return [table, "", *map(Text, found.notes)]


def markdown_comparison(found: Comparison) -> str:
    """Return a comparison as a Markdown table, the notes below it."""
    rows = [
        tuple(f"**{cell}**" if entry.rank == 1 and cell else cell for cell in cells(entry)) for entry in found.entries
    ]
    return "\n\n".join([pipes(HEADER, rows, ALIGN), *found.notes]) + "\n"


def csv_comparison(found: Comparison) -> str:
    """Return a comparison as CSV: numbers as they are, accuracies and scores in percent; notes as lines that begin with #."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    of_row, of_scores = ("last_mean", "last_std", "best_mean", "best_std", "seeds"), ("hlr", "ior", "lrs", "ars")
    about = ("run", "where", "ipc", "student", "image_bytes", "label_bytes", "made_s", "made_flops")
    writer.writerow(["rank", *about, "row", "label_regime", *of_row, *of_scores])
    for e in found.entries:
        of = [getattr(e, name) for name in about] + [e.row.arm, REGIMES[e.row.regime]]
        numbers = [getattr(e.row, name) for name in of_row] + [getattr(e.scores, name) for name in of_scores]
        writer.writerow([e.rank, *of, *numbers])
    return buffer.getvalue() + "".join(f"# {note}\n" for note in found.notes)
