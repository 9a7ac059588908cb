"""Search spaces, searchers, schedulers and loggers of Ray Tune, by the names a sweep file calls them."""

import importlib.util
import json
import logging
import os
from collections.abc import Callable
from typing import Any

from ray import tune
from ray.tune.experiment import Trial
from ray.tune.result import EXPR_RESULT_FILE
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler, PopulationBasedTraining
from ray.tune.search.basic_variant import BasicVariantGenerator

from cvdd_ray.errors import ConfigError
from cvdd_ray.space import Domain
from cvdd_ray.sweepconfig import SweepConfig

DOMAINS: dict[str, Callable[[Domain], Any]] = {
    "grid": lambda domain: tune.grid_search(list(domain.points())),
    "choice": lambda domain: tune.choice(list(domain.points())),
    "uniform": lambda domain: tune.uniform(*domain.argument),
    "loguniform": lambda domain: tune.loguniform(*domain.argument),
    "quniform": lambda domain: tune.quniform(*domain.argument),
    "randint": lambda domain: tune.randint(*domain.argument),
    "lograndint": lambda domain: tune.lograndint(*domain.argument),
}


def param_space(c: SweepConfig) -> dict[str, Any]:
    """Return the sweep's space as Tune's; listed values that are not numbers go by their names."""
    return {key: DOMAINS[domain.kind](domain) for key, domain in c.sweep.space.items()}


def require_extra(module: str, option: str) -> None:
    """Raise ConfigError unless the optional package behind an option is installed."""
    if importlib.util.find_spec(module) is None:
        raise ConfigError(f"{option}: {module!r} is not installed; pip install 'cvdd_ray[{module}]'")


def _variants(c: SweepConfig) -> Any:
    return BasicVariantGenerator(random_state=c.seed, max_concurrent=c.sweep.max_concurrent or 0)


def _optuna(c: SweepConfig) -> Any:
    require_extra("optuna", "sweep.search")
    import optuna
    from ray.tune.search import ConcurrencyLimiter
    from ray.tune.search.optuna import OptunaSearch

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    searcher = OptunaSearch(seed=c.seed)
    return ConcurrencyLimiter(searcher, c.sweep.max_concurrent) if c.sweep.max_concurrent else searcher


SEARCHERS: dict[str, Callable[[SweepConfig], Any]] = {"grid": _variants, "random": _variants, "optuna": _optuna}


class RestorableASHA(ASHAScheduler):
    """ASHA that knows, after a restart, what the trials of earlier sessions had reached at its rungs.

    Tune brings back a scheduler as it was before the first trial.
    """

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        for result in recorded_results(trial):
            super().on_trial_result(tune_controller, trial, result)


class RestorablePBT(PopulationBasedTraining):
    """Population-based training whose trials, after a restart, are perturbed when they would have been."""

    def on_trial_add(self, tune_controller: Any, trial: Trial) -> None:
        super().on_trial_add(tune_controller, trial)
        last = max((result["epoch"] for result in recorded_results(trial)), default=0)
        self._trial_state[trial].last_perturbation_time = (
            last // self._perturbation_interval * self._perturbation_interval
        )


def recorded_results(trial: Trial) -> list[dict]:
    """Return what a trial has reported in earlier sessions, epoch by epoch; nothing for a new one."""
    storage = trial.storage
    if storage is None or storage.trial_dir_name is None:
        return []
    try:
        with storage.storage_filesystem.open_input_stream(f"{storage.trial_fs_path}/{EXPR_RESULT_FILE}") as stream:
            lines = stream.read().splitlines()
    except FileNotFoundError:
        return []
    found = {result["epoch"]: result for result in map(json.loads, lines) if "epoch" in result}
    return [found[epoch] for epoch in sorted(found)]


def _asha(c: SweepConfig) -> Any:
    return RestorableASHA(
        time_attr="epoch", max_t=c.student_epochs, grace_period=c.sweep.grace_epochs or _an_eighth(c),
        reduction_factor=c.sweep.reduction_factor or 3,
    )  # fmt: skip


def _pbt(c: SweepConfig) -> Any:
    space = c.sweep.space
    mutations = {key: list(d.points()) if d.values else DOMAINS[d.kind](d) for key, d in space.items()}

    def inside(point: dict[str, Any]) -> dict[str, Any]:  # perturbing multiplies, and so may leave a range
        ranges = {key: d.argument for key, d in space.items() if d.values is None}
        return {**point, **{key: min(max(point[key], low), high) for key, (low, high, *_) in ranges.items()}}

    return RestorablePBT(
        time_attr="epoch", perturbation_interval=perturb_epochs(c), hyperparam_mutations=mutations, custom_explore_fn=inside
    )  # fmt: skip


SCHEDULERS: dict[str, Callable[[SweepConfig], Any]] = {"fifo": lambda c: FIFOScheduler(), "asha": _asha, "pbt": _pbt}


def perturb_epochs(c: SweepConfig) -> int:
    """Return the epochs between two perturbations of population-based training."""
    return c.sweep.perturb_epochs or _an_eighth(c)


def _an_eighth(c: SweepConfig) -> int:
    return max(1, c.student_epochs // 8)


def _wandb(project: str) -> Any:
    require_extra("wandb", "sweep.loggers")
    from ray.air.integrations.wandb import WandbLoggerCallback

    here = {"mode": os.environ.get("WANDB_MODE"), "dir": os.environ.get("WANDB_DIR")}  # its actor may live elsewhere
    return WandbLoggerCallback(project=project, **{name: value for name, value in here.items() if value})


def _mlflow(project: str) -> Any:
    require_extra("mlflow", "sweep.loggers")
    from ray.air.integrations.mlflow import MLflowLoggerCallback

    return MLflowLoggerCallback(experiment_name=project)  # the server of MLFLOW_TRACKING_URI, or ./mlruns


LOGGERS: dict[str, Callable[[str], Any]] = {"wandb": _wandb, "mlflow": _mlflow}


def quiet_tune() -> None:
    """Keep Tune from speaking: what a trial died of is in the results, progress is shown by the sweep itself."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # the newer output prints boxes however quiet it is asked to be
    for name in ("ray.tune", "ray.train", "ray.air"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
