"""`cvdd sweep`: the shared stages, the trials under Ray Tune, the tables, and one final test of the winner."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from ray import tune

from cvdd_ray.config import RunConfig
from cvdd_ray.data.artifacts import Artifacts, first_difference, source_stores
from cvdd_ray.data.sources import RealData
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError, CvddError
from cvdd_ray.recipes import dump_config, with_settings, without_login, without_place
from cvdd_ray.runner.cluster import connect, disconnect, places_with
from cvdd_ray.runner.leases import lease_desk, leased
from cvdd_ray.runner.nodes import gather
from cvdd_ray.runner.runtime import RayRuntime, mendable
from cvdd_ray.runner.search import LOGGERS, SCHEDULERS, SEARCHERS, param_space, perturb_epochs, quiet_tune
from cvdd_ray.runner.sweepdisplay import DisplayCallback, SweepDisplay
from cvdd_ray.runner.trainable import METRIC, placement, trainable
from cvdd_ray.space import label, samples
from cvdd_ray.stages.arms import OURS
from cvdd_ray.stages.context import Progress, Run, Silent
from cvdd_ray.stages.evaluate import RESULTS as TEST_RESULTS
from cvdd_ray.stages.evaluate import evaluate
from cvdd_ray.stages.pipeline import check
from cvdd_ray.stages.runtime import LocalRuntime, Runtime
from cvdd_ray.stages.sweepreport import best_yaml, write_sweep_report
from cvdd_ray.stages.sweepsummary import (
    BEST,
    FINAL,
    RESULTS,
    SWEEP,
    TRIALS,
    default_point,
    is_sweep,
    read_sweep,
    read_sweep_config,
    results_table,
    trial_run_config,
)
from cvdd_ray.stages.trial import prepare, run_beside, untouched_stages, with_history
from cvdd_ray.sweepconfig import CHECKPOINT_EVERY, TRIED, SweepConfig, named

TUNE = "tune"  # Tune's own folder: trial storage, TensorBoard files


def sweep(
    config: SweepConfig,
    out: str,
    *,
    reuse: Sequence[str] = (),
    overwrite: bool = False,
    progress: Progress | None = None,
    on_event: Callable[[str, dict], None] = lambda event, facts: None,
    verbose: bool = False,
) -> tune.ResultGrid:
    """Run a sweep below `out`, or continue the one that is there, and return Tune's results.

    Stages that no swept setting changes are made once, before the trials; finished stages of other runs or sweeps named in
    `reuse` are taken over where they are the same. `on_event` is told of failures and more in the shared stages (RayRuntime).
    Results: results.parquet, best.yaml, final.json, report/.

    Raises ConfigError for settings that cannot work (before anything starts), ArtifactError when `out` holds another
    sweep and `overwrite` is off, and the first trial's error when all trials fail.
    """
    progress = progress or Silent()
    weights = [(f"committee.weights.{name}", source) for name, source in config.committee.weights.items()]
    places = [
        ("out", str(out)),
        ("data.path", config.data.path or ""),
        *weights,
        *(("--reuse", root) for root in reuse),
    ]
    for name, place in places:
        if place != without_login(place):
            raise ConfigError(
                f"{name}: {without_login(place)} was given with credentials, which would end up in Ray Tune's files; leave "
                f"them to the standard chain (AWS_ACCESS_KEY_ID, profiles, roles)"
            )
    store, sources = Store(out), source_stores(reuse)
    base = config.run_config()
    first = Run(base, Artifacts(store, variants=True), progress=progress)
    _refuse_another(config, store, overwrite)
    check(first)
    _check_points(config, first)
    store.require_writable()
    callbacks = [DisplayCallback(), *(LOGGERS[name](f"cvdd-{Path(out).name}") for name in config.sweep.loggers)]
    machinery = SEARCHERS[config.sweep.search](config), SCHEDULERS[config.sweep.scheduler](config), callbacks
    if overwrite:
        _drop_trials(store)
    owns_ray = connect(config.runtime)
    runtime: Runtime | None = None
    try:
        if not verbose:
            quiet_tune()
        gather(config.runtime, store, progress.say)
        runtime = RayRuntime(config.runtime, on_event) if config.runtime.engine == "ray" else LocalRuntime()
        artifacts = Artifacts(store, variants=True, sources=sources, exclusive=partial(leased, lease_desk(store)))
        run_of = partial(run_beside, base, first.real, artifacts=artifacts, runtime=runtime, progress=progress)
        _check_room(config, base)
        store.write(SWEEP, dump_config(without_place(config)).encode())
        prepare(run_of, base, {}, untouched_stages(config.sweep.changed()))
        if isinstance(runtime, RayRuntime):
            runtime.release()  # trials need what the experts hold
        function = _trainable(config, base, store, [source.root for source in sources], first.real)
        results = _run_trials(config, store, function, machinery, progress, verbose)
        _write_results(config, store, results)
        _final_test(config, store, partial(run_of, progress=OnlyWork(progress)))
        write_sweep_report(store)
        return results
    finally:
        if runtime is not None:
            runtime.close()
        disconnect(owns_ray)


class OnlyWork:
    """Progress of work alone: what is already there is not said again."""

    def __init__(self, progress: Progress):
        self.start, self.update, self.finish = progress.start, progress.update, progress.finish

    def say(self, text: str) -> None: ...


def _refuse_another(config: SweepConfig, store: Store, overwrite: bool) -> None:
    """Raise ArtifactError when the directory holds a sweep with other settings and `overwrite` is off."""
    if overwrite or not is_sweep(store):
        return
    there, wanted = (
        without_place(c).model_dump(mode="json", exclude={"runtime": True, "sweep": {"final_seeds"}})
        for c in (read_sweep_config(store), config)
    )
    if difference := first_difference(there, wanted):
        where, old, new = difference
        raise ArtifactError(
            f"{store.display(SWEEP)} has {where} = {old}, now asked for {new}; choose another --out, or pass --overwrite "
            f"to drop its trials"
        )


def _drop_trials(store: Store) -> None:
    """Remove the trials and results of a sweep; its stages stay: they are used where they fit."""
    for folder in (TUNE, TRIALS, "report"):
        store.delete_folder(folder)
    for name in (RESULTS, BEST, FINAL, SWEEP):
        store.delete(name)


def _check_points(config: SweepConfig, first: Run) -> None:
    """Raise ConfigError where a listed value's run cannot work with this data (networks, teachers, voters, IPC), each seen
    at the first point of the space that has it."""
    seen: set[tuple[str, str]] = set()
    for values in samples(config.sweep.space, TRIED):
        new = {(key, label(value)) for key, value in values.items() if config.sweep.space[key].values} - seen
        if not new:
            continue
        seen |= new
        try:
            check(Run(config.trial_config(values), first.artifacts, real=first.real))
        except CvddError as error:
            raise type(error)(f"sweep.space, at {named(values)}: {error}") from None


def _check_room(config: SweepConfig, base: RunConfig) -> None:
    """Raise ConfigError when a trial would wait for ever for more than a private cluster has."""
    if config.runtime.address is not None:
        return  # a cluster may grow
    s = config.sweep
    asked = placement(base, s.space, s.gpus_per_trial, s.workers_per_trial)
    for kind, amount in asked.required_resources.items():
        there = sum(places_with(kind))
        if amount > there:
            raise ConfigError(
                f"sweep: a trial asks for {amount:g} {kind}, this machine has {there:g}; lower sweep.gpus_per_trial or "
                f"sweep.workers_per_trial, or set runtime.engine=local"
            )


def _trainable(config: SweepConfig, base: RunConfig, store: Store, reuse: Sequence[str], real: RealData) -> Callable:
    """Return the trainable of this sweep's trials. Its real data comes without test images: no trial can see them."""
    s, is_pbt = config.sweep, config.sweep.scheduler == "pbt"
    blind = replace(real, test=real.test.subset(np.arange(0)))
    return trainable(
        base, store.root, seeds=s.seeds, report_every=s.report_every,
        checkpoint_every=perturb_epochs(config) if is_pbt else s.checkpoint_every or CHECKPOINT_EVERY, space=s.space,
        reuse=reuse, real=blind, gpus_per_trial=s.gpus_per_trial, workers_per_trial=s.workers_per_trial, keep_last=is_pbt,
    )  # fmt: skip


