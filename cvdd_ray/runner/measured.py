"""Voters, committees and stores that answer as those they wrap, and record what it took."""

import time
from collections.abc import Callable, Mapping
from threading import Lock
from typing import Any

import torch

from cvdd_ray.core.committee import Ballot, Committee, Vote, Voter
from cvdd_ray.data.storage import Store
from cvdd_ray.runner.metrics import record

IDLE_WINDOW_S = 5.0


class Spent:
    """What one kind of work has taken in this process: how often it was done, seconds of its threads' CPU, and of the clock.
    Several threads may add. Work on several torch threads counts with what the asking one takes."""

    def __init__(self):
        self._lock, self._sums = Lock(), [0, 0.0, 0.0]

    def add(self, cpu_s: float, wall_s: float) -> None:
        with self._lock:
            self._sums = [total + more for total, more in zip(self._sums, (1, cpu_s, wall_s), strict=True)]

    def sums(self) -> tuple[int, float, float]:
        """Return (times, CPU seconds, seconds) so far."""
        with self._lock:
            return tuple(self._sums)


class IdleShare:
    """Keeps the idle share of one actor over windows of `IDLE_WINDOW_S` or, where a vote takes longer, of one vote."""

    def __init__(self, who: str):
        self._who, self._since, self._busy_s = who, time.perf_counter(), 0.0

    def worked(self, seconds: float) -> None:
        self._busy_s += seconds
        window_s = time.perf_counter() - self._since
        if window_s >= IDLE_WINDOW_S:
            record("cvdd_expert_idle_share", max(0.0, 1.0 - self._busy_s / window_s), expert=self._who)
            self._since, self._busy_s = time.perf_counter(), 0.0


class MeasuredVoter:
    """A voter whose votes are timed."""

    def __init__(self, name: str, voter: Voter, idle: IdleShare):
        self._name, self._voter, self._idle = name, voter, idle
        self.spent = Spent()
        self._marks: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def vote(self, ballot: Ballot) -> Vote:
        if ballot.views_GBCHW.is_cuda:
            return self._vote_on_gpu(ballot)
        started, cpu_started = time.perf_counter(), time.thread_time()
        vote = self._voter.vote(ballot)
        seconds = time.perf_counter() - started
        self.spent.add(time.thread_time() - cpu_started, seconds)
        self._took(seconds)
        return vote

    def _vote_on_gpu(self, ballot: Ballot) -> Vote:
        """A vote's kernels run on after it has returned: events mark where they begin and end. They are read at the next
        vote, when this one's gradients have long been used, so that nothing waits for the clock."""
        if self._marks:
            began, ended = self._marks
            ended.synchronize()
            self._took(began.elapsed_time(ended) / 1000)
        self._marks = began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        vote = self._voter.vote(ballot)
        ended.record()
        return vote

    def _took(self, seconds: float) -> None:
        record("cvdd_expert_step_seconds", seconds, expert=self._name)
        record("cvdd_expert_busy_seconds", seconds, expert=self._name)
        self._idle.worked(seconds)


class CountedCommittee:
    """The committee as one group of `num_jobs` jobs asks it, once per iteration: counts iterations and their time; `stepping`
    adds up what groups do between a vote and the next."""

    def __init__(self, committee: Committee, num_jobs: int, stepping: Spent):
        self._committee, self._num_jobs, self._stepping = committee, num_jobs, stepping
        self._answered: tuple[float, float] | None = None

    def vote(self, ballots: Mapping[str, Ballot]) -> dict[str, Vote]:
        asked = time.perf_counter()
        if self._answered is not None:
            answered, cpu_s = self._answered
            record("cvdd_coordinator_seconds", asked - answered, doing="stepping")
            self._stepping.add(time.thread_time() - cpu_s, asked - answered)
        votes = self._committee.vote(ballots)
        self._answered = time.perf_counter(), time.thread_time()
        record("cvdd_coordinator_seconds", self._answered[0] - asked, doing="waiting")
        record("cvdd_iterations", self._num_jobs)
        return votes


class CheckpointStore:
    """The store as a job group uses it: what it writes are its checkpoints. `on_checkpoint` gets (seconds, bytes)."""

    def __init__(self, store: Store, on_checkpoint: Callable[[float, int], None]):
        self._store, self._on_checkpoint = store, on_checkpoint

    def __getattr__(self, name: str) -> Any:
        return getattr(self._store, name)

    def write(self, name: str, content: bytes) -> None:
        started = time.perf_counter()
        self._store.write(name, content)
        seconds = time.perf_counter() - started
        record("cvdd_checkpoints", 1)
        record("cvdd_checkpoint_seconds", seconds)
        self._on_checkpoint(seconds, len(content))
