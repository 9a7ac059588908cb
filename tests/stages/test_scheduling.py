"""The policy that hands groups to workers, with a clock of the test's own; its decisions against hand arithmetic."""

import random

import pytest

from cvdd_ray.stages.scheduling import GroupClock, LeastBusy, Scheduler, coordinators, replicas


def alike(costs) -> dict[str, dict[str, float]]:
    """Groups g0, g1 ... that all ask the same expert."""
    return {f"g{number}": {"a": cost} for number, cost in enumerate(costs)}


def play(scheduler: Scheduler, took_s: dict[str, float], events=()) -> tuple[float, list[tuple[float, str, str]]]:
    """Return the makespan and (time, group, worker) as they were handed out; `events` are (time, what, worker)."""
    now, running, order, events = 0.0, {}, [], sorted(events)
    while scheduler.unfinished:
        for name, worker in scheduler.assign():
            order.append((now, name, worker))
            running[name] = now + took_s[name], worker
        done, name = min(((end, name) for name, (end, _) in running.items()), default=(float("inf"), ""))
        if events and events[0][0] <= done:
            now, what, worker = events.pop(0)
            if what == "join":
                scheduler.join(worker)
            else:
                back = scheduler.lose(worker)
                running = {name: at for name, at in running.items() if at[1] != worker}
                assert not set(back) & set(running)
            continue
        now = done
        del running[name]
        scheduler.finish(name)
    return now, order


def test_the_longest_go_first_and_whoever_is_free_takes_the_next():
    """5 and 4 begin; 3 goes to the one that has done 4, then to the one that has done 5, then at 7 the last: 10."""
    costs = [3, 3, 5, 3, 4]
    scheduler = Scheduler(alike(costs))
    scheduler.join("x")
    scheduler.join("y")
    wall, order = play(scheduler, {f"g{k}": float(cost) for k, cost in enumerate(costs)})
    assert order == [(0, "g2", "x"), (0, "g4", "y"), (4, "g0", "y"), (5, "g1", "x"), (7, "g3", "y")]
    assert wall == 10


@pytest.mark.parametrize("mixed", [False, True])
def test_no_worker_is_idle_while_a_group_waits_and_equal_events_give_equal_decisions(mixed):
    def handed_out() -> list[tuple[str, str]]:
        draw, order, running = random.Random(3), [], []
        flops = {f"g{k}": {draw.choice("abc"): draw.randint(1, 9), draw.choice("abc"): 2} for k in range(60)}
        scheduler = Scheduler(flops, mixed=mixed)
        slots = {"x": 1, "y": 2, "z": 3}
        for worker, number in slots.items():
            scheduler.join(worker, number)
        while scheduler.unfinished:
            new = scheduler.assign()
            order, running = order + new, running + new
            assert scheduler.waiting == 0 or len(running) == 6
            assert all(sum(owner == worker for _, owner in running) <= number for worker, number in slots.items())
            name, _ = running.pop(draw.randrange(len(running)))
            scheduler.finish(name, draw.random())
        assert sorted(name for name, _ in order) == sorted(flops)
        return order

    assert handed_out() == handed_out()


def test_a_lost_worker_gives_its_groups_back():
    """y dies at 3 with the group of 4 on it: x, which is free at 5, takes it up before those of 3."""
    costs = [5, 4, 3, 3]
    scheduler = Scheduler(alike(costs))
    scheduler.join("x")
    scheduler.join("y")
    took_s = {f"g{k}": float(cost) for k, cost in enumerate(costs)}
    wall, order = play(scheduler, took_s, [(3, "lose", "y"), (8, "join", "y")])
    assert order == [(0, "g0", "x"), (0, "g1", "y"), (5, "g1", "x"), (8, "g2", "y"), (9, "g3", "x")]
    assert wall == 12
    assert scheduler.lose("never seen") == []


def test_a_worker_that_joins_takes_the_next():
    scheduler = Scheduler(alike([4, 4, 4, 4]))
    scheduler.join("x")
    wall, order = play(scheduler, dict.fromkeys(["g0", "g1", "g2", "g3"], 4.0), [(5, "join", "y")])
    assert order == [(0, "g0", "x"), (4, "g1", "x"), (5, "g2", "y"), (8, "g3", "x")]
    assert wall == 12


def test_a_worker_with_more_room_is_filled_evenly():
    scheduler = Scheduler(alike([1] * 5))
    scheduler.join("x", 2)
    scheduler.join("y", 3)
    assert [worker for _, worker in scheduler.assign()] == ["y", "x", "y", "x", "y"]


