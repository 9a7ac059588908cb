"""A tiny run from its starting images to its soft labels, disturbed or not, for tests that compare bytes.

As a program it is a driver of its own: ADDRESS PLACEMENT WIRE SEED THERE OUT, where SEED "" leaves the run alone. A disturbed
one waits for a line at its first checkpoint and when it hears of nodes that will leave, so that there is work left when that
happens.
"""

import hashlib
import json
import os
import random
import sys

import ray
from conftest import tiny_config

from cvdd_ray.stages.context import Run
from cvdd_ray.stages.initialize import initialize
from cvdd_ray.stages.pretrain import pretrain
from cvdd_ray.stages.prior import prior
from cvdd_ray.stages.relabel import relabel
from cvdd_ray.stages.synthesize import synthesize

BEFORE = ("pretrain", "prior", "initialize")
COMPARED = ("synthesize/ipc2", "relabel/ipc2/distilled")
KILLS = 2


def config(**runtime):
    """Four groups of one job each, with a checkpoint every 10 of 60 iterations; two files of labels."""
    synthesize = {"iterations": 60, "class_chunk": 5, "checkpoint_every": 10}
    return tiny_config(synthesize=synthesize, relabel={"epochs": 12, "batch_size": 10}, runtime=runtime)


def prepared(folder) -> Run:
    """Return a run in this process that has everything synthesis begins with."""
    run = Run(config(engine="local"), str(folder))
    pretrain(run)
    prior(run)
    initialize(run, 2)
    return run


def beside(there: Run, folder, config, runtime=None) -> Run:
    """Return a run of the same settings that has what another one has begun with."""
    run = Run(config, str(folder), runtime=runtime)
    for name in there.store.all_names():
        if name.startswith(BEFORE):
            run.store.take(there.store, name, name)
    return run


def distil(run: Run) -> dict[str, str]:
    """Make images and soft labels; return the sha256 of every file of them as it lies on the disk, manifests left out."""
    synthesize(run, 2)
    relabel(run, 2)
    names = [name for stage in COMPARED for name in run.store.names(stage) if not name.endswith("manifest.json")]
    return {name: hashlib.sha256(run.store.read(name)).hexdigest() for name in names}


class Killer:
    """Kills a random expert actor, coordinator or worker of a runtime at random checkpoints, `KILLS` times in all."""

    def __init__(self, runtime, seed: int):
        self._draw, self._runtime, self.killed = random.Random(seed), runtime, []
        muster = runtime._muster

        def mustered(*arguments):
            self._crew, scheduler = muster(*arguments)
            return self._crew, scheduler

        runtime._muster = mustered

    def __call__(self, event: str, facts: dict) -> None:
        if event != "checkpoint" or len(self.killed) == KILLS or self._draw.random() < 0.3:
            return
        experts = [(name, actor) for name, actors in self._runtime._experts.actors.items() for actor in actors]
        name, victim = self._draw.choice([*experts, *self._crew.workers.actors.items()])
        ray.kill(victim, no_restart=False)
        self.killed.append(name)


def main(address: str, placement: str, wire: str, seed: str, there: str, out: str) -> None:
    os.environ["RAY_AUTH_TOKEN"] = os.environ["CLUSTER_TOKEN"]  # that of tests was set with their imports

    from cvdd_ray.runner.runtime import RayRuntime

    settings = config(num_cpus=None, address=address, placement=placement, wire=wire)
    runtime = RayRuntime(settings.runtime)
    killer = Killer(runtime, int(seed)) if seed else None

    waits = {"checkpoint", "nodes_leaving"}

    def tell(event: str, facts: dict) -> None:
        print(event, facts.get("what"), flush=True)
        if killer:
            killer(event, facts)
            if event in waits:
                waits.remove(event)
                sys.stdin.readline()

    runtime._on_event = tell
    hashes = distil(beside(Run(settings, there), out, settings, runtime))
    print("hashes", json.dumps(hashes), flush=True)
    print("killed", len(killer.killed) if killer else 0, flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
