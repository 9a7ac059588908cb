"""What Ray costs in synthesis, and what it leaves idle, in seconds of CPU cores.

All of it is counted, nothing estimated: seconds of CPU of every vote and every step between votes, of all processes of the
private Ray that is started for it, and of the clock. What is neither vote nor step is Ray's: calls, messages, copies, and its
own processes. What nobody used of the cores is idle.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from statistics import median
from typing import Any

import psutil
import ray
import torch

from cvdd_ray.bench.unreal import random_expert, unreal_run
from cvdd_ray.bench.works import SynthesisWork, synthesis_work
from cvdd_ray.config import RunConfig
from cvdd_ray.core.committee import Ballot
from cvdd_ray.core.synthesis import Job
from cvdd_ray.data.datasets import DatasetInfo
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError
from cvdd_ray.runner.actors import Coordinator, ExpertActor
from cvdd_ray.runner.cluster import Share, places_with
from cvdd_ray.runner.committee import RayCommittee
from cvdd_ray.runner.crews import remote_class
from cvdd_ray.runner.runtime import RayRuntime
from cvdd_ray.runner.wires import WIRES
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.grouptask import GroupTask, NoiseStarts

ITERATIONS = 40  # of a round
WARM_UP = 3  # iterations before a round
MESSAGES = 20  # of a round, timed one by one
NOWHERE = Share(0.0, 0.0)  # actors of a private Ray ask for no cores: they share what there is
Spread = tuple[float, float, float]  # median, least and most of the rounds


@dataclass(frozen=True)
class Wire:
    """A round of two expert actors and a coordinator: seconds of the clock; of CPU in votes by expert, in steps, and in all
    processes; of the clock in votes by expert; images times iterations."""

    wall_s: float
    vote_cpu_s: Mapping[str, float]
    step_cpu_s: float
    total_cpu_s: float
    vote_wall_s: Mapping[str, float]
    units: int

    def shares(self, cores: int) -> dict[str, float]:
        """Return the shares of the time of so many cores, which add up to 1: votes, steps, Ray, idle."""
        votes, whole = sum(self.vote_cpu_s.values()), cores * self.wall_s
        spent = {
            "votes": votes / whole,
            "steps": self.step_cpu_s / whole,
            "ray": (self.total_cpu_s - votes - self.step_cpu_s) / whole,
        }
        return {**spent, "idle": 1.0 - sum(spent.values())}

    def waiting(self) -> dict[str, float]:
        """Return the share of the time in which each expert's actor had no vote to give."""
        return {name: 1.0 - seconds / self.wall_s for name, seconds in self.vote_wall_s.items()}


@dataclass(frozen=True)
class Placed:
    """A round of a whole synthesis, from the first group that is handed out to the last that is finished: seconds of the
    clock, of CPU in all processes, and images times iterations."""

    wall_s: float
    total_cpu_s: float
    units: int

    def idle(self, cores: int) -> float:
        """Return the share of so many cores' time that nobody used."""
        return 1.0 - self.total_cpu_s / (cores * self.wall_s)


@dataclass(frozen=True)
class RayCosts:
    """What was measured on so many cores: rounds by wire, and of whole syntheses by placement; empty where not asked for.
    `in_flight` groups of up to `group_images` images were under way at once over a coordinator. A message is a question of
    `message_bytes` and an answer of as many, its seconds those of one alone, without the vote."""

    cores: int
    in_flight: int
    group_images: int
    wires: Mapping[str, tuple[Wire, ...]] = field(default_factory=dict)
    message_bytes: int = 0
    messages_s: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    placements: Mapping[str, tuple[Placed, ...]] = field(default_factory=dict)

    def shares(self) -> dict[str, dict[str, Spread]]:
        """Return the shares of the cores' time, by wire."""
        return {wire: spreads([one.shares(self.cores) for one in rounds]) for wire, rounds in self.wires.items()}

    def waiting(self) -> dict[str, dict[str, Spread]]:
        """Return the shares of the time in which the experts waited, by wire."""
        return {wire: spreads([one.waiting() for one in rounds]) for wire, rounds in self.wires.items()}

    def ms(self) -> dict[str, dict[str, Spread]]:
        """Return milliseconds of the clock, of a message, and of a round per image and iteration, by wire."""
        return {
            wire: spreads([{"message": 1000 * s} for s in self.messages_s[wire]])
            | spreads([{"image and iteration": 1000 * one.wall_s / one.units} for one in rounds])
            for wire, rounds in self.wires.items()
        }

    def placed(self) -> dict[str, dict[str, Spread]]:
        """Return milliseconds per image and iteration, and the idle share of the cores, by placement."""
        return {
            placement: spreads([{"ms": 1000 * r.wall_s / r.units, "idle": r.idle(self.cores)} for r in rounds])
            for placement, rounds in self.placements.items()
        }


