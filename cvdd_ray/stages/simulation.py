"""A stage's work on so many GPUs, played through with a clock that only counts: the policy is the one a run uses
(stages/scheduling.py), the time of every piece is given. Nothing is computed but times."""

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count

from cvdd_ray.stages.scheduling import LeastBusy, Scheduler, coordinators, replicas

ITERATIONS = 40  # of a group with placement `spread` are played through; they stand for all


@dataclass(frozen=True)
class Played:
    """What came out: seconds until the last piece was finished, seconds that GPUs computed, and (group, worker) as they
    were handed out."""

    wall_s: float
    work_s: float
    order: tuple[tuple[str, str], ...] = ()

    def busy(self, gpus: int) -> float:
        """Return the share of the GPUs' time that was work."""
        return self.work_s / (gpus * self.wall_s) if self.wall_s else 0.0


@dataclass(frozen=True)
class Wire:
    """Messages between coordinators and expert actors: seconds of a question with its answer besides what its bytes take,
    bytes per second through one coordinator, and what a coordinator's core takes per value of its images and iteration
    (view, its gradient, Adam).

    Defaults were measured through the object store of one machine with 2 cores: 2.7 ms for 0.12 MB there and back, 10.7 ms
    for 60 MB there and 60 MB back, 24 ms of a coordinator for 10 images of 224 px. Between machines there is a network.
    """

    latency_s: float = 0.0027
    bytes_per_s: float = 15e9
    step_s_per_value: float = 0.024 / (10 * 3 * 224**2)


@dataclass(frozen=True)
class Question:
    """What a group asks of one expert in every iteration: FLOPs of the vote, bytes of views with labels, and of the answer."""

    flops: int
    bytes_out: int
    bytes_back: int


@dataclass(frozen=True)
class Group:
    """One group of synthesis jobs: iterations, values of its images, what it asks in each iteration, by expert, and FLOPs of
    views and of the gradient back through them."""

    iterations: int
    values: int
    asks: Mapping[str, Question]
    view_flops: int = 0

    def flops(self) -> dict[str, int]:
        """Return the FLOPs of all iterations by expert."""
        return {name: self.iterations * ask.flops for name, ask in self.asks.items()}


Seconds = Callable[[Mapping[str, int]], float]  # that one GPU takes for FLOPs by network


def play_colocated(groups: Mapping[str, Group], gpus: int, seconds: Seconds, views: str, per_gpu: int = 1) -> Played:
    """Workers with the whole committee, each with one group at a time; `views` names the FLOPs of views. Where `per_gpu`
    workers share a GPU, each has that part of its speed."""
    scheduler = Scheduler({name: group.flops() for name, group in groups.items()})
    took_s = group_seconds(groups, seconds, views)
    for number in range(min(gpus * per_gpu, len(groups))):
        scheduler.join(f"worker {number}")
    now, running, order = 0.0, [], []
    while scheduler.unfinished:
        for name, worker in scheduler.assign():
            order.append((name, worker))
            heapq.heappush(running, (now + per_gpu * took_s[name], len(order), name))
        now, _, name = heapq.heappop(running)
        scheduler.finish(name, per_gpu * took_s[name])
    return Played(now, sum(took_s.values()), tuple(order))


def group_seconds(groups: Mapping[str, Group], seconds: Seconds, views: str) -> dict[str, float]:
    """Return how long one GPU with the whole committee takes for each group."""
    return {n: seconds({**g.flops(), views: g.iterations * g.view_flops}) for n, g in groups.items()}


def ceiling(took_s: Sequence[float], gpus: int) -> float:
    """Return the share of the GPUs' time that can be work at most, however pieces are dealt out: someone has the longest;
    of the k * GPUs + 1 longest someone has k + 1, which take at least as long as the k + 1 shortest of them."""
    longest = sorted(took_s, reverse=True)
    rounds = (len(longest) - 1) // gpus
    wall_s = max((sum(longest[k * gpus - k : k * gpus + 1]) for k in range(rounds + 1)), default=0.0)
    return min(1.0, sum(longest) / (gpus * wall_s)) if wall_s else 0.0


