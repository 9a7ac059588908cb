"""A sweep's report: tables for the terminal and as Markdown, pictures, and the winner as a recipe."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cvdd_ray.config import RunConfig
from cvdd_ray.data.storage import Store
from cvdd_ray.recipes import dump_config
from cvdd_ray.space import label
from cvdd_ray.stages.report import pipes, spread
from cvdd_ray.stages.sweeppictures import learning_figure, parallel_figure, values_figure
from cvdd_ray.stages.sweepsummary import BEST, FINAL, RESULTS, SweepSummary, Trial, read_sweep

MAX_TRIALS = 12  # rows on a terminal
RULE = (
    "Trials are compared by hold-out accuracy after their last epoch; the test set is touched once, by fresh students of "
    "the winner and of the unchanged run."
)


def trials_table(summary: SweepSummary) -> list[tuple[str, ...]]:
    """Return rows of text: swept values, epochs, hold-out accuracy in percent (mean ± std over a trial's students), state."""
    return [(*_values(summary, trial), *_reached(summary, trial)) for trial in summary.trials]


def final_table(summary: SweepSummary) -> list[tuple[str, ...]]:
    """Return rows of text: which run, swept values, last and best test accuracy in percent, students."""
    return [
        (
            test.name,
            *(label(test.point[key]) for key in summary.config.sweep.space),
            spread(test.last_mean, test.last_std),
            spread(test.best_mean, test.best_std),
            str(test.seeds),
        )
        for test in summary.final
    ]


def savings_table(summary: SweepSummary) -> list[tuple[str, ...]]:
    """Return rows of text: stage, how often trials needed one, how many are different, saved runs, saved seconds."""
    return [
        (use.stage, str(use.needed), str(use.made), str(use.needed - use.made), f"{use.saved_s:.0f}")
        for use in summary.stages
    ]


def rich_sweep(summary: SweepSummary) -> list:
    """Return what a terminal shows of a sweep: counts, leading trials, the final test, saved stage runs."""
    parts: list = [Text(f"{name}: {value}") for name, value in _facts(summary).items()]
    rows = trials_table(summary)
    parts += ["", _rich(_trial_header(summary), rows[:MAX_TRIALS], bold=0 if summary.winner else None)]
    if len(rows) > MAX_TRIALS:
        parts.append(Text(f"and {len(rows) - MAX_TRIALS} more in {RESULTS}"))
    if summary.final:
        parts += ["", _rich(_final_header(summary), final_table(summary))]
    if summary.stages:
        parts += ["", _rich(_SAVINGS, savings_table(summary))]
    return [*parts, "", Text(RULE)]


def write_sweep_report(store: Store) -> dict[str, str]:
    """Write `report/` of a sweep anew: table.md and the three pictures; return {name: path}, results and winner included.

    Raises ArtifactError as read_sweep.
    """
    summary = read_sweep(store)
    title = _title(summary)
    files = {
        "report/values.png": values_figure(summary, title=title),
        "report/parallel_coordinates.png": parallel_figure(summary, title=title),
        "report/learning_curves.png": learning_figure(summary, title=title),
    }
    files = {"report/table.md": _markdown(summary, list(files)).encode(), **files}
    for name, content in files.items():
        store.write(name, content)
    there = [name for name in (RESULTS, BEST, FINAL) if store.exists(name)]
    return {name.split("/")[-1]: store.where(name) for name in (*files, *there)}


def best_yaml(summary: SweepSummary, config: RunConfig) -> str:
    """Return the winner as a file that `cvdd run` takes: every setting, priors as they were measured."""
    winner = summary.winner
    head = [
        f"# Winner of the sweep in {summary.where}: {_point_text(winner)}",
        f"# Hold-out accuracy {winner.accuracy:.2f} % after {winner.epochs} epochs. Run it: cvdd run THIS_FILE --out DIR",
        f"# (with --reuse {summary.where} nothing is made twice). Priors are given as the sweep measured them.",
    ]
    return "\n".join(head) + "\n" + dump_config(config)


def _facts(summary: SweepSummary) -> dict[str, str]:
    counts = [sum(trial.state == state for trial in summary.trials) for state in ("finished", "stopped", "failed")]
    c, winner = summary.config, summary.winner
    students = f"{c.sweep.seeds} student{'s' if c.sweep.seeds > 1 else ''} each"
    facts = {
        "sweep": summary.where,
        "trials": f"{len(summary.trials)} ({counts[0]} finished, {counts[1]} stopped early, {counts[2]} failed), {students}",
    }
    for trial in summary.trials:
        if trial.state == "failed":
            facts.setdefault("first failure", f"{_point_text(trial)}: {trial.error}")
    if winner:
        facts["winner"] = f"{_point_text(winner)}: {_accuracy(summary, winner)} % on the hold-out"
    return facts


def _title(summary: SweepSummary) -> str:
    c = summary.config
    student = f"{c.evaluate.students[0]}, " if "evaluate.students" not in c.sweep.space else ""
    return f"{c.data.dataset or c.data.source}, {c.ipc[0]} images per class: {student}hold-out accuracy"


def _point_text(trial: Trial) -> str:
    return ", ".join(f"{key}={label(value)}" for key, value in trial.point.items())


def _values(summary: SweepSummary, trial: Trial) -> tuple[str, ...]:
    return tuple(label(trial.point[key]) for key in summary.config.sweep.space)


def _reached(summary: SweepSummary, trial: Trial) -> tuple[str, str, str]:
    reached = trial.curve[-1][0] if trial.curve else 0
    return f"{reached}/{trial.epochs}", _accuracy(summary, trial) if trial.curve else "none", trial.state


def _accuracy(summary: SweepSummary, trial: Trial) -> str:
    _, mean, std = trial.curve[-1]
    return spread(mean, std if summary.config.sweep.seeds > 1 else None)


_SAVINGS = ("stage", "needed by trials", "made", "runs saved", "seconds saved")


def _trial_header(summary: SweepSummary) -> tuple[str, ...]:
    return (*summary.config.sweep.space, "epochs", "hold-out %", "state")


def _final_header(summary: SweepSummary) -> tuple[str, ...]:
    return ("test of", *summary.config.sweep.space, "last %", "best %", "students")


def _rich(header: tuple[str, ...], rows: list[tuple[str, ...]], bold: int | None = None) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in header:
        table.add_column(title, overflow="fold")
    for k, row in enumerate(rows):
        table.add_row(*row, style="bold" if k == bold else None)
    return table


def _markdown(summary: SweepSummary, pictures: list[str]) -> str:
    def section(header: tuple[str, ...], rows: list[tuple[str, ...]], empty: str) -> str:
        return pipes(header, rows, ("---",) * len(header)) if rows else empty

    sections = {
        f"# {_title(summary)}": "\n".join(f"- {name}: {value}" for name, value in _facts(summary).items()),
        "## Test accuracy": section(_final_header(summary), final_table(summary), "Not tested.") + f"\n\n{RULE}",
        "## Trials": section(_trial_header(summary), trials_table(summary), "None."),
        "## Stages": section(_SAVINGS, savings_table(summary), "None."),
        "## Pictures": "\n".join(f"- [{name.split('/')[-1]}]({name.split('/')[-1]})" for name in pictures),
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items()) + "\n"
