"""The runtime on Ray: stages' pieces of work as tasks, synthesis as expert actors and coordinators."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cvdd_ray.config import RuntimeConfig
from cvdd_ray.core.experts import ExpertSpec, prepare_torch
from cvdd_ray.errors import CvddError
from cvdd_ray.runner.actors import ColocatedWorker, Coordinator, ExpertActor, Mailbox, tell
from cvdd_ray.runner.cluster import (
    Share,
    connect,
    expert_share,
    outgrown,
    places_with,
    student_share,
    task_share,
    worker_bundles,
)
from cvdd_ray.runner.metrics import record
from cvdd_ray.stages.grouptask import VoterSettings
from cvdd_ray.stages.runtime import read_and_work

POLL_S = 0.25
SILENT_S = 30.0  # when no worker has begun for so long, for twice as long ..., it is said
# An actor is restarted when its process or node dies, its calls are repeated; one that keeps dying is given up.
RESTARTED = {"max_restarts": 20, "max_task_retries": -1}
# Which stage a function of the stages works for, and what its pieces are.
WORK = {
    "train_one": ("pretrain", "experts"),
    "measure_expert": ("prior", "students"),
    "read_and_work": ("initialize", "pieces"),
    "cut_piece": ("initialize", "pieces"),
    "tile_shard": ("initialize", "image files"),
    "assemble_shard": ("synthesize", "image files"),
    "label_epochs": ("relabel", "label blocks"),
    "run_student": ("evaluate", "students"),
}
# An actor or task that says a second time that it has started, has failed before.
AGAIN = {"actor_started": "actor_restarted", "task_started": "task_retried"}


OnEvent = Callable[[str, dict[str, Any]], None]


@dataclass(frozen=True)
class Work:
    """What is being done: pieces of a stage, each counting for so many units (a job group for its jobs)."""

    stage: str
    unit: str
    sizes: Mapping[str, int]


def _call(function: Callable, item: Any, name: str, mailbox: Any, threads: int, *shared: Any) -> Any:
    """One piece of work in a task: set torch up, run, send reports to the driver's mailbox."""
    prepare_torch(threads)
    tell(mailbox, "task_started", name, ray.get_runtime_context().get_task_id())
    return function(item, *shared, report=lambda report: mailbox.put.remote(name, report))