def play_spread(groups: Mapping[str, Group], gpus: int, seconds: Seconds, in_flight: int, wire: Wire) -> Played:
    """Expert actors, several of an expert where there are more GPUs than experts, and coordinators that ask them.

    A GPU answers one question after the other in the order they arrive. Every group at work has a core of its coordinator's
    machine; messages of a coordinator pass one after the other. The first `ITERATIONS` of each group stand for all.
    """
    scheduler = Scheduler({name: group.flops() for name, group in groups.items()}, mixed=True)
    actors = expert_actors(groups, gpus)
    first = dict(zip(actors, [sum(list(actors.values())[:k]) for k in range(len(actors))], strict=True))
    per_gpu = -(-sum(actors.values()) // gpus)
    voters, at_once = max(len(group.asks) for group in groups.values()), min(sum(actors.values()), gpus)
    pick = {f"coordinator {k}": LeastBusy(k) for k in range(coordinators(at_once, voters, in_flight, len(groups)))}
    for coordinator in pick:
        scheduler.join(coordinator, in_flight)
    vote_s = {name: {e: seconds({e: ask.flops}) for e, ask in group.asks.items()} for name, group in groups.items()}
    steps = {name: min(group.iterations, ITERATIONS) for name, group in groups.items()}
    scale = max(group.iterations / steps[name] for name, group in groups.items())
    free, link, owner, left, open_ = [0.0] * gpus, dict.fromkeys(pick, 0.0), {}, dict(steps), {}
    events, order, number = [], [], count()

    def at(time: float, what: Callable, *about) -> None:
        heapq.heappush(events, (time, next(number), what, about))

    def send(now: float, name: str, num_bytes: int) -> float:
        """Return when a message arrives that is ready now."""
        coordinator = owner[name]
        link[coordinator] = max(link[coordinator], now) + num_bytes / wire.bytes_per_s
        return link[coordinator] + wire.latency_s / 2

    def begin(now: float) -> None:
        for name, coordinator in scheduler.assign():
            owner[name] = coordinator
            order.append((name, coordinator))
            step(now, name)

    def step(now: float, name: str) -> None:
        at(now + groups[name].values * wire.step_s_per_value, ask, name)

    def ask(now: float, name: str) -> None:
        open_[name] = len(groups[name].asks)
        for expert, question in groups[name].asks.items():
            actor = pick[owner[name]].pick(expert, actors[expert])
            at(send(now, name, question.bytes_out), vote, name, expert, actor)

    def vote(now: float, name: str, expert: str, actor: int) -> None:
        gpu = (first[expert] + actor) // per_gpu
        free[gpu] = max(free[gpu], now) + vote_s[name][expert]
        at(free[gpu], answer, name, expert, actor)

    def answer(now: float, name: str, expert: str, actor: int) -> None:
        at(send(now, name, groups[name].asks[expert].bytes_back), hear, name, expert, actor)

    def hear(now: float, name: str, expert: str, actor: int) -> None:
        pick[owner[name]].answered(expert, actor)
        open_[name] -= 1
        if open_[name]:
            return
        left[name] -= 1
        if left[name]:
            step(now, name)
            return
        scheduler.finish(name)
        begin(now)

    now = 0.0
    begin(now)
    while events:
        now, _, what, about = heapq.heappop(events)
        what(now, *about)
    work_s = sum(groups[name].iterations * sum(each.values()) for name, each in vote_s.items())
    return Played(now * scale, work_s, tuple(order))


def play_tasks(took_s: Sequence[float], gpus: int, per_gpu: int) -> Played:
    """Tasks in the order they are given, each on the fullest GPU that has room for one more; `per_gpu` of them share a GPU,
    whose speed is divided among those that are there."""
    waiting, now = list(took_s)[::-1], 0.0
    there: list[list[float]] = [[] for _ in range(gpus)]  # what is left of every task on a GPU, if it were alone
    while waiting or any(there):
        while waiting and (room := [tasks for tasks in there if len(tasks) < per_gpu]):
            max(room, key=len).append(waiting.pop())
        passed = min(min(tasks) * len(tasks) for tasks in there if tasks)
        now += passed
        for tasks in filter(None, there):
            share = passed / len(tasks)
            tasks[:] = [left - share for left in tasks if left - share > 1e-12 * now]
    return Played(now, float(sum(took_s)))


def expert_actors(groups: Mapping[str, Group], gpus: int) -> dict[str, int]:
    """Return how many actors every expert has on so many GPUs (or places without them)."""
    work: dict[str, int] = {}
    asking: dict[str, int] = {}
    for group in groups.values():
        for name, flops in group.flops().items():
            work[name] = work.get(name, 0) + flops
            asking[name] = asking.get(name, 0) + 1
    return replicas(work, gpus, asking)
