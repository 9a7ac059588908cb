"""A disk that fails for a while is waited for; what is written is whole or not there."""

import errno
import os

import pytest

from cvdd_ray.data import disk, retries
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError


class Failing:
    """os.fsync and os.replace that fail `times` times with an error number."""

    def __init__(self, monkeypatch, function: str, number: int, times: int):
        self.left, self.number, self.real = times, number, getattr(os, function)
        monkeypatch.setattr(disk.os, function, self)
        monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)

    def __call__(self, *arguments):
        if self.left:
            self.left -= 1
            raise OSError(self.number, os.strerror(self.number))
        return self.real(*arguments)


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.ESTALE])
def test_a_write_is_tried_again(function, number, tmp_path, monkeypatch):
    fault = Failing(monkeypatch, function, number, 3)
    store = Store(str(tmp_path))
    store.write("a/b", b"content")
    assert fault.left == 0
    assert store.read("a/b") == b"content"
    assert os.listdir(tmp_path / "a") == ["b"]


def test_a_disk_that_stays_full_is_one_line_and_changes_nothing(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.write("a", b"before")
    Failing(monkeypatch, "fsync", errno.ENOSPC, 10**9)
    monkeypatch.setenv("CVDD_RAY_DISK_RETRY_S", "0.05")
    with pytest.raises(
        ArtifactError,
        match=r"/a cannot be written: the disk is full; tried \d+ times in \d+ s \(limit CVDD_RAY_DISK_RETRY_S=0.05\): "
        r"make room or mend the disk, then run the same command again, it continues$",
    ):
        store.write("a", b"after")
    with pytest.raises(ArtifactError, match="the disk is full"), store.writer("a") as stream:
        stream.write(b"after")
    assert store.read("a") == b"before"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(("number", "reason"), [(errno.EACCES, "permission is denied"), (errno.EROFS, "is read-only")])
def test_what_time_does_not_mend_ends_at_once(number, reason, tmp_path, monkeypatch):
    fault = Failing(monkeypatch, "fsync", number, 10)
    with pytest.raises(ArtifactError, match=reason):
        Store(str(tmp_path)).write("a", b"x")
    assert fault.left == 9


def test_errors_that_are_not_the_disks_pass(tmp_path, monkeypatch):
    Failing(monkeypatch, "fsync", errno.EBADF, 1)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Store(str(tmp_path)).write("a", b"x")
    monkeypatch.setenv("CVDD_RAY_DISK_RETRY_S", "soon")
    with pytest.raises(ConfigError, match=r"CVDD_RAY_DISK_RETRY_S=soon: give seconds"):
        Store(str(tmp_path)).write("a", b"x")


def test_a_stream_goes_on_where_the_disk_stopped_it(tmp_path, monkeypatch):
    """The disk takes at most 5 bytes at once, and every other time none."""
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    taken = bytearray()

    class Slow:
        calls = 0

        def write(self, data):
            self.calls += 1
            if self.calls % 2:
                raise OSError(errno.ENOSPC, "full")
            taken.extend(data[:5])
            return min(5, len(data))

    slow = Slow()
    stream = disk.PatientStream(slow, "there")
    assert stream.write(b"twelve bytes") == 12
    assert stream.write(memoryview(b"and more")) == 8
    assert bytes(taken) == b"twelve bytesand more"
    assert slow.calls == 2 * (3 + 2)


def test_reading_waits_too(tmp_path, monkeypatch):
    store = Store(str(tmp_path))
    store.write("a", b"x")
    fault, real = [2], open

    def failing(*arguments, **options):
        if fault[0]:
            fault[0] -= 1
            raise OSError(errno.ESTALE, "stale")
        return real(*arguments, **options)

    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(disk, "open", failing, raising=False)
    assert store.read("a") == b"x"
    with pytest.raises(ArtifactError, match="is not there"):
        store.read("b")
