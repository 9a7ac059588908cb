"""The workers of a synthesis as Ray actors, by placement: whole committees, or coordinators and the experts they ask.

A crew starts workers, passes groups to them and, when nodes have joined, adds to them; what goes where is decided by the
scheduler (stages/scheduling.py). A worker that is new or was lost is heard of when its `ready` returns.
"""

import time
from collections.abc import Mapping
from typing import Any

import ray

from cvdd_ray.config import RuntimeConfig
from cvdd_ray.core.experts import ExpertSpec
from cvdd_ray.data.storage import Store
from cvdd_ray.runner.actors import ColocatedWorker, Coordinator, ExpertActor
from cvdd_ray.runner.cluster import Share, expert_share, outgrown, room, worker_bundles, worker_places
from cvdd_ray.runner.recovery import MAX_LOSSES
from cvdd_ray.stages.grouptask import GroupTask, VoterSettings
from cvdd_ray.stages.scheduling import coordinators
from cvdd_ray.stages.simulation import Group, expert_actors

# An actor is restarted when its process or node dies; one that keeps dying is given up. Calls of experts, and those that ask
# whether a worker is there, wait for the restart and are repeated.
RESTARTED = {"max_restarts": MAX_LOSSES, "max_task_retries": -1}
GROW_S = 2.0  # how often new places are looked for


def remote_class(plain: type, share: Share, **options: Any):
    """Return the actor class of a plain class, restarted when it dies."""
    return ray.remote(num_cpus=share.num_cpus, num_gpus=share.num_gpus, **RESTARTED, **options)(plain)


class Workers:
    """Actors of one kind that run groups, by name: `worker 0`, `worker 1` ..."""

    def __init__(self, what: str):
        self._what = what
        self.actors: dict[str, Any] = {}
        self.hired = 0

    def hire(self, remote: Any, *arguments: Any) -> dict[Any, str]:
        """Start one more and return {what to wait for: its name}."""
        name = f"{self._what} {self.hired}"
        self.hired += 1
        self.actors[name] = remote.remote(*arguments)
        return {self.greet(name): name}

    def greet(self, name: str) -> Any:
        """Return what is there as soon as the worker is, however often it has to be started again before."""
        return self.actors[name].ready.remote()

    def run(self, worker: str, name: str, task: GroupTask, *more: Any) -> Any:
        """Return the coming result of a group; it fails when the worker is lost, so that another can have the group."""
        return self.actors[worker].run_group.options(max_task_retries=0).remote(name, task, *more)

    def ask(self, what: str) -> None:
        """Ask all workers to `keep` or to `stop` the groups they work on."""
        for actor in self.actors.values():
            getattr(actor, what).remote()

    def dismiss(self, name: str) -> None:
        """End a worker."""
        ray.kill(self.actors.pop(name))


class Colocated:
    """As many workers as there are GPUs (or cores), each with the whole committee and one group at a time."""

    slots = 1

    def __init__(
        self, c: RuntimeConfig, specs: Mapping[str, ExpertSpec], voter: VoterSettings, store: Store, mailbox: Any,
        num_groups: int,
    ):  # fmt: skip
        self._c, self.workers = c, Workers("worker")
        self._first = max(1, min(worker_places(c), num_groups))
        self._share = expert_share(c, self._first)
        self._remote = remote_class(ColocatedWorker, self._share, max_concurrency=2)  # a group, and what is asked of it
        self._specs_ref = ray.put(specs)  # kept: a restarted worker asks for it again
        self._arguments = self._specs_ref, voter, store, mailbox, c.threads_per_actor
        self._looked = time.monotonic()
        self.lacking = outgrown(c, self._share, 1)

    def start(self) -> dict[Any, str]:
        """Start the workers and return {what to wait for: name}."""
        return self._hire(self._first)

    def grow(self, unfinished: int) -> dict[Any, str]:
        """Start more where nodes have joined, at most one per unfinished group."""
        if time.monotonic() - self._looked < GROW_S:
            return {}
        self._looked = time.monotonic()
        return self._hire(min(room(self._share), unfinished) - self.workers.hired)

    def run(self, worker: str, name: str, task: GroupTask) -> Any:
        return self.workers.run(worker, name, task)

    def end(self) -> None:
        for name in list(self.workers.actors):
            self.workers.dismiss(name)

    def _hire(self, number: int) -> dict[Any, str]:
        return {
            ref: name for _ in range(number) for ref, name in self.workers.hire(self._remote, *self._arguments).items()
        }


