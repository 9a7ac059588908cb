"""The committee whose experts are Ray actors: same question, same answers, wherever they live."""

from collections.abc import Callable, Mapping, Sequence
from threading import Lock
from typing import Any

from cvdd_ray.core.committee import Ballot, Vote
from cvdd_ray.runner.wires import WIRES
from cvdd_ray.stages.scheduling import LeastBusy


class RayCommittee:
    """Asks an actor of every expert of a ballot at once, the one with the fewest open questions, and waits for all answers.
    Experts are stateless, so which actor answers leaves no trace in the vote. Several threads may ask at once. An actor that
    has not answered after `hung_s` seconds is ended; Ray starts it again and it is asked the same. `wire` is a name in
    wires.WIRES, which tell `on_failure` what kind of failure there was with which expert."""

    def __init__(
        self, experts: Mapping[str, Sequence[Any]] | None = None, *, first: int = 0, hung_s: float | None = None,
        on_failure: Callable[[str, str], None] = lambda kind, name: None, wire: str = "ray",
    ):  # fmt: skip
        self._experts, self._wire = experts or {}, WIRES[wire](hung_s, on_failure)
        self._least_busy, self._lock = LeastBusy(first), Lock()

    def meet(self, experts: Mapping[str, Sequence[Any]]) -> None:
        """Ask these actors from now on; of an expert that is known already there may be more, at the end."""
        with self._lock:
            self._experts = experts

    def vote(self, ballots: Mapping[str, Ballot]) -> dict[str, Vote]:
        asked, picked = {}, []
        try:
            for name in ballots:
                with self._lock:
                    actors = self._experts[name]
                    picked.append((name, self._least_busy.pick(name, len(actors))))
                asked[name] = actors[picked[-1][1]]
            return self._wire.ask(asked, ballots)
        finally:
            with self._lock:
                for name, actor in picked:
                    self._least_busy.answered(name, actor)
