"""An object store as files: reading, listing and writing by path, every operation tried again while the store is away."""

import io
import re
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import BinaryIO, TypeVar
from urllib.parse import quote

import pyarrow as pa
from pyarrow import fs

from cvdd_ray.data.retries import retried
from cvdd_ray.data.s3 import PART_BYTES, S3, parse_s3
from cvdd_ray.recipes import without_login

PARTS_AT_ONCE = 4  # range requests of one large read
Result = TypeVar("Result")


def is_uri(address: str) -> bool:
    """Return whether an address is a URI rather than a local path."""
    return re.match(r"^[A-Za-z][A-Za-z0-9+]*://", address) is not None


def without_secrets(uri: str) -> str:
    """Return a URI for a message: no login, no options."""
    return without_login(uri).split("?")[0]


def below(uri: str, name: str) -> str:
    """Return the URI of a file below another URI."""
    head, mark, options = uri.partition("?")
    return f"{head.rstrip('/')}/{quote(name)}{mark}{options}"


class Remote:
    """What lies at a URI and below. Paths are `bucket/key`, as pyarrow wants them; `base` is the URI's own.

    Pickles by URI, so that every process opens clients of its own. Operations raise FileNotFoundError for what is not there,
    and ArtifactError as `retries.retried` does.  Raises ValueError or OSError for a URI that cannot be opened.
    """

    def __init__(self, uri: str):
        self.uri = uri
        self.s3: S3 | None = None
        if uri.startswith("s3://"):
            self.s3 = parse_s3(uri)
            self.filesystem, self.base = self.s3.filesystem, self.s3.base
        else:
            self.filesystem, self.base = fs.FileSystem.from_uri(uri)
        self._scheme = uri.partition("://")[0]

    def __reduce__(self):
        return Remote, (self.uri,)

    def __str__(self) -> str:
        return self.where(self.base)

    def where(self, path: str) -> str:
        """Return a path for a message."""
        return f"{self._scheme}://{path}"

    def attempt(self, doing: str, path: str, operation: Callable[[], Result]) -> Result:
        """Return operation(), tried again as long as its fault may pass; it must be one that may be repeated."""
        return retried(operation, doing, self.where(path))

    def info(self, path: str) -> fs.FileInfo:
        """Return type, size and time of change of a path; what is not there has the type NotFound."""
        return self.attempt("read", path, lambda: self.filesystem.get_file_info(path))

    def files(self, path: str) -> list[fs.FileInfo]:
        """Return all files below a path, from one recursive listing; an absent one has none."""
        selector = fs.FileSelector(path, recursive=True)  # allow_not_found would also forgive an absent bucket
        try:
            found = self.attempt("listed", path, lambda: self.filesystem.get_file_info(selector))
        except FileNotFoundError:
            return []
        return [info for info in found if info.type == fs.FileType.File]

    def open(self, path: str) -> "RemoteFile":
        """Return a random-access file."""
        return RemoteFile(self, path)

    def read(self, path: str) -> bytes:
        """Return a whole file."""
        with self.open(path) as file:
            return file.read_at(0, file.size)

    def put(self, path: str, stream: BinaryIO, size: int) -> None:
        """Write `size` bytes of a seekable stream as one file that others see whole or not at all."""
        self.attempt("written", path, lambda: self._put(path, stream, size))

    def _put(self, path: str, stream: BinaryIO, size: int) -> None:
        if self.s3 is not None:
            self.s3.put(path, stream, size)
            return
        stream.seek(0)
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"  # closing completes a file, also after an error
        with self.filesystem.open_output_stream(temporary) as target:
            while part := stream.read(PART_BYTES):
                target.write(part)
        self.filesystem.move(temporary, path)

    def copy(self, there: str, here: str) -> None:
        """Copy a file inside this object store."""
        copy = self.s3.copy if self.s3 is not None else self.filesystem.copy_file
        self.attempt("copied", there, lambda: copy(there, here))

    def shares(self, other: "Remote") -> bool:
        """Return whether both are on one object store with one login."""
        if self.s3 is not None and other.s3 is not None:
            return self.s3.endpoint == other.s3.endpoint
        return self.filesystem.equals(other.filesystem)

    def delete(self, path: str) -> None:
        """Remove a file, if it is there."""
        with suppress(FileNotFoundError):
            self.attempt("deleted", path, lambda: self.filesystem.delete_file(path))

    def delete_folder(self, path: str) -> None:
        """Remove a folder and what is in it, if it is there."""
        with suppress(FileNotFoundError):
            self.attempt("deleted", path, lambda: self.filesystem.delete_dir(path))


def reading(address: str, operation: Callable[[pa.NativeFile], Result]) -> Result:
    """Return operation(file) for an open file: of the local disk, or of an object store, then all of it tried again while
    its fault may pass.  Raises FileNotFoundError when there is no such file."""
    if not is_uri(address):
        with pa.OSFile(address) as file:
            return operation(file)
    remote = Remote(address)

    def work() -> Result:
        with remote.filesystem.open_input_file(remote.base) as file:
            return operation(file)

    return remote.attempt("read", remote.base, work)


class RemoteFile(io.RawIOBase):
    """A file of an object store, read in ranges; every range is tried again by itself.

    A binary file for Python; `read_at` is for several threads at once.
    """

    def __init__(self, remote: Remote, path: str):
        self._remote, self._path, self._position = remote, path, 0
        self._file = remote.attempt("read", path, lambda: remote.filesystem.open_input_file(path))
        self.size = self._file.size()

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from an offset, fewer at the end of the file."""
        stop = min(offset + size, self.size)
        cuts = [(start, min(start + PART_BYTES, stop)) for start in range(offset, stop, PART_BYTES)]
        if len(cuts) < 2:
            return self._range(*cuts[0]) if cuts else b""
        with ThreadPoolExecutor(PARTS_AT_ONCE) as pool:
            return b"".join(pool.map(lambda cut: self._range(*cut), cuts))

    def _range(self, start: int, stop: int) -> bytes:
        return self._remote.attempt("read", self._path, lambda: self._file.read_at(stop - start, start))

    def arrow(self) -> pa.NativeFile:
        """Return this file as Arrow's readers want it."""
        return pa.PythonFile(self, mode="r")

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._position = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence] + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        data = self.read_at(self._position, self.size if size is None or size < 0 else size)
        self._position += len(data)
        return data

    def readinto(self, buffer) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
