"""The committee whose experts are Ray actors: same question, same answers, wherever they live."""

from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import ray
import torch

from cvdd_ray.core.committee import Ballot, Vote
from cvdd_ray.runner.metrics import record
from cvdd_ray.stages.scheduling import LeastBusy


class RayCommittee:
    """Asks an actor of every expert of a ballot at once, the one with the fewest open questions, and waits for all answers.
    Experts are stateless, so which actor answers leaves no trace in the vote. Several threads may ask at once."""

    def __init__(self, experts: Mapping[str, Sequence[Any]] | None = None, *, first: int = 0):
        self._experts = experts or {}
        self._least_busy, self._lock = LeastBusy(first), Lock()

    def meet(self, experts: Mapping[str, Sequence[Any]]) -> None:
        """Ask these actors from now on; of an expert that is known already there may be more, at the end."""
        with self._lock:
            self._experts = experts

    def vote(self, ballots: Mapping[str, Ballot]) -> dict[str, Vote]:
        votes_ref, picked = {}, []
        try:
            for name, ballot in ballots.items():
                question = ballot.views_GBCHW.cpu().numpy(), ballot.labels_GB.cpu().numpy()
                with self._lock:
                    actors = self._experts[name]
                    picked.append((name, self._least_busy.pick(name, len(actors))))
                votes_ref[name] = actors[picked[-1][1]].vote.remote(*question)
                record("cvdd_wire_bytes", sum(part.nbytes for part in question), direction="views", expert=name)
            answers = dict(zip(votes_ref, ray.get(list(votes_ref.values())), strict=True))
        finally:
            with self._lock:
                for name, actor in picked:
                    self._least_busy.answered(name, actor)
        for name, answer in answers.items():
            record("cvdd_wire_bytes", sum(part.nbytes for part in answer), direction="gradients", expert=name)
        return {
            name: Vote(*(torch.from_numpy(np.array(part)).to(ballots[name].views_GBCHW.device) for part in answer))
            for name, answer in answers.items()
        }
