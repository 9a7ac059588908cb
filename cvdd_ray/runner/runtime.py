"""The runtime on Ray: stages' pieces of work as tasks, synthesis as expert actors and coordinators."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cvdd_ray.config import RuntimeConfig
from cvdd_ray.core.experts import ExpertSpec, prepare_torch
from cvdd_ray.errors import CvddError
from cvdd_ray.runner.actors import ColocatedWorker, Coordinator, ExpertActor, Mailbox
from cvdd_ray.runner.cluster import (
    Share,
    connect,
    expert_share,
    places_with,
    student_share,
    task_share,
    worker_bundles,
)
from cvdd_ray.stages.grouptask import VoterSettings
from cvdd_ray.stages.runtime import read_and_work

POLL_S = 0.25
# An actor is restarted when its process or node dies, its calls are repeated; one that keeps dying is given up.
RESTARTED = {"max_restarts": 20, "max_task_retries": -1}


def _call(function: Callable, item: Any, name: str, mailbox: Any, threads: int, *shared: Any) -> Any:
    """One piece of work in a task: set torch up, run, send reports to the driver's mailbox."""
    prepare_torch(threads)
    return function(item, *shared, report=lambda report: mailbox.put.remote(name, report))


class RayRuntime:
    """Runs a stage's work on Ray; results and their bits are those of LocalRuntime.

    Raises ConfigError when Ray cannot be started or joined; errors of the work itself are raised as they are.
    """

    def __init__(self, c: RuntimeConfig):
        self._owns_ray = connect(c)
        self._c = c
        self._here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        self._mailbox = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=self._here)(Mailbox).remote()
        self._experts: dict[str, Any] = {}
        self._holds: dict[str, tuple[ExpertSpec, VoterSettings]] = {}
        self._kept: dict[str, Any] = {}

    def map(self, function, items, shared=(), on_report=lambda name, report: None) -> Iterator[tuple[str, Any]]:
        share = task_share(self._c)
        remote = ray.remote(num_cpus=share.num_cpus, num_gpus=share.num_gpus, max_retries=3)(_call)
        shared_refs = [ray.put(value) for value in shared]
        waiting = {
            remote.remote(function, item, name, self._mailbox, self._c.threads_per_actor, *shared_refs): name
            for name, item in items.items()
        }
        yield from self._results(waiting, on_report)

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
                for name, result in self._results(refs, heard):
                    del todo[name]
                    yield name, result
                return
            except (
                RayActorError
            ):  # this actor or one of Ray Train's, which start again themselves when workers are lost
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

        try:
            yield from stream(self._c, read, worker, items, shared)
        except RayTaskError as error:
            raise mendable(error) from None

    def distill(self, tasks, experts, voter, store, on_report=lambda name, report: None) -> Iterator[tuple[str, bytes]]:
        used = {name for task in tasks.values() for job in task.jobs for name in job.voters}
        specs = {name: spec for name, spec in experts.items() if name in used}
        start = self._colocated if self._c.placement == "colocate" else self._spread
        drivers = start(specs, voter, store, len(tasks))
        try:
            waiting = {
                drivers[k % len(drivers)].run_group.remote(name, ray.put(task)): name
                for k, (name, task) in enumerate(tasks.items())
            }
            yield from self._results(waiting, on_report)
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
            remote = _remote(ExpertActor, expert_share(c, len(specs)), **strategy)
            for name, spec in missing.items():
                if name in self._experts:
                    ray.kill(self._experts.pop(name))
                spec_ref = ray.put(spec)
                self._holds[name], self._kept[name] = (
                    (spec, voter),
                    spec_ref,
                )  # a restarted actor asks for its spec again
                self._experts[name] = remote.remote(spec_ref, voter, c.threads_per_actor)
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
        remote = _remote(ColocatedWorker, expert_share(c, num_workers))
        specs_ref = self._kept["committee"] = ray.put(specs)
        return [remote.remote(specs_ref, voter, store, self._mailbox, c.threads_per_actor) for _ in range(num_workers)]

    def _results(self, waiting: Mapping[Any, str], on_report) -> Iterator[tuple[str, Any]]:
        """Yield (name, result) as work finishes and pass reports on; if one piece fails, the rest is cancelled."""
        waiting = dict(waiting)
        known = set(waiting.values())  # a late report of an earlier call is nobody's
        try:
            while waiting:
                ready, _ = ray.wait(list(waiting), timeout=POLL_S)
                for name, report in self._reports().items():
                    if name in known:
                        on_report(name, report)
                for result_ref in ready:
                    name = waiting.pop(result_ref)
                    yield name, _get(result_ref)
        finally:
            for result_ref in waiting:
                ray.cancel(result_ref, force=False)

    def _reports(self) -> dict[str, dict]:
        try:
            return ray.get(self._mailbox.take.remote())
        except RayActorError:  # progress is lost while the mailbox restarts, nothing else
            return {}

    def close(self) -> None:
        self.release()
        if self._owns_ray:
            ray.shutdown()


def _remote(plain: type, share: Share, **options: Any):
    """Return the actor class of a plain class, restarted for ever."""
    return ray.remote(num_cpus=share.num_cpus, num_gpus=share.num_gpus, **RESTARTED, **options)(plain)


def _get(result_ref: Any) -> Any:
    """Return a result; an error a user can mend is raised as itself, not wrapped in a remote traceback."""
    try:
        return ray.get(result_ref)
    except RayTaskError as error:
        raise mendable(error) from None


def mendable(error: Exception) -> Exception:
    """Return the error a user can mend that is behind one that came from a worker, else the error as it is."""
    cause = error
    while isinstance(cause, RayTaskError):
        cause = cause.cause
    if not isinstance(cause, CvddError):
        return error
    kind = next(kind for kind in type(cause).__mro__ if kind.__module__ == CvddError.__module__)
    return kind(str(cause.args[0]).splitlines()[0])  # Ray Data adds lines of its own