def _run_trials(
    config: SweepConfig, store: Store, function: Callable, machinery: tuple, progress: Progress, verbose: bool
) -> tune.ResultGrid:  # fmt: skip
    """Run the trials, or what is left of them, with (searcher, scheduler, callbacks).

    Raises KeyboardInterrupt after Ctrl-C, when their state has been saved.
    """
    searcher, scheduler, callbacks = machinery
    filesystem, root = (None, store.root) if store.is_local else store.filesystem
    there = f"{root.rstrip('/')}/{TUNE}"
    display = DisplayCallback.current = SweepDisplay(progress, config.num_trials())
    progress.start("sweep", config.num_trials(), "trials")
    c = config.sweep
    has_snapshot = any(name.startswith(f"{TUNE}/experiment_state") for name in store.names(TUNE))
    if has_snapshot and tune.Tuner.can_restore(there, storage_filesystem=filesystem):
        tuner = tune.Tuner.restore(
            there,
            trainable=function,
            resume_errored=True,
            param_space=param_space(config),
            storage_filesystem=filesystem,
        )
    else:
        store.delete_folder(TUNE)
        tuner = tune.Tuner(
            function,
            param_space=param_space(config),
            tune_config=tune.TuneConfig(
                metric=METRIC, mode="max", search_alg=searcher, scheduler=scheduler, num_samples=c.num_trials or 1,
                reuse_actors=True, trial_dirname_creator=lambda trial: trial.trial_id,
            ),
            run_config=tune.RunConfig(
                name=TUNE, storage_path=root, storage_filesystem=filesystem, verbose=2 if verbose else 0,
                callbacks=callbacks, checkpoint_config=tune.CheckpointConfig(num_to_keep=None if c.scheduler == "pbt" else 2),
                failure_config=tune.FailureConfig(max_failures=c.max_failures),
            ),
        )  # fmt: skip
    results = tuner.fit()
    if display.was_interrupted:  # Tune catches Ctrl-C, saves and returns
        raise KeyboardInterrupt
    progress.finish(display.note())
    return results


