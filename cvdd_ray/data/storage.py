"""Where a run lives: a local directory or an object store, behind one small interface of whole, atomic files."""

import hashlib
import io
import os
import re
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
from pyarrow import fs

from cvdd_ray.errors import ArtifactError

PART_BYTES = 16 << 20  # of a file that passes through this process


class Store:
    """Files under one root. A name is a relative path with forward slashes; names cannot leave the root.

    `root` is a directory or a URI that pyarrow knows (`s3://bucket/prefix?endpoint_override=...`). Stores pickle by
    root alone, so that actors open their own.  Raises ArtifactError for a root that cannot be opened.
    """

    def __init__(self, root: str):
        self.root = str(root)
        try:
            if re.match(r"^[A-Za-z][A-Za-z0-9+]*://", self.root):
                self._fs, self._base = fs.FileSystem.from_uri(self.root)
                if not self._base:
                    raise pa.ArrowInvalid("no bucket")
            else:
                self.root = str(
                    Path(self.root).expanduser().absolute()
                )  # other processes have other working directories
                self._fs, self._base = fs.LocalFileSystem(), self.root
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(  # pyarrow's own message repeats the URI, credentials and all
                f"storage.out: cannot open {_without_secrets(self.root)!r} ({type(error).__name__}); "
                f"give a directory or an s3://bucket/prefix URI"
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
        return self._fs.get_file_info(self.path(name)).type == fs.FileType.File

    def read(self, name: str) -> bytes:
        """Return the whole file.  Raises ArtifactError when it is not there."""
        try:
            with self._fs.open_input_stream(self.path(name)) as stream:
                return stream.read()
        except FileNotFoundError:
            raise self._absent(name) from None

    def open(self, name: str) -> pa.NativeFile:
        """Return a random-access file, memory-mapped where the disk is local.  Raises ArtifactError when it is absent."""
        try:
            return pa.memory_map(self.path(name)) if self.is_local else self._fs.open_input_file(self.path(name))
        except FileNotFoundError:
            raise self._absent(name) from None

    def write(self, name: str, content: bytes) -> None:
        """Write a whole file or nothing: temporary name, fsync, rename (an object store's put is atomic by itself)."""
        path = self.path(name)
        if not self.is_local:
            with self._fs.open_output_stream(path) as stream:
                stream.write(content)
            return
        with _replacing(path) as temporary, open(temporary, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())

    @contextmanager
    def writer(self, name: str) -> Iterator["HashingStream"]:
        """Give a stream whose content becomes the file when the block ends, and nothing if it ends with an error.

        For files that should not be held in memory: an object store gets them in parts.
        """
        path = self.path(name)
        if self.is_local:
            with _replacing(path) as temporary, open(temporary, "wb") as stream:
                yield HashingStream(stream)
                stream.flush()
                os.fsync(stream.fileno())
            return
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        stream = self._fs.open_output_stream(temporary)
        try:
            yield HashingStream(stream)
            stream.close()
            self._fs.move(temporary, path)
        except BaseException:  # closing completes an upload, so a broken one lies under its temporary name
            with suppress(OSError):
                stream.close()
                self._fs.delete_file(temporary)
            raise

    def take(self, source: "Store", there: str, here: str) -> None:
        """Take a file over from another store, or under another name: a hard link on one disk, a copy inside one object
        store, else through this process in parts; whole or not at all.

        Raises ArtifactError when it is not there.
        """
        if not source.exists(there):
            raise source._absent(there)
        if self.is_local and source.is_local:
            try:
                with _replacing(self.path(here)) as temporary:
                    os.link(source.path(there), temporary)
                return
            except OSError:  # another disk, or one without links
                pass
        elif not self.is_local and self._fs.equals(source._fs):
            self._fs.copy_file(source.path(there), self.path(here))
            return
        with source.open(there) as stream, self.writer(here) as copy:
            while part := stream.read(PART_BYTES):
                copy.write(part)

    @property
    def has_secrets(self) -> bool:
        """Whether the root itself carries credentials."""
        return _without_secrets(self.root) != self.root.split("?")[0]

    @property
    def filesystem(self) -> tuple[fs.FileSystem, str]:
        """The pyarrow file system this store is on, and the path of its root there."""
        return self._fs, self._base

    def names(self, folder: str) -> list[str]:
        """Return the sorted names of all files below a folder; an absent folder has none."""
        selector = fs.FileSelector(self.path(folder), recursive=True, allow_not_found=True)
        infos = [info for info in self._fs.get_file_info(selector) if info.type == fs.FileType.File]
        prefix = len(self._base.rstrip("/")) + 1
        return sorted(info.path[prefix:] for info in infos if not info.path.endswith(".tmp"))

    def delete_folder(self, folder: str) -> None:
        """Remove a folder and what is in it, if it is there."""
        if self._fs.get_file_info(self.path(folder)).type == fs.FileType.Directory or self.names(folder):
            self._fs.delete_dir(self.path(folder))

    def delete(self, name: str) -> None:
        """Remove one file, if it is there."""
        if self.exists(name):
            self._fs.delete_file(self.path(name))

    def _absent(self, name: str) -> ArtifactError:
        return ArtifactError(f"{self.display(name)} is not there; run the stage that makes it")

    def where(self, name: str) -> str:
        """Return the path of a file for a person: an ordinary one on the local disk, else as `display`."""
        return self.path(name) if self.is_local else self.display(name)

    def display(self, name: str) -> str:
        """Return root and name for a message, without credentials."""
        return f"{_without_secrets(self.root).rstrip('/')}/{name}"


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


@contextmanager
def _replacing(path: str) -> Iterator[str]:
    """Give a temporary name in the folder of `path`; what is there at the end takes its place, after an error nothing does."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _without_secrets(uri: str) -> str:
    return re.sub(r"//[^/@]*@", "//", uri).split("?")[0]
