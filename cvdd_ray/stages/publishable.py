"""What a run has to publish: its finished distilled sets with their labels, its experts, its settings without paths."""

from dataclasses import dataclass, replace
from typing import Any

from cvdd_ray.config import RunConfig
from cvdd_ray.data.artifacts import Manifest
from cvdd_ray.data.labels import ONLINE
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError
from cvdd_ray.recipes import without_place
from cvdd_ray.stages.summary import RunReader, RunSummary, read_summary
from cvdd_ray.stages.sweepsummary import is_sweep


@dataclass(frozen=True)
class DistilledSet:
    """One IPC: the finished images, and their soft labels if there are any."""

    ipc: int
    images: Manifest
    labels: Manifest | None

    @property
    def num_images(self) -> int:
        return self.images.facts["images"]

    @property
    def has_label_files(self) -> bool:
        """Whether soft labels are stored: online ones are not."""
        return self.labels is not None and ONLINE not in self.labels.files


@dataclass(frozen=True)
class Publishable:
    """A run as it is published. `summary` holds the IPCs of `sets` and no accuracy that is out of date; `experts` those
    that voted and are there; `missing` says in lines what is left out."""

    reader: RunReader
    summary: RunSummary
    sets: tuple[DistilledSet, ...]
    experts: dict[str, Manifest]
    missing: tuple[str, ...]

    @property
    def classes(self) -> tuple[str, ...]:
        return tuple(self.sets[0].images.identity["classes"])

    @property
    def info(self) -> dict[str, Any]:
        """The dataset's constants: name, num_classes, image_size, mean, std ..."""
        return self.sets[0].images.identity["settings"]["dataset"]

    @property
    def recipe(self) -> RunConfig:
        """The settings without what tells of the machine they were used on: where data and given weights lay."""
        c = without_place(self.reader.config)
        named = {
            name: source if source.startswith("torchvision:") else source.replace("\\", "/").rsplit("/", 1)[-1]
            for name, source in c.committee.weights.items()
        }
        committee = c.committee.model_copy(update={"weights": named})
        return c.model_copy(update={"committee": committee, "data": c.data.model_copy(update={"path": None})})

    def stages(self) -> dict[str, Manifest]:
        """Return the stages whose files are published."""
        found = {f"pretrain/{name}": manifest for name, manifest in self.experts.items()}
        for one in self.sets:
            found |= {m.stage: m for m in (one.images, one.labels if one.has_label_files else None) if m is not None}
        return found


def read_publishable(path: str, ipc: int | None) -> Publishable:
    """Return what a run directory (or s3:// URI) has to publish, of one IPC or of all.

    Raises ArtifactError when there is no finished distilled set, none of this IPC, or one that is out of date; ConfigError
    for the directory of a sweep.
    """
    store = Store(path)
    if is_sweep(store):
        raise ConfigError(f"{path} is a sweep; run its best.yaml with `cvdd run` and export that run")
    reader = RunReader(store)
    summary = read_summary(reader)
    state, where = summary.stages, summary.where
    there = [n for n in reader.ipcs() if state.get(f"synthesize/ipc{n}") in ("done", "outdated")]
    if not there:
        raise ArtifactError(f"{where} has no finished distilled set; make it with `cvdd synthesize`")
    if ipc is not None and ipc not in there:
        raise ArtifactError(f"{where} has distilled sets for IPC {', '.join(map(str, there))}; name one with --ipc")
    missing = [f"IPC {n} is not distilled yet and left out" for n in reader.ipcs() if n not in there and ipc is None]
    sets = []
    for n in there if ipc is None else [ipc]:
        images, labels = f"synthesize/ipc{n}", f"relabel/ipc{n}/distilled"
        for stage, verb in ((images, "synthesize"), (labels, "relabel")):
            if state.get(stage) == "outdated":
                raise ArtifactError(
                    f"{store.display(stage)} is out of date: what it was made from has been replaced since; make it anew "
                    f"with `cvdd {verb} --overwrite`"
                )
        if labels not in reader.manifests:
            missing.append(f"IPC {n} has no soft labels (`cvdd relabel` makes them): its images are exported alone")
        if state.get(f"evaluate/ipc{n}") == "outdated":
            missing.append(f"IPC {n}: the accuracy table is out of date and left out (`cvdd evaluate` makes it anew)")
        sets.append(DistilledSet(n, reader.manifests[images], reader.manifests.get(labels)))
        if sets[-1].labels and not sets[-1].has_label_files:
            missing.append(
                f"IPC {n} has online labels, which are not stored (relabel.online): its images are exported alone"
            )
    voted = [name.split("/")[1] for name in sets[0].images.identity["inputs"] if name.startswith("pretrain/")]
    experts = {name: reader.manifests[f"pretrain/{name}"] for name in voted if f"pretrain/{name}" in reader.manifests}
    if gone := [name for name in voted if name not in experts]:
        missing.append(f"experts not there any more and left out: {', '.join(gone)}")
    chosen = {one.ipc for one in sets}
    ipcs = tuple(
        replace(one, rows=() if state.get(f"evaluate/ipc{one.ipc}") == "outdated" else one.rows)
        for one in summary.ipcs
        if one.ipc in chosen
    )
    return Publishable(reader, replace(summary, ipcs=ipcs), tuple(sets), experts, tuple(missing))
