"""Files of the local disk, whole or not there; a disk that is full, busy or away for a while is waited for (retries.py)."""

import errno
import io
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, TypeVar

from cvdd_ray.data.retries import Fault, Patience, retried
from cvdd_ray.errors import ArtifactError

Result = TypeVar("Result")

_PASSING = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the quota is used up",
    errno.EIO: "the disk answers with an input/output error",
    errno.EBUSY: "the disk is busy",
    errno.EAGAIN: "the disk is busy",
    errno.ENOLCK: "the file server gives no locks",
    errno.ESTALE: "the file server has lost its place",
    errno.ETIMEDOUT: "the file server does not answer",
    errno.EHOSTDOWN: "the file server does not answer",
    errno.EHOSTUNREACH: "the file server is out of reach",
    errno.EREMOTEIO: "the disk answers with an input/output error",
}
_FOR_GOOD = {
    errno.EACCES: ("permission is denied", "give a directory that may be written"),
    errno.EPERM: ("it is not permitted", "give a directory that may be written"),
    errno.EROFS: ("its file system is read-only", "give a directory that may be written"),
    errno.ENOTDIR: ("a file lies where a directory should be", "give another directory"),
    errno.EISDIR: ("a directory lies in its place", "remove it or give another directory"),
    errno.EFBIG: ("it is larger than a file may be", "raise the limit (ulimit -f) or give another disk"),
    errno.ENAMETOOLONG: ("its name is too long", "give a directory with a shorter path"),
}


def diagnose(error: Exception) -> Fault | None:
    """Return what an error of the local disk means, None for other errors."""
    number = getattr(error, "errno", None)
    if number in _PASSING:
        return Fault(_PASSING[number])
    return Fault(*_FOR_GOOD[number]) if number in _FOR_GOOD else None


DISK = Patience("CVDD_RAY_DISK_RETRY_S", 60.0, diagnose, "make room or mend the disk")


def patiently(operation: Callable[[], Result], doing: str, path: str) -> Result:
    """Return operation(), which may be repeated, as soon as the disk lets it.  Raises ArtifactError as `retried`."""
    return retried(operation, doing, path, patience=DISK)


def read_file(path: str) -> bytes:
    """Return a whole file.  Raises FileNotFoundError, or ArtifactError when the disk does not give it."""

    def read() -> bytes:
        with open(path, "rb") as stream:
            return stream.read()

    return patiently(read, "read", path)


def write_file(path: str, content: bytes) -> None:
    """Write a whole file or nothing: temporary name, fsync, rename.  Raises ArtifactError when the disk does not take it."""

    def write() -> None:
        with replacing(path) as temporary, open(temporary, "wb", buffering=0) as stream:
            _write(stream, content)
            os.fsync(stream.fileno())

    patiently(write, "written", path)


@contextmanager
def file_writer(path: str) -> Iterator[BinaryIO]:
    """Give a stream whose content becomes the file when the block ends, and nothing if it ends with an error.

    Every write waits for the disk by itself. A file that cannot be brought safely to the disk at the end is an error at
    once, for what a failed fsync has lost only a new file can bring back.  Raises ArtifactError when the disk does not take it.
    """
    try:
        with replacing(path) as temporary, open(temporary, "wb", buffering=0) as stream:
            yield PatientStream(stream, path)
            os.fsync(stream.fileno())
    except OSError as error:
        fault = diagnose(error)
        if fault is None:
            raise
        remedy = fault.advice or f"{DISK.remedy}, then run the same command again, it continues"
        raise ArtifactError(f"{path} cannot be written: {fault.reason}; {remedy}") from None


class PatientStream(io.RawIOBase):
    """A file that is written to, and waits where the disk does not take a part of it."""

    def __init__(self, stream: BinaryIO, path: str):
        self._stream, self._path = stream, path

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:
        left = memoryview(data).cast("B")
        while left:
            left = left[patiently(lambda left=left: self._stream.write(left), "written", self._path) :]
        return memoryview(data).nbytes


def _write(stream: BinaryIO, content: bytes) -> None:
    left = memoryview(content)
    while left:
        left = left[stream.write(left) :]


@contextmanager
def replacing(path: str) -> Iterator[str]:
    """Give a temporary name in the folder of `path`; what is there at the end takes its place, after an error nothing does."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)
