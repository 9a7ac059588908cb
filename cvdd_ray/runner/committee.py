"""The committee whose experts are Ray actors: same question, same answers, wherever they live."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import ray
import torch

from cvdd_ray.core.committee import Ballot, Vote
from cvdd_ray.runner.metrics import record


class RayCommittee:
    """Asks every expert actor of a ballot at once and waits for all answers."""

    def __init__(self, experts: Mapping[str, Any]):
        self._experts = dict(experts)

    def vote(self, ballots: Mapping[str, Ballot]) -> dict[str, Vote]:
        votes_ref = {}
        for name, ballot in ballots.items():
            question = ballot.views_GBCHW.cpu().numpy(), ballot.labels_GB.cpu().numpy()
            votes_ref[name] = self._experts[name].vote.remote(*question)
            record("cvdd_wire_bytes", sum(part.nbytes for part in question), direction="views", expert=name)
        answers = dict(zip(votes_ref, ray.get(list(votes_ref.values())), strict=True))
        for name, answer in answers.items():
            record("cvdd_wire_bytes", sum(part.nbytes for part in answer), direction="gradients", expert=name)
        return {
            name: Vote(*(torch.from_numpy(np.array(part)).to(ballots[name].views_GBCHW.device) for part in answer))
            for name, answer in answers.items()
        }
