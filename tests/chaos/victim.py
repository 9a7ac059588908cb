"""A run of the command line in a process of its own, started again after whatever ended it; its processes, and what it
leaves."""

import hashlib
import json
import os
import secrets
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from clusters import RayCluster

from cvdd_ray.config import RunConfig
from cvdd_ray.data.storage import Store
from cvdd_ray.recipes import dump_config

HERE = Path(__file__).parent
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


class Victim:
    """The command `cvdd run` in a process of its own, started again with the same words after whatever ended it; it finds
    what comes before synthesis there, if it is given where that has been made."""

    def __init__(self, whole: RunConfig, calm: Path | None, folder: Path, placement: str, cluster: RayCluster | None):
        self.out, self.faults, self.mark = folder / "run", folder / "faults", f"CHAOS_RUN={secrets.token_hex(8)}"
        self.faults.mkdir(parents=True)
        if calm:
            store, before = Store(str(self.out)), Store(str(calm))
            for name in before.all_names():
                if name.startswith(BEFORE):
                    store.take(before, name, name)
        runtime = {"num_cpus": None, "address": cluster.address} if cluster else {"num_cpus": 2}
        settings = whole.model_dump() | {"runtime": {**whole.runtime.model_dump(), "placement": placement, **runtime}}
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
        for path in self._files():
            with suppress(FileNotFoundError):
                if path.suffix != ".tmp":
                    found.add((str(path), path.stat().st_mtime_ns))
        return frozenset(found)

    def names(self, end: str) -> list[Path]:
        """Return files of unfinished work."""
        return sorted(path for path in self._files() if "partial" in path.parts and path.name.endswith(end))

    def _files(self) -> list[Path]:
        """Return the files that are there; unlike Path.rglob this lives with folders that go meanwhile."""
        return [Path(folder) / name for folder, _, names in os.walk(self.out) for name in names]

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


def tail(log: Path) -> str:
    return "\n".join(log.read_text().splitlines()[-30:])
