"""When work is tried again, when it is given up, and when it is asked to save itself."""

import time
from collections import Counter
from collections.abc import Callable, Hashable

import ray
import torch
from ray.exceptions import RayError, RayTaskError

from cvdd_ray.errors import NumericsError

TRIES = 3  # of a piece of work that ends with an error of its own, and of a crew that is lost as a whole
MAX_LOSSES = 20  # of what Ray loses: restarts of an actor, tries of a piece of work
ASK_S = 2.0  # how often Ray is asked which nodes will leave
STOP_S = 60.0  # how long the checkpoints of a run that is interrupted may take
DEVICE_ERRORS = ("CUDA error", "CUBLAS_STATUS", "CUDNN_STATUS")


class LostWorkerError(Exception):
    """The process or node of a worker is gone; others can do its work."""


class LostCrewError(Exception):
    """No worker is left, or no actor of an expert, and Ray has given up starting them; its cause is the last one's end."""


def innermost(error: BaseException) -> BaseException:
    """Return the error behind one that has come from a worker, perhaps by way of another."""
    while isinstance(error, RayTaskError):
        error = error.cause
    return error


def is_device_error(error: BaseException) -> bool:
    """Return whether a process can do nothing more on its GPU after this error: it needs a new one."""
    lost = getattr(torch, "AcceleratorError", ())
    return isinstance(error, lost) or any(mark in str(error) for mark in DEVICE_ERRORS)


class Poisoned:
    """Pieces of work that end with errors of their own: tried `TRIES` times, then given up, while the others complete.

    An error that is a function of the piece alone (NumericsError) is not tried again; one of Ray's own, which has lost a
    process or an object, up to `MAX_LOSSES` times.
    """

    def __init__(self):
        self._tries: Counter[Hashable] = Counter()
        self._given_up: list[Exception] = []

    def again(self, name: Hashable, error: Exception) -> bool:
        """Return whether the piece that has failed is to be tried again; else its error is kept."""
        lost = isinstance(innermost(error), RayError)
        self._tries[name, lost] += 1
        if self._tries[name, lost] < (MAX_LOSSES if lost else TRIES) and not isinstance(error, NumericsError):
            return True
        self._given_up.append(error)
        return False

    def raise_first(self) -> None:
        """Raise the error of the piece that was given up first, if there is one."""
        if self._given_up:
            raise self._given_up[0]


class Leaving:
    """Nodes of which Ray has been told that they will be taken away soon (spot machines, `ray drain-node`)."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock, self._asked, self._known = clock, clock(), frozenset(_draining())

    def news(self) -> list[str]:
        """Return the ids (hex) of nodes that have been told so since the last time; Ray is asked every ASK_S."""
        if self._clock() - self._asked < ASK_S:
            return []
        self._asked, draining = self._clock(), frozenset(_draining())
        new, self._known = draining - self._known, draining
        return sorted(new)


def _draining() -> list[str]:
    return list(ray._private.state.state.get_draining_nodes())
