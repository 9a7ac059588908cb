"""The local cache: fetched once and verified, whole or not there, shared by processes, kept within its limit."""

import hashlib
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from cvdd_ray.data import cache
from cvdd_ray.data.cache import cache_root, kept, local_copy, local_file, mapped
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError, DataError

CONTENT = os.urandom(100_000)
SHA = hashlib.sha256(CONTENT).hexdigest()


@pytest.fixture
def store(s3):
    s3.put("run/a/labels.arrow", CONTENT)
    return Store(s3.uri("run"))


def files():
    return sorted(path for path in cache_root().rglob("*") if path.is_file() and path.parent.name != "locks")


def test_a_file_is_fetched_once_and_mapped_afterwards(s3, store):
    cut = s3.fail("cut", "GET /.*labels", times=2)
    path = Path(local_file(store, "a/labels.arrow", SHA))
    assert cut.used == 2
    assert path.read_bytes() == CONTENT
    assert path.name == f"{SHA}.arrow"
    s3.requests.clear()
    s3.down()
    with mapped(store, "a/labels.arrow", SHA) as file:
        assert file.read() == CONTENT
    s3.up()
    assert s3.requests == []
    assert files() == [path]


def test_what_is_not_what_was_promised_is_not_kept(s3, store):
    for name, sha, message in (
        ("a/labels.arrow", "0" * 64, "does not have the sha256 its manifest says"), ("a/none", SHA, "a/none is not there"),
    ):  # fmt: skip
        with pytest.raises(ArtifactError, match=message):
            local_file(store, name, sha)
    assert files() == []


def test_a_local_store_needs_no_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CVDD_RAY_CACHE", str(tmp_path / "cache"))
    store = Store(str(tmp_path / "run"))
    store.write("a", b"x")
    assert local_file(store, "a", "whatever") == str(tmp_path / "run" / "a")
    assert mapped(store, "a", "whatever").read() == b"x"
    assert not (tmp_path / "cache").exists()


def test_several_threads_fetch_a_file_once(s3, store):
    slow = s3.fail("delay", "GET /.*labels", value=0.5)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(local_file(store, "a/labels.arrow", SHA))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert slow.used == 1
    assert len(s3.seen("GET /.*labels")) == 1
    assert len(found) == 4
    assert len(set(found)) == 1


def test_several_processes_make_a_file_once(tmp_path, monkeypatch):
    monkeypatch.setenv("CVDD_RAY_CACHE", str(tmp_path / "cache"))

    def make(stream):
        with open(tmp_path / "log", "a") as log:
            log.write("made\n")
        time.sleep(0.3)
        stream.write(CONTENT)

    def work():
        os._exit(0 if kept("x", make).read_bytes() == CONTENT else 1)

    processes = [multiprocessing.get_context("fork").Process(target=work) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "made\n"


def test_what_was_used_longest_ago_goes_first(tmp_path, monkeypatch):
    monkeypatch.setenv("CVDD_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CVDD_RAY_CACHE_GB", "2.5e-6")  # 2,500 bytes
    for number, name in enumerate(("old", "older", "used")):
        kept(f"x/{name}", lambda stream: stream.write(bytes(800)))
        os.utime(tmp_path / "cache" / "x" / name, (number, number))
    kept("x/old", lambda stream: pytest.fail("made again"))  # is used now
    (tmp_path / "cache" / "x" / "half.1234.tmp").write_bytes(bytes(10_000))
    os.utime(tmp_path / "cache" / "x" / "half.1234.tmp", (time.time() - 25 * 3600,) * 2)
    kept("y/new", lambda stream: stream.write(bytes(800)))
    assert [path.name for path in files()] == ["old", "used", "new"]
    kept("y/large", lambda stream: stream.write(bytes(5000)))  # what has just come stays, until something else comes
    assert [path.name for path in files()] == ["large"]
    kept("y/small", lambda stream: stream.write(bytes(8)))
    assert [path.name for path in files()] == ["small"]


def test_a_file_in_use_may_be_evicted(s3, store, monkeypatch):
    file = mapped(store, "a/labels.arrow", SHA)
    monkeypatch.setenv("CVDD_RAY_CACHE_GB", "0")
    kept("other", lambda stream: stream.write(b"x"))
    assert [path.name for path in files()] == ["other"]
    assert file.read() == CONTENT
    real, gone = cache.local_file, []

    def evicted_once(*args):  # by another process, before it could be opened
        path = real(*args)
        if not gone:
            gone.append(os.unlink(path))
        return path

    monkeypatch.setattr(cache, "local_file", evicted_once)
    assert mapped(store, "a/labels.arrow", SHA).read() == CONTENT
    assert len(gone) == 1


def test_a_failure_while_writing_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CVDD_RAY_CACHE", str(tmp_path / "cache"))

    def fail(stream):
        stream.write(b"half")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        kept("x", fail)
    assert files() == []


def test_a_cache_that_cannot_be_written_says_so(s3, store, tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CVDD_RAY_CACHE", str(tmp_path / "file"))
    with pytest.raises(ArtifactError, match=r"the local cache .*file cannot be written .*CVDD_RAY_CACHE"):
        local_file(store, "a/labels.arrow", SHA)
    monkeypatch.setenv("CVDD_RAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("CVDD_RAY_CACHE_GB", "much")
    with pytest.raises(ConfigError, match="CVDD_RAY_CACHE_GB=much"):
        local_file(store, "a/labels.arrow", SHA)


def test_where_it_is(monkeypatch, tmp_path):
    monkeypatch.delenv("CVDD_RAY_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "cvdd_ray"
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert cache_root() == Path("/x/cvdd_ray")
    monkeypatch.setenv("CVDD_RAY_CACHE", "~/mine")
    assert cache_root() == tmp_path / "mine"


def test_copies_follow_their_original(s3):
    s3.put("w/net.safetensors", b"one")
    uri = s3.uri("w/net.safetensors").replace("s3://", "s3://me:hush@")
    first = Path(local_copy(uri))
    assert first.read_bytes() == b"one"
    assert local_copy(s3.uri("w/net.safetensors")) == str(first)  # a login is not what it is
    assert len(s3.seen("GET")) == 1
    s3.put("w/net.safetensors", b"other")
    assert Path(local_copy(uri)).read_bytes() == b"other"
    with pytest.raises(DataError, match=r"^s3://bucket-[0-9a-f]*/w/none is not there"):
        local_copy(s3.uri("w/none"))
    with pytest.raises(DataError, match=r"s3://bucket/x cannot be opened \(unknown option a"):
        local_copy("s3://me:hush@bucket/x?a=b")
