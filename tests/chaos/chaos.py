"""Runs of the command line, disturbed by a seeded adversary at random moments, and compared with an undisturbed one.

As a program (`make chaos`): many faults of every kind, and a table of what they cost. With `--recipe NAME` what is disturbed
is that run from its beginning, once: `--recipe digits-demo --kinds driver_killed --each 10 --every 30` kills `make demo`.
"""

import argparse
import errno
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parents[1])]

from clusters import RayCluster
from victim import Victim, config, contents, injected, kill, processes, tail

import cvdd_ray
from cvdd_ray.config import RunConfig
from cvdd_ray.recipes import load_config

HUNG_S = 300.0  # a run that writes nothing for so long hangs


@dataclass
class Chaos:
    """The adversary: draws when and what, and strikes. A strike returns whether there was something to hit."""

    victim: Victim
    draw: random.Random
    cluster: RayCluster | None = None
    ends: list[tuple[float, Callable[[], None]]] = field(default_factory=list)

    def _one_of(self, *titles: str) -> bool:
        found = [p for p in processes(self.victim.mark) if p.title.startswith(titles)]
        return bool(found) and kill(self.draw.choice(found).pid)

    def expert(self) -> bool:
        return self._one_of("ray::ExpertActor")

    def worker(self) -> bool:
        return self._one_of("ray::Coordinator", "ray::ColocatedWorker")

    def task(self) -> bool:
        return self._one_of("ray::_call")

    def memory(self) -> bool:
        """The largest of Ray's workers, as the kernel does when memory is out."""
        found = [p for p in processes(self.victim.mark) if p.title.startswith("ray::") and "Agent" not in p.title]
        return bool(found) and kill(max(found, key=lambda p: p.pages).pid)

    def mailbox(self) -> bool:
        return self._one_of("ray::Mailbox")

    def driver_killed(self) -> bool:
        self.victim.process.kill()
        return True

    def driver_interrupted(self) -> bool:
        self.victim.process.send_signal(signal.SIGINT)
        return True

    def checkpoint(self) -> bool:
        """A checkpoint is cut or has a changed byte, and is needed since the workers die."""
        found = self.victim.names(".checkpoint")
        if not found:
            return False
        path = self.draw.choice(found)
        try:
            data = bytearray(path.read_bytes())
            at = self.draw.randrange(len(data) // 2, len(data))
            data[at] ^= 0xFF
            path.write_bytes(data if self.draw.random() < 0.5 else data[:at])
        except FileNotFoundError:
            return False
        workers = [p for p in processes(self.victim.mark) if p.title.startswith(("ray::Coord", "ray::Colocated"))]
        return sum(kill(worker.pid) for worker in workers) > 0

    def _disk(self, number: int) -> bool:
        (self.victim.faults / "disk").write_text(str(number))
        seconds = self.draw.uniform(0.5, 3)
        self.ends.append((time.monotonic() + seconds, (self.victim.faults / "disk").unlink))
        return True

    def disk_full(self) -> bool:
        return self._disk(errno.ENOSPC)

    def disk_error(self) -> bool:
        return self._disk(errno.EIO)

    def device(self) -> bool:
        """The next vote of any expert fails as on a lost GPU."""
        (self.victim.faults / "device").touch()
        return self._happened("device")

    def head(self) -> bool:
        """Ray itself ends: the process that places all others, or the one that knows them. The driver cannot go on."""
        found = [p for p in processes(self.victim.mark) if p.title.split(" ")[0].endswith(("/raylet", "/gcs_server"))]
        return bool(found) and kill(self.draw.choice(found).pid)

    def _happened(self, fault: str) -> bool:
        flag, until = self.victim.faults / fault, time.monotonic() + 5
        while flag.exists() and time.monotonic() < until:
            time.sleep(0.02)
        happened = not flag.exists()
        flag.unlink(missing_ok=True)
        return happened

    def node(self) -> bool:
        """A machine is lost; another one joins a little later."""
        self.cluster.lose()
        self.ends.append((time.monotonic() + self.draw.uniform(0, 3), self.cluster.add))
        return True

    def tidy(self, everything: bool = False) -> None:
        """End what was to last for a while only."""
        for until, end in list(self.ends):
            if everything or time.monotonic() >= until:
                self.ends.remove((until, end))
                end()


KINDS = {
    "expert": "expert actor killed",
    "worker": "coordinator or worker killed",
    "task": "task killed",
    "memory": "largest process killed (out of memory)",
    "mailbox": "the driver's mailbox killed",
    "driver_killed": "driver killed (SIGKILL)",
    "driver_interrupted": "driver interrupted (SIGINT)",
    "checkpoint": "checkpoint damaged, workers killed",
    "disk_full": "disk full for up to 3 s",
    "disk_error": "disk errors for up to 3 s",
    "device": "CUDA error in an actor",
    "head": "Ray's head killed",
    "node": "node lost, another joins",
}


CLUSTER = ("node",)  # they need machines of their own
# Exit codes of the command; Python itself ends by the signal while it still imports.
ENDS = {"driver_killed": (-signal.SIGKILL,), "driver_interrupted": (130, -signal.SIGINT), "head": (1,)}


@dataclass
class Outcome:
    """What came of one run: (kind, seconds until something was written again) of every fault, kinds that found nothing to
    hit, seconds in all, and what was not as it should be."""

    faults: list[tuple[str, float]]
    left: list[str]
    wall_s: float
    complaint: str | None = None


def disturbed(
    calm: Path, folder: Path, kinds: Sequence[str], seed: int, *, placement: str = "spread", every_s: float = 1.5,
    cluster: RayCluster | None = None, whole: RunConfig | None = None,
) -> Outcome:  # fmt: skip
    """Run the command with faults of these kinds, each at a random moment (`every_s` on average) after the run has got over
    the one before and has written something; those that find nothing to hit wait. Return what came of it. `calm` is where the
    undisturbed run is, which it takes the stages before synthesis from unless it is a `whole` one."""
    started, outcome = time.monotonic(), Outcome([], list(kinds), 0.0)
    victim = Victim(whole or config(), None if whole else calm, folder, placement, cluster)
    chaos = Chaos(victim, random.Random(seed), cluster)
    struck: tuple[str, float] | None = None
    seen, moment, expected, wrote = victim.written(), None, {0}, started
    try:
        while outcome.complaint is None:
            chaos.tidy()
            now, written = time.monotonic(), victim.written()
            if now - wrote > HUNG_S:
                outcome.complaint = f"hung\n{tail(victim.log)}"
            code = victim.process.poll()
            if code == 0:
                break
            if code is not None and code not in expected:
                outcome.complaint = f"ended with code {code}\n{tail(victim.log)}"
            elif code is not None:
                expected = {0}  # the next start is not to end but with success
                victim.start()
            if written != seen:
                seen, wrote = written, now
                if struck and expected == {0}:
                    outcome.faults.append((struck[0], now - struck[1]))
                    struck, moment = None, now + chaos.draw.uniform(0, 2) * every_s
                elif moment is None:
                    moment = now + chaos.draw.uniform(0, 2) * every_s
            if not struck and moment is not None and now >= moment and code is None:
                for kind in dict.fromkeys(outcome.left):
                    if getattr(chaos, kind)():
                        struck, seen = (kind, now), victim.written()
                        expected = {0, *ENDS.get(kind, ())}
                        outcome.left.remove(kind)
                        break
            time.sleep(0.03)
    finally:
        chaos.tidy(everything=True)
        victim.end()
    if struck:  # it ended before it wrote anything more
        outcome.faults.append((struck[0], time.monotonic() - struck[1]))
    outcome.wall_s = time.monotonic() - started
    if outcome.complaint is None:
        found, wanted = contents(victim.out), contents(calm)
        wrong = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        outcome.complaint = f"altered or lost: {', '.join(wrong)}" if wrong else None
    return outcome


def calm_run(folder: Path) -> Path:
    """Return the directory of a run in this process that nothing disturbs."""
    settings = config().model_dump()
    settings["runtime"] |= {"engine": "local"}
    cvdd_ray.run(RunConfig(**settings), str(folder / "calm"))
    return folder / "calm"


def tiny_runs(folder: Path, args: argparse.Namespace, draw: random.Random) -> Iterator[tuple[str, Outcome]]:
    """Disturb small runs until there was every fault, or time is over: private ones, then some on a cluster."""
    started, calm = time.monotonic(), calm_run(folder)
    todo = {"private": [kind for kind in args.kinds if kind not in CLUSTER] * args.each,
            "cluster": [kind for kind in args.kinds if kind in CLUSTER] * args.each}  # fmt: skip
    number = 0
    for where, kinds in todo.items():
        draw.shuffle(kinds)
        while kinds and time.monotonic() - started < 60 * args.minutes:
            at, seed, placement = folder / f"run{number}", draw.randrange(2**31), draw.choice(["spread", "colocate"])
            placement = "spread" if set(kinds) == {"expert"} else placement  # colocated workers have no other actors
            if where == "private":
                outcome = disturbed(calm, at, kinds, seed, placement=placement)
            else:
                with RayCluster(env=injected(at / "faults")) as cluster:
                    for _ in range(2):
                        cluster.add()
                    outcome = disturbed(calm, at, kinds, seed, placement=placement, cluster=cluster)
            kinds, number = outcome.left, number + 1
            yield f"{placement}, {where}", outcome


def one_recipe(folder: Path, args: argparse.Namespace, draw: random.Random) -> Iterator[tuple[str, Outcome]]:
    """Run a recipe to its end, and once more from its beginning with faults; both as the command line does."""
    whole, kinds = load_config(args.recipe, []), args.kinds * args.each
    draw.shuffle(kinds)
    calm = Victim(whole, None, folder / "calm", whole.runtime.placement, None)
    try:
        if calm.process.wait():
            sys.exit(tail(calm.log))
    finally:
        calm.end()
    yield args.recipe, disturbed(
        calm.out, folder / "run", kinds, draw.randrange(2**31), placement=whole.runtime.placement, every_s=args.every,
        whole=whole,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=5, help="faults of each kind")
    parser.add_argument("--minutes", type=float, default=25, help="begin no other run after so many")
    parser.add_argument("--recipe", help="disturb this run instead, once")
    parser.add_argument("--every", type=float, default=1.5, help="seconds between faults on average, with --recipe")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    if args.recipe and set(args.kinds) & set(CLUSTER):
        parser.error(f"--recipe runs without machines to lose; give --kinds without {', '.join(CLUSTER)}")
    started, outcomes = time.monotonic(), []
    with TemporaryDirectory() as root:
        runs = one_recipe if args.recipe else tiny_runs
        for what, outcome in runs(Path(root), args, random.Random(args.seed)):
            outcomes.append(outcome)
            print(f"{what}: {len(outcome.faults)} faults in {outcome.wall_s:.0f} s, {outcome.complaint or 'equal'}",
                  flush=True)  # fmt: skip
    bad = [outcome for outcome in outcomes if outcome.complaint]
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    print("\n| fault | number | seconds until the run went on: median, most |\n|---|---:|---:|")
    for kind in args.kinds:
        if lost_s := sorted(seconds for other, seconds in faults if other == kind):
            print(f"| {KINDS[kind]} | {len(lost_s)} | {median(lost_s):.1f}, {lost_s[-1]:.1f} |")
    print(f"\n{len(faults)} faults of {len({kind for kind, _ in faults})} kinds in {len(outcomes)} runs, "
          f"{(time.monotonic() - started) / 60:.0f} minutes; {len(bad)} lost, altered or hung; "
          f"{args.each * len(args.kinds) - len(faults)} faults not struck")  # fmt: skip
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
