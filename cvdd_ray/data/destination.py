"""A folder that is published whole: made beside its place and renamed, or uploaded with its README last."""

import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError

MARKER, CARD = "export.json", "README.md"


@contextmanager
def published_folder(dest: str, overwrite: bool) -> Iterator[Path]:
    """Give an empty local folder; when the block ends without an error its content becomes `dest`, a directory or s3://
    URI. A directory is complete or not there; an object store gets README.md last.

    Raises ArtifactError when `dest` cannot be written or is not empty; `overwrite` lets an earlier export be replaced,
    never anything else.
    """
    store = Store(dest)
    there = _names_there(store)
    if there and not overwrite:
        raise ArtifactError(
            f"{_where(store)} is not empty; give another --dest, or pass --overwrite to replace an earlier export"
        )
    if there and MARKER not in there:
        raise ArtifactError(
            f"{_where(store)} holds something that is no export ({MARKER} is missing) and is not replaced; "
            f"give another --dest"
        )
    if not store.is_local:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
            _upload(Path(folder), store, there)
        return
    path = Path(store.root).resolve()
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with _one_line(store):
        temporary.mkdir(parents=True)
    try:
        yield temporary
        with _one_line(store):
            _put_in_place(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename the new folder to its place; an old one is gone only when that has worked."""
    old = path.with_name(f"{temporary.name}.old")
    if path.exists():
        os.rename(path, old)
    try:
        os.rename(temporary, path)
    except OSError:
        if old.exists():
            os.rename(old, path)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _upload(folder: Path, store: Store, there: set[str]) -> None:
    """Copy all files: the marker first, so that a broken upload can be replaced, README.md last."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    with _one_line(store):
        store.delete(CARD)
        for name in sorted(names, key=lambda name: (name == CARD, name != MARKER, name)):
            store.upload(name, folder / name)
            if name == MARKER:
                for stale in there - set(names):
                    store.delete(stale)


def _names_there(store: Store) -> set[str]:
    """Return the names of what is at the root of a store.  Raises ArtifactError when that is no directory."""
    with _one_line(store):
        if store.root_is_file():
            raise ArtifactError(f"{_where(store)} is a file; give another --dest")
        if not store.is_local:
            return set(store.all_names())
        return {path.name for path in Path(store.root).iterdir()} if Path(store.root).is_dir() else set()


@contextmanager
def _one_line(store: Store) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error) or type(error).__name__).splitlines()[0]
        raise ArtifactError(f"{_where(store)} cannot be written ({reason}); give another --dest") from None


def _where(store: Store) -> str:
    return store.display("").rstrip("/")
