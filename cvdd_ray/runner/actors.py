"""The actors, as plain classes; they are made remote where they are created.

In calls numpy travels, never torch tensors: a torch tensor in a call is pickled and copied, an array is not.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock, Thread
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from cvdd_ray.core.committee import Ballot, Committee, LocalCommittee, parts
from cvdd_ray.core.experts import ExpertSpec, prepare_torch
from cvdd_ray.data.storage import Store
from cvdd_ray.runner.committee import RayCommittee
from cvdd_ray.runner.connection import Meeting, answer_all
from cvdd_ray.runner.mailbox import tell
from cvdd_ray.runner.measured import CheckpointStore, CountedCommittee, IdleShare, MeasuredVoter, Spent
from cvdd_ray.runner.recovery import is_device_error
from cvdd_ray.stages.grouptask import GroupTask, Notice, VoterSettings, run_group
from cvdd_ray.stages.runtime import local_voter


class ExpertActor:
    """One backbone on one device; stateless but for its weights, so Ray may restart it at any moment."""

    def __init__(self, spec: ExpertSpec, voter: VoterSettings, threads: int, mailbox: Any = None):
        self._spec, self._settings, self._threads = spec, voter, threads
        self._voter: MeasuredVoter | None = None
        self._health, self._voting = Health(), Lock()
        if mailbox is not None:
            tell(mailbox, "actor_started", f"expert {spec.name}", ray.get_runtime_context().get_actor_id())

    def ready(self) -> None:
        """Return when this actor is there."""

    def vote(self, *question: np.ndarray) -> tuple[np.ndarray, ...]:
        """Return the arrays of a Vote on those of a Ballot, in order, as far as there are any."""
        return tuple(part.numpy() for part in self._answer(*(torch.from_numpy(np.array(part)) for part in question)))

    def serve(self, meeting: Meeting) -> None:
        """Answer as `vote` does what one who asks sends over torch.distributed, in a thread of its own, until it is gone."""
        here = ray.util.get_node_ip_address()
        Thread(target=answer_all, args=(meeting, here, self._answer), daemon=True).start()

    def _answer(self, *question: Tensor) -> list[Tensor]:
        """Return the tensors of a vote on those of a ballot, on the CPU; one vote at a time."""
        with self._voting, self._health.watched():
            device = prepare_torch(self._threads)
            if self._voter is None:  # built here and not in __init__, so that its errors reach the caller as themselves
                voter = local_voter(self._spec, self._settings, device)
                self._voter = MeasuredVoter(self._spec.name, voter, IdleShare(self._spec.name))
            return [part.cpu() for part in parts(self._voter.vote(Ballot(*(part.to(device) for part in question))))]

    def spent(self) -> tuple[int, float, float]:
        """Return how many votes there were so far (on a CPU), their seconds of CPU, and of the clock."""
        return self._voter.spent.sums() if self._voter else Spent().sums()


class Coordinator:
    """Drives groups of jobs: draws views, asks the expert actors, adds up their gradients, steps, checkpoints. `number`
    tells coordinators apart, `wire` says how experts are asked."""

    def __init__(self, number: int, store: Store, mailbox: Any, threads: int, hung_s: float, wire: str = "ray"):
        me = ray.get_runtime_context().get_actor_id()
        self._committee = RayCommittee(
            first=number,
            hung_s=hung_s,
            wire=wire,
            on_failure=lambda kind, name: tell(mailbox, kind, f"expert {name}", me),
        )
        self._store, self._mailbox = store, mailbox
        self._threads, self._notice, self._stepping = threads, Notice(), Spent()
        self._device = torch.device("cpu")
        tell(mailbox, "actor_started", "coordinator", me)

    def ready(self) -> None:
        """Return when this actor is there."""

    def meet(self, experts: Mapping[str, Sequence[Any]]) -> None:
        """Ask these actors from now on, one or several of each expert."""
        self._committee.meet(experts)

    def run_group(self, name: str, task: GroupTask, experts: Mapping[str, Sequence[Any]]) -> bytes:
        """Finish one group and return what `grouptask.run_group` does; several calls may run at once, each in a thread."""
        prepare_torch(self._threads)
        self.meet(experts)
        return _run_group(
            self._committee, name, task, self._store, self._device, self._mailbox, self._stepping, self._notice
        )

    def spent(self) -> tuple[int, float, float]:
        """Return how many steps between votes there were so far, their seconds of CPU, and of the clock."""
        return self._stepping.sums()

    def keep(self) -> None:
        """Write checkpoints of the groups at work now."""
        self._notice.keep()

    def stop(self) -> None:
        """Write checkpoints of the groups at work and stop."""
        self._notice.stop()


class ColocatedWorker:
    """The whole committee on one device, driving whole groups: no message per iteration."""

    def __init__(
        self, experts: Mapping[str, ExpertSpec], voter: VoterSettings, store: Store, mailbox: Any, threads: int
    ):
        self._specs, self._voter, self._store, self._mailbox = experts, voter, store, mailbox
        self._threads = threads
        self._committee: LocalCommittee | None = None
        self._notice, self._health = Notice(), Health()
        tell(mailbox, "actor_started", "worker", ray.get_runtime_context().get_actor_id())

    def ready(self) -> None:
        """Return when the committee is built."""
        device = prepare_torch(self._threads)
        if self._committee is None:  # not in __init__, so that its errors reach the caller as themselves
            idle = IdleShare("all")
            built = {name: local_voter(spec, self._voter, device) for name, spec in self._specs.items()}
            self._committee = LocalCommittee({name: MeasuredVoter(name, one, idle) for name, one in built.items()})

    def run_group(self, name: str, task: GroupTask) -> bytes:
        """Finish one group and return what `grouptask.run_group` does."""
        with self._health.watched():
            self.ready()
            device = prepare_torch(self._threads)
            return _run_group(self._committee, name, task, self._store, device, self._mailbox, Spent(), self._notice)

    def keep(self) -> None:
        """Write a checkpoint of the group at work now."""
        self._notice.keep()

    def stop(self) -> None:
        """Write a checkpoint of the group at work and stop."""
        self._notice.stop()


class Health:
    """Whether this process can still use its GPU. After an error of the device (`recovery.is_device_error`) it cannot, and
    ends at the next call, so that Ray starts another one; the error itself has then reached the caller."""

    def __init__(self):
        self._lost = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        if self._lost:
            os._exit(1)
        try:
            yield
        except Exception as error:
            self._lost = is_device_error(error)
            raise


def _run_group(
    committee: Committee, name: str, task: GroupTask, store: Store, device: torch.device, mailbox: Any, stepping: Spent,
    notice: Notice,
) -> bytes:  # fmt: skip
    """Finish one group, count what it does, and keep the driver informed."""
    work = ray.get_runtime_context().get_task_id()
    tell(mailbox, "group_started", name, work, jobs=len(task.jobs), iterations=task.settings.iterations)
    return run_group(
        CountedCommittee(committee, len(task.jobs), stepping),
        task,
        CheckpointStore(
            store, lambda seconds, size: tell(mailbox, "checkpoint", name, work, took_s=round(seconds, 3), bytes=size)
        ),
        device,
        lambda report: mailbox.put.remote(name, report),
        notice,
    )
