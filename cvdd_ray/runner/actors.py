"""The actors, as plain classes; they are made remote where they are created.

numpy travels, never torch tensors: a torch tensor in a call is pickled and copied, an array is not.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cvdd_ray.core.committee import Ballot, Voter
from cvdd_ray.core.experts import ExpertSpec, prepare_torch
from cvdd_ray.data.storage import Store
from cvdd_ray.runner.committee import RayCommittee
from cvdd_ray.stages.grouptask import GroupTask, VoterSettings, run_group
from cvdd_ray.stages.runtime import local_committee, local_voter


class ExpertActor:
    """One backbone on one device; stateless but for its weights, so Ray may restart it at any moment."""

    def __init__(self, spec: ExpertSpec, voter: VoterSettings, threads: int):
        self._spec, self._settings, self._threads = spec, voter, threads
        self._voter: Voter | None = None

    def vote(self, views_GBCHW: np.ndarray, labels_GB: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return (gradient, cross-entropy per group, BN term per group) as float32 arrays."""
        device = prepare_torch(self._threads)
        if self._voter is None:  # built here and not in __init__, so that its errors reach the caller as themselves
            self._voter = local_voter(self._spec, self._settings, device)
        ballot = Ballot(
            torch.from_numpy(np.array(views_GBCHW)).to(device), torch.from_numpy(np.array(labels_GB)).to(device)
        )
        vote = self._voter.vote(ballot)
        return tuple(part.cpu().numpy() for part in (vote.gradient_GBCHW, vote.cross_entropy_G, vote.bn_term_G))


class Coordinator:
    """Drives groups of jobs: draws views, asks the expert actors, adds up their gradients, steps, checkpoints."""

    def __init__(self, experts: Mapping[str, Any], store: Store, mailbox: Any, threads: int):
        self._committee, self._store, self._mailbox = RayCommittee(experts), store, mailbox
        self._threads = threads
        self._device = torch.device("cpu")

    def run_group(self, name: str, task: GroupTask) -> bytes:
        """Finish one group and return its final state; several calls may run at once, each in its own thread."""
        prepare_torch(self._threads)
        return run_group(
            self._committee, task, self._store, self._device, lambda report: self._mailbox.put.remote(name, report)
        )


class ColocatedWorker:
    """The whole committee on one device, driving whole groups: no message per iteration."""

    def __init__(
        self, experts: Mapping[str, ExpertSpec], voter: VoterSettings, store: Store, mailbox: Any, threads: int
    ):
        self._threads, self._device = threads, prepare_torch(threads)
        self._committee = local_committee(experts, voter, self._device)
        self._store, self._mailbox = store, mailbox

    def run_group(self, name: str, task: GroupTask) -> bytes:
        """Finish one group and return its final state."""
        prepare_torch(self._threads)
        return run_group(
            self._committee, task, self._store, self._device, lambda report: self._mailbox.put.remote(name, report)
        )


class Mailbox:
    """Progress reports from workers to the driver: the latest of every piece of work."""

    def __init__(self):
        self._reports: dict[str, dict] = {}

    def put(self, name: str, report: dict) -> None:
        self._reports[name] = report

    def take(self) -> dict[str, dict]:
        """Return and forget what has arrived since the last call."""
        reports, self._reports = self._reports, {}
        return reports
