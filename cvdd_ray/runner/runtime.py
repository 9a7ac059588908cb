"""The runtime on Ray: stages' pieces of work as tasks, synthesis as expert actors and coordinators."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import OutOfMemoryError, RayActorError, RayError, RayTaskError
from ray.util import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cvdd_ray.config import RuntimeConfig
from cvdd_ray.core.costs import Network, forward_cost
from cvdd_ray.core.experts import prepare_torch
from cvdd_ray.errors import CvddError, NumericsError
from cvdd_ray.runner.cluster import connect, gpu_memory, places_with, student_share, task_share, worker_bundles
from cvdd_ray.runner.crews import Colocated, Experts, Spread
from cvdd_ray.runner.mailbox import Mailbox, tell
from cvdd_ray.runner.metrics import record
from cvdd_ray.runner.recovery import (
    MAX_LOSSES,
    STOP_S,
    TRIES,
    Leaving,
    LostCrewError,
    LostWorkerError,
    Poisoned,
    innermost,
)
from cvdd_ray.stages.grouptask import Notice
from cvdd_ray.stages.groupwork import committee_bytes, fits, group_of, workers_per_gpu
from cvdd_ray.stages.runtime import interruptible, read_and_work
from cvdd_ray.stages.scheduling import GroupClock, Scheduler

POLL_S = 0.25
SILENT_S = 30.0  # when no worker has begun for so long, for twice as long ..., it is said
LOST = (RayActorError, OutOfMemoryError)  # a worker's process or node is gone
# Which stage a function of the stages works for, and what its pieces are.
WORK = {
    "train_one": ("pretrain", "experts"),
    "measure_expert": ("prior", "students"),
    "measure_statistics": ("statistics", "experts"),
    "read_and_work": ("initialize", "pieces"),
    "choose_of_classes": ("initialize", "pieces"),
    "cut_piece": ("initialize", "pieces"),
    "tile_shard": ("initialize", "image files"),
    "measure_sizes": ("calibrate", "pieces"),
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
        self._experts = Experts()

    def map(self, function, items, shared=(), on_report=lambda name, report: None) -> Iterator[tuple[str, Any]]:
        share = task_share(self._c)
        remote = ray.remote(num_cpus=share.num_cpus, num_gpus=share.num_gpus, max_retries=3)(_call)
        shared_refs = [ray.put(value) for value in shared]

        def begin(name: str) -> Any:
            return remote.remote(function, items[name], name, self._mailbox, self._c.threads_per_actor, *shared_refs)

        yield from self._results({begin(name): name for name in items}, on_report, _work(function, items), begin)

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
        left, poisoned, notice, lost = dict(tasks), Poisoned(), Notice(), 0
        with interruptible(notice):
            while (
                left
            ):  # once, unless nodes or all workers are lost: then the groups go on from their checkpoints on others
                try:
                    for name, result in self._distill_here(
                        dict(left), specs, voter, store, on_report, poisoned, notice
                    ):
                        del left[name]
                        if result is not None:
                            yield name, result
                except LostCrewError as error:
                    lost += 1
                    if lost == TRIES:
                        raise error.__cause__ from None
                    self._failed("workers_lost", "all of them")
                    self.release()
        poisoned.raise_first()

    def _distill_here(
        self, tasks, specs, voter, store, on_report, poisoned, notice
    ) -> Iterator[tuple[str, bytes | None]]:
        """Yield results as groups finish (None: it is given up), until all have or the actors no longer fit on the nodes that
        are there.

        The scheduler says which group goes to which worker. Workers that are lost, or say nothing for `hung_s`, give their
        groups back, and join again when Ray has restarted them; where nodes join, more are started, and when one is going
        to leave, checkpoints are written. Raises LostCrewError, and KeyboardInterrupt when the notice asks to stop.
        """
        crew, scheduler = self._muster(tasks, specs, voter, store)
        work = Work(stage_of(next(iter(tasks.values())).checkpoint), "jobs", {n: len(t.jobs) for n, t in tasks.items()})
        watch, losses, left = GroupClock(on_report), Counter(), dict(tasks)
        running: dict[Any, tuple[str, str]] = {}  # group and worker
        asked, silent_s, leaving = time.monotonic(), SILENT_S, Leaving()
        try:
            arriving = crew.start()
            while left and not crew.lacking():
                if notice.stopping:
                    crew.workers.ask("stop")
                    ray.wait(list(running), num_returns=len(running), timeout=STOP_S) if running else None
                    raise KeyboardInterrupt
                if nodes := leaving.news():
                    crew.workers.ask("keep")
                    self._on_event("nodes_leaving", {"what": ", ".join(nodes), "stage": work.stage})
                for name, worker in running.values():
                    if watch.silent_s(name) > voter.patience_s(self._c.hung_s):
                        watch.begin(name)
                        self._failed("worker_hung", worker)
                        ray.kill(crew.workers.actors[worker], no_restart=False)
                for name, worker in scheduler.assign():
                    running[crew.run(worker, name, tasks[name])] = name, worker
                    watch.begin(name)
                    self._on_event("group_assigned", {"what": name, "worker": worker})
                ready, _ = ray.wait([*running, *arriving], timeout=POLL_S)
                if self._watch(left, set(tasks), watch.report, work):
                    silent_s = math.inf
                elif (waited_s := time.monotonic() - asked) > silent_s:
                    self._on_event("waiting", {"stage": work.stage, "waited_s": waited_s})
                    silent_s *= 2
                for ref in ready:
                    if ref in arriving:
                        self._welcome(crew, scheduler, arriving.pop(ref), ref)
                        continue
                    name, worker = running.pop(ref)
                    try:
                        result = self._get(ref, name, losses[name] < MAX_LOSSES)
                    except LostWorkerError:
                        losses[name] += 1
                        returned = scheduler.lose(worker)
                        running = {other: at for other, at in running.items() if at[1] != worker}
                        arriving[crew.workers.greet(worker)] = worker
                        self._on_event("worker_lost", {"what": worker, "groups": returned})
                        break  # what else is ready may have been this worker's; it stays ready
                    except (RayError, NumericsError) as error:
                        if isinstance(innermost(error), RayActorError):  # an expert that cannot be started again
                            raise LostCrewError from error
                        if poisoned.again(name, error):
                            scheduler.give_back(name)
                        else:
                            scheduler.give_up(name)
                            del left[name]
                            yield name, None
                        continue
                    scheduler.finish(name, watch.took_s(name))
                    del left[name]
                    self._done(name, work)
                    yield name, result
                arriving |= crew.grow(len(left))
        finally:
            record("cvdd_work_left", 0, stage=work.stage, unit=work.unit)
            for ref in running:
                ray.cancel(ref, force=False)
            crew.end()
            if self._c.address is not None or places_with("GPU") or worker_bundles():
                self.release()  # what the experts hold is needed by tasks of later stages

    def _muster(self, tasks, specs, voter, store) -> tuple[Colocated | Spread, Scheduler]:
        """Return the workers for some groups, not started yet, and who gets which."""
        tile = voter.matching and voter.matching.patch_size
        networks = {
            n: Network(spec.name, spec.num_classes, spec.image_size, spec.width, tile) for n, spec in specs.items()
        }
        flops = {name: 2 * forward_cost(network).flops for name, network in networks.items()}  # of a vote on an image
        groups = {
            name: group_of(task.jobs, flops, task.info.image_size, task.settings.iterations)
            for name, task in tasks.items()
        }
        colocated = self._is_colocated([task.jobs for task in tasks.values()], networks)
        args = self._c, specs, voter, store, self._mailbox
        crew = Colocated(*args, len(tasks)) if colocated else Spread(*args, groups, self._experts)
        return crew, Scheduler({name: group.flops() for name, group in groups.items()}, mixed=not colocated)

    def _is_colocated(self, groups: Sequence, networks: Mapping[str, Network]) -> bool:
        """Return what the placement is, or what `auto` makes of it: colocated where every GPU holds the committee."""
        c = self._c
        if c.placement != "auto":
            return c.placement == "colocate"
        if c.gpus_per_actor == 0 or not places_with("GPU"):
            return True
        self.release()  # what experts hold would keep the GPUs from answering
        needed, memory = workers_per_gpu(c.gpus_per_actor) * committee_bytes(groups, networks), gpu_memory()
        self._on_event("placement", {"colocate": fits(needed, memory), "needed_bytes": needed, "gpu_bytes": memory})
        return fits(needed, memory)

    def _welcome(self, crew: Colocated | Spread, scheduler: Scheduler, worker: str, ref: Any) -> None:
        """A worker says that it is there, or Ray that it has been started in vain too often."""
        try:
            self._get(ref, worker, replaceable=True)
        except LostWorkerError as error:
            crew.workers.dismiss(worker)
            if not crew.workers.actors:
                raise LostCrewError from error.__cause__
        else:
            scheduler.join(worker, crew.slots)

    def release(self) -> None:
        """End the expert actors that are kept for the next stage."""
        self._experts.release()

    def _results(
        self, waiting: Mapping[Any, str], on_report, work: Work, again: Callable[[str], Any] | None = None
    ) -> Iterator[tuple[str, Any]]:
        """Yield (name, result) as work finishes and pass reports on. A piece that fails begins `again`, a few times, and is
        then given up when the others have finished; where it cannot, and for errors a user can mend, the rest is cancelled.
        """
        waiting, poisoned = dict(waiting), Poisoned()
        known = set(waiting.values())  # a late report of an earlier call is nobody's
        asked, silent_s = time.monotonic(), SILENT_S
        try:
            while waiting:
                ready, _ = ray.wait(list(waiting), timeout=POLL_S)
                if self._watch(waiting.values(), known, on_report, work):
                    silent_s = math.inf
                elif (waited_s := time.monotonic() - asked) > silent_s:
                    self._on_event("waiting", {"stage": work.stage, "waited_s": waited_s})
                    silent_s *= 2
                for result_ref in ready:
                    name = waiting.pop(result_ref)
                    try:
                        result = self._get(result_ref, name)
                    except (RayError, NumericsError) as error:
                        if again is None:
                            raise
                        if poisoned.again(name, error):
                            waiting[again(name)] = name
                        continue
                    self._done(name, work)
                    yield name, result
            poisoned.raise_first()
        finally:
            record("cvdd_work_left", 0, stage=work.stage, unit=work.unit)
            for result_ref in waiting:
                ray.cancel(result_ref, force=False)

    def _watch(self, unfinished: Iterable[str], known: set[str], on_report, work: Work) -> bool:
        """Pass on what workers have reported, count what had to be started again, and return whether there was anything."""
        left = sum(work.sizes[name] for name in unfinished)
        record("cvdd_work_left", left, stage=work.stage, unit=work.unit)
        try:
            reports, events = ray.get(self._mailbox.take.remote())
        except RayActorError:  # what it held is lost while the mailbox restarts, nothing else
            return False
        for event in events:
            kind = event.pop("event")
            self._on_event(kind, event)
            if kind in ("expert_hung", "connection_lost"):
                self._failed(kind, event["what"], host=event["host"])
            again = kind in AGAIN and event["work"] in self._started
            self._started.add(event["work"])
            if again:
                self._failed(AGAIN[kind], event["what"], host=event["host"])
        for name, report in reports.items():
            if name in known:
                on_report(name, report)
        return bool(reports or events)

    def _get(self, result_ref: Any, name: str, replaceable: bool = False) -> Any:
        """Return a result; an error a user can mend is raised as itself, not wrapped in a remote traceback. Where the worker
        is `replaceable`, its loss is no failure but LostWorkerError."""
        try:
            return ray.get(result_ref)
        except RayError as error:
            if replaceable and isinstance(error, LOST) and not isinstance(error, RayTaskError):
                raise LostWorkerError from error
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


def stage_of(checkpoint: str) -> str:
    """Return the stage that a checkpoint is for, by where it lies: its stage's folder, in a sweep's `stages`."""
    return checkpoint.removeprefix("stages/").split("/")[0]


def mendable(error: Exception) -> Exception:
    """Return the error a user can mend that is behind one that came from a worker, else the error as it is."""
    cause = innermost(error)
    if not isinstance(cause, CvddError):
        return error
    kind = next(kind for kind in type(cause).__mro__ if kind.__module__ == CvddError.__module__)
    return kind(str(cause.args[0]).splitlines()[0])  # Ray Data adds lines of its own
