"""States of unfinished work as bytes: tensors by name and plain values beside them, in one safetensors file."""

import json
from collections.abc import Mapping
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from cvdd_ray.errors import ArtifactError


def write_state(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> bytes:
    """Return safetensors bytes of the tensors (moved to the CPU) and of values that JSON knows."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(plain, metadata={name: json.dumps(value) for name, value in about.items()})


def read_state(data: bytes, complaint: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and values of `write_state`.  Raises ArtifactError, with the complaint, when they are damaged."""
    try:
        tensors = load(data)
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
        return tensors, {name: json.loads(value) for name, value in header.items()}
    except (SafetensorError, KeyError, ValueError) as error:
        raise ArtifactError(f"{complaint} ({error})") from None
