"""Runs of the command line, disturbed by a seeded adversary at random moments, and compared with an undisturbed one.

As a program (`make chaos`): many faults of every kind, and a table of what they cost.
"""

import argparse
import errno
import hashlib
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from clusters import RayCluster

import cvdd_ray
from cvdd_ray.config import RunConfig
from cvdd_ray.data.storage import Store
from cvdd_ray.recipes import dump_config

HUNG_S = 300.0  # a run that writes nothing for so long hangs
BEFORE = ("pretrain", "prior", "initialize")


def config() -> RunConfig:
    """Four groups of one job each, some seconds of work in all; a student with a checkpoint after every epoch."""
    return RunConfig(
        ipc=(2,),
        data={"source": "digits", "flip": False, "max_per_class": 20, "max_test": 50},
        committee={"experts": ["resnet18", "shufflenet_v2"], "width": 0.125},
        pretrain={"epochs": 1, "batch_size": 64, "lr": 0.005, "pad": 1},
        prior={"ipc": 2, "iterations": 3, "epochs": 1},
        initialize={"images_per_class": 4, "num_crops": 1},
        synthesize={"iterations": 60, "lr": 0.1, "jobs_per_group": 1, "class_chunk": 5, "checkpoint_every": 5},
        relabel={"epochs": 20, "batch_size": 10},
        evaluate={"seeds": 1, "test_every": 10, "checkpoint_minutes": 0, "baselines": []},
        runtime={"num_cpus": 2, "object_store_mb": 100},
    )


def contents(root: Path) -> dict[str, str]:
    """Return the sha256 of every file of a finished run's artifacts, manifests left out; of its students the curves."""
    store, found = Store(str(root)), {}
    for name in store.all_names():
        if name.startswith((*BEFORE, "synthesize", "relabel")) and not name.endswith("manifest.json"):
            found[name] = hashlib.sha256(store.read(name)).hexdigest()
        elif name.startswith("evaluate") and name.endswith("results.json"):
            found[name] = json.dumps([row["curve"] for row in json.loads(store.read(name))["runs"]])
    return found


# --------------------------------------------------------------------------------------------------- processes


@dataclass(frozen=True)
class Process:
    """A process of a run: its id, its title (Ray names what it does), its resident memory in pages."""

    pid: int
    title: str
    pages: int


def processes(mark: str) -> list[Process]:
    """Return the processes that have `mark` in their environment, by id."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                if mark.encode() in (folder / "environ").read_bytes():
                    title = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                    found.append(Process(int(folder.name), title, int((folder / "statm").read_text().split()[1])))
            except OSError:  # it has ended meanwhile, or is another user's
                pass
    return sorted(found, key=lambda process: process.pid)


def kill(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    return True


# --------------------------------------------------------------------------------------------------- the victim


class Victim:
    """The command `cvdd run` in a process of its own, started again with the same words after whatever ended it."""

    def __init__(self, calm: Path, folder: Path, placement: str, cluster: RayCluster | None):
        self.out, self.faults, self.mark = folder / "run", folder / "faults", f"CHAOS_RUN={secrets.token_hex(8)}"
        self.faults.mkdir(parents=True)
        store, before = Store(str(self.out)), Store(str(calm))
        for name in before.all_names():
            if name.startswith(BEFORE):
                store.take(before, name, name)
        runtime = {"num_cpus": None, "address": cluster.address} if cluster else {"num_cpus": 2}
        settings = config().model_dump() | {
            "runtime": {**config().runtime.model_dump(), "placement": placement, **runtime}
        }
        (folder / "run.yaml").write_text(dump_config(RunConfig(**settings)))
        self.command = [sys.executable, "-m", "cvdd_ray.cli", "run", str(folder / "run.yaml"), "--out", str(self.out)]
        base = cluster.env if cluster else {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        name, value = self.mark.split("=")
        self.env = {
            **base,
            **injected(self.faults),
            name: value,
            "RAY_USAGE_STATS_ENABLED": "0",
            "CVDD_RAY_DISK_RETRY_S": "60",
        }
        self.log, self.starts = folder / "log", 0
        self.start()

    def start(self) -> None:
        self.starts += 1
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, env=self.env, start_new_session=True, preexec_fn=heed_interrupts
            )

    def written(self) -> frozenset[tuple[str, int]]:
        """Return what there is of the run: files, with the time when they were written."""
        found = set()
        for path in self.out.rglob("*"):
            with suppress(FileNotFoundError):
                if path.is_file() and path.suffix != ".tmp":
                    found.add((str(path), path.stat().st_mtime_ns))
        return frozenset(found)

    def names(self, end: str) -> list[Path]:
        """Return files of unfinished work."""
        return sorted(self.out.glob(f"*/**/partial/**/*{end}"))

    def end(self) -> None:
        """Leave nothing of it behind."""
        for process in processes(self.mark):
            kill(process.pid)
        self.process.wait()


def heed_interrupts() -> None:
    """What is started in the background of a shell ignores SIGINT otherwise."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def injected(faults: Path) -> dict[str, str]:
    """Return what makes processes fail from inside, see injected/sitecustomize.py."""
    path = os.pathsep.join([str(HERE / "injected"), str(HERE.parents[1]), str(HERE.parent)])
    return {"PYTHONPATH": path, "CHAOS_FAULTS": str(faults)}


