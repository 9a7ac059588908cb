"""What stages ask of the machinery that runs them, and the reference that runs everything in this process."""

import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from cvdd_ray.core.committee import LocalCommittee, Voter
from cvdd_ray.core.experts import ExpertSpec, prepare_torch
from cvdd_ray.core.precision import require_tf32_device
from cvdd_ray.core.statistics import MatchingVoter, read_targets
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError, NumericsError
from cvdd_ray.stages.grouptask import GroupTask, Notice, StoppedError, VoterSettings, run_group

Report = Callable[[str, dict], None]


class Runtime(Protocol):
    """Runs independent pieces of work; results come as they finish, and do not depend on where or when they ran."""

    def map(
        self, function: Callable, items: Mapping[str, Any], shared: tuple, on_report: Report
    ) -> Iterator[tuple[str, Any]]:
        """Yield (name, function(item, *shared, report=...)) for every item; `shared` travels once per machine."""
        ...

    def train(
        self, function: Callable, items: Mapping[str, Any], shared: tuple, num_workers: int, on_report: Report
    ) -> Iterator[tuple[str, Any]]:
        """Yield (name, function(item, *shared, workers=Workers(...), report=...)) for every item, which `num_workers`
        processes run together, in one process group of torch.distributed; the result is rank 0's. When one is lost, all
        start the item again: the function goes on from its own checkpoint.

        Raises ConfigError where there is no room for so many.
        """
        ...

    def stream(
        self, read: Callable, worker: type, items: Mapping[str, Any], shared: tuple, on_report: Report
    ) -> Iterator[tuple[str, np.ndarray]]:
        """Yield (name, rows) for every item: `read(item, *shared)` yields blocks (arrays by name, of equal length), an
        instance of `worker(*shared)` makes rows of a block. Blocks may be cut anywhere, so rows must not depend on it."""
        ...

    def distill(
        self, tasks: Mapping[str, GroupTask], experts: Mapping[str, ExpertSpec], voter: VoterSettings, store: Store,
        on_report: Report,
    ) -> Iterator[tuple[str, bytes]]:  # fmt: skip
        """Yield (name, what `run_group` returns) for every group of synthesis jobs, voted on by the experts.

        Raises KeyboardInterrupt after Ctrl-C, when the groups at work have written their checkpoints; the error of a group
        that fails by itself when the others are finished.
        """
        ...

    def close(self) -> None: ...


class LocalRuntime:
    """Everything in this process, one piece after the other."""

    def __init__(self, threads: int = 1):
        self._device = prepare_torch(threads)

    def map(self, function, items, shared=(), on_report=lambda name, report: None):
        for name, item in items.items():
            yield name, function(item, *shared, report=lambda report, name=name: on_report(name, report))

    def train(self, function, items, shared, num_workers, on_report=lambda name, report: None):
        raise ConfigError(
            f"{num_workers} workers for one network need Ray, this process is one; set runtime.engine=ray, or workers of "
            f"pretrain and evaluate to 1"
        )

    def stream(self, read, worker, items, shared=(), on_report=lambda name, report: None):
        yield from self.map(read_and_work, items, (read, worker, *shared), on_report)

    def distill(self, tasks, experts, voter, store, on_report=lambda name, report: None):
        committee, notice, failed = local_committee(experts, voter, self._device), Notice(), []
        for name, task in tasks.items():
            try:
                with interruptible(notice):
                    result = run_group(
                        committee, task, store, self._device, lambda report, name=name: on_report(name, report), notice
                    )
            except StoppedError:
                raise KeyboardInterrupt from None
            except NumericsError as error:  # the others are not to suffer for it
                failed.append(error)
                continue
            yield name, result
        for error in failed:
            raise error

    def close(self) -> None:
        pass


@contextmanager
def interruptible(notice: Notice) -> Iterator[None]:
    """Let Ctrl-C ask for checkpoints and an end (SIGINT, once; the second ends at once), where this is the main thread and
    SIGINT is not ignored."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        if notice.stopping:
            raise KeyboardInterrupt
        notice.stop()

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def read_and_work(item: Any, read: Callable, worker: type, *shared: Any, report: Callable[[dict], None]) -> np.ndarray:
    """Return the rows of one item of a stream, made in one place."""
    work = worker(*shared)
    return np.concatenate([work(block) for block in read(item, *shared)])


def local_committee(experts: Mapping[str, ExpertSpec], voter: VoterSettings, device) -> LocalCommittee:
    """Return a committee whose experts are built on `device` of this process."""
    return LocalCommittee({name: local_voter(spec, voter, device) for name, spec in experts.items()})


def local_voter(spec: ExpertSpec, voter: VoterSettings, device) -> Voter | MatchingVoter:
    """Return one expert built on `device`, ready to vote.  Raises ConfigError for tf32 on a CPU."""
    require_tf32_device(voter.precision, device)
    if voter.matching is not None:
        return MatchingVoter(
            spec.build(device), read_targets(spec.statistics), matching=voter.matching, weight=voter.bn_weight,
            first_multiplier=voter.first_bn_multiplier, precision=voter.precision,
        )  # fmt: skip
    return Voter(
        spec.build(device), bn_weight=voter.bn_weight, first_bn_multiplier=voter.first_bn_multiplier,
        precision=voter.precision, compile=voter.compile,
    )  # fmt: skip
