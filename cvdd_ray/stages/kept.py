"""Checkpoints of networks in training: what a student or an expert goes on from when whatever trained it has died."""

import time
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from cvdd_ray.data.states import read_state, write_state
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError

Rows = Sequence[tuple[float, ...]]


class Kept:
    """The checkpoint of an unfinished training of a `what`: its state, its curve and the seconds it has taken.

    `start` is what there was (state, curve); None at first, and where it is damaged, which is reported: {"say": text}. It is
    written every so many `minutes`, with 0 after every epoch.
    """

    def __init__(self, store: Store, name: str, minutes: float, what: str, report: Callable[[dict], None]):
        self._store, self._name, self._every_s = store, name, 60 * minutes
        self.start: tuple[Mapping[str, Tensor], list[tuple[float, ...]]] | None = None
        self._saved = self._started = time.monotonic()
        if store.exists(name):
            data = store.read(name)
            try:
                state, about = read_state(data, f"{store.display(name)}, the checkpoint of a {what}, is damaged")
            except ArtifactError as error:
                report({"say": f"{error}; the {what} begins again"})
                return
            self.start = state, [tuple(row) for row in about["curve"]]
            self._started -= about["wall_s"]

    def save(self, state: Callable[[], Mapping[str, Tensor]], curve: Rows) -> None:
        """Write it if the last time is long enough ago."""
        if time.monotonic() - self._saved >= self._every_s:
            about = {"curve": curve, "wall_s": self.wall_s()}
            self._store.write(self._name, write_state(state(), about))
            self._saved = time.monotonic()

    def wall_s(self) -> float:
        """Seconds of training so far, those before an interruption included."""
        return round(time.monotonic() - self._started, 2)
