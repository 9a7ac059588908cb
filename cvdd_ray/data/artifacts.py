"""Artifacts: complete or not there. A stage's manifest is written last and says what was made, from what, and how."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch

from cvdd_ray.data.cache import mapped
from cvdd_ray.data.storage import PART_BYTES, Store
from cvdd_ray.errors import ArtifactError

SCHEMA_VERSION = 1
_digests: dict[tuple, str] = {}
"""sha256 of local files that this process has read through, by path, size and times."""
MANIFEST = "manifest.json"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def stored_sha256(store: Store, name: str) -> str:
    """Return the sha256 of a file of any size.  Raises ArtifactError when it is not there."""
    digest = hashlib.sha256()
    with store.open(name) as file:
        while chunk := file.read(PART_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


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
        return _fingerprint(self.identity())


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


@dataclass(frozen=True)
class Written:
    """A file of a stage that lies in the stage's partial folder already, written by a worker: its name in the store and
    its sha256."""

    name: str
    sha256: str


class Artifacts:
    """The artifacts in a store: those of one run, or the variants of a sweep.

    A run has one artifact per stage, in the stage's folder; `overwrite` lets other settings replace it. With `variants`
    results of different settings lie side by side, in a folder per plan, and `manifest(stage)` is the one last asked for
    by plan. `sources` are other stores whose finished stages are taken over where the plan is the same. `exclusive(keys)`
    is entered while stages are made, so that two processes do not make the same one. `cached` keeps what is read from an
    object store in the local cache (`data.cache`).
    """

    def __init__(
        self,
        store: Store,
        overwrite: bool = False,
        *,
        variants: bool = False,
        sources: Sequence[Store] = (),
        exclusive: Callable[[Sequence[str]], AbstractContextManager] = lambda keys: nullcontext(),
        cached: bool = False,
    ):
        self.store, self.overwrite, self.variants, self._cached = store, overwrite, variants, cached
        self._sources, self._exclusive = tuple(sources), exclusive
        self.used: dict[str, Manifest] = {}

    def folder(self, identity: Mapping[str, Any]) -> str:
        """Return the folder of the artifact with this identity."""
        return variant_folder(identity) if self.variants else identity["stage"]

    def manifest(self, stage: str) -> Manifest | None:
        """Return the manifest of a finished stage, or None.  Raises ArtifactError when it cannot be read."""
        return self.used.get(stage) if self.variants else read_manifest(self.store, stage, stage)

    def require(self, stage: str, verb: str) -> Manifest:
        """Return the manifest of a finished stage.  Raises ArtifactError that names the verb which makes it."""
        found = self.manifest(stage)
        if found is None:
            raise ArtifactError(f"{self.store.display(stage)} is not finished; make it with `cvdd {verb}`")
        return found

    def finished(self, plan: StagePlan) -> Manifest | None:
        """Return the manifest if the planned work is already done, here or in a source.  Raises ArtifactError when the
        folder holds the result of other settings and `overwrite` is off."""
        identity = plan.identity()
        found = read_manifest(self.store, self.folder(identity), plan.stage)
        difference = first_difference(found.identity, identity) if found else None
        if difference and not self.overwrite:
            where, there, wanted = difference
            raise ArtifactError(
                f"{self.store.display(plan.stage)} was made with {where} = {there}, now asked for {wanted}; "
                f"choose another --out, or pass --overwrite to replace it"
            )
        if found is None or difference:
            found = self._adopt(identity)
        if found is not None:
            self.used[plan.stage] = found
        return found

    @contextmanager
    def making(self, *plans: StagePlan) -> Iterator[None]:
        """Be the only one who makes these stages; entering waits while another process makes one of them."""
        with self._exclusive(sorted(self.folder(plan.identity()) for plan in plans)):
            yield

    def commit(
        self, plan: StagePlan, files: Mapping[str, bytes | Written], *, wall_s: float, facts: Mapping
    ) -> Manifest:
        """Write the files, or take those over that workers have written, then the manifest, then drop the partial results;
        return the manifest."""
        folder = self.folder(plan.identity())
        replaced = read_manifest(self.store, folder, plan.stage)
        self.store.delete(f"{folder}/{MANIFEST}")
        digests = {}
        for name, content in files.items():
            if isinstance(content, Written):
                self.store.take(self.store, content.name, f"{folder}/{name}")
                digests[name] = content.sha256
            else:
                self.store.write(f"{folder}/{name}", content)
                digests[name] = sha256(content)
        manifest = Manifest(
            identity=plan.identity(),
            files=digests,
            facts=dict(facts),
            wall_s=round(wall_s, 3),
            versions=software_versions(),
        )
        self.store.write(f"{folder}/{MANIFEST}", json.dumps(asdict(manifest), indent=1).encode())
        for name in set(replaced.files if replaced else ()) - set(digests):
            self.store.delete(f"{folder}/{name}")
        self.store.delete_folder(f"{folder}/partial")
        self.used[plan.stage] = manifest
        return manifest

    def partial(self, plan: StagePlan) -> str:
        """Return the folder for results of an unfinished stage; it is named by the plan, so other settings never mix."""
        return f"{self.folder(plan.identity())}/partial/{plan.fingerprint()[:16]}"

    def read(self, manifest: Manifest, name: str) -> bytes:
        """Return a file of a finished stage, verified.  Raises ArtifactError when it is missing or altered."""
        path = self._place(manifest, name)
        if self._cached and not self.store.is_local:
            with mapped(self.store, path, manifest.files[name]) as file:
                return file.read()
        content = self.store.read(path)
        self._require_digest(manifest, name, sha256(content))
        return content

    def verify(self, manifest: Manifest, name: str) -> str:
        """Return the store's name of a file that is to be opened in place, after reading it once through; a file of the
        local disk that this process has read before and that has not changed is not read again.

        Raises ArtifactError when it is missing or altered.
        """
        path = self._place(manifest, name)
        known = self._known_as(path)
        if known is None or _digests.get(known) != manifest.files[name]:
            digest = stored_sha256(self.store, path)
            self._require_digest(manifest, name, digest)
            if known is not None:
                _digests[known] = digest
        return path

    def _known_as(self, path: str) -> tuple | None:
        """Return what tells this version of a local file from all others; None for others and for what is not there."""
        if not self.store.is_local:
            return None
        try:
            about = os.stat(self.store.path(path))
        except OSError:
            return None
        return self.store.path(path), about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns

    def _place(self, manifest: Manifest, name: str) -> str:
        """Return the store's name of a file of a stage.  Raises ArtifactError for one that its manifest does not name, and for
        a link that leads out of the store."""
        folder = self.folder(manifest.identity)
        path = f"{folder}/{name}"
        if name not in manifest.files:
            raise ArtifactError(
                f"{self.store.display(f'{folder}/{MANIFEST}')} does not name {name}; remove its folder to make it anew"
            )
        if self.store.is_local and os.path.islink(self.store.path(path)):
            root, target = (os.path.realpath(place) for place in (self.store.root, self.store.path(path)))
            if os.path.commonpath([root, target]) != root:
                raise ArtifactError(
                    f"{self.store.display(path)} is a link that leads out of {self.store.root}; put the file itself there"
                )
        return path

    def _require_digest(self, manifest: Manifest, name: str, digest: str) -> None:
        if digest != manifest.files.get(name):
            folder = self.folder(manifest.identity)
            raise ArtifactError(
                f"{self.store.display(f'{folder}/{name}')} does not have the sha256 its manifest says; "
                f"it was altered or damaged: remove the folder {folder} and run the command again"
            )

    def _adopt(self, identity: Mapping[str, Any]) -> Manifest | None:
        """Take a finished stage of the same identity over from a source, files first; return its manifest, or None."""
        for source in self._sources:
            for there in (identity["stage"], variant_folder(identity)):
                found = read_manifest(source, there, identity["stage"])
                if found is None or first_difference(found.identity, identity):
                    continue
                here = self.folder(identity)
                if not self.variants:  # what other settings left there
                    self.store.delete(f"{here}/{MANIFEST}")
                for name in (*found.files, MANIFEST):
                    self.store.take(source, f"{there}/{name}", f"{here}/{name}")
                return found
        return None


def source_stores(roots: Sequence[str]) -> list[Store]:
    """Return the stores of runs or sweeps whose stages are to be taken over.  Raises ArtifactError for one without any."""
    stores = [Store(root) for root in roots]
    for store in stores:
        if not any(store.names(folder) for folder in ("pretrain", "initialize", "stages")):  # one without experts, too
            raise ArtifactError(
                f"--reuse: {store.display('').rstrip('/')} has no finished stage to take over; give the directory of a run or "
                f"a sweep"
            )
    return stores


def variant_folder(identity: Mapping[str, Any]) -> str:
    """Return where a sweep keeps the variant of a stage with this identity."""
    return f"stages/{identity['stage']}/{_fingerprint(identity)[:16]}"


def _fingerprint(identity: Mapping[str, Any]) -> str:
    return sha256(json.dumps(identity, sort_keys=True).encode())


def read_manifest(store: Store, folder: str, stage: str) -> Manifest | None:
    """Return the manifest of `stage` in a folder, None if there is none.  Raises ArtifactError when it cannot be read."""
    name = f"{folder}/{MANIFEST}"
    if not store.exists(name):
        return None
    try:
        found = Manifest(**json.loads(store.read(name)))
        if found.identity["schema"] == SCHEMA_VERSION and found.stage == stage and _is_sound(found):
            return found
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        pass
    raise ArtifactError(
        f"{store.display(name)} is damaged or of another schema (this version reads {SCHEMA_VERSION}); "
        f"remove its folder to make it anew"
    )


def _is_sound(manifest: Manifest) -> bool:
    """Return whether a manifest holds what its readers take for granted; above all that its files lie beside it."""
    identity = manifest.identity
    kinds = (("settings", dict), ("inputs", dict), ("classes", list), ("seed", int))
    return (
        all(isinstance(identity[name], kind) for name, kind in kinds)
        and all(isinstance(each, dict) for each in (manifest.files, manifest.facts, manifest.versions))
        and isinstance(manifest.wall_s, (int, float))
        and all(isinstance(name, str) for name in identity["classes"])
        and all(_is_plain(name) and re.fullmatch("[0-9a-f]{64}", digest) for name, digest in manifest.files.items())
    )


def _is_plain(name: str) -> bool:
    return "\\" not in name and "\0" not in name and not {"", ".", ".."} & set(name.split("/"))


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
