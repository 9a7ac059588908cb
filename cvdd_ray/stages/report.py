"""report: what a run has made, as plain values, tables and pictures; read from the artifacts alone."""

import json
import re
from dataclasses import dataclass

import yaml
from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cvdd_ray.config import RunConfig
from cvdd_ray.data.artifacts import MANIFEST, Artifacts, Manifest
from cvdd_ray.data.datasets import dataset_info
from cvdd_ray.data.imagesets import ImageSet, read_image_set
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError
from cvdd_ray.recipes import validate
from cvdd_ray.stages.evaluate import OURS, RESULTS
from cvdd_ray.stages.initialize import RANDOM, START
from cvdd_ray.stages.pictures import ARM_COLOURS, contact_sheet, curves_figure
from cvdd_ray.stages.pipeline import CONFIG
from cvdd_ray.stages.relabel import BASELINE_LABELS, LABEL_SETS, LABELS
from cvdd_ray.stages.synthesize import DISTILLED, TRACE
from cvdd_ray.stages.votes import PRIORS, needs_priors

FOLDERS = ("pretrain", "prior", "initialize", "synthesize", "relabel", "evaluate")
TRAINING_SETS = {
    "distilled": "distilled, soft labels (BSSL)",
    "eval_labels": "distilled, eval-mode labels",
    "start_soft": "starting images, soft labels",
    "random_soft": "random real, soft labels",
    "random_hard": "random real, hard labels",
}
HEADER = ("IPC", "training set", "student", "last %", "best %", "seeds")
MAX_VOTES = 10  # image indices listed per IPC
RULE = "The test set is used by the final evaluation only; the accuracy after the last epoch is the primary number."


@dataclass(frozen=True)
class ExpertSummary:
    """One expert: hold-out accuracy and prior in percent, pretraining time in seconds; None where not there yet."""

    name: str
    holdout_accuracy: float | None
    prior: float | None
    wall_s: float | None


@dataclass(frozen=True)
class Vote:
    """Who voted on one image index, and with which weights (sum 1)."""

    image_index: int
    voters: tuple[str, ...]
    weights: tuple[float, ...]

    def lines(self) -> list[str]:
        """Return one line of text per voter."""
        return [f"{voter} {weight:.2f}" for voter, weight in zip(self.voters, self.weights, strict=True)]


@dataclass(frozen=True)
class ResultRow:
    """One row of the table: what students trained on, test accuracy in percent (std with n-1; None for one seed)."""

    ipc: int
    arm: str
    training_set: str
    student: str
    last_mean: float
    last_std: float | None
    best_mean: float
    best_std: float | None
    seeds: int
    is_best: bool
    """Whether its last accuracy is the highest of its IPC."""


@dataclass(frozen=True)
class IpcSummary:
    """One IPC: number of distilled images, votes per image index, seconds per stage, table rows, bytes on disk."""

    ipc: int
    images: int
    votes: tuple[Vote, ...]
    wall_s: dict[str, float]
    rows: tuple[ResultRow, ...]
    image_bytes: int | None
    label_bytes: dict[str, int]


@dataclass(frozen=True)
class RunSummary:
    """A run in plain values; None where no finished stage tells. `stages` maps every stage to done, outdated (made
    from inputs that were replaced since), begun or missing."""

    where: str
    dataset: str | None
    classes: tuple[str, ...]
    image_size: int | None
    seed: int | None
    experts: tuple[ExpertSummary, ...]
    ipcs: tuple[IpcSummary, ...]
    stages: dict[str, str]
    prior_wall_s: float | None
    versions: dict[str, str]

    def unfinished(self) -> dict[str, str]:
        """Return the stages that are not done, with their state."""
        return {stage: state for stage, state in self.stages.items() if state != "done"}


