"""What a run has made, as plain values read from its artifacts alone."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from cvdd_ray.config import RunConfig
from cvdd_ray.data.artifacts import MANIFEST, Artifacts, Manifest
from cvdd_ray.data.datasets import dataset_info
from cvdd_ray.data.imagesets import ImageSet, read_table
from cvdd_ray.data.labels import FULL, ONLINE
from cvdd_ray.data.shards import load_images, shard_files
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError
from cvdd_ray.labelconfig import RelabelConfig
from cvdd_ray.recipes import parse_config, validate
from cvdd_ray.stages.arms import CEILING, LABEL_SETS, OURS, REGIMES, TRAINING_SETS, label_sets
from cvdd_ray.stages.ceiling import STAGE as CEILING_STAGE
from cvdd_ray.stages.evaluate import RESULTS
from cvdd_ray.stages.pipeline import CONFIG
from cvdd_ray.stages.relabel import LABELS, full_bytes, label_encoding
from cvdd_ray.stages.synthesize import DISTILLED
from cvdd_ray.stages.votes import PRIORS, needs_priors, priors_hash

FOLDERS = (
    "pretrain",
    "prior",
    "initialize",
    "statistics",
    "trajectories",
    "calibrate",
    "synthesize",
    "relabel",
    "evaluate",
)
MAX_VOTES = 10  # image indices listed per IPC


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
    regime: str
    """Key of its label regime in `arms.REGIMES`: rows of one are compared with each other."""
    training_set: str
    student: str
    last_mean: float
    last_std: float | None
    best_mean: float
    best_std: float | None
    seeds: int
    is_best: bool
    """Whether its last accuracy is the highest of its IPC and regime, the ceiling apart."""


@dataclass(frozen=True)
class LabelSummary:
    """A label set: its bytes on disk, what float16 logits of every class for every epoch would take (None: they are what is
    stored), and whether teachers say it as students train, with nothing stored (`relabel.online`)."""

    bytes: int
    full_bytes: int | None
    is_online: bool


@dataclass(frozen=True)
class IpcSummary:
    """One IPC: number of distilled images, votes per image index, seconds per stage, table rows, bytes on disk, label sets
    by name."""

    ipc: int
    images: int
    votes: tuple[Vote, ...]
    wall_s: dict[str, float]
    rows: tuple[ResultRow, ...]
    image_bytes: int | None
    labels: dict[str, LabelSummary]


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


class RunReader:
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
        self._sets: dict[tuple[str, str, int | None], ImageSet] = {}
        self.config = self._config()

    def file(self, stage: str, name: str) -> bytes:
        return self.artifacts.read(self.manifests[stage], name)

    def images(self, stage: str, base: str, upto: int | None = None) -> ImageSet:
        """Return an image set, or what its first files hold of it: at least `upto` image indices."""
        if (stage, base, upto) not in self._sets:
            self._sets[stage, base, upto] = load_images(self.artifacts, self.manifests[stage], base, upto)
        return self._sets[stage, base, upto]

    def content(self, stage: str, base: str) -> str:
        """Return the content hash of an image set."""
        recorded = self.manifests[stage].facts.get("content", {}).get(base)
        return recorded or self.images(stage, base).content()

    def votes(self, stage: str) -> list[tuple[int, list[str], list[float]]]:
        """Return (image index, voters, weights) of every distilled image, without decoding any."""
        manifest = self.manifests[stage]
        rows = []
        for name in shard_files(manifest.files, DISTILLED):
            table = read_table(self.artifacts.read(manifest, name), self.store.display(f"{stage}/{name}"))
            columns = [table[column].to_pylist() for column in ("image_index", "voters", "voter_weights")]
            rows += zip(*columns, strict=True)
        return rows

    def size(self, stage: str, base: str) -> int:
        """Return the bytes of an image or label set, without reading it (labels can be large)."""
        return self._bytes(stage, shard_files(self.manifests[stage].files, base))

    def stage_bytes(self, stage: str) -> int:
        """Return the bytes of all files of a stage."""
        return self._bytes(stage, self.manifests[stage].files)

    def _bytes(self, stage: str, names: Iterable[str]) -> int:
        total = 0
        for name in names:
            if not self.store.exists(f"{stage}/{name}"):
                raise ArtifactError(
                    f"{self.store.display(f'{stage}/{name}')} is gone; remove its folder to make it anew"
                )
            with self.store.open(f"{stage}/{name}") as file:
                total += file.size()
        return total

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
        soft = label_sets(c) if c else [OURS]
        expected = [f"pretrain/{name}" for name in self.experts()] or ["pretrain"]
        if c and not c.needs_experts:
            expected = []
        expected += ["trajectories"] if c and c.synthesize.method == "trajectories" else []
        expected += ["prior"] if c is None or needs_priors(c) else []
        expected += ["statistics"] if c and c.synthesize.matching.convolutions else []
        for n in self.ipcs():
            expected += [f"initialize/ipc{n}"]
            expected += [f"calibrate/ipc{n}"] if c and c.synthesize.jobs_per_group == "auto" else []
            expected += [f"synthesize/ipc{n}"]
            expected += [f"relabel/ipc{n}/{label_set}" for label_set in soft]
            expected += [f"evaluate/ipc{n}"]
        expected += [CEILING_STAGE] if c and CEILING in c.evaluate.baselines else []
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
                if source not in self.manifests or self.content(source, file) != content:
                    return True
            if name == "initialize" and content not in started:
                return True
            if name == "prior" and content not in (self._priors_hash(), "not used"):
                return True
            if name != "prior" and name in self.manifests and content != self.manifests[name].content:
                return True
            if name in self.manifests and self._is_outdated(name):
                return True
        return False

    def _priors_hash(self) -> str | None:
        return priors_hash(json.loads(self.file("prior", PRIORS))["priors"]) if "prior" in self.manifests else None

    def _config(self) -> RunConfig | None:
        if self.store.exists(CONFIG):
            return parse_config(self.store.read(CONFIG), self.store.display(CONFIG))
        distilled = [stage for stage in self.manifests if stage.startswith("synthesize/")]
        return validate(self.images(distilled[0], DISTILLED, 1).metadata["config"]) if distilled else None


def summarize_run(store: Store) -> RunSummary:
    """Return the summary of a finished or unfinished run.

    Raises ArtifactError when the directory is no run, or one of its files is damaged.
    """
    return read_summary(RunReader(store))


def read_summary(reader: RunReader) -> RunSummary:
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


def _ipc_summary(reader: RunReader, ipc: int) -> IpcSummary:
    manifests = reader.manifests
    own = [stage for stage in manifests if f"ipc{ipc}" in stage.split("/")]
    labels = [stage for stage in own if stage.startswith("relabel/")]
    images, votes, image_bytes = 0, (), None
    if (stage := f"synthesize/ipc{ipc}") in manifests:
        rows = reader.votes(stage)
        by_index = {i: Vote(i, tuple(voters), tuple(weights)) for i, voters, weights in rows}
        images, votes, image_bytes = len(rows), tuple(by_index.values()), reader.size(stage, DISTILLED)
    return IpcSummary(
        ipc, images, votes, {stage: manifests[stage].wall_s for stage in own}, _rows(reader, ipc), image_bytes,
        {stage.split("/")[-1]: _labels(reader, stage, ipc) for stage in labels},
    )  # fmt: skip


def _labels(reader: RunReader, stage: str, ipc: int) -> LabelSummary:
    identity = reader.manifests[stage].identity
    c, num_classes = RelabelConfig(**identity["settings"]["relabel"]), len(identity["classes"])
    is_full = not c.online and c.stored_epochs is None and label_encoding(c, num_classes) == FULL
    full = None if is_full else full_bytes(ipc * num_classes, num_classes, c)
    return LabelSummary(reader.size(stage, LABELS), full, c.online)


def _rows(reader: RunReader, ipc: int) -> tuple[ResultRow, ...]:
    """Return the rows of one IPC, regime by regime, student by student, ours first; the ceiling is one of every IPC."""
    stages = [stage for stage in (f"evaluate/ipc{ipc}", CEILING_STAGE) if stage in reader.manifests]
    if stages[:1] in ([], [CEILING_STAGE]):
        return ()
    found = [row for stage in stages for row in json.loads(reader.file(stage, RESULTS))["table"]]
    online = _is_online(reader, ipc)
    regimes = {row["arm"]: TRAINING_SETS[row["arm"]].regime(online) for row in found}
    students, arms, order = list(dict.fromkeys(row["student"] for row in found)), list(TRAINING_SETS), list(REGIMES)
    found.sort(
        key=lambda row: (order.index(regimes[row["arm"]]), students.index(row["student"]), arms.index(row["arm"]))
    )
    best: dict[str, float] = {}
    for row in found:
        if row["arm"] != CEILING:
            best[regimes[row["arm"]]] = max(best.get(regimes[row["arm"]], 0.0), row["last_mean"])
    return tuple(
        ResultRow(
            ipc=ipc, regime=regimes[row["arm"]], training_set=training_set(reader, ipc, row["arm"]),
            is_best=row["arm"] != CEILING and row["last_mean"] == best[regimes[row["arm"]]], **row,
        )
        for row in found
    )  # fmt: skip


def _is_online(reader: RunReader, ipc: int) -> bool:
    labels = reader.manifests.get(f"relabel/ipc{ipc}/{OURS}")
    return labels is not None and ONLINE in labels.files


def training_set(reader: RunReader, ipc: int, arm: str) -> str:
    """Return a row in words, with what the labels of this run are."""
    title, labels = TRAINING_SETS[arm].title, reader.manifests.get(f"relabel/ipc{ipc}/{OURS}")
    if arm == OURS and labels and labels.identity["settings"]["relabel"]["batchnorm"] != "batch":
        title = title.replace("BSSL", "eval mode")
    return title.replace("soft", "online soft") if _is_online(reader, ipc) else title
