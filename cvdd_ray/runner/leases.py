"""Leases on stages: of several trials that need the same one, the first makes it and the others wait."""

import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.exceptions import RayError

from cvdd_ray.data.storage import Store

LEASE_S = 60.0  # a holder that is silent for so long has died
RENEW_S = 10.0
POLL_S = 1.0


class LeaseDesk:
    """Who is making what, as a plain class; an actor of it serves all trials of a sweep."""

    def __init__(self, lease_s: float = LEASE_S, clock: Callable[[], float] = time.monotonic):
        self._lease_s, self._clock = lease_s, clock
        self._holders: dict[str, tuple[str, float]] = {}

    def acquire(self, keys: Sequence[str], holder: str) -> bool:
        """Give, or renew, all the leases to the holder and return True; or none, where another holds one of them."""
        now = self._clock()
        taken = (self._holders.get(key) for key in keys)
        if any(lease and lease[0] != holder and now < lease[1] for lease in taken):
            return False
        self._holders |= dict.fromkeys(keys, (holder, now + self._lease_s))
        return True

    def release(self, keys: Sequence[str], holder: str) -> None:
        """Take back what the holder has of these."""
        for key in keys:
            if self._holders.get(key, ("", 0.0))[0] == holder:
                del self._holders[key]


def lease_desk(store: Store, **options: Any) -> Any:
    """Return the lease desk of a sweep's store, started if this process is the first to ask; it ends with this process,
    unless `lifetime="detached"` is among the options."""
    name = f"cvdd-leases:{store.display('').rstrip('/')}"
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy="DEFAULT")(LeaseDesk)
    return remote.options(name=name, get_if_exists=True, **options).remote()


@contextmanager
def leased(desk: Any, keys: Sequence[str]) -> Iterator[None]:
    """Hold the leases while inside; entering waits for them."""
    holder = uuid.uuid4().hex
    while not ray.get(desk.acquire.remote(keys, holder)):
        time.sleep(POLL_S)
    done = threading.Event()

    def renew() -> None:
        while not done.wait(RENEW_S):
            with suppress(RayError):  # a desk that is being restarted is asked again
                ray.get(desk.acquire.remote(keys, holder))

    thread = threading.Thread(target=renew, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        desk.release.remote(keys, holder)