class _Reader:
    """The artifacts of one run as they are: manifests by stage, configuration, image sets.

    Raises ArtifactError for a directory that holds neither a configuration nor a finished stage.
    """

    def __init__(self, store: Store):
        self.store, self.artifacts = store, Artifacts(store)
        self.names = [name for folder in FOLDERS for name in store.names(folder)]
        stages = [name.removesuffix(f"/{MANIFEST}") for name in self.names if name.endswith(f"/{MANIFEST}")]
        self.manifests: dict[str, Manifest] = {stage: self.artifacts.manifest(stage) for stage in stages}
        if not self.manifests and not store.exists(CONFIG):
            raise ArtifactError(
                f"{store.display('').rstrip('/')} holds no run: neither {CONFIG} nor any finished stage; "
                f"give the directory (--out) of a run, or make one with `cvdd run RECIPE --out DIR`"
            )
        self._sets: dict[tuple[str, str], ImageSet] = {}
        self.config = self._config()

    def file(self, stage: str, name: str) -> bytes:
        return self.artifacts.read(self.manifests[stage], name)

    def images(self, stage: str, name: str) -> ImageSet:
        if (stage, name) not in self._sets:
            self._sets[stage, name] = read_image_set(self.file(stage, name), self.store.display(f"{stage}/{name}"))
        return self._sets[stage, name]

    def size(self, stage: str, name: str) -> int:
        """Return bytes of a file, without reading it (labels can be large)."""
        if not self.store.exists(f"{stage}/{name}"):
            raise ArtifactError(f"{self.store.display(f'{stage}/{name}')} is gone; remove its folder to make it anew")
        with self.store.open(f"{stage}/{name}") as file:
            return file.size()

    def ipcs(self) -> list[int]:
        """Return the IPCs configured or found; starting images alone may be the prior's, so they count last."""

        def found(*folders: str) -> set[int]:
            return {int(m[1]) for name in self.names if (m := re.match(rf"(?:{'|'.join(folders)})/ipc(\d+)/", name))}

        configured = set(self.config.ipc) if self.config else set()
        return sorted(configured | found("synthesize", "relabel", "evaluate") or found("initialize"))

    def experts(self) -> list[str]:
        """Return the committee in voting order; without a configuration what was trained, by name."""
        trained = [stage.split("/")[1] for stage in self.manifests if stage.startswith("pretrain/")]
        return list(self.config.committee.experts) if self.config else trained

    def stages(self) -> dict[str, str]:
        """Return every stage this run should have or has, with its state."""
        c = self.config
        soft = dict.fromkeys(["distilled", *(BASELINE_LABELS.get(b) for b in (c.evaluate.baselines if c else ()))])
        expected = [f"pretrain/{name}" for name in self.experts()] or ["pretrain"]
        expected += ["prior"] if c is None or needs_priors(c) else []
        for n in self.ipcs():
            expected += [f"initialize/ipc{n}", f"synthesize/ipc{n}"]
            expected += [f"relabel/ipc{n}/{label_set}" for label_set in soft if label_set]
            expected += [f"evaluate/ipc{n}"]
        return {stage: self._state(stage) for stage in dict.fromkeys([*expected, *self.manifests])}

    def _state(self, stage: str) -> str:
        if stage in self.manifests:
            return "outdated" if self._is_outdated(stage) else "done"
        return "begun" if any(name.startswith(f"{stage}/partial/") for name in self.names) else "missing"

    def _is_outdated(self, stage: str) -> bool:
        """Return whether an input of a finished stage was replaced after it, directly or further up."""
        plan = self.manifests[stage].identity
        started = {m.content for name, m in self.manifests.items() if name.startswith("initialize/")}
        for name, content in plan["inputs"].items():
            if name == "images":
                source, file, _ = LABEL_SETS[plan["settings"]["label_set"]].images
                source = source.format(ipc=stage.split("/")[1].removeprefix("ipc"))
                if source not in self.manifests or self.images(source, file).content() != content:
                    return True
            if name == "initialize" and content not in started:
                return True
            if name in self.manifests and content not in (self.manifests[name].content, "not used"):
                return True
            if name in self.manifests and self._is_outdated(name):
                return True
        return False

    def _config(self) -> RunConfig | None:
        if self.store.exists(CONFIG):
            return validate(yaml.safe_load(self.store.read(CONFIG)))
        distilled = [stage for stage in self.manifests if stage.startswith("synthesize/")]
        return validate(self.images(distilled[0], DISTILLED).metadata["config"]) if distilled else None


def summarize_run(store: Store) -> RunSummary:
    """Return the summary of a finished or unfinished run.

    Raises ArtifactError when the directory is no run, or one of its files is damaged.
    """
    return _summary(_Reader(store))


def _summary(reader: _Reader) -> RunSummary:
    manifests, config = reader.manifests, reader.config
    any_plan = next(iter(manifests.values())).identity if manifests else {}
    info = dataset_info(config.data) if config else None
    priors = json.loads(reader.file("prior", PRIORS))["priors"] if "prior" in manifests else {}
    experts = []
    for name in reader.experts():
        manifest = manifests.get(f"pretrain/{name}")
        accuracy = manifest.facts["holdout_accuracy"] if manifest else None
        experts.append(ExpertSummary(name, accuracy, priors.get(name), manifest.wall_s if manifest else None))
    versions: dict[str, dict[str, None]] = {}
    for manifest in manifests.values():
        for name, version in manifest.versions.items():
            versions.setdefault(name, {})[version] = None
    return RunSummary(
        where=reader.store.display("").rstrip("/"),
        dataset=info.name if info else None,
        classes=tuple(any_plan.get("classes", ())),
        image_size=info.image_size if info else None,
        seed=config.seed if config else any_plan["seed"],
        experts=tuple(experts),
        ipcs=tuple(_ipc_summary(reader, ipc) for ipc in reader.ipcs()),
        stages=reader.stages(),
        prior_wall_s=manifests["prior"].wall_s if "prior" in manifests else None,
        versions={name: ", ".join(found) for name, found in versions.items()},
    )


