"""Two ways of doing the same work, each in a process of its own, asked in turn.

In turn, so that what else the machine does meets both; in processes of their own, so that each has its own peak of memory.
"""

import multiprocessing
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from cvdd_ray.core.experts import prepare_torch
from cvdd_ray.errors import CvddError

Round = Callable[[], int]  # does a round of work, returns how many units it was


@dataclass(frozen=True)
class Timing:
    """One side: seconds of its first round (with everything that happens once), seconds per unit of every later round, and
    the most memory of its process in MiB, on a GPU that of torch's tensors there as well."""

    first_s: float
    unit_s: tuple[float, ...]
    peak_mib: int
    gpu_peak_mib: int | None

    @property
    def median_s(self) -> float:
        return statistics.median(self.unit_s)


@dataclass(frozen=True)
class Comparison:
    """What `compare` measured; `unit` is what a unit of work is, in words."""

    unit: str
    ours: Timing
    reference: Timing

    @property
    def ratios(self) -> tuple[float, ...]:
        """Reference time over ours, round by round."""
        return tuple(theirs / ours for theirs, ours in zip(self.reference.unit_s, self.ours.unit_s, strict=True))

    @property
    def ratio(self) -> float:
        """The median of the ratios: how many times faster this package is."""
        return statistics.median(self.ratios)

    @property
    def memory_ratio(self) -> float:
        """Peak memory of our process over that of the reference."""
        return self.ours.peak_mib / self.reference.peak_mib


class Side:
    """A process that has built `build(*arguments)`, a Round, and does rounds when it is asked to; set up as workers are
    (`prepare_torch`), where `keep_memory` says so with their memory."""

    def __init__(self, build: Callable[..., Round], arguments: Sequence, threads: int, keep_memory: bool):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(theirs, build, tuple(arguments), threads, keep_memory), daemon=True
        )
        self._process.start()
        theirs.close()

    def round(self) -> tuple[float, int, int, int | None]:
        """Return (seconds, units, peak MiB, GPU peak MiB) of one round.

        Raises what the work raises, and CvddError when its process has died (of memory, most likely).
        """
        self._pipe.send("round")
        try:
            answer = self._pipe.recv()
        except EOFError:
            self._process.join()
            raise CvddError(
                f"the benchmark's process ended with code {self._process.exitcode}, probably for want of memory; make the work "
                f"smaller, e.g. --ipc 1"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer

    def close(self) -> None:
        self._pipe.close()
        self._process.join(5)
        if self._process.is_alive():
            self._process.kill()


def _serve(pipe: Connection, build: Callable[..., Round], arguments: tuple, threads: int, keep_memory: bool) -> None:
    device, work = prepare_torch(threads, keep_memory=keep_memory), None
    try:
        while pipe.recv():
            try:
                began = time.perf_counter()
                work = work or build(*arguments)
                units = work()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                seconds = time.perf_counter() - began
            except Exception as error:  # it is the asker's to raise
                pipe.send(error)
                continue
            gpu_peak = torch.cuda.max_memory_allocated(device) >> 20 if device.type == "cuda" else None
            pipe.send((seconds, units, peak_mib(), gpu_peak))
    except EOFError:
        return


def peak_mib() -> int:
    """Return the most memory that this process has had, in MiB."""
    status = Path("/proc/self/status")
    if status.exists():  # what getrusage says on Linux includes the process that started this one
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) >> 10
    per_mib = 2**20 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // per_mib


def compare(
    unit: str, sides: Mapping[str, tuple[Callable[..., Round], Sequence]], *, rounds: int, threads: int = 1
) -> Comparison:
    """Measure the sides `ours` and `reference`, (build, arguments) of a Side each, in turn: a first round, then `rounds` more.

    Raises what the work raises, and CvddError as `Side.round`.
    """
    running = {
        name: Side(build, arguments, threads, keep_memory=name == "ours") for name, (build, arguments) in sides.items()
    }
    try:
        answers = {name: [] for name in running}
        for _ in range(1 + rounds):
            for name, side in running.items():
                answers[name].append(side.round())
    finally:
        for side in running.values():
            side.close()
    timings = {
        name: Timing(
            first_s=given[0][0],
            unit_s=tuple(seconds / units for seconds, units, _, _ in given[1:]),
            peak_mib=given[-1][2],
            gpu_peak_mib=given[-1][3],
        )
        for name, given in answers.items()
    }
    return Comparison(unit, timings["ours"], timings["reference"])