def spreads(rounds: Sequence[Mapping[str, float]]) -> dict[str, Spread]:
    """Return (median, least, most) of every named value."""
    each = {name: [one[name] for one in rounds] for name in (rounds[0] if rounds else ())}
    return {name: (median(values), min(values), max(values)) for name, values in each.items()}


def measure_ray(
    config: RunConfig, what: Sequence[str], *, ipc: int | None = None, rounds: int = 3, iterations: int | None = None,
    num_classes: int | None = None,
) -> RayCosts:  # fmt: skip
    """Measure synthesis of one class chunk at `ipc` in a private Ray on this machine's cores.

    `wire`: the two voters of the first image vote on all of them, an actor for each, one coordinator with
    `runtime.groups_in_flight` groups at once, over all wires in turn; and messages without votes. `scheduler`: everything as
    a run does it, once per placement.
    Raises ConfigError where a Ray is joined, there are GPUs, or an image of the wire has not two voters, and as `bench`.
    """
    if config.runtime.address is not None:
        raise ConfigError(
            f"bench {what[0]} starts a Ray of its own; leave out runtime.address ({config.runtime.address!r})"
        )
    run = unreal_run(config, num_classes)
    work = synthesis_work(run, ipc or config.ipc[0], iterations or ITERATIONS)
    images = max(sum(len(job.labels) for job in group) for group in work.groups)
    costs = RayCosts(len(os.sched_getaffinity(0)), config.runtime.groups_in_flight, images)
    if "wire" in what:
        two = with_two_voters(work)
        with private_ray(run, "spread") as (runtime, store):
            crew = Crew(two, run, store, runtime.mailbox)
            made = {wire: [] for wire in WIRES}
            for number in range(rounds):
                for wire in WIRES:
                    made[wire].append(crew.round(number, wire))
            crew.close()
            echo = Echoes(two, run)
            taken = {wire: [] for wire in WIRES}
            for number in range(-1, rounds):
                for wire in WIRES:
                    seconds = echo.round(wire)
                    taken[wire] += seconds if number >= 0 else []  # before, connections are made
        costs = replace(
            costs, wires={wire: tuple(those) for wire, those in made.items()}, message_bytes=echo.message_bytes,
            messages_s={wire: tuple(those) for wire, those in taken.items()},
        )  # fmt: skip
    if "scheduler" in what:
        placed = {}
        for placement in ("colocate", "spread"):
            with private_ray(run, placement) as (runtime, store):
                placed[placement] = tuple(whole_round(runtime, work, run.info, store, k) for k in range(rounds))
        costs = replace(costs, placements=placed)
    return costs


@contextmanager
def private_ray(run: Run, placement: str) -> Iterator[tuple["Observed", Store]]:
    """Yield a runtime on a Ray of its own, and a store that goes with it.  Raises ConfigError where it has GPUs."""
    c = run.config.runtime.model_copy(update={"engine": "ray", "placement": placement})
    with tempfile.TemporaryDirectory() as folder:
        runtime = Observed(c)
        try:
            if places_with("GPU"):
                raise ConfigError("bench with Ray counts seconds of CPU cores; hide the GPUs: CUDA_VISIBLE_DEVICES=")
            yield runtime, Store(folder)
        finally:
            runtime.close()


class Observed(RayRuntime):
    """The runtime of a run; `on_first` is called when the first group of a synthesis is handed out."""

    def __init__(self, c):
        self.on_first: Callable[[], None] | None = None
        super().__init__(c, self._heard)
        self.mailbox = self._mailbox

    def _heard(self, event: str, _facts: Mapping) -> None:
        if event == "group_assigned" and self.on_first is not None:
            self.on_first()
            self.on_first = None


def whole_round(runtime: Observed, work: SynthesisWork, info: DatasetInfo, store: Store, number: int) -> Placed:
    """Distil all groups as a run does."""
    tasks = {f"round{number}-group{g}": group for g, group in enumerate(work.groups)}
    tasks = {title: group_task(work, info, title, group) for title, group in tasks.items()}
    began: list[float] = []
    runtime.on_first = lambda: began.extend((time.perf_counter(), tree_cpu_s()))
    specs = {name: random_expert(network) for name, network in work.experts.items()}
    for _ in runtime.distill(tasks, specs, work.voter, store):
        ended = time.perf_counter(), tree_cpu_s()
    return Placed(ended[0] - began[0], ended[1] - began[1], work.units())


def with_two_voters(work: SynthesisWork) -> SynthesisWork:
    """Return the work with the first image's two voters for all of them, of equal weight."""
    voters = work.groups[0][0].voters
    if len(voters) != 2:
        raise ConfigError(f"bench wire is about two voters per image, these have {len(voters)}; set voting.size=2")
    groups = [tuple(replace(job, voters=voters, weights=(0.5, 0.5)) for job in group) for group in work.groups]
    return replace(work, experts={name: work.experts[name] for name in voters}, groups=tuple(groups))


