"""Trajectories of experts on the disk or in the object store: a safetensors file each, of which single epochs are read.

Legend: E epochs, P parameters in one vector.
"""

import json
from collections.abc import Mapping

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from cvdd_ray.data.artifacts import Artifacts, Manifest
from cvdd_ray.data.cache import mapped
from cvdd_ray.data.storage import Store

THETA = "theta"
FLOAT = 4  # bytes


def trajectory_name(expert: int) -> str:
    """Return the name of the file of one expert."""
    return f"expert{expert:03d}.safetensors"


def trajectory_bytes(theta_EP: Tensor) -> bytes:
    """Return the file of the parameters at the start and after every epoch, float32."""
    return save({THETA: theta_EP.float().contiguous()})


def trajectory_files(artifacts: Artifacts, manifest: Manifest) -> dict[str, str]:
    """Return the files of a finished stage, expert after expert: names in the store with their sha256. Those of a local disk
    are verified now, those of an object store when they are fetched.

    Raises ArtifactError when one is missing or altered.
    """
    if artifacts.store.is_local:
        for name in manifest.files:
            artifacts.verify(manifest, name)
    folder = artifacts.folder(manifest.identity)
    return {f"{folder}/{name}": manifest.files[name] for name in sorted(manifest.files)}


class Trajectories:
    """Reads the parameters of any expert after any epoch, from the local cache where the store is an object store."""

    def __init__(self, store: Store, files: Mapping[str, str]):
        self._store, self._files = store, list(files.items())
        self._opened: dict[int, tuple] = {}

    def __call__(self, expert: int, epoch: int) -> Tensor:
        """Return theta_P of expert number `expert` after `epoch` epochs."""
        if expert not in self._opened:
            file = mapped(self._store, *self._files[expert])
            length = int.from_bytes(file.read_at(8, 0), "little")
            self._opened[expert] = file, 8 + length, json.loads(file.read_at(length, 8))[THETA]["shape"]
        file, start, (_, num_parameters) = self._opened[expert]
        row = file.read_at(FLOAT * num_parameters, start + epoch * FLOAT * num_parameters)
        return torch.from_numpy(np.frombuffer(row, np.float32).copy())