def test_measured_times_take_the_place_of_flops():
    """ShuffleNet has fewer FLOPs and takes four times as long for each."""
    scheduler = Scheduler({"res0": {"res": 10}, "shu0": {"shu": 9}, "res1": {"res": 8}, "shu1": {"shu": 7}})
    scheduler.join("x")
    scheduler.join("y")
    assert [name for name, _ in scheduler.assign()] == ["res0", "shu0"]
    scheduler.finish("res0", 20.0)
    assert (scheduler.expected("res1"), scheduler.expected("shu1")) == (16.0, 14.0)  # what has not been timed: as all
    scheduler.finish("shu0", 72.0)
    assert (scheduler.expected("res1"), scheduler.expected("shu1")) == (16.0, 56.0)
    assert [name for name, _ in scheduler.assign()] == ["shu1", "res1"]


def test_mixed_keeps_all_kinds_at_work():
    """Four dear and two cheap groups: a cheap one is begun with every other dear one, not after all of them."""
    flops = {**{f"dear{k}": {"a": 9} for k in range(4)}, **{f"cheap{k}": {"b": 1} for k in range(2)}}
    kinds = {}
    for mixed in (True, False):
        scheduler = Scheduler(flops, mixed=mixed)
        scheduler.join("x", 6)
        kinds[mixed] = [name[0] for name, _ in scheduler.assign()]
    assert kinds == {True: list("dcddcd"), False: list("ddddcc")}


@pytest.mark.parametrize(
    ("places", "most", "actors"),
    [
        (7, 9, {"a": 4, "b": 2, "c": 1}),  # in proportion
        (14, 9, {"a": 8, "b": 4, "c": 2}),
        (5, 9, {"a": 3, "b": 1, "c": 1}),  # 4/3, 2, 1 instead of 4/2, 2/2, 1: the same for the slowest, so the first
        (2, 9, {"a": 1, "b": 1, "c": 1}),  # they share places
        (100, 3, {"a": 3, "b": 3, "c": 3}),  # no more than groups that ask
    ],
)
def test_replicas_follow_the_work(places, most, actors):
    work = {"a": 4e15, "b": 2e15, "c": 1e15}
    found = replicas(work, places, dict.fromkeys(work, most))
    if places == 5:
        assert max(work[name] / number for name, number in found.items()) == 2e15
    else:
        assert found == actors


def test_the_least_busy_actor_is_asked():
    pick = LeastBusy()
    assert [pick.pick("a", 3) for _ in range(3)] == [0, 1, 2]
    pick.answered("a", 1)
    assert pick.pick("a", 3) == 1
    assert pick.pick("b", 2) == 0
    for actor in (0, 1, 2):
        pick.answered("a", actor)
    assert pick.pick("a", 3) == 0  # all are free, 1 has been asked twice
    assert LeastBusy(first=4).pick("a", 3) == 1
    assert pick.pick("a", 4) == 3  # one that has come later


@pytest.mark.parametrize(
    ("at_once", "in_flight", "groups", "number"), [(2, 2, 2, 1), (5, 2, 100, 5), (1, 2, 100, 1), (64, 2, 100, 50), (5, 16, 9, 1)]
)  # fmt: skip
def test_there_are_as_many_coordinators_as_keep_the_experts_busy(at_once, in_flight, groups, number):
    assert coordinators(at_once, 2, in_flight, groups) == number


def test_groups_are_timed_from_their_first_report():
    now, passed = [0.0], []
    watch = GroupClock(lambda name, report: passed.append((name, report["done"])), clock=lambda: now[0])
    for name in ("whole", "resumed", "there", "silent"):
        watch.begin(name)
    now[0] = 10.0  # loading
    watch.report("whole", {"done": 0.0})
    watch.report("resumed", {"done": 0.5})
    watch.report("there", {"done": 1.0})
    now[0] = 14.0
    watch.report("resumed", {"done": 0.9})
    now[0] = 15.0
    took = {name: watch.took_s(name) for name in ("whole", "resumed", "there", "silent")}
    assert took == {"whole": 5.0, "resumed": 10.0, "there": None, "silent": 15.0}
    assert passed == [("whole", 0.0), ("resumed", 0.5), ("there", 1.0), ("resumed", 0.9)]
    watch.begin("whole")  # again, on another worker
    watch.report("whole", {"done": 0.2})
    now[0] = 23.0
    assert watch.took_s("whole") == pytest.approx(10.0)
