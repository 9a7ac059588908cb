"""Artifacts: complete or not there. A stage's manifest is written last and says what was made, from what, and how."""

import hashlib
import json
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch

from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError

SCHEMA_VERSION = 1
MANIFEST = "manifest.json"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


@dataclass(frozen=True)
class StagePlan:
    """What a stage would make: its folder, the settings its result depends on, content hashes of its inputs."""

    stage: str
    settings: Mapping[str, Any]
    inputs: Mapping[str, str]
    classes: tuple[str, ...]
    seed: int

    def identity(self) -> dict[str, Any]:
        """Return the plan as plain JSON values; two plans are the same work if these are equal."""
        return json.loads(json.dumps({"schema": SCHEMA_VERSION, **asdict(self)}))

    def fingerprint(self) -> str:
        return sha256(json.dumps(self.identity(), sort_keys=True).encode())


@dataclass(frozen=True)
class Manifest:
    """A finished stage: its plan's identity, its files with their sha256, and what is good to know (`facts`)."""

    identity: dict[str, Any]
    files: dict[str, str]
    facts: dict[str, Any] = field(default_factory=dict)
    wall_s: float = 0.0
    versions: dict[str, str] = field(default_factory=dict)

    @property
    def stage(self) -> str:
        return self.identity["stage"]

    @property
    def content(self) -> str:
        """Content hash of the artifact: depends on the files alone, not on when or how fast they were made."""
        return sha256(json.dumps(self.files, sort_keys=True).encode())


class Artifacts:
    """The artifacts of one run, in a store. `overwrite` lets a stage with other settings replace what is there."""

    def __init__(self, store: Store, overwrite: bool = False):
        self.store, self.overwrite = store, overwrite

    def manifest(self, stage: str) -> Manifest | None:
        """Return the manifest of a finished stage, or None.  Raises ArtifactError when it cannot be read."""
        name = f"{stage}/{MANIFEST}"
        if not self.store.exists(name):
            return None
        try:
            found = Manifest(**json.loads(self.store.read(name)))
            if found.identity["schema"] == SCHEMA_VERSION and found.stage == stage:
                return found
        except (ValueError, TypeError, KeyError):
            pass
        raise ArtifactError(
            f"{self.store.display(name)} is damaged or of another schema (this version reads {SCHEMA_VERSION}); "
            f"remove its folder to make it anew"
        )

    def require(self, stage: str, verb: str) -> Manifest:
        """Return the manifest of a finished stage.  Raises ArtifactError that names the verb which makes it."""
        found = self.manifest(stage)
        if found is None:
            raise ArtifactError(f"{self.store.display(stage)} is not finished; make it with `cvdd {verb}`")
        return found

    def finished(self, plan: StagePlan) -> Manifest | None:
        """Return the manifest if the planned work is already done.  Raises ArtifactError when the folder holds the
        result of other settings and `overwrite` is off."""
        found = self.manifest(plan.stage)
        if found is None:
            return None
        difference = first_difference(found.identity, plan.identity())
        if difference is None:
            return found
        if not self.overwrite:
            where, there, wanted = difference
            raise ArtifactError(
                f"{self.store.display(plan.stage)} was made with {where} = {there}, now asked for {wanted}; "
                f"choose another --out, or pass --overwrite to replace it"
            )
        return None

    def commit(self, plan: StagePlan, files: Mapping[str, bytes], *, wall_s: float, facts: Mapping) -> Manifest:
        """Write the files, then the manifest, then drop the partial results; return the manifest."""
        self.store.delete(f"{plan.stage}/{MANIFEST}")
        for name, content in files.items():
            self.store.write(f"{plan.stage}/{name}", content)
        manifest = Manifest(
            identity=plan.identity(),
            files={name: sha256(content) for name, content in files.items()},
            facts=dict(facts),
            wall_s=round(wall_s, 3),
            versions=software_versions(),
        )
        self.store.write(f"{plan.stage}/{MANIFEST}", json.dumps(asdict(manifest), indent=1).encode())
        self.store.delete_folder(f"{plan.stage}/partial")
        return manifest

    def partial(self, plan: StagePlan) -> str:
        """Return the folder for results of an unfinished stage; it is named by the plan, so other settings never mix."""
        return f"{plan.stage}/partial/{plan.fingerprint()[:16]}"

    def read(self, manifest: Manifest, name: str) -> bytes:
        """Return a file of a finished stage, verified.  Raises ArtifactError when it is missing or altered."""
        content = self.store.read(f"{manifest.stage}/{name}")
        self._require_digest(manifest, name, sha256(content))
        return content

    def verify(self, manifest: Manifest, name: str) -> str:
        """Return the store's name of a file that is to be opened in place, after reading it once through.

        Raises ArtifactError when it is missing or altered.
        """
        digest = hashlib.sha256()
        with self.store.open(f"{manifest.stage}/{name}") as file:
            while chunk := file.read(1 << 24):
                digest.update(chunk)
        self._require_digest(manifest, name, digest.hexdigest())
        return f"{manifest.stage}/{name}"

    def _require_digest(self, manifest: Manifest, name: str, digest: str) -> None:
        if digest != manifest.files.get(name):
            raise ArtifactError(
                f"{self.store.display(f'{manifest.stage}/{name}')} does not have the sha256 its manifest says; "
                f"it was altered or damaged: remove the folder {manifest.stage} and run the command again"
            )


def first_difference(there: Any, wanted: Any, where: str = "") -> tuple[str, Any, Any] | None:
    """Return (dotted path, value there, value wanted) of the first difference between two JSON values, or None."""
    if isinstance(there, dict) and isinstance(wanted, dict):
        for name in sorted(set(there) | set(wanted)):
            found = first_difference(there.get(name), wanted.get(name), f"{where}.{name}".lstrip("."))
            if found:
                return found
        return None
    return None if there == wanted else (where.removeprefix("settings."), there, wanted)


def software_versions() -> dict[str, str]:
    """Return the versions that can change bits: Python, torch, torchvision, pyarrow, this package, the platform."""
    versions = {name: metadata.version(name) for name in ("cvdd_ray", "torchvision", "pyarrow")}
    about = {"python": platform.python_version(), "platform": platform.platform(), "torch": torch.__version__}
    return {**about, **versions}