def _ipc_summary(reader: _Reader, ipc: int) -> IpcSummary:
    manifests = reader.manifests
    own = [stage for stage in manifests if f"ipc{ipc}" in stage.split("/")]
    labels = [stage for stage in own if stage.startswith("relabel/")]
    images, votes, image_bytes = 0, (), None
    if (stage := f"synthesize/ipc{ipc}") in manifests:
        distilled = reader.images(stage, DISTILLED)
        names = ("image_index", "voters", "voter_weights")
        columns = [distilled.columns[name].to_pylist() for name in names]
        by_index = {i: Vote(i, tuple(voters), tuple(weights)) for i, voters, weights in zip(*columns, strict=True)}
        images, votes, image_bytes = len(distilled), tuple(by_index.values()), reader.size(stage, DISTILLED)
    return IpcSummary(
        ipc, images, votes, {stage: manifests[stage].wall_s for stage in own}, _rows(reader, ipc), image_bytes,
        {stage.split("/")[-1]: reader.size(stage, LABELS) for stage in labels},
    )  # fmt: skip


def _rows(reader: _Reader, ipc: int) -> tuple[ResultRow, ...]:
    """Return the rows of one IPC, student by student, ours first."""
    if f"evaluate/ipc{ipc}" not in reader.manifests:
        return ()
    found = json.loads(reader.file(f"evaluate/ipc{ipc}", RESULTS))["table"]
    names, labels = dict(TRAINING_SETS), reader.manifests.get(f"relabel/ipc{ipc}/distilled")
    if labels and labels.identity["settings"]["relabel"]["batchnorm"] != "batch":
        names[OURS] = TRAINING_SETS[OURS].replace("BSSL", "eval mode")
    students, order = list(dict.fromkeys(row["student"] for row in found)), list(names)
    best = max(row["last_mean"] for row in found)
    found.sort(key=lambda row: (students.index(row["student"]), order.index(row["arm"])))
    return tuple(
        ResultRow(ipc=ipc, training_set=names[row["arm"]], is_best=row["last_mean"] == best, **row) for row in found
    )


def accuracy_table(summary: RunSummary) -> list[tuple[str, ...]]:
    """Return rows of text: IPC, training set, student, last and best test accuracy in percent, seeds."""

    def cells(row: ResultRow) -> tuple[str, ...]:
        last, best = _spread(row.last_mean, row.last_std), _spread(row.best_mean, row.best_std)
        return str(row.ipc), row.training_set, row.student, last, best, str(row.seeds)

    return [cells(row) for row in _all_rows(summary)]


def markdown_table(summary: RunSummary) -> str:
    """Return the accuracy table as Markdown; the best row of every IPC (by last accuracy) is bold."""
    rows = zip(accuracy_table(summary), _all_rows(summary), strict=True)
    marked = [tuple(f"**{cell}**" for cell in cells) if row.is_best else cells for cells, row in rows]
    return _pipes(HEADER, marked, ("---:", "---", "---", "---:", "---:", "---:"))