class Crew:
    """An actor per expert, and one coordinator at a time: every process of Ray, idle or not, wakes a hundred times a second,
    so there are no more than a run has."""

    def __init__(self, work: SynthesisWork, run: Run, store: Store, mailbox: Any):
        self._c, self._work, self._info, self._store, self._mailbox = run.config.runtime, work, run.info, store, mailbox
        expert = remote_class(ExpertActor, NOWHERE)
        self._experts = {
            name: [expert.remote(random_expert(network), work.voter, self._c.threads_per_actor, mailbox)]
            for name, network in work.experts.items()
        }

    def round(self, number: int, wire: str) -> Wire:
        """Run all groups once, over this wire, and return what it took."""
        c = self._c
        remote = remote_class(Coordinator, NOWHERE, max_concurrency=c.groups_in_flight + 1)
        coordinator = remote.remote(0, self._store, self._mailbox, c.threads_per_actor, c.hung_s, wire)
        few = replace(self._work, settings=replace(self._work.settings, iterations=WARM_UP))
        # networks are built, connections made, and the allocator is warm
        self._distill(coordinator, few, f"{wire}-before{number}")
        before, began = self._spent(coordinator), time.perf_counter()
        self._distill(coordinator, self._work, f"{wire}-round{number}")
        wall_s, after = time.perf_counter() - began, self._spent(coordinator)
        ray.kill(coordinator)
        cpu, wall = (
            {name: late[name] - early[name] for name in late} for early, late in zip(before, after, strict=True)
        )
        votes, votes_wall = ({name: spent[name] for name in self._experts} for spent in (cpu, wall))
        return Wire(wall_s, votes, cpu["steps"], cpu["all"], votes_wall, self._work.units())

    def _distill(self, coordinator: Any, work: SynthesisWork, title: str) -> None:
        tasks = {f"{title}-group{g}": group for g, group in enumerate(work.groups)}
        waiting, running = [(name, group_task(work, self._info, name, group)) for name, group in tasks.items()], []
        while waiting or running:
            while waiting and len(running) < self._c.groups_in_flight:
                running.append(coordinator.run_group.remote(*waiting.pop(0), self._experts))
            done, running = ray.wait(running)
            ray.get(done)

    def close(self) -> None:
        """End the experts' actors."""
        for (actor,) in self._experts.values():
            ray.kill(actor)

    def _spent(self, coordinator: Any) -> tuple[dict[str, float], dict[str, float]]:
        """Return the seconds of CPU and of the clock so far, by expert, of steps, and (CPU) of all processes."""
        refs = {name: actors[0].spent.remote() for name, actors in self._experts.items()}
        refs["steps"] = coordinator.spent.remote()
        sums = dict(zip(refs, ray.get(list(refs.values())), strict=True))
        cpu = {name: cpu_s for name, (_, cpu_s, _) in sums.items()}
        return {**cpu, "all": tree_cpu_s()}, {name: wall_s for name, (_, _, wall_s) in sums.items()}


class Echo(ExpertActor):
    """An expert actor that votes at once, with the views for a gradient."""

    def _answer(self, views_GBCHW, labels_GB, *more):
        return [views_GBCHW, *torch.zeros(2, len(views_GBCHW)), *more[:1]]


class Echoes:
    """Messages of the work's largest group to an actor that does not compute."""

    def __init__(self, work: SynthesisWork, run: Run):
        c = run.config.runtime
        (name, network), *_ = work.experts.items()
        actor = remote_class(Echo, NOWHERE).remote(random_expert(network), work.voter, c.threads_per_actor)
        self._committees = {wire: RayCommittee({name: [actor]}, wire=wire) for wire in WIRES}
        group = max(work.groups, key=lambda group: sum(len(job.labels) for job in group))
        labels_GB = torch.tensor([job.labels for job in group])
        views_GBCHW = torch.rand(*labels_GB.shape, 3, work.size, work.size)
        self._ballots, self.message_bytes = {name: Ballot(views_GBCHW, labels_GB)}, views_GBCHW.nbytes

    def round(self, wire: str) -> list[float]:
        """Return seconds of the clock of every message."""
        taken = []
        for _ in range(MESSAGES):
            began = time.perf_counter()
            self._committees[wire].vote(self._ballots)
            taken.append(time.perf_counter() - began)
        return taken


def group_task(work: SynthesisWork, info: DatasetInfo, title: str, group: Sequence[Job]) -> GroupTask:
    """Return a group that starts from noise."""
    starts = NoiseStarts(0, work.size)
    return GroupTask(tuple(group), starts, work.settings, info, "png", f"{title}.checkpoint", f"{title}.arrow")


def tree_cpu_s() -> float:
    """Return the seconds of CPU that this process and all that it has started, and is still there, have used."""
    me, total = psutil.Process(), 0.0
    for process in [me, *me.children(recursive=True)]:
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += times.user + times.system
    return total