class RayRuntime:
    """Runs a stage's work on Ray; results and their bits are those of LocalRuntime.

    `on_event` is told of what happens on the way: actors, tasks and groups that start, checkpoints, finished pieces,
    failures, each with facts that JSON can hold.
    Raises ConfigError when Ray cannot be started or joined; errors of the work itself are raised as they are.
    """

    def __init__(self, c: RuntimeConfig, on_event: OnEvent = lambda event, facts: None):
        self._owns_ray = connect(c)
        self._c, self._on_event = c, on_event
        self._started: set[str] = set()  # Ray's ids of the actors and tasks that have said so
        # the driver's own node: not lost before the driver is; Ray takes `soft` for any node, and so far away reports
        # would be waited for until Ray notices that their node has gone
        self._here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._mailbox = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=self._here)(Mailbox).remote()
        self._experts: dict[str, Any] = {}
        self._holds: dict[str, tuple[ExpertSpec, VoterSettings]] = {}
        self._kept: dict[str, Any] = {}
        self._asked = Share(0.0, 0.0), 0  # of Ray for the latest distillation: each actor's share, and how many

    def map(self, function, items, shared=(), on_report=lambda name, report: None) -> Iterator[tuple[str, Any]]:
        share = task_share(self._c)
        remote = ray.remote(num_cpus=share.num_cpus, num_gpus=share.num_gpus, max_retries=3)(_call)
        shared_refs = [ray.put(value) for value in shared]
        waiting = {
            remote.remote(function, item, name, self._mailbox, self._c.threads_per_actor, *shared_refs): name
            for name, item in items.items()
        }
        yield from self._results(waiting, on_report, _work(function, items))

    def train(
        self, function, items, shared, num_workers, on_report=lambda name, report: None
    ) -> Iterator[tuple[str, Any]]:
        from cvdd_ray.runner import dataparallel

        self.release()  # workers take whole GPUs
        share, at_once = student_share(self._c, num_workers)
        remote = ray.remote(
            num_cpus=0, scheduling_strategy=self._here, runtime_env={"env_vars": dataparallel.ENVIRONMENT},
            concurrency_groups={"train": at_once, "tell": 8},
        )(dataparallel.WorkerGroups)  # fmt: skip
        todo, places, shared_refs = dict(items), {}, [ray.put(value) for value in shared]

        def heard(name: str, report: dict) -> None:
            places[name] = report.get("place") or places.get(name)
            on_report(name, report)

        for losses in range(dataparallel.MAX_FAILURES + 1):
            groups = remote.remote(num_workers, share, self._c.threads_per_actor)
            run = groups.run.options(concurrency_group="train")
            refs = {run.remote(name, item, function, shared_refs, self._mailbox): name for name, item in todo.items()}
            try:
                for name, result in self._results(refs, heard, _work(function, todo)):
                    del todo[name]
                    yield name, result
                return
            except RayActorError:  # of this actor or one of Ray Train's, which start workers again by themselves
                if losses == dataparallel.MAX_FAILURES:
                    raise
            finally:  # ends the workers; but Ray keeps the places of an actor that was ended
                ray.kill(groups)
                for place in filter(None, places.values()):
                    remove_placement_group(place)

    def stream(self, read, worker, items, shared=(), on_report=lambda name, report: None) -> Iterator[tuple[str, Any]]:
        if worker_bundles() is not None:  # Ray Data would look for places outside of this trial's
            yield from self.map(read_and_work, items, (read, worker, *shared), on_report)
            return
        from cvdd_ray.runner.streaming import stream

        work = _work(read_and_work, items)
        try:
            for name, rows in stream(self._c, read, worker, items, shared):
                self._done(name, work)
                yield name, rows
        except RayTaskError as error:
            raise mendable(error) from None

    def distill(self, tasks, experts, voter, store, on_report=lambda name, report: None) -> Iterator[tuple[str, bytes]]:
        used = {name for task in tasks.values() for job in task.jobs for name in job.voters}
        specs = {name: spec for name, spec in experts.items() if name in used}
        left = dict(tasks)
        while left:  # once, unless nodes leave: then the groups go on from their checkpoints on those that are left
            for name, result in self._distill_here(dict(left), specs, voter, store, on_report):
                del left[name]
                yield name, result

    def _distill_here(self, tasks, specs, voter, store, on_report) -> Iterator[tuple[str, bytes]]:
        """Yield results as groups finish, until all have or the actors no longer fit on the nodes that are there."""
        start = self._colocated if self._c.placement == "colocate" else self._spread
        drivers = start(specs, voter, store, len(tasks))
        try:
            waiting = {
                drivers[k % len(drivers)].run_group.remote(name, ray.put(task)): name
                for k, (name, task) in enumerate(tasks.items())
            }
            sizes = {name: len(task.jobs) for name, task in tasks.items()}
            stage = stage_of(next(iter(tasks.values())).checkpoint)
            until = outgrown(self._c, *self._asked)
            yield from self._results(waiting, on_report, Work(stage, "jobs", sizes), until)
        finally:
            for driver in drivers:
                ray.kill(driver)
            if self._c.address is not None or places_with("GPU") or worker_bundles():
                self.release()  # what the experts hold is needed by tasks of later stages

    def _spread(self, specs, voter, store, num_groups) -> list:
        """One actor per expert, kept for the next stage, and a coordinator with `groups_in_flight` groups at once."""
        c = self._c
        missing = {name: spec for name, spec in specs.items() if (spec, voter) != self._holds.get(name)}
        if missing:
            strategy = (
                {} if worker_bundles() else {"scheduling_strategy": "SPREAD"}
            )  # a trial's actors stay in its places
            self._asked = expert_share(c, len(specs)), len(specs)
            remote = _remote(ExpertActor, self._asked[0], **strategy)
            for name, spec in missing.items():
                if name in self._experts:
                    ray.kill(self._experts.pop(name))
                spec_ref = ray.put(spec)
                self._holds[name], self._kept[name] = (
                    (spec, voter),
                    spec_ref,
                )  # a restarted actor asks for its spec again
                self._experts[name] = remote.remote(spec_ref, voter, c.threads_per_actor, self._mailbox)
        coordinator = _remote(Coordinator, Share(0.0, 0.0), max_concurrency=min(c.groups_in_flight, num_groups))
        experts = {name: self._experts[name] for name in specs}
        return [coordinator.remote(experts, store, self._mailbox, c.threads_per_actor)]

    def release(self) -> None:
        """End the expert actors that are kept for the next stage."""
        for actor in self._experts.values():
            ray.kill(actor)
        self._experts, self._holds, self._kept = {}, {}, {}

    def _colocated(self, specs, voter, store, num_groups) -> list:
        """As many workers as there are GPUs (or cores), each with the whole committee and whole groups."""
        c = self._c
        places = int(sum(places_with("GPU")) or sum(places_with("CPU")) / c.threads_per_actor)
        num_workers = max(1, min(places, num_groups))
        self._asked = expert_share(c, num_workers), num_workers
        remote = _remote(ColocatedWorker, self._asked[0])
        specs_ref = self._kept["committee"] = ray.put(specs)
        return [remote.remote(specs_ref, voter, store, self._mailbox, c.threads_per_actor) for _ in range(num_workers)]

    def _results(
        self, waiting: Mapping[Any, str], on_report, work: Work, until: Callable[[], bool] = lambda: False
    ) -> Iterator[tuple[str, Any]]:
        """Yield (name, result) as work finishes and pass reports on; if one piece fails, or when `until` says so, the
        rest is cancelled."""
        waiting = dict(waiting)
        known = set(waiting.values())  # a late report of an earlier call is nobody's
        asked, silent_s = time.monotonic(), SILENT_S
        try:
            while waiting and not until():
                ready, _ = ray.wait(list(waiting), timeout=POLL_S)
                if self._watch(waiting, known, on_report, work):
                    silent_s = math.inf
                elif (waited_s := time.monotonic() - asked) > silent_s:
                    self._on_event("waiting", {"stage": work.stage, "waited_s": waited_s})
                    silent_s *= 2
                for result_ref in ready:
                    name = waiting.pop(result_ref)
                    result = self._get(result_ref, name)
                    self._done(name, work)
                    yield name, result
        finally:
            record("cvdd_work_left", 0, stage=work.stage, unit=work.unit)
            for result_ref in waiting:
                ray.cancel(result_ref, force=False)

    def _watch(self, waiting: Mapping[Any, str], known: set[str], on_report, work: Work) -> bool:
        """Pass on what workers have reported, count what had to be started again, and return whether there was anything."""
        left = sum(work.sizes[name] for name in waiting.values())
        record("cvdd_work_left", left, stage=work.stage, unit=work.unit)
        try:
            reports, events = ray.get(self._mailbox.take.remote())
        except RayActorError:  # what it held is lost while the mailbox restarts, nothing else
            return False
        for event in events:
            kind = event.pop("event")
            self._on_event(kind, event)
            again = kind in AGAIN and event["work"] in self._started
            self._started.add(event["work"])
            if again:
                self._failed(AGAIN[kind], event["what"], host=event["host"])
        for name, report in reports.items():
            if name in known:
                on_report(name, report)
        return bool(reports or events)

    def _get(self, result_ref: Any, name: str) -> Any:
        """Return a result; an error a user can mend is raised as itself, not wrapped in a remote traceback."""
        try:
            return ray.get(result_ref)
        except RayError as error:
            cause = mendable(error)
            self._failed(type(cause.cause if isinstance(cause, RayTaskError) else cause).__name__, name)
            if cause is error:
                raise
            raise cause from None

    def _done(self, name: str, work: Work) -> None:
        record("cvdd_work_done", work.sizes[name], stage=work.stage, unit=work.unit)
        self._on_event("piece_done", {"what": name, "number": work.sizes[name], "unit": work.unit})

    def _failed(self, kind: str, what: str, **facts: Any) -> None:
        record("cvdd_failures", 1, kind=kind)
        self._on_event("failure", {"kind": kind, "what": what, **facts})

    def close(self) -> None:
        self.release()
        if self._owns_ray:
            ray.shutdown()


def _work(function: Callable, items: Mapping[str, Any]) -> Work:
    return Work(*WORK.get(function.__name__, ("other", "pieces")), dict.fromkeys(items, 1))


def _remote(plain: type, share: Share, **options: Any):
    """Return the actor class of a plain class, restarted for ever."""
    return ray.remote(num_cpus=share.num_cpus, num_gpus=share.num_gpus, **RESTARTED, **options)(plain)


def stage_of(checkpoint: str) -> str:
    """Return the stage that a checkpoint is for, by where it lies: its stage's folder, in a sweep's `stages`."""
    return checkpoint.removeprefix("stages/").split("/")[0]


def mendable(error: Exception) -> Exception:
    """Return the error a user can mend that is behind one that came from a worker, else the error as it is."""
    cause = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if not isinstance(cause, CvddError):
        return error
    kind = next(kind for kind in type(cause).__mro__ if kind.__module__ == CvddError.__module__)
    return kind(str(cause.args[0]).splitlines()[0])  # Ray Data adds lines of its own