def _write_results(config: SweepConfig, store: Store, results: tune.ResultGrid) -> None:
    """Write results.parquet from Tune's results.  Raises the first trial's error when no trial has finished."""
    rows = [row for result in results for row in _rows(config, result)]
    if not any(row["state"] == "finished" for row in rows):
        errors = [mendable(result.error) for result in results if result.error]
        if not errors:
            reached = ", ".join(f"{row['trial']}: {row['epoch']} of {row['epochs']}" for row in rows[-8:])
            raise ConfigError(
                f"sweep: no trial reached its last epoch ({reached}); lower sweep.reduction_factor or use scheduler fifo"
            )
        raise errors[0]
    store.write(RESULTS, results_table(config, rows))


def _rows(config: SweepConfig, result: Any) -> list[dict[str, Any]]:
    """Return one row per measured epoch of a trial; an epoch measured again after a restart counts once, the last time."""
    frame = result.metrics_dataframe
    found = {int(m["epoch"]): m for m in frame.to_dict("records")} if frame is not None and "epoch" in frame else {}
    if "epoch" in (result.metrics or {}):  # what Tune itself remembers, should the trial's file lag behind
        found.setdefault(int(result.metrics["epoch"]), result.metrics)
    last = max(found, default=0)
    epochs = int(found[last]["epochs"]) if found else 0
    state = "failed" if result.error else "finished" if last == epochs else "stopped"
    about = {"trial": Path(result.path).name, "state": state, "epochs": epochs, "error": _reason(result.error)}
    if not found:
        nothing = ("holdout_accuracy", "holdout_std", "train_loss", "train_agreement", "lr", "seconds", "history")
        return [{**about, **dict.fromkeys(nothing), "point": result.config, "epoch": 0, "holdout_accuracies": []}]
    return [
        {
            **about,
            **{name: m[name] for name in ("holdout_accuracy", "holdout_std", "train_loss", "train_agreement", "lr")},
            "epoch": epoch,
            "holdout_accuracies": [m[f"holdout_accuracy_{seed}"] for seed in range(config.sweep.seeds)],
            "seconds": m["time_total_s"],
            "history": m["history"],
            "point": json.loads(m["point"]),
        }
        for epoch, m in sorted(found.items())
    ]


def _reason(error: Exception | None) -> str | None:
    """Return in one line what a trial died of."""
    return " ".join(str(mendable(error)).strip().splitlines()[-1:]) if error else None


def _final_test(config: SweepConfig, store: Store, run_of: Callable[[RunConfig], Run]) -> None:
    """Write best.yaml, and test fresh students of the winner and of the unchanged run, side by side."""
    summary, c = read_sweep(store), config.sweep
    winner = summary.winner
    best = with_history(trial_run_config(store, winner.name), winner.history)
    fresh = {"seeds": c.final_seeds or config.evaluate.seeds, "first_seed": c.seeds}
    dropped = {"eval_labels"} if best.relabel.batchnorm == "eval" else set()
    shown = [name for name in config.evaluate.baselines if name not in dropped]
    store.write(BEST, best_yaml(summary, with_settings(best, {"evaluate": {**fresh, "baselines": shown}})).encode())
    if not c.final_seeds:
        return
    rows = []
    for name, point, run_config in (
        ("winner", winner.point, best), ("default", default_point(config), config.run_config()),
    ):  # fmt: skip
        run, _ = prepare(run_of, with_settings(run_config, {"evaluate": fresh}), {})
        ipc = run_config.ipc[0]
        evaluate(run, ipc)
        table = json.loads(run.artifacts.read(run.require(f"evaluate/ipc{ipc}", "evaluate"), TEST_RESULTS))["table"]
        row = next(row for row in table if row["arm"] == OURS)
        kept = ("last_mean", "last_std", "best_mean", "best_std", "seeds")
        rows.append({"name": name, "point": dict(point), **{key: row[key] for key in kept}})
    store.write(FINAL, json.dumps(rows, indent=1).encode())
