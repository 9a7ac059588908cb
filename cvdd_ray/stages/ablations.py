"""Analyses of sweeps: the paper's ablations as tables, with the paper's numbers beside ours where the setting was the same.

Ours are hold-out accuracies of the trials (nothing is chosen on test), the paper's are test accuracies.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cvdd_ray.config import RunConfig
from cvdd_ray.data.artifacts import Artifacts, read_manifest
from cvdd_ray.data.datasets import dataset_info
from cvdd_ray.data.imagesets import ImageSet
from cvdd_ray.data.shards import load_images
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError
from cvdd_ray.space import label
from cvdd_ray.stages.analyses import Analysis, parameters
from cvdd_ray.stages.analysispictures import bars_figure, image_grid, parameter_figure
from cvdd_ray.stages.paper import PAPER, paper, paper_note
from cvdd_ray.stages.report import spread
from cvdd_ray.stages.sweepsummary import Trial, read_sweep, trial_files, trial_run_config
from cvdd_ray.stages.synthesize import DISTILLED

MAX_GRIDS = 4  # trials whose images are shown side by side


@dataclass(frozen=True)
class Ablation:
    """One of the paper's tables: title, table of paper.yaml, settings that a sweep must vary (one of them is enough), and what
    the paper has for a run's configuration, if its data and IPC are the paper's."""

    title: str
    table: str
    varies: tuple[str, ...]
    number: Callable[[RunConfig, int], float | None]


def _experts(c: RunConfig, ipc: int) -> float | None:
    return paper("experts")["values"].get(ipc, {}).get(c.voting.size) if c.voting.weighting == "prior" else None


def _voters(c: RunConfig, ipc: int) -> float | None:
    if c.voting.size != 2:
        return _experts(c, ipc)
    return paper("voters")["values"].get(ipc, {}).get(c.voting.weighting)


def _bssl(c: RunConfig, ipc: int) -> float | None:
    group = c.relabel.resolved_bn_group(100 * ipc)
    published = c.relabel.batchnorm == "eval" or (c.relabel.batch_size, group) == (16, 8)
    return paper("bssl")["values"].get(ipc, {}).get(c.relabel.batchnorm) if published else None


def _committee(c: RunConfig, ipc: int) -> float | None:
    table = paper("committee")
    return table["sizes"].get(len(c.committee.experts), {}).get(c.evaluate.students[0]) if ipc == table["ipc"] else None


def _architectures(c: RunConfig, ipc: int) -> float | None:
    table = paper("architectures")
    return table["students"].get(c.evaluate.students[0], {}).get("CV-DD") if ipc == table["ipc"] else None


ABLATIONS: Mapping[str, Ablation] = {
    "experts": Ablation("Voters per image (paper Table 5)", "experts", ("voting.size", "voting"), _experts),
    "voters": Ablation("Weights of votes (paper Table 6)", "voters", ("voting.weighting", "voting"), _voters),
    "bssl": Ablation("Batch-specific soft labels (paper Table 7)", "bssl", ("relabel.batchnorm", "relabel"), _bssl),
    "committee": Ablation("Committee choices (paper Table 18)", "committee", ("committee.experts",), _committee),
    "architectures": Ablation(
        "Cross-architecture (paper Table 4)", "architectures", ("evaluate.students",), _architectures
    ),
}


def ablation(store: Store, what: str) -> Analysis:
    """Return one of ABLATIONS from a sweep's directory, trials in the order of the grid.

    Raises ConfigError for a sweep that does not vary what the table is about, ArtifactError when it has no finished trial.
    """
    summary, about = read_sweep(store), ABLATIONS[what]
    space = summary.config.sweep.space
    if not set(about.varies) & set(space):
        raise ConfigError(
            f"--what {what}: the sweep in {summary.where} varies {', '.join(space)}, this table is about "
            f"{' or '.join(about.varies)}"
        )
    trials = _in_order(summary.trials)
    if not trials:
        raise ArtifactError(f"{summary.where} has no finished trial; run the same `cvdd sweep` again")
    rows, bars, points, theirs = [], [], {}, {}
    for trial in trials:
        config = trial_run_config(store, trial.name)
        std, ipc = trial.curve[-1][2] if summary.config.sweep.seeds > 1 else None, config.ipc[0]
        known = about.number(config, ipc) if _is_papers(about.table, config) else None
        name = ", ".join(label(trial.point[key]) for key in space)
        rows.append((name, spread(trial.accuracy, std), "" if known is None else f"{known:g}"))
        bars.append((name, trial.accuracy, std, known))
        if what == "architectures":
            millions = _millions(config)
            points[name] = (millions, trial.accuracy, std)
            if known is not None:
                theirs[name] = (paper("architectures")["students"][name]["parameters"], known)
            rows[-1] = (name, f"{millions:.2f}", *rows[-1][1:])
    dataset, ipc = dataset_info(summary.config.data).name, summary.config.ipc[0]
    students = f"{summary.config.sweep.seeds} student{'s' if summary.config.sweep.seeds > 1 else ''} per trial"
    notes = (
        f"Ours: hold-out accuracy in percent after the last epoch, {students}; paper: test accuracy.",
        paper_note(about.table, dataset, ipc),
    )
    title = f"{about.title}: {dataset}, IPC {ipc}"
    if what == "architectures":
        figure = parameter_figure(points, theirs, title=title, label="hold-out accuracy in %, last epoch")
        header = ("student", "parameters in millions", "ours, hold-out %", f"{PAPER}, test %")
    else:
        figure = bars_figure(bars, title=title, label="accuracy in % (ours: hold-out, mean and standard deviation)")
        header = (", ".join(space), "ours, hold-out %", f"{PAPER}, test %")
    return Analysis(
        title,
        header,
        tuple(rows),
        notes,
        figure,
        [dict(zip(("name", "mean", "std", PAPER), b, strict=True)) for b in bars],
    )


def cross(store: Store) -> Analysis:
    """Return hold-out accuracies of a sweep over images and labels as a table with a row per kind of images and a column per
    kind of labels.  The paper changes both together.

    Raises ConfigError where two trials have the same images and labels, ArtifactError without a finished trial.
    """
    summary = read_sweep(store)
    found: dict[tuple[str, str], tuple[float, float | None]] = {}
    for trial in _in_order(summary.trials):
        c = trial_run_config(store, trial.name)
        place = images_in_words(c), labels_in_words(c)
        if place in found:
            raise ConfigError(
                f"--what cross: the sweep in {summary.where} varies more than images and labels: it has {' with '.join(place)} "
                f"twice"
            )
        found[place] = trial.accuracy, trial.curve[-1][2] if summary.config.sweep.seeds > 1 else None
    if not found:
        raise ArtifactError(f"{summary.where} has no finished trial; run the same `cvdd sweep` again")
    kinds, labels = (list(dict.fromkeys(names)) for names in zip(*found, strict=True))
    rows = [(kind, *(spread(*found[kind, name]) if (kind, name) in found else "" for name in labels)) for kind in kinds]
    title = f"Images and labels: {dataset_info(summary.config.data).name}, IPC {summary.config.ipc[0]}"
    figure = bars_figure(
        [(f"{kind}; {name}", *found[kind, name], None) for kind in kinds for name in labels if (kind, name) in found],
        title=title, label="hold-out accuracy in %, mean and standard deviation",
    )  # fmt: skip
    notes = (f"Hold-out accuracy in percent after the last epoch, {summary.config.sweep.seeds} students per trial.",)
    return Analysis(
        title, ("images", *labels), tuple(rows), notes, figure,
        [{"images": kind, "labels": name, "mean": mean, "std": std} for (kind, name), (mean, std) in found.items()],
    )  # fmt: skip


def images_in_words(c: RunConfig) -> str:
    """Return what a run's images are: who distilled them, or what they were before that."""
    if c.synthesize.iterations:
        return f"{c.voting.size} voters" if c.voting.size > 1 else "one voter (SRe2L++)"
    return {"patches": "patches", "real": "random real", "noise": "noise"}[c.initialize.method]


