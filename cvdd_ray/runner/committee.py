"""The committee whose experts are Ray actors: same question, same answers, wherever they live."""

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

import numpy as np
import ray
import torch

from cvdd_ray.core.committee import Ballot, Vote, parts
from cvdd_ray.runner.metrics import record
from cvdd_ray.stages.scheduling import LeastBusy


class RayCommittee:
    """Asks an actor of every expert of a ballot at once, the one with the fewest open questions, and waits for all answers.
    Experts are stateless, so which actor answers leaves no trace in the vote. Several threads may ask at once. An actor that
    has not answered after `hung_s` seconds is ended; Ray starts it again and asks it the same."""

    def __init__(
        self, experts: Mapping[str, Sequence[Any]] | None = None, *, first: int = 0, hung_s: float | None = None,
        on_hung: Callable[[str], None] = lambda name: None,
    ):  # fmt: skip
        self._experts, self._hung_s, self._on_hung = experts or {}, hung_s, on_hung
        self._least_busy, self._lock = LeastBusy(first), Lock()

    def meet(self, experts: Mapping[str, Sequence[Any]]) -> None:
        """Ask these actors from now on; of an expert that is known already there may be more, at the end."""
        with self._lock:
            self._experts = experts

    def vote(self, ballots: Mapping[str, Ballot]) -> dict[str, Vote]:
        votes_ref, asked, picked = {}, {}, []
        try:
            for name, ballot in ballots.items():
                question = [part.cpu().numpy() for part in parts(ballot)]
                with self._lock:
                    actors = self._experts[name]
                    picked.append((name, self._least_busy.pick(name, len(actors))))
                asked[name] = actors[picked[-1][1]]
                votes_ref[name] = asked[name].vote.remote(*question)
                record("cvdd_wire_bytes", sum(part.nbytes for part in question), direction="views", expert=name)
            self._wait(votes_ref, asked)
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

    def _wait(self, votes_ref: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
        """Return when all votes are there or have failed."""
        refs = list(votes_ref.values())
        while True:
            _, missing = ray.wait(refs, num_returns=len(refs), timeout=self._hung_s, fetch_local=False)
            if not missing:
                return
            for name in (name for name, ref in votes_ref.items() if ref in missing):
                self._on_hung(name)
                ray.kill(asked[name], no_restart=False)
