"""`cvdd analyze`: one analysis of finished runs or of a sweep, as a table and perhaps a picture, by name."""

import csv
import io
from collections.abc import Callable, Mapping, Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError
from cvdd_ray.stages.ablations import ABLATIONS, ablation, cross, sweep_images
from cvdd_ray.stages.analyses import (
    Analysis,
    OneRun,
    architectures,
    batchnorm,
    curves,
    efficiency,
    images,
    priors,
    similarity,
)
from cvdd_ray.stages.compare import short_names
from cvdd_ray.stages.report import pipes
from cvdd_ray.stages.summary import RunReader
from cvdd_ray.stages.sweepsummary import is_sweep

OfRuns = Callable[[Sequence[OneRun], str | None], Analysis]
RUNS: Mapping[str, OfRuns] = {
    "images": images,
    "similarity": similarity,
    "batchnorm": batchnorm,
    "curves": curves,
    "efficiency": efficiency,
    "priors": priors,
    "architectures": architectures,
}
"""Analyses of runs."""
SWEEPS = (*ABLATIONS, "cross", "images")
"""Analyses of sweeps."""
SEVERAL = ("images", "similarity", "curves", "efficiency")  # take several runs, side by side
OF_EXPERTS = ("similarity", "batchnorm")


def analyze(folders: Sequence[str], what: str, *, ipc: int | None = None, expert: str | None = None) -> Analysis:
    """Return an analysis of finished runs, or of one sweep (directories or s3:// URIs).

    `ipc` is one of the run's (default: its largest with distilled images), `expert` the one that looks at the images (default:
    the first).  Raises ConfigError for an unknown analysis, several runs where one is taken, or an option without effect;
    ArtifactError when a run lacks what is needed.
    """
    if what not in {*RUNS, *SWEEPS}:
        raise ConfigError(
            f"--what {what}: no such analysis; of runs: {', '.join(RUNS)}; of sweeps: {', '.join(SWEEPS)}"
        )
    if len(folders) > 1 and what not in SEVERAL:
        raise ConfigError(f"--what {what} takes one run, got {len(folders)}; several: {', '.join(SEVERAL)}")
    if expert and what not in OF_EXPERTS:
        raise ConfigError(
            f"--expert {expert} has no effect on {what}; it chooses who looks in {' and '.join(OF_EXPERTS)}"
        )
    stores = [Store(folder) for folder in folders]
    swept = [store for store in stores if is_sweep(store)]
    known, kind = (SWEEPS, "sweep") if swept else (RUNS, "run")
    if len(stores) > 1 and swept:
        raise ConfigError("analyze takes one sweep, or runs")
    if what not in known:
        where = (swept or stores)[0].display("").rstrip("/")
        raise ConfigError(f"--what {what}: {where} is a {kind}; a {kind} has {', '.join(known)}")
    if swept:
        if ipc is not None:
            raise ConfigError(f"--ipc {ipc} has no effect on a sweep, which has one")
        special = {"images": sweep_images, "cross": cross}
        return special[what](swept[0]) if what in special else ablation(swept[0], what)
    return RUNS[what](
        [_run(name, folder, ipc) for name, folder in zip(short_names(folders), folders, strict=True)], expert
    )


def _run(name: str, folder: str, ipc: int | None) -> OneRun:
    store = Store(folder)
    reader = RunReader(store)
    made = [n for n in reader.ipcs() if f"synthesize/ipc{n}" in reader.manifests]
    if ipc is not None and ipc not in made:
        raise ArtifactError(
            f"--ipc {ipc}: {store.display('').rstrip('/')} has distilled images for IPC {', '.join(map(str, made)) or 'none'}"
        )
    return OneRun(name, reader, ipc or max(made or reader.ipcs() or [0]))


def rich_analysis(found: Analysis) -> list:
    """Return what a terminal shows of an analysis."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for column, title in enumerate(found.header):
        table.add_column(title, justify="right" if column else "left", overflow="fold")
    for row in found.rows:
        table.add_row(*row)
    return [Text(found.title, style="bold"), "", table, "", *map(Text, found.notes)]


def markdown_analysis(found: Analysis, picture: str | None) -> str:
    """Return an analysis as Markdown, `picture` being the name of its picture."""
    align = ("---", *["---:"] * (len(found.header) - 1))
    shown = [f"![{found.title}]({picture})"] if picture else []
    parts = [f"# {found.title}", pipes(found.header, list(found.rows), align), *found.notes, *shown]
    return "\n\n".join(parts) + "\n"


def csv_analysis(found: Analysis) -> str:
    """Return the table of an analysis as CSV."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows([found.header, *found.rows])
    return buffer.getvalue()


def write_analysis(store: Store, what: str, found: Analysis) -> dict[str, str]:
    """Write `analysis/WHAT.md`, .csv and, if there is a picture, .png below a run or sweep; return {name: path}."""
    picture = f"{what}.png" if found.picture else None
    files = {f"{what}.md": markdown_analysis(found, picture).encode(), f"{what}.csv": csv_analysis(found).encode()}
    if found.picture:
        files[picture] = found.picture
    for name, content in files.items():
        store.write(f"analysis/{name}", content)
    return {name: store.where(f"analysis/{name}") for name in files}