def rich_table(summary: RunSummary) -> Table:
    """Return the accuracy table for a terminal of 80 columns."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for title in HEADER:
        is_text = title in ("training set", "student")
        table.add_column(title, justify="left" if is_text else "right", no_wrap=not is_text, overflow="fold")
    rows = _all_rows(summary)
    for k, (cells, row) in enumerate(zip(accuracy_table(summary), rows, strict=True)):
        is_last = k + 1 < len(rows) and rows[k + 1].ipc != row.ipc
        table.add_row(*cells, style="bold" if row.is_best else None, end_section=is_last)
    return table


def rich_summary(summary: RunSummary) -> list:
    """Return what a terminal shows of a run: facts, then the accuracy table and how to read it if there are results."""
    facts = [Text(f"{name}: {value}") for name, value in _facts(summary).items()]
    return [*facts, "", rich_table(summary), "", Text(RULE)] if _all_rows(summary) else facts


def write_report(store: Store) -> dict[str, str]:
    """Write `report/` of a run anew: table.md, contact_sheet_ipc<n>.png, curves_ipc<n>.png; return {name: path}.

    Pictures of stages that are not there are left out, older ones are removed.  Raises ArtifactError as summarize_run.
    """
    reader = _Reader(store)
    summary = _summary(reader)
    files: dict[str, bytes] = {}
    for one in summary.ipcs:
        start, distilled = f"initialize/ipc{one.ipc}", f"synthesize/ipc{one.ipc}"
        if start in reader.manifests and distilled in reader.manifests:
            sets = [reader.images(start, RANDOM), reader.images(start, START), reader.images(distilled, DISTILLED)]
            files[f"contact_sheet_ipc{one.ipc}.png"] = contact_sheet(
                *sets, [vote.lines() for vote in one.votes], title=summary.dataset
            )
        files[f"curves_ipc{one.ipc}.png"] = _curves(reader, one.ipc, summary)
    pictures = [f"report/{name}" for name in files]
    files = {"table.md": _markdown(summary, list(files)).encode(), **files}
    for name in store.names("report"):
        if re.fullmatch(r"report/(contact_sheet|curves)_ipc\d+\.png", name) and name not in pictures:
            store.delete(name)
    for name, content in files.items():
        store.write(f"report/{name}", content)
    return {name: store.path(f"report/{name}") if store.is_local else store.display(f"report/{name}") for name in files}


def _curves(reader: _Reader, ipc: int, summary: RunSummary) -> bytes:
    def loaded(stage: str, name: str, empty):
        return json.loads(reader.file(stage, name)) if stage in reader.manifests else empty

    training = {name: loaded(f"pretrain/{name}", "curve.json", []) for name in reader.experts()}
    trace = loaded(f"synthesize/ipc{ipc}", TRACE, [])
    runs = loaded(f"evaluate/ipc{ipc}", RESULTS, {"runs": []})["runs"]
    names = {arm: TRAINING_SETS[arm] for arm in ARM_COLOURS}
    names |= {row.arm: row.training_set for one in summary.ipcs if one.ipc == ipc for row in one.rows}
    return curves_figure(training, trace, runs, names, title=f"{summary.dataset}, {ipc} images per class")


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
            labels = ", ".join(f"{name} {size / 1024:.1f} KiB" for name, size in one.label_bytes.items())
            images = f"{one.images} images, {one.image_bytes / 1024:.1f} KiB"
            facts[f"IPC {one.ipc}"] = f"{images}; labels: {labels or 'none'}"
    states = [stage if state == "missing" else f"{stage} ({state})" for stage, state in summary.unfinished().items()]
    return {**facts, "not finished": ", ".join(states)} if states else facts


def _markdown(summary: RunSummary, pictures: list[str]) -> str:
    """Return table.md: facts, accuracies, seconds per stage, votes, pictures, versions."""
    walls = {f"pretrain/{e.name}": e.wall_s for e in summary.experts} | {"prior": summary.prior_wall_s}
    votes = []
    for one in summary.ipcs:
        walls |= one.wall_s
        votes += [(str(one.ipc), str(v.image_index), " + ".join(v.lines())) for v in one.votes[:MAX_VOTES]]
    seconds = [(stage, f"{wall_s:.1f}") for stage, wall_s in walls.items() if wall_s is not None]
    sections = {
        f"# {summary.dataset or 'Run'}": "\n".join(f"- {name}: {value}" for name, value in _facts(summary).items()),
        "## Test accuracy": f"{markdown_table(summary) if _all_rows(summary) else 'No results yet.'}\n\n{RULE}",
        "## Wall time": _pipes(("stage", "seconds"), seconds, ("---", "---:")),
        "## Votes": f"The same for every class; at most {MAX_VOTES} image indices per IPC are listed.\n\n"
        + _pipes(("IPC", "image index", "weights"), votes, ("---:", "---:", "---")),
        "## Pictures": "\n".join(f"- [{name}]({name})" for name in pictures) or "None yet.",
        "## Software": "\n".join(f"- {name} {version}" for name, version in summary.versions.items()),
    }
    return "\n\n".join(f"{title}\n\n{text}" for title, text in sections.items()) + "\n"


def _pipes(header: tuple[str, ...], rows: list[tuple[str, ...]], align: tuple[str, ...]) -> str:
    """Return a Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (header, align, *rows))


def _all_rows(summary: RunSummary) -> list[ResultRow]:
    return [row for one in summary.ipcs for row in one.rows]


def _percent(value: float | None) -> str:
    return "not there" if value is None else f"{value:.1f} %"


def _spread(mean: float, std: float | None) -> str:
    return f"{mean:.1f}" if std is None else f"{mean:.1f} ± {std:.1f}"
