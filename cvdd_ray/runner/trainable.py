"""A trial of a sweep as a Ray Tune trainable, for `cvdd sweep` and for anyone's own Tuner."""

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ray import tune

from cvdd_ray.config import RunConfig
from cvdd_ray.core.experts import prepare_torch
from cvdd_ray.data.artifacts import Artifacts, source_stores
from cvdd_ray.data.sources import RealData
from cvdd_ray.data.storage import Store
from cvdd_ray.runner.cluster import task_share, worker_bundles
from cvdd_ray.runner.leases import lease_desk, leased
from cvdd_ray.runner.runtime import RayRuntime
from cvdd_ray.space import Space
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.runtime import LocalRuntime, Runtime
from cvdd_ray.stages.sweepsummary import TRIALS
from cvdd_ray.stages.trial import FIRST_STAGE, Measurement, TrialStudents, prepare, run_beside, run_trial
from cvdd_ray.sweepconfig import CHECKPOINT_EVERY, settings_of

METRIC = "holdout_accuracy"
STATE = "students.safetensors"


def trainable(
    config: RunConfig,
    out: str,
    *,
    seeds: int = 1,
    report_every: int = 1,
    checkpoint_every: int = CHECKPOINT_EVERY,
    space: Space | None = None,
    reuse: Sequence[str] = (),
    real: RealData | None = None,
    gpus_per_trial: float | None = None,
    workers_per_trial: int = 1,
    keep_last: bool = False,
) -> Callable:
    """Return a Tune trainable that measures this run with the dotted settings of a trial's `config` changed.

    It makes the stages a trial needs (below `out`, shared by all trials; or taken over from runs and sweeps in `reuse`),
    trains `seeds` students side by side and reports `holdout_accuracy` (percent, mean over the students; never the test
    set), `epoch` and more every `report_every` epochs, with a checkpoint every `checkpoint_every` epochs (`keep_last`:
    after the last, too). `config` must have one IPC and one student. `space` is needed where points name listed values;
    `real` spares trials from reading the data; `gpus_per_trial` and `workers_per_trial` are those of SearchConfig.

    A trial raises ConfigError for settings that do not fit together, and what the stages raise.

        tuner = tune.Tuner(
            cvdd_ray.trainable(config, "runs/mine"),
            param_space={"evaluate.temperature": tune.grid_search([4, 20])},
            tune_config=tune.TuneConfig(metric="holdout_accuracy", mode="max"),
        )
    """
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # relative paths of the data stay what they are
    c, space, root, sources = config.runtime, space or {}, Store(out).root, [Store(place).root for place in reuse]

    def cvdd_trial(point: dict[str, Any], real: RealData | None = None) -> None:
        prepare_torch(c.threads_per_actor)
        values = settings_of(space, point)
        store = Store(root)
        exclusive = partial(leased, lease_desk(store, lifetime="detached"))
        artifacts = Artifacts(store, variants=True, sources=source_stores(sources), exclusive=exclusive)
        opened: list[Run] = []
        try:
            run, used = prepare(lambda wanted: _open(opened, wanted, artifacts, config, real), config, values)
            about = {
                "values": point,
                "stages": {stage: artifacts.folder(manifest.identity) for stage, manifest in used.items()},
                "config": run.config.model_dump(mode="json"),
            }
            store.write(f"{TRIALS}/{tune.get_context().get_trial_id()}.json", json.dumps(about, indent=1).encode())
            students = TrialStudents(run, seeds)
        finally:
            for one in opened:
                one.close()
        if checkpoint := tune.get_checkpoint():
            with checkpoint.as_directory() as folder:
                students.load(Path(folder, STATE).read_bytes())
        report = partial(_report, point)
        run_trial(students, report, report_every=report_every, checkpoint_every=checkpoint_every, keep_last=keep_last)

    function = cvdd_trial if real is None else tune.with_parameters(cvdd_trial, real=real)
    return tune.with_resources(function, lambda point: placement(config, point, gpus_per_trial, workers_per_trial))


def placement(
    config: RunConfig, point: Mapping[str, Any], gpus_per_trial: float | None, workers_per_trial: int
) -> tune.PlacementGroupFactory:
    """Return what a trial asks of the cluster.

    Trials that differ in post-evaluation alone: one bundle, by default a quarter of a GPU, so that small students share
    one. Trials that make stages anew: a place for the students, and `workers_per_trial` bundles for expert actors and
    tasks, of a core and what the students leave of a GPU; without GPUs the students need no place of their own, since they
    and the actors never work at once.
    """
    c = config.runtime
    share = task_share(c)
    gpus = share.num_gpus if gpus_per_trial is None else gpus_per_trial
    alone = _bundle(share.num_cpus, gpus)
    only_evaluates = all(FIRST_STAGE.get(key.split(".")[0]) == "evaluate" for key in point)
    if only_evaluates or c.engine == "local":
        return tune.PlacementGroupFactory([alone])
    rest = 1.0 - gpus if gpus < 1 else 1.0  # of its GPU, so that a trial with one worker fits on one GPU
    worker = _bundle(share.num_cpus, rest if share.num_gpus else 0.0)
    return tune.PlacementGroupFactory([_bundle(0, gpus), *[worker] * workers_per_trial])


def _bundle(cpus: float, gpus: float) -> dict[str, float]:
    return {name: amount for name, amount in (("CPU", cpus), ("GPU", gpus)) if amount}


def _open(opened: list[Run], config: RunConfig, artifacts: Artifacts, base: RunConfig, real: RealData | None) -> Run:
    """Return the run of a configuration inside a trial, and note it among those to close."""
    opened.append(run_beside(base, real, config, artifacts, start=lambda: _runtime(config)))
    return opened[-1]


def _runtime(config: RunConfig) -> Runtime:
    """Return what runs a trial's stages: actors in the trial's own places, or this process where it has none."""
    return RayRuntime(config.runtime) if worker_bundles() else LocalRuntime(config.runtime.threads_per_actor)


def _report(point: Mapping[str, Any], measured: Measurement, state: bytes | None) -> None:
    """Tell Tune; this may not return, when the scheduler ends the trial. The point goes along: population-based training
    may have given the trial another one by the time its results are read."""
    metrics = {**measured.metrics(), "point": json.dumps(point)}
    if state is None:
        tune.report(metrics)
        return
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, STATE).write_bytes(state)
        tune.report(metrics, checkpoint=tune.Checkpoint.from_directory(folder))
