"""Search spaces, searchers, schedulers and loggers of Ray Tune, by the names a sweep file calls them."""

import importlib.util
import logging
import os
from collections.abc import Callable
from typing import Any

from ray import tune
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


def _asha(c: SweepConfig) -> Any:
    epochs = c.student_epochs
    grace = c.sweep.grace_epochs or max(1, epochs // 8)
    return ASHAScheduler(
        time_attr="epoch", max_t=epochs, grace_period=min(grace, epochs), reduction_factor=c.sweep.reduction_factor or 3
    )


def _pbt(c: SweepConfig) -> Any:
    return PopulationBasedTraining(
        time_attr="epoch", perturbation_interval=perturb_epochs(c), hyperparam_mutations=param_space(c)
    )


SCHEDULERS: dict[str, Callable[[SweepConfig], Any]] = {"fifo": lambda c: FIFOScheduler(), "asha": _asha, "pbt": _pbt}


def perturb_epochs(c: SweepConfig) -> int:
    """Return the epochs between two perturbations of population-based training."""
    return c.sweep.perturb_epochs or max(1, c.student_epochs // 8)


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
