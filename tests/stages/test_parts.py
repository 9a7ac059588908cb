"""A part of unfinished work is pending, running or committed, by what lies in the store."""

import pytest

from cvdd_ray.data.artifacts import Written, sha256
from cvdd_ray.data.storage import Store
from cvdd_ray.stages.parts import Parts, State, sealed, unsealed


@pytest.fixture
def store(tmp_path):
    return Store(str(tmp_path))


def test_from_pending_to_committed(store):
    parts = Parts(store, "folder/partial")
    assert parts.find(["a"]).states == {"a": State.PENDING}
    store.write(parts.checkpoint("a"), b"half")
    assert parts.find(["a"]).states == {"a": State.RUNNING}
    parts.commit("a", b"whole")
    found = parts.find(["a", "b"])
    assert found.states == {"a": State.COMMITTED, "b": State.PENDING}
    assert found.results == {"a": b"whole"}
    assert store.all_names() == [parts.result("a")]


def test_an_end_between_commit_and_the_checkpoints_removal(store, monkeypatch):
    parts = Parts(store, "partial")
    store.write(parts.checkpoint("a"), b"half")
    monkeypatch.setattr(Store, "delete", lambda self, name: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        parts.commit("a", b"whole")
    assert parts.find(["a"]).states == {"a": State.COMMITTED}


@pytest.mark.parametrize("victim", ["result", "file"])
@pytest.mark.parametrize("damage", [lambda data: data[:-1], lambda data: data[:-1] + b"?", lambda data: b""])
def test_a_damaged_part_is_made_again(victim, damage, store):
    """From its checkpoint, if it still has one."""
    parts, written = Parts(store, "partial"), lambda name, result: Written(parts.file(name), result.decode())
    for name in ("a", "b"):
        store.write(parts.file(name), b"pixels")
        parts.commit(name, sha256(b"pixels").encode())
    assert parts.find(["a", "b"], written).damaged == ()
    name = getattr(parts, victim)("a")
    store.write(name, damage(store.read(name)))
    found = parts.find(["a", "b"], written)
    assert found.damaged == ("a",)
    assert found.states == {"a": State.PENDING, "b": State.COMMITTED}
    store.write(parts.checkpoint("a"), b"half")
    assert parts.find(["a"], written).states == {"a": State.RUNNING}
    store.delete(parts.file("b"))
    assert parts.find(["b"], written).damaged == ("b",)


def test_a_seal_is_broken_by_any_bit():
    data = sealed(b"content")
    assert unsealed(data) == b"content"
    for position in range(len(data)):
        assert unsealed(data[:position] + bytes([data[position] ^ 1]) + data[position + 1 :]) is None
    assert unsealed(b"") is None
