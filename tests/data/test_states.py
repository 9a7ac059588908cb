"""A state of unfinished work comes back as it was, or not at all."""

import random

import pytest
import torch

from cvdd_ray.data.states import read_state, write_state
from cvdd_ray.errors import ArtifactError

TENSORS = {"a": torch.arange(6.0).view(2, 3), "scalar": torch.tensor(7), "empty": torch.empty(0)}
ABOUT = {"iteration": 3, "trace": [[0, "x", 1.5]]}


def test_what_was_written_is_read():
    tensors, about = read_state(write_state(TENSORS, ABOUT), "damaged")
    assert about == ABOUT
    assert set(tensors) == set(TENSORS)
    assert all(
        torch.equal(tensors[name], value) and tensors[name].shape == value.shape for name, value in TENSORS.items()
    )


def test_no_changed_bit_and_no_cut_goes_unnoticed():
    """Every changed bit is noticed, or changes nothing that is read (a blank of the header)."""
    complaints: set[str] = set()
    data, draw = write_state(TENSORS, ABOUT), random.Random(0)
    for position in [*range(len(data) - 60, len(data)), *draw.sample(range(len(data)), 200)]:
        changed = bytearray(data)
        changed[position] ^= 1 << draw.randrange(8)
        try:
            tensors, about = read_state(bytes(changed), "damaged")
        except ArtifactError as error:
            complaints.add(str(error)[:9])
            continue
        assert about == ABOUT
        assert {name: value.tolist() for name, value in tensors.items()} == {n: v.tolist() for n, v in TENSORS.items()}
        assert position < int.from_bytes(data[:8], "little") + 8
    assert complaints == {"damaged ("}
    for length in (0, 7, 20, len(data) // 2, len(data) - 1):
        with pytest.raises(ArtifactError, match=r"^damaged \("):
            read_state(data[:length], "damaged")
