"""report: a run's summary as tables, text and pictures."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cvdd_ray.data.storage import Store
from cvdd_ray.stages.arms import OURS, TRAINING_SETS
from cvdd_ray.stages.ceiling import STAGE as CEILING_STAGE
from cvdd_ray.stages.costsheet import StageCost, stage_costs
from cvdd_ray.stages.evaluate import RESULTS
from cvdd_ray.stages.initialize import RANDOM, START
from cvdd_ray.stages.pictures import MAX_INDICES, contact_sheet, curves_figure
from cvdd_ray.stages.planreport import flops, size
from cvdd_ray.stages.scores import Scores, scores_of
from cvdd_ray.stages.summary import (
    MAX_VOTES,
    LabelSummary,
    ResultRow,
    RunReader,
    RunSummary,
    read_summary,
    training_set,
)
from cvdd_ray.stages.synthesize import DISTILLED, TRACE

HEADER = ("IPC", "training set", "student", "last %", "best %", "seeds")
SCORES_HEADER = ("IPC", "student", "HLR", "IOR", "LRS %", "ARS %")
SCORES_RULE = (
    "HLR: points that all real images are ahead of the distilled ones, both with hard labels (lower is better); IOR: points "
    "that the distilled images are ahead of random real ones with the same labels (higher is better); LRS joins the two, ARS "
    "the gains over random images with and without augmentation: 26.9 % is no gain, more is better (DD-Ranking)."
)
RULE = "The test set is used by the final evaluation only; the accuracy after the last epoch is the primary number."


def accuracy_table(summary: RunSummary) -> list[tuple[str, ...]]:
    """Return rows of text: IPC, training set, student, last and best test accuracy in percent, seeds."""

    def cells(row: ResultRow) -> tuple[str, ...]:
        last, best = spread(row.last_mean, row.last_std), spread(row.best_mean, row.best_std)
        return str(row.ipc), row.training_set, row.student, last, best, str(row.seeds)

    return [cells(row) for row in _all_rows(summary)]


def markdown_table(summary: RunSummary) -> str:
    """Return the accuracy table as Markdown; the best row (by last accuracy) of every IPC and label regime is
    bold."""
    rows = zip(accuracy_table(summary), _all_rows(summary), strict=True)
    marked = [tuple(f"**{cell}**" for cell in cells) if row.is_best else cells for cells, row in rows]
    return pipes(HEADER, marked, ("---:", "---", "---", "---:", "---:", "---:"))


def rich_table(summary: RunSummary) -> Table:
    """Return the accuracy table for a terminal of 80 columns."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in HEADER:
        is_text = title in ("training set", "student")
        table.add_column(title, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    rows = _all_rows(summary)
    for k, (cells, row) in enumerate(zip(accuracy_table(summary), rows, strict=True)):
        is_last = k + 1 < len(rows) and (rows[k + 1].ipc, rows[k + 1].regime) != (row.ipc, row.regime)
        table.add_row(*cells, style="bold" if row.is_best else None, end_section=is_last)
    return table


def rich_summary(summary: RunSummary) -> list:
    """Return what a terminal shows of a run: facts, then the accuracy table and how to read it if there are results."""
    facts = [Text(f"{name}: {value}") for name, value in _facts(summary).items()]
    if not _all_rows(summary):
        return facts
    scores = scores_of(_all_rows(summary))
    table = Table(*SCORES_HEADER, box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for cells in score_rows(scores):
        table.add_row(*cells)
    below = [Text(text) for text in (SCORES_RULE, *missing_rows(scores))]
    return [*facts, "", rich_table(summary), "", Text(RULE), "", table, "", *below]


def score_rows(scores: Sequence[Scores]) -> list[tuple[str, ...]]:
    """Return rows of text: IPC, student, HLR and IOR in points, LRS and ARS in percent; empty where rows are missing."""

    def cell(value: float | None, sign: str = "") -> str:
        return "" if value is None else f"{value:{sign}.1f}"

    return [(str(s.ipc), s.student, cell(s.hlr, "+"), cell(s.ior, "+"), cell(s.lrs), cell(s.ars)) for s in scores]


def missing_rows(scores: Sequence[Scores]) -> list[str]:
    """Return what would complete the scores, in one line or none."""
    missing = dict.fromkeys(row for one in scores for row in one.missing)
    return [f"Without {', '.join(missing)} in evaluate.baselines some scores are not known."] if missing else []


def write_report(store: Store) -> dict[str, str]:
    """Write `report/` of a run anew: table.md, results.json (the same for programs), contact_sheet_ipc<n>.png,
    curves_ipc<n>.png; return {name: path}.

    Pictures of stages that are not there are left out, older ones are removed.  Raises ArtifactError as summarize_run.
    """
    reader = RunReader(store)
    summary = read_summary(reader)
    files: dict[str, bytes] = {}
    for one in summary.ipcs:
        start, distilled = f"initialize/ipc{one.ipc}", f"synthesize/ipc{one.ipc}"
        if start in reader.manifests and distilled in reader.manifests:
            shown = ((start, RANDOM), (start, START), (distilled, DISTILLED))
            sets = [reader.images(stage, base, MAX_INDICES) for stage, base in shown]
            files[f"contact_sheet_ipc{one.ipc}.png"] = contact_sheet(
                *sets, [vote.lines() for vote in one.votes], title=summary.dataset
            )
        files[f"curves_ipc{one.ipc}.png"] = _curves(reader, one.ipc, summary)
    pictures = [f"report/{name}" for name in files]
    costs = stage_costs(reader)
    tables = {
        "table.md": _markdown(summary, costs, list(files)).encode(),
        "results.json": json.dumps(plain_results(summary, costs), indent=1).encode(),
    }
    files = {**tables, **files}
    for name in store.names("report"):
        if re.fullmatch(r"report/(contact_sheet|curves)_ipc\d+\.png", name) and name not in pictures:
            store.delete(name)
    for name, content in files.items():
        store.write(f"report/{name}", content)
    return {name: store.where(f"report/{name}") for name in files}


def _curves(reader: RunReader, ipc: int, summary: RunSummary) -> bytes:
    def loaded(stage: str, name: str, empty):
        return json.loads(reader.file(stage, name)) if stage in reader.manifests else empty

    training = {name: loaded(f"pretrain/{name}", "curve.json", []) for name in reader.experts()}
    trace = loaded(f"synthesize/ipc{ipc}", TRACE, [])
    runs = loaded(f"evaluate/ipc{ipc}", RESULTS, {"runs": []})["runs"]
    runs += loaded(CEILING_STAGE, RESULTS, {"runs": []})["runs"] if runs else []
    names = {arm: training_set(reader, ipc, arm) for arm in TRAINING_SETS}
    voted = reader.config is None or reader.config.synthesize.method == "committee"
    terms = {} if voted else {"terms": ("matching loss", "learned rate")}
    return curves_figure(training, trace, runs, names, title=f"{summary.dataset}, {ipc} images per class", **terms)


def _facts(summary: RunSummary) -> dict[str, str]:
    """Return the run in words, line by line."""
    shape = f"{len(summary.classes) or '?'} classes, {summary.image_size or '?'} px"
    experts = [
        f"{e.name} (hold-out {_percent(e.holdout_accuracy)}, prior {_percent(e.prior)})" for e in summary.experts
    ]
    facts = {
        "run": summary.where,
        "data": f"{summary.dataset or 'unknown'}, {shape}",
        "seed": str(summary.seed),
        "experts": "; ".join(experts),
    }
    for one in summary.ipcs:
        if one.image_bytes is not None:
            labels = ", ".join(f"{name} {_label_size(labels)}" for name, labels in one.labels.items())
            images = f"{one.images} images, {size(one.image_bytes)}"
            facts[f"IPC {one.ipc}"] = f"{images}; labels: {labels or 'none'}"
    states = [stage if state == "missing" else f"{stage} ({state})" for stage, state in summary.unfinished().items()]
    return {**facts, "not finished": ", ".join(states)} if states else facts


def _label_size(labels: LabelSummary) -> str:
    """Return the size of a label set, and how many times smaller it is than it might be."""
    if labels.is_online:
        return f"online, nothing stored ({size(labels.full_bytes)} as float16 for every epoch)"
    if labels.full_bytes is None:
        return size(labels.bytes)
    return f"{size(labels.bytes)} ({labels.full_bytes / labels.bytes:.1f}x smaller than float16 for every epoch)"


def plain_results(summary: RunSummary, costs: Sequence[StageCost]) -> dict:
    """Return the numbers of a report as plain values: rows and scores in percent, stages in seconds, FLOPs and bytes, and
    per IPC the bytes of distilled images and label sets."""
    rows = _all_rows(summary)
    storage = {
        str(one.ipc): {"images": one.image_bytes, "labels": {name: of.bytes for name, of in one.labels.items()}}
        for one in summary.ipcs
    }
    return {
        "run": summary.where,
        "rows": [asdict(row) for row in rows],
        "scores": [asdict(score) for score in scores_of(rows)],
        "stages": [asdict(cost) for cost in costs],
        "storage_bytes": storage,
    }


def _scores_text(summary: RunSummary) -> str:
    scores = scores_of(_all_rows(summary))
    if not scores:
        return "No results yet."
    table = pipes(SCORES_HEADER, score_rows(scores), ("---:", "---", *["---:"] * 4))
    return "\n\n".join([table, SCORES_RULE, *missing_rows(scores)])


def _storage(summary: RunSummary) -> list[tuple[str, ...]]:
    """Return per IPC what a student needs of ours, labels included: (IPC, images, labels, both)."""
    rows = []
    for one in summary.ipcs:
        labels = one.labels.get(OURS)
        if one.image_bytes is not None and labels is not None:
            rows.append((str(one.ipc), *map(size, (one.image_bytes, labels.bytes, one.image_bytes + labels.bytes))))
    return rows


def _markdown(summary: RunSummary, costs: Sequence[StageCost], pictures: list[str]) -> str:
    """Return table.md: facts, accuracies, scores, what stages took and what is stored, votes, pictures, versions."""
    votes = []
    for one in summary.ipcs:
        votes += [(str(one.ipc), str(v.image_index), " + ".join(v.lines())) for v in one.votes[:MAX_VOTES]]
    took = [(c.stage, f"{c.wall_s:.1f}", "?" if c.flops is None else flops(c.flops), size(c.bytes)) for c in costs]
    known = [c.flops for c in costs if c.flops is not None]
    took.append(("all", f"{sum(c.wall_s for c in costs):.1f}", flops(sum(known)), size(sum(c.bytes for c in costs))))
    sections = {
        f"# {summary.dataset or 'Run'}": "\n".join(f"- {name}: {value}" for name, value in _facts(summary).items()),
        "## Test accuracy": f"{markdown_table(summary) if _all_rows(summary) else 'No results yet.'}\n\n{RULE}",
        "## Scores": _scores_text(summary),
        "## Cost": pipes(("stage", "seconds", "FLOPs", "bytes"), took, ("---", "---:", "---:", "---:"))
        + "\n\nSeconds are of wall time on whatever it ran, FLOPs of convolutions and matrix products.",
        "## Storage": pipes(("IPC", "distilled images", "their labels", "both"), _storage(summary), ("---:",) * 4),
        "## Votes": f"The same for every class; at most {MAX_VOTES} image indices per IPC are listed.\n\n"
        + pipes(("IPC", "image index", "weights"), votes, ("---:", "---:", "---")),
        "## Pictures": "\n".join(f"- [{name}]({name})" for name in pictures) or "None yet.",
        "## Software": "\n".join(f"- {name} {version}" for name, version in summary.versions.items()),
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items()) + "\n"


def pipes(header: tuple[str, ...], rows: list[tuple[str, ...]], align: tuple[str, ...]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *rows))


def _all_rows(summary: RunSummary) -> list[ResultRow]:
    return [row for one in summary.ipcs for row in one.rows]


def _percent(value: float | None) -> str:
    return "not there" if value is None else f"{value:.1f} %"


def spread(mean: float, std: float | None) -> str:
    """Return `mean ± std`, or the mean alone."""
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"
