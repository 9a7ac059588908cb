"""Leases: one maker at a time, nobody waits for the dead."""

import itertools
import time

import pytest
import ray

from cvdd_ray.data.storage import Store
from cvdd_ray.runner.leases import LeaseDesk, lease_desk, leased


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def desk(clock):
    return LeaseDesk(lease_s=10.0, clock=clock)


def test_the_first_gets_the_lease_and_the_next_after_it_is_returned(desk):
    assert desk.acquire(["a"], "one")
    assert not desk.acquire(["a"], "two")
    assert desk.acquire(["b"], "two")
    desk.release(["a"], "two")  # not theirs to return
    assert not desk.acquire(["a"], "two")
    desk.release(["a"], "one")
    assert desk.acquire(["a"], "two")


def test_several_leases_are_given_together_or_not_at_all(desk):
    assert desk.acquire(["b"], "one")
    assert not desk.acquire(["a", "b", "c"], "two")
    assert desk.acquire(["a", "c"], "three")  # nothing was kept for two


def test_a_silent_holder_loses_its_lease_and_a_renewing_one_keeps_it(desk, clock):
    assert desk.acquire(["a"], "one")
    clock.now = 9.0
    assert desk.acquire(["a"], "one")  # renewed
    clock.now = 18.0
    assert not desk.acquire(["a"], "two")
    clock.now = 19.0
    assert desk.acquire(["a"], "two")


def test_processes_take_turns(ray_runtime, tmp_path):
    store = Store(str(tmp_path))
    desk = lease_desk(store)  # ends with the process that was the first to ask: this one

    def work(name):
        with leased(lease_desk(store), ["stage"]):
            store.write(f"{name}-begin", repr(time.time()).encode())
            time.sleep(0.5)
            store.write(f"{name}-end", repr(time.time()).encode())

    task = ray.remote(num_cpus=0.5)(work)
    names = ["a", "b", "c"]
    ray.get([task.remote(name) for name in names])
    spans = sorted((float(store.read(f"{name}-begin")), float(store.read(f"{name}-end"))) for name in names)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(spans))
    assert ray.get(desk.acquire.remote(["stage"], "next"))


def test_a_lease_is_returned_after_an_error(ray_runtime, tmp_path):
    desk = lease_desk(Store(str(tmp_path)))
    with pytest.raises(ZeroDivisionError), leased(desk, ["stage"]):
        raise ZeroDivisionError
    assert ray.get(desk.acquire.remote(["stage"], "next"))
