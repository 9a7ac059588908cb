"""States of unfinished work as bytes: tensors by name and plain values beside them, in one safetensors file that knows its
own sha256."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cvdd_ray.errors import ArtifactError

DIGEST = "sha256"


def write_state(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Return safetensors bytes of the tensors (moved to the CPU) and of values that JSON knows."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    values = {name: json.dumps(value) for name, value in about.items()}
    return save(plain, metadata={**values, DIGEST: _digest(plain, values)})


def read_state(data: bytes, complaint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and values of `write_state`.  Raises ArtifactError, with the complaint, when a bit of them has
    changed."""
    try:
        tensors = load(data)
        values = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        if values.pop(DIGEST) != _digest(tensors, values):
            raise ValueError("its content does not have its sha256")
        return tensors, {name: json.loads(value) for name, value in values.items()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{complaint} ({error})") from None


def _digest(tensors: Mapping[str, Tensor], values: Mapping[str, str]) -> str:
    """Return the sha256 of names, types, shapes and bytes of the tensors, and of the values."""
    digest = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.numpy())
    return digest.hexdigest()