class Experts:
    """Expert actors, one or several of each expert. They outlive a crew, for the next stage may ask the same."""

    def __init__(self):
        self.actors: dict[str, list[Any]] = {}
        self._holds: dict[str, tuple[ExpertSpec, VoterSettings]] = {}
        self._spec_refs: dict[str, Any] = {}  # kept: a restarted actor asks for its spec again

    def want(
        self, specs: Mapping[str, ExpertSpec], voter: VoterSettings, number: Mapping[str, int], share: Share, threads: int,
        mailbox: Any,
    ) -> list[tuple[str, Any]]:  # fmt: skip
        """Start what is missing of `number` actors of each expert and end what is too many; return those started."""
        strategy = {} if worker_bundles() else {"scheduling_strategy": "SPREAD"}  # a trial's actors stay in its places
        remote = remote_class(ExpertActor, share, **strategy)
        started = []
        for name, spec in specs.items():
            if self._holds.get(name) != (spec, voter):
                self._end(name, 0)
                self._holds[name], self._spec_refs[name] = (spec, voter), ray.put(spec)
            self._end(name, number[name])
            while len(self.actors[name]) < number[name]:
                self.actors[name].append(remote.remote(self._spec_refs[name], voter, threads, mailbox))
                started.append((name, self.actors[name][-1]))
        return started

    def release(self) -> None:
        """End all of them."""
        for name in self.actors:
            self._end(name, 0)
        for kept in (self.actors, self._holds, self._spec_refs):
            kept.clear()

    def _end(self, name: str, keep: int) -> None:
        actors = self.actors.setdefault(name, [])
        while len(actors) > keep:
            ray.kill(actors.pop())


class Spread:
    """Coordinators with `groups_in_flight` groups at once, and expert actors: where there are more GPUs (or cores) than
    experts, several of an expert, in proportion to what its votes cost over all groups."""

    def __init__(
        self, c: RuntimeConfig, specs: Mapping[str, ExpertSpec], voter: VoterSettings, store: Store, mailbox: Any,
        groups: Mapping[str, Group], experts: Experts,
    ):  # fmt: skip
        self._c, self._specs, self._voter, self._mailbox = c, specs, voter, mailbox
        self._groups, self._experts, self.workers = groups, experts, Workers("coordinator")
        self._number = expert_actors(groups, worker_places(c))
        self._share = expert_share(c, sum(self._number.values()))
        self._coming: dict[Any, tuple[str, Any]] = {}
        self._want()
        self._there = {name: list(experts.actors[name]) for name in specs}  # calls wait until they are
        self.slots = min(c.groups_in_flight, len(groups))
        self._remote = remote_class(Coordinator, Share(0.0, 0.0), max_concurrency=self.slots + 1)
        self._arguments = store, mailbox, c.threads_per_actor, voter.patience_s(c.hung_s), c.wire
        self._looked = time.monotonic()

    def start(self) -> dict[Any, str]:
        """Start the coordinators and return {what to wait for: name}."""
        return self._hire()

    def grow(self, unfinished: int) -> dict[Any, str]:
        """Start more actors of the experts that cost most where nodes have joined, and tell the coordinators of those that
        are there; start more coordinators when that makes sense."""
        ready, _ = ray.wait(list(self._coming), num_returns=len(self._coming), timeout=0) if self._coming else ([], [])
        for ref in ready:
            ray.get(ref)
            name, actor = self._coming.pop(ref)
            self._there[name].append(actor)
        if ready:
            for coordinator in self.workers.actors.values():
                coordinator.meet.remote(self._there)
        if time.monotonic() - self._looked < GROW_S:
            return {}
        self._looked = time.monotonic()
        more = expert_actors(self._groups, min(worker_places(self._c), room(self._share)))
        if sum(more.values()) <= sum(self._number.values()):
            return {}
        self._number = {name: max(number, self._number[name]) for name, number in more.items()}
        self._coming |= {actor.ready.remote(): (name, actor) for name, actor in self._want()}
        return self._hire()

    def run(self, worker: str, name: str, task: GroupTask) -> Any:
        return self.workers.run(worker, name, task, self._there)

    def end(self) -> None:
        """End the coordinators; the experts stay, where they hold nothing that later work needs."""
        for name in list(self.workers.actors):
            self.workers.dismiss(name)

    def _want(self) -> list[tuple[str, Any]]:
        total = sum(self._number.values())
        self.lacking = outgrown(self._c, self._share, total, fewest=len(self._specs))
        threads = self._c.threads_per_actor
        return self._experts.want(self._specs, self._voter, self._number, self._share, threads, self._mailbox)

    def _hire(self) -> dict[Any, str]:
        voters = max(len(group.asks) for group in self._groups.values())
        at_once = min(sum(self._number.values()), max(1, worker_places(self._c)))
        wanted = coordinators(at_once, voters, self.slots, len(self._groups))
        arriving: dict[Any, str] = {}
        while self.workers.hired < wanted:
            arriving |= self.workers.hire(self._remote, self.workers.hired, *self._arguments)
        return arriving
