"""Files of object stores kept on the local disk: whole, verified when they come, shared by all processes of a machine.

The cache is $CVDD_RAY_CACHE, else cvdd_ray in $XDG_CACHE_HOME or ~/.cache; it may hold $CVDD_RAY_CACHE_GB (default 100), and
what was used longest ago goes first. It can be removed at any time.
"""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO

import pyarrow as pa
from filelock import FileLock

from cvdd_ray.data.disk import replacing
from cvdd_ray.data.remote import PARTS_AT_ONCE, Remote, without_secrets
from cvdd_ray.data.s3 import PART_BYTES
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError, DataError
from cvdd_ray.recipes import without_login

DEFAULT_LIMIT_GB = 100.0
LOCKS = 64  # files that processes lock, whatever they wait for
STALE_S = 24 * 3600.0  # what a dead process left half-written


def cache_root() -> Path:
    """Return the directory of the cache."""
    if place := os.environ.get("CVDD_RAY_CACHE"):
        return Path(place).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "cvdd_ray"


def limit_bytes() -> float:
    """Return how much the cache may hold.  Raises ConfigError for anything but a number."""
    text = os.environ.get("CVDD_RAY_CACHE_GB", str(DEFAULT_LIMIT_GB))
    with suppress(ValueError):
        if float(text) >= 0:
            return float(text) * 1e9
    raise ConfigError(f"CVDD_RAY_CACHE_GB={text}: give gigabytes, 0 or more (default {DEFAULT_LIMIT_GB:g})")


def local_file(store: Store, name: str, sha256: str) -> str:
    """Return the path of a local copy of a file in a store: fetched and verified unless a file with this sha256 is there
    already. A local store's own path is returned as it is.

    The file may be evicted later on; `mapped` opens it at once.  Raises ArtifactError when it is absent or altered, or when
    the cache cannot be written.
    """
    if store.is_local:
        return store.path(name)

    def fetch(stream: BinaryIO) -> None:
        found = hashlib.sha256()
        with store.open(name) as file:
            while part := file.read(PARTS_AT_ONCE * PART_BYTES):
                found.update(part)
                stream.write(part)
        if found.hexdigest() != sha256:
            raise ArtifactError(
                f"{store.display(name)} does not have the sha256 its manifest says; it was altered or damaged: remove its "
                f"folder and run the command again"
            )

    with _one_line():
        return str(kept(f"files/{sha256[:2]}/{sha256}{PurePosixPath(name).suffix}", fetch))


def mapped(store: Store, name: str, sha256: str) -> pa.NativeFile:
    """Return a file of a store, memory-mapped: of an object store, its local copy.  Raises ArtifactError as `local_file`."""
    while not store.is_local:
        with suppress(FileNotFoundError):  # another process may evict it before it is open
            return pa.memory_map(local_file(store, name, sha256))
    return store.open(name)


def local_copy(uri: str) -> str:
    """Return the path of a local copy of what is at a URI, fetched again when its size or time has changed.

    Raises DataError when it is not there, ArtifactError when the cache cannot be written.
    """
    try:
        remote = Remote(uri)
        info = remote.info(remote.base)
        version = json.dumps([without_login(uri), info.size, info.mtime_ns])
        name = f"copies/{hashlib.sha256(version.encode()).hexdigest()}{PurePosixPath(remote.base).suffix}"
        with _one_line():
            return str(kept(name, lambda stream: stream.write(remote.read(remote.base))))
    except FileNotFoundError:
        raise DataError(f"{without_secrets(uri)} is not there; correct the URI") from None
    except ValueError as error:
        raise DataError(f"{without_secrets(uri)} cannot be opened ({error}); correct the URI") from None


def kept(name: str, make: Callable[[BinaryIO], object]) -> Path:
    """Return the path of a file of the cache, written by `make(stream)` if it is not there: by one process, whole or not at
    all, and made room for.  Raises OSError when the disk refuses."""
    root = cache_root()
    path = root / name
    if _use(path):
        return path
    with _locked(root, int(hashlib.sha256(name.encode()).hexdigest(), 16) % LOCKS):
        if not _use(path):
            with replacing(str(path)) as temporary, open(temporary, "wb") as stream:
                make(stream)
                stream.flush()
                os.fsync(stream.fileno())
            with _locked(root, LOCKS):
                _evict(root, path)
    return path


def _use(path: Path) -> bool:
    """Return whether a file is there, and note that it was used now."""
    try:
        os.utime(path)
        return True
    except FileNotFoundError:
        return False


@contextmanager
def _locked(root: Path, number: int) -> Iterator[None]:
    """Be the only one with this number inside, among all threads and processes; entering waits for others."""
    (root / "locks").mkdir(parents=True, exist_ok=True)
    with FileLock(root / "locks" / str(number)):
        yield


def _evict(root: Path, newest: Path) -> None:
    """Remove what was used longest ago until the rest is within the limit; the newest file stays."""
    files, total = [], 0
    for folder, _, names in os.walk(root):
        for file in (Path(folder, name) for name in names if folder != str(root / "locks")):
            with suppress(FileNotFoundError):
                about = file.stat()
                if file.suffix == ".tmp" and about.st_mtime < time.time() - STALE_S:
                    file.unlink()
                elif file.suffix != ".tmp":
                    files.append((about.st_mtime_ns, about.st_size, file))
                    total += about.st_size
    limit = limit_bytes()
    for _, size, file in sorted(files):
        if total <= limit:
            return
        if file != newest:
            file.unlink(missing_ok=True)
            total -= size


@contextmanager
def _one_line() -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ArtifactError(
            f"the local cache {cache_root()} cannot be written ({error.strerror or error}); make room, or set "
            f"CVDD_RAY_CACHE to another directory"
        ) from None
