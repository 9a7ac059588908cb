"""Where a run lives: a local directory or an object store, behind one small interface of whole, atomic files."""

import hashlib
import io
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from pyarrow import fs

from cvdd_ray.data.disk import file_writer, read_file, replacing, write_file
from cvdd_ray.data.remote import Remote, is_uri, without_secrets
from cvdd_ray.data.s3 import PART_BYTES, S3
from cvdd_ray.errors import ArtifactError


class Store:
    """Files under one root. A name is a relative path with forward slashes; names cannot leave the root.

    `root` is a directory or a URI (`s3://bucket/prefix?endpoint_override=...`). Stores pickle by root alone, so that actors
    open their own. An object store or a disk that fails for a while is waited for (`retries.retried`): all methods raise
    ArtifactError in the end.  Raises ArtifactError for a root that cannot be opened.
    """

    def __init__(self, root: str):
        self.root = str(root)
        if not self.root:
            raise ArtifactError("an empty name is no place for results; give a directory or an s3://bucket/prefix URI")
        self.is_local = not is_uri(self.root)
        if self.is_local:
            self.root = str(Path(self.root).expanduser().absolute())  # other processes have other working directories
            self._fs, self._base = fs.LocalFileSystem(), self.root
            return
        try:
            self._remote = Remote(self.root)
            self._fs, self._base = self._remote.filesystem, self._remote.base
            if not self._base:
                raise ValueError("no bucket")
        except (ValueError, OSError) as error:  # pyarrow's own message repeats the URI, credentials and all
            reason = str(error) if self.root.startswith("s3://") else type(error).__name__
            raise ArtifactError(
                f"storage.out: cannot open {without_secrets(self.root)!r} ({reason}); give a directory or an "
                f"s3://bucket/prefix URI"
            ) from None
        self.is_local = isinstance(self._fs, fs.LocalFileSystem)

    def __reduce__(self):
        return Store, (self.root,)

    def path(self, name: str) -> str:
        """Return the full path of a name (on the local disk: an ordinary path)."""
        parts = name.split("/")
        if name.startswith("/") or any(part in ("", ".", "..") for part in parts):
            raise ArtifactError(f"artifact name {name!r} would leave its directory; use plain relative names")
        return "/".join([self._base.rstrip("/"), *parts])

    def exists(self, name: str) -> bool:
        path = self.path(name)
        info = self._fs.get_file_info(path) if self.is_local else self._remote.info(path)
        return info.type == fs.FileType.File

    def read(self, name: str) -> bytes:
        """Return the whole file.  Raises ArtifactError when it is not there."""
        try:
            return read_file(self.path(name)) if self.is_local else self._remote.read(self.path(name))
        except FileNotFoundError:
            raise self._absent(name) from None

    def open(self, name: str) -> pa.NativeFile:
        """Return a random-access file, memory-mapped where the disk is local.  Raises ArtifactError when it is absent."""
        try:
            return pa.memory_map(self.path(name)) if self.is_local else self._remote.open(self.path(name)).arrow()
        except FileNotFoundError:
            raise self._absent(name) from None

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file or nothing: temporary name, fsync, rename (an object store's put is atomic by itself)."""
        if self.is_local:
            write_file(self.path(name), content)
        else:
            self._remote.put(self.path(name), io.BytesIO(content), len(content))

    @contextmanager
    def writer(self, name: str) -> Iterator["HashingStream"]:
        """Give a stream whose content becomes the file when the block ends, and nothing if it ends with an error.

        For files that should not be held in memory. What goes to an object store waits on the local disk, so that the
        upload can be tried again.
        """
        path = self.path(name)
        if self.is_local:
            with file_writer(path) as stream:
                yield HashingStream(stream)
            return
        with tempfile.SpooledTemporaryFile(max_size=PART_BYTES) as stream:
            yield HashingStream(stream)
            self._remote.put(path, stream, stream.tell())

    def upload(self, name: str, path: str | Path) -> None:
        """Write a whole file from one of the local disk."""
        with open(path, "rb") as source:
            if not self.is_local:
                self._remote.put(self.path(name), source, os.fstat(source.fileno()).st_size)
                return
            with self.writer(name) as copy:
                shutil.copyfileobj(source, copy, PART_BYTES)

    def take(self, source: "Store", there: str, here: str) -> None:
        """Take a file over from another store, or under another name: a hard link on one disk, a copy inside one object
        store, else through this process in parts; whole or not at all.

        Raises ArtifactError when it is not there.
        """
        if not source.exists(there):
            raise source._absent(there)
        if self.is_local and source.is_local:
            try:
                with replacing(self.path(here)) as temporary:
                    os.link(source.path(there), temporary)
                return
            except OSError:  # another disk, or one without links
                pass
        elif not self.is_local and not source.is_local and self._remote.shares(source._remote):
            self._remote.copy(source.path(there), self.path(here))
            return
        with source.open(there) as stream, self.writer(here) as copy:
            while part := stream.read(PART_BYTES):
                copy.write(part)

    def require_writable(self) -> None:
        """Raise ArtifactError when the root is no directory that can be written; what it takes to find out is removed again.

        An object store is not asked.
        """
        if not self.is_local:
            return
        made: list[Path] = []
        try:
            root = Path(self._base)
            missing = [folder for folder in (root, *root.parents) if not os.path.lexists(folder)]
            for folder in reversed(missing):
                folder.mkdir()
                made.append(folder)
            with tempfile.TemporaryFile(dir=root):
                pass
        except OSError as error:
            raise ArtifactError(
                f"{self.root} cannot be written ({error.strerror or error}); give another directory"
            ) from None
        finally:
            for folder in reversed(made):
                with suppress(OSError):
                    folder.rmdir()

    def root_is_file(self) -> bool:
        """Return whether a file lies where the root should be."""
        info = self._fs.get_file_info(self._base) if self.is_local else self._remote.info(self._base)
        return info.type == fs.FileType.File

    @property
    def s3(self) -> S3 | None:
        """The bucket and prefix, where this store is on S3."""
        return None if self.is_local else self._remote.s3

    @property
    def filesystem(self) -> tuple[fs.FileSystem, str]:
        """The pyarrow file system this store is on, and the path of its root there."""
        return self._fs, self._base

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of all files below a folder; an absent folder has none."""
        return self._names(self.path(folder))

    def all_names(self) -> list[str]:
        """Return the sorted names of all files in the store."""
        return self._names(self._base)

    def _names(self, path: str) -> list[str]:
        if self.is_local:
            found = self._fs.get_file_info(fs.FileSelector(path, recursive=True, allow_not_found=True))
            infos = [info for info in found if info.type == fs.FileType.File]
        else:
            infos = self._remote.files(path)
        prefix = len(self._base.rstrip("/")) + 1
        return sorted(info.path[prefix:] for info in infos if not info.path.endswith(".tmp"))

    def delete_folder(self, folder: str) -> None:
        """Remove a folder and what is in it, if it is there."""
        if not self.is_local:
            self._remote.delete_folder(self.path(folder))
        elif self._fs.get_file_info(self.path(folder)).type == fs.FileType.Directory:
            self._fs.delete_dir(self.path(folder))

    def delete(self, name: str) -> None:
        """Remove one file, if it is there."""
        if not self.is_local:
            self._remote.delete(self.path(name))
        elif self.exists(name):
            self._fs.delete_file(self.path(name))

    def _absent(self, name: str) -> ArtifactError:
        return ArtifactError(f"{self.display(name)} is not there; run the stage that makes it")

    def where(self, name: str) -> str:
        """Return the path of a file for a person: an ordinary one on the local disk, else as `display`."""
        return self.path(name) if self.is_local else self.display(name)

    def display(self, name: str) -> str:
        """Return root and name for a message, without credentials."""
        return f"{without_secrets(self.root).rstrip('/')}/{name}"


class HashingStream(io.RawIOBase):
    """A stream that is only written to, and knows the sha256 of what has passed through it."""

    def __init__(self, stream: BinaryIO | pa.NativeFile):
        self._stream, self._digest = stream, hashlib.sha256()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        self._digest.update(data)
        self._stream.write(data)
        return len(data)

    def sha256(self) -> str:
        return self._digest.hexdigest()