# --------------------------------------------------------------------------------------------------- faults


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
    cluster: RayCluster | None = None,
) -> Outcome:  # fmt: skip
    """Run the command with faults of these kinds, each at a random moment (`every_s` on average) after the run has got over
    the one before and has written something; those that find nothing to hit wait. Return what came of it."""
    started, outcome = time.monotonic(), Outcome([], list(kinds), 0.0)
    victim = Victim(calm, folder, placement, cluster)
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


def tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-30:])


def calm_run(folder: Path) -> Path:
    """Return the directory of a run in this process that nothing disturbs."""
    settings = config().model_dump()
    settings["runtime"] |= {"engine": "local"}
    cvdd_ray.run(RunConfig(**settings), str(folder / "calm"))
    return folder / "calm"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each", type=int, default=5, help="faults of each kind")
    parser.add_argument("--minutes", type=float, default=25, help="begin no other run after so many")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    args = parser.parse_args()
    started, outcomes, draw = time.monotonic(), [], random.Random(args.seed)
    todo = {"private": [kind for kind in args.kinds if kind not in CLUSTER] * args.each,
            "cluster": [kind for kind in args.kinds if kind in CLUSTER] * args.each}  # fmt: skip
    with TemporaryDirectory() as root:
        calm = calm_run(Path(root))
        for where, kinds in todo.items():
            draw.shuffle(kinds)
            while kinds and time.monotonic() - started < 60 * args.minutes:
                folder, seed = Path(root) / f"run{len(outcomes)}", draw.randrange(2**31)
                placement = draw.choice(["spread", "colocate"])
                if where == "private":
                    outcome = disturbed(calm, folder, kinds, seed, placement=placement)
                else:
                    with RayCluster(env=injected(folder / "faults")) as cluster:
                        for _ in range(2):
                            cluster.add()
                        outcome = disturbed(calm, folder, kinds, seed, placement=placement, cluster=cluster)
                kinds = outcome.left
                outcomes.append(outcome)
                print(f"{placement}, {where}: {len(outcome.faults)} faults in {outcome.wall_s:.0f} s, "
                      f"{outcome.complaint or 'equal'}", flush=True)  # fmt: skip
    bad = [outcome for outcome in outcomes if outcome.complaint]
    faults = [fault for outcome in outcomes for fault in outcome.faults]
    print("\n| fault | number | seconds until the run went on: median, most |\n|---|---:|---:|")
    for kind in args.kinds:
        if lost_s := sorted(seconds for other, seconds in faults if other == kind):
            print(f"| {KINDS[kind]} | {len(lost_s)} | {median(lost_s):.1f}, {lost_s[-1]:.1f} |")
    print(f"\n{len(faults)} faults of {len({kind for kind, _ in faults})} kinds in {len(outcomes)} runs, "
          f"{(time.monotonic() - started) / 60:.0f} minutes; {len(bad)} lost, altered or hung")  # fmt: skip
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
