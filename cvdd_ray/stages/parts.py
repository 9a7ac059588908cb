"""The parts of a stage that is not finished yet, on the disk or in the object store: groups of jobs, label epochs, students.

A part goes from state to state in one direction, each by one atomic write; the stage is finished by its manifest:

    pending     nothing of it is there, or what is there is damaged
    running     its checkpoint is there: whoever takes it up goes on from it, to the same bits
    committed   its result is there, with the sha256 of its content and of the file it has left; its checkpoint goes

Whatever ends at whatever moment, a part is in the state that it last reached. Nothing else about it is kept anywhere.
"""

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from cvdd_ray.data.artifacts import Written, stored_sha256
from cvdd_ray.data.storage import Store

Receipt = Callable[[str, bytes], Written]
"""Which file a part has left, by its name and result."""


class State(StrEnum):
    PENDING, RUNNING, COMMITTED = "pending", "running", "committed"


@dataclass(frozen=True)
class Found:
    """What is there of some parts: their states, the results of those that are committed, and which are damaged."""

    states: dict[str, State]
    results: dict[str, bytes]
    damaged: tuple[str, ...]


class Parts:
    """The parts in a folder of a store, by name."""

    def __init__(self, store: Store, folder: str):
        self._store, self._folder = store, folder

    def find(self, names: Iterable[str], written: Receipt | None = None) -> Found:
        """Return what is there. A part whose result, or whose file as `written` names it, was altered is damaged."""
        there, states, results, damaged = set(self._store.names(self._folder)), {}, {}, []
        for name in names:
            result = self._result(name, written, there) if self.result(name) in there else None
            if result is not None:
                results[name] = result
            elif self.result(name) in there:
                damaged.append(name)
            begun = State.RUNNING if self.checkpoint(name) in there else State.PENDING
            states[name] = begun if result is None else State.COMMITTED
        return Found(states, results, tuple(damaged))

    def commit(self, name: str, result: bytes) -> None:
        """Write a part's result, then drop its checkpoint."""
        self._store.write(self.result(name), sealed(result))
        self._store.delete(self.checkpoint(name))

    def result(self, name: str) -> str:
        """Return where a part's result is."""
        return f"{self._folder}/{name}"

    def checkpoint(self, name: str) -> str:
        """Return where an unfinished part keeps its checkpoint."""
        return f"{self._folder}/{name}.checkpoint"

    def file(self, name: str) -> str:
        """Return where a part that writes what it makes itself puts it."""
        return f"{self._folder}/{name}.arrow"

    def _result(self, name: str, written: Receipt | None, there: set[str]) -> bytes | None:
        result = unsealed(self._store.read(self.result(name)))
        if result is None or written is None:
            return result
        file = written(name, result)
        return result if file.name in there and stored_sha256(self._store, file.name) == file.sha256 else None


def sealed(content: bytes) -> bytes:
    """Return content with its sha256 before it."""
    return hashlib.sha256(content).digest() + content


def unsealed(data: bytes) -> bytes | None:
    """Return the content of `sealed` data; None when a bit of it has changed."""
    digest, content = data[:32], data[32:]
    return content if hashlib.sha256(content).digest() == digest else None
