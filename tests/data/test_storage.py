"""Files are whole or not there, and stay below their root; on the local disk and, with moto, on an object store."""

import os
import pickle

import boto3
import pyarrow as pa
import pytest

from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path / "run"))


@pytest.fixture
def s3_store():
    """A store in a bucket of a real S3 server on this machine."""
    moto = pytest.importorskip("moto.server")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    try:
        keys = {"aws_access_key_id": "me", "aws_secret_access_key": "hush", "region_name": "us-east-1"}
        boto3.client("s3", endpoint_url=f"http://{host}:{port}", **keys).create_bucket(Bucket="bucket")
        yield Store(f"s3://me:hush@bucket/some/run?endpoint_override={host}%3A{port}&scheme=http&region=us-east-1")
    finally:
        server.stop()


def all_files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def test_what_is_written_is_read(store):
    store.write("stage/a.bin", b"one")
    store.write("stage/a.bin", b"two")  # replaces
    store.write("top", b"")
    assert store.read("stage/a.bin") == b"two"
    assert store.read("top") == b""
    assert store.exists("stage/a.bin")
    assert not store.exists("stage")
    assert not store.exists("stage/b.bin")
    with store.open("stage/a.bin") as file:
        assert file.read() == b"two"
    with open(store.path("stage/a.bin"), "rb") as file:
        assert file.read() == b"two"


def test_names_lists_all_files_below_a_folder_and_ignores_temporary_ones(store, tmp_path):
    for name in ("s/b", "s/a/z", "s/a/y", "t/c"):
        store.write(name, b"x")
    (tmp_path / "run/s/a/y.1234abcd.tmp").write_bytes(b"half")
    assert store.names("s") == ["s/a/y", "s/a/z", "s/b"]
    assert store.names("nothing") == []
    assert [store.read(name) for name in store.names("s")] == [b"x"] * 3


@pytest.mark.parametrize("suffix", ["", "/", "/../run", "/./"])
def test_names_can_be_read_back_however_the_root_is_written(tmp_path, suffix):
    (tmp_path / "run").mkdir()
    store = Store(f"{tmp_path}/run{suffix}")
    store.write("s/a", b"x")
    assert store.names("s") == ["s/a"]
    assert (tmp_path / "run/s/a").read_bytes() == b"x"


def test_a_relative_root_does_not_follow_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = Store("run")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    store.write("a", b"x")
    assert all_files(tmp_path) == ["run/a"]


@pytest.mark.parametrize("broken", ["replace", "fsync"])
def test_a_failed_write_leaves_what_was_there(store, tmp_path, monkeypatch, broken):
    store.write("s/old", b"old")

    def fail(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, broken, fail)
    for name in ("s/old", "s/new", "s2/new"):
        with pytest.raises(OSError, match="no space"):
            store.write(name, b"new")
    monkeypatch.undo()
    assert all_files(tmp_path / "run") == ["s/old"]
    assert store.read("s/old") == b"old"


def test_a_file_is_never_seen_half_written(store, monkeypatch):
    """At the moment of the rename the temporary file is complete, and the name is still free."""
    seen, real = [], os.replace

    def look(source, target):
        with open(source, "rb") as file:
            seen.append((file.read(), os.path.exists(target), os.path.dirname(source) == os.path.dirname(target)))
        real(source, target)

    monkeypatch.setattr(os, "replace", look)
    store.write("s/a", b"content")
    assert seen == [(b"content", False, True)]
    assert store.names("s") == ["s/a"]


@pytest.mark.parametrize("name", ["../a", "s/../../a", "/etc/passwd", "s//a", "", ".", "s/./a", "s/", ".."])
def test_names_that_leave_the_root_are_refused(store, tmp_path, name):
    with pytest.raises(ArtifactError, match="plain relative"):
        store.write(name, b"x")
    with pytest.raises(ArtifactError, match="plain relative"):
        store.read(name)
    assert all_files(tmp_path) == []


def test_reading_what_is_not_there_says_what_to_do(store):
    with pytest.raises(ArtifactError, match=r"run/s/a is not there; run the stage"):
        store.read("s/a")


def test_deleting_is_for_what_is_there_and_nothing_else(store, tmp_path):
    for name in ("s/a", "s/p/b", "s2/c"):
        store.write(name, b"x")
    store.delete_folder("s/p")
    store.delete_folder("absent")
    store.delete("s2/c")
    store.delete("s2/c")
    assert all_files(tmp_path / "run") == ["s/a"]


def test_a_store_travels_by_its_root(store):
    store.write("s/a", b"x")
    there = pickle.loads(pickle.dumps(store))
    assert there.root == store.root
    assert there.read("s/a") == b"x"


@pytest.mark.parametrize("root", ["nowhere://bucket/x", "s3://bucket/x?nonsense=1"])
def test_a_root_that_cannot_be_opened_is_refused(root):
    with pytest.raises(ArtifactError, match=r"storage\.out"):
        Store(root)


def test_messages_do_not_show_credentials():
    with pytest.raises(ArtifactError) as error:
        Store("nowhere://me:hush@bucket/x?secret=hush")
    assert "hush" not in str(error.value)
    assert "bucket/x" in str(error.value)


def test_object_store(s3_store):
    store = pickle.loads(pickle.dumps(s3_store))
    assert not store.is_local
    assert store.names("s") == []
    store.write("s/a", b"one")
    store.write("s/p/b", b"two")
    store.write("s/a", b"three")
    assert store.names("s") == ["s/a", "s/p/b"]
    assert store.read("s/a") == b"three"
    assert store.exists("s/a")
    assert not store.exists("s/c")
    with store.open("s/p/b") as file:
        assert file.read() == b"two"
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, pa.schema([("x", pa.int32())])) as writer:
        writer.write_batch(pa.record_batch([pa.array([1, 2], pa.int32())], names=["x"]))
    store.write("s/t.arrow", sink.getvalue().to_pybytes())
    assert pa.ipc.open_file(store.open("s/t.arrow")).read_all().to_pydict() == {"x": [1, 2]}
    store.delete_folder("s/p")
    store.delete("s/a")
    store.delete("s/a")
    assert store.names("s") == ["s/t.arrow"]
    with pytest.raises(ArtifactError, match=r"^s3://bucket/some/run/s/a is not there"):
        store.read("s/a")


def test_taking_a_file_over_links_or_copies_it_whole(tmp_path, monkeypatch):
    there, here = Store(str(tmp_path / "there")), Store(str(tmp_path / "here"))
    there.write("a/b.bin", b"content")
    here.take(there, "a/b.bin", "c/d.bin")
    assert here.read("c/d.bin") == b"content"
    there.write("a/b.bin", b"changed later")  # a new file under the name; the link keeps the old one
    assert here.read("c/d.bin") == b"content"

    def refuse(*args):
        raise OSError("another disk")

    monkeypatch.setattr(os, "link", refuse)
    here.take(there, "a/b.bin", "c/e.bin")
    assert here.read("c/e.bin") == b"changed later"
    with pytest.raises(ArtifactError, match=r"nothing\.bin is not there"):
        here.take(there, "nothing.bin", "c/f.bin")
    assert here.names("c") == ["c/d.bin", "c/e.bin"]
