"""Simulated times against closed forms and hand arithmetic."""

import math

import pytest

from cvdd_ray.stages import simulation
from cvdd_ray.stages.simulation import (
    Group,
    Question,
    Wire,
    ceiling,
    expert_actors,
    group_seconds,
    play_colocated,
    play_spread,
    play_tasks,
)

FREE = Wire(0.0, math.inf, 0.0)


def seconds(work) -> float:
    return sum(work.values())


def ask(flops: int) -> Question:
    return Question(flops, 1000, 500)


def groups(*flops, iterations=10, views=0) -> dict[str, Group]:
    """Groups that ask experts for so many FLOPs per iteration: dicts by expert."""
    asks = [{name: ask(number) for name, number in one.items()} for one in flops]
    return {f"g{k}": Group(iterations, 100, one, views) for k, one in enumerate(asks)}


@pytest.mark.parametrize(("number", "gpus"), [(1, 1), (100, 8), (100, 64), (7, 7), (3, 9)])
def test_equal_groups_take_what_does_not_divide(number, gpus):
    made = play_colocated(groups(*[{"a": 2, "b": 1}] * number, views=1), gpus, seconds, "views")
    assert made.wall_s == math.ceil(number / gpus) * 10 * (2 + 1 + 1)
    assert made.busy(gpus) == pytest.approx(number / (gpus * math.ceil(number / gpus)))
    assert ceiling([40.0] * number, gpus) == pytest.approx(made.busy(gpus))


def test_unequal_groups_by_hand():
    """Longest first on two GPUs: 9; 5 and 4; what is left of 3 and 1 fills the rest."""
    these = groups({"a": 1}, {"a": 9}, {"a": 4}, {"a": 5}, {"a": 3})
    made = play_colocated(these, 2, seconds, "views")
    assert made.order == (
        ("g1", "worker 0"), ("g3", "worker 1"), ("g2", "worker 1"), ("g4", "worker 0"), ("g0", "worker 1"),
    )  # fmt: skip
    assert (made.wall_s, made.work_s) == (120.0, 220.0)
    shared = play_colocated(these, 1, seconds, "views", per_gpu=2)
    assert shared.wall_s == 2 * made.wall_s
    assert shared.busy(1) == pytest.approx(made.busy(2))
    assert group_seconds(these, seconds, "views")["g1"] == 90


def test_the_measured_speed_of_networks_decides_when_it_is_known():
    """b has fewer FLOPs and takes longer: after the first two have been timed the others of b go first."""
    these = groups({"a": 10}, {"a": 10}, {"b": 9}, {"b": 9}, {"a": 10}, {"b": 9})
    made = play_colocated(these, 2, lambda work: work.get("a", 0) + 3 * work.get("b", 0), "views")
    assert [name for name, _ in made.order] == ["g0", "g1", "g4", "g2", "g3", "g5"]


@pytest.mark.parametrize(
    ("took_s", "gpus", "share"),
    [
        ([1, 1, 1, 1], 2, 1.0),
        ([3, 3, 3], 2, 9 / 12),
        ([8, 1, 1], 2, 10 / 16),
        ([2, 2, 2, 2, 2], 2, 10 / 12),
        ([], 4, 0.0),
    ],
)
def test_no_order_can_beat_the_ceiling(took_s, gpus, share):
    assert ceiling(took_s, gpus) == pytest.approx(share)
    if took_s:
        made = play_colocated(groups(*({"a": t} for t in took_s), iterations=1), gpus, seconds, "views")
        assert made.busy(gpus) <= share + 1e-9


def test_spread_over_equal_experts_is_the_closed_form():
    """Four groups ask two experts for a second each, 10 times: 40 seconds on two GPUs, 80 on one, 20 on four."""
    these = groups(*[{"a": 1, "b": 1}] * 4)
    for gpus, wall_s in ((1, 80.0), (2, 40.0), (4, 20.0)):
        made = play_spread(these, gpus, seconds, 4, FREE)
        assert (made.wall_s, made.work_s, made.busy(gpus)) == (wall_s, 80.0, 1.0)


def test_unequal_experts_get_gpus_in_proportion():
    these = groups(*[{"a": 3, "b": 1}] * 12)
    assert expert_actors(these, 4) == {"a": 3, "b": 1}
    assert play_spread(these, 4, seconds, 12, FREE).busy(4) > 0.99
    assert play_spread(these, 2, seconds, 12, FREE).busy(2) == pytest.approx(4 / 6, rel=0.01)


def test_a_lone_group_waits_for_every_message():
    wire = Wire(latency_s=0.5, bytes_per_s=1000.0, step_s_per_value=0.02)
    made = play_spread(groups({"a": 3}), 1, seconds, 1, wire)
    assert made.wall_s == pytest.approx(10 * (100 * 0.02 + 0.5 + 1.5 + 3))


def test_a_second_group_in_flight_fills_the_gaps():
    wire = Wire(latency_s=1.0, bytes_per_s=math.inf, step_s_per_value=0.0)
    these = groups(*[{"a": 2}] * 2, iterations=40)
    assert play_spread(these, 1, seconds, 1, wire).busy(1) > 0.95  # two coordinators with a group each
    alone = groups({"a": 2}, iterations=40)
    assert play_spread(alone, 1, seconds, 1, wire).busy(1) == pytest.approx(2 / 3)


def test_a_few_iterations_stand_for_all(monkeypatch):
    these = groups(*[{"a": 3, "b": 1}, {"b": 1, "c": 2}, {"a": 3, "c": 2}] * 5, iterations=400)
    few = play_spread(these, 5, seconds, 2, Wire(0.3, 1e5, 0.001))
    monkeypatch.setattr(simulation, "ITERATIONS", 400)
    all_ = play_spread(these, 5, seconds, 2, Wire(0.3, 1e5, 0.001))
    assert few.wall_s == pytest.approx(all_.wall_s, rel=0.03)
    assert few.work_s == all_.work_s


@pytest.mark.parametrize(
    ("took_s", "gpus", "per_gpu", "wall_s"),
    [
        ([5, 1, 1, 4, 2], 2, 1, 7.0),  # in order, to whoever is free: 5 + 2 and 1 + 1 + 4
        ([5, 1, 1, 4, 2], 8, 1, 5.0),
        ([5, 1, 1, 4, 2], 2, 4, 11.0),  # four share the first GPU
        ([5, 1, 1, 4, 2], 1, 4, 13.0),
        ([0.0, 0.0], 1, 1, 0.0),
        ([], 3, 1, 0.0),
    ],
)
def test_tasks_go_to_the_fullest_gpu_that_has_room(took_s, gpus, per_gpu, wall_s):
    made = play_tasks(took_s, gpus, per_gpu)
    assert (made.wall_s, made.work_s) == (pytest.approx(wall_s), sum(took_s))
    assert made.busy(gpus) == pytest.approx(sum(took_s) / (gpus * wall_s) if wall_s else 0.0)