def labels_in_words(c: RunConfig) -> str:
    """Return who labels a run's images, and in which mode."""
    teachers = len(c.relabel.teachers or c.committee.experts)
    many = "1 teacher" if teachers == 1 else f"{teachers} teachers"
    return f"{many}, {'BSSL' if c.relabel.batchnorm == 'batch' else 'eval mode'}"


def _in_order(trials: tuple[Trial, ...]) -> list[Trial]:
    return sorted((trial for trial in trials if trial.state == "finished"), key=lambda trial: trial.name)


def _is_papers(table: str, c: RunConfig) -> bool:
    """Return whether a table of the paper is of this data, with networks of full width."""
    return dataset_info(c.data).name == paper(table)["dataset"] and c.committee.width == 1


def _millions(c: RunConfig) -> float:
    info = dataset_info(c.data)
    return parameters(
        c.evaluate.students[0], info.num_classes or 1000, info.image_size, c.evaluate.width or c.committee.width
    )


def sweep_images(store: Store) -> Analysis:
    """Return distilled images of a sweep's trials side by side, those that differ, at most four (paper Figs. 7, 8)."""
    summary, files = read_sweep(store), trial_files(store)
    artifacts, seen = Artifacts(store, variants=True), set()
    sets: dict[str, ImageSet] = {}
    for trial in sorted(summary.trials, key=lambda trial: trial.name):
        for stage, folder in files[trial.name]["stages"].items():
            made = read_manifest(store, folder, stage) if stage.startswith("synthesize/") else None
            if made is not None and folder not in seen and len(seen) < MAX_GRIDS:
                seen.add(folder)
                name = ", ".join(label(trial.point[key]) for key in summary.config.sweep.space)
                sets[name] = load_images(artifacts, made, DISTILLED)
    if not sets:
        raise ArtifactError(f"{summary.where} has no distilled images of its own; look at the run it took them from")
    rows = tuple((name, str(len(images)), str(len(images.classes))) for name, images in sets.items())
    title = f"Distilled images by {', '.join(summary.config.sweep.space)}"
    return Analysis(title, ("trial", "images", "classes"), rows, picture=image_grid(sets, title=title))
