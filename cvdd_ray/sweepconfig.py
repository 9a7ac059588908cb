"""The description of a sweep: a run, and what to vary in it."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from cvdd_ray.config import RunConfig
from cvdd_ray.errors import ConfigError
from cvdd_ray.evaluateconfig import MUTABLE_SETTINGS
from cvdd_ray.fields import Count, NonNegative, Number, Positive, Section
from cvdd_ray.recipes import load_config, with_settings, without_place
from cvdd_ray.space import MAX_GRID, SEVERAL, Domain, Space, flat, label, samples

MUTABLE = tuple(f"evaluate.{name}" for name in MUTABLE_SETTINGS)
CHECKPOINT_EVERY = 10  # epochs
TRIED = 256  # points of a random space that are checked before anything starts


class SearchConfig(Section):
    space: dict[str, Domain]
    """What to vary: dotted setting (or section) -> `{grid: [...]}`, `{choice: [...]}`, `{uniform: [low, high]}`,
    `{loguniform: ...}`, `{quniform: [low, high, step]}`, `{randint: ...}`, `{lograndint: ...}`. Under the key `settings` the
    listed values are mappings of dotted settings, of any sections, which change together."""
    search: Literal["grid", "random", "optuna"] = "grid"
    """`grid`: every combination; `random`: independent draws; `optuna`: draws that learn from finished trials (TPE)."""
    num_trials: Positive | None = None
    """Trials of a `random` or `optuna` search (of `pbt`: the population); a grid has as many as it has combinations."""
    scheduler: Literal["fifo", "asha", "pbt"] = "fifo"
    """`fifo`: every trial to its end; `asha`: trials that lag are stopped early; `pbt`: population-based training, where
    lagging trials copy a leading one and change its settings."""
    grace_epochs: Positive | None = None
    """`asha`: epochs before a trial may be stopped; None: an eighth of all."""
    reduction_factor: Annotated[Number, Field(gt=1)] | None = None
    """`asha`: of this many trials one goes on at every rung; None: 3."""
    perturb_epochs: Positive | None = None
    """`pbt`: epochs between two looks at the others; None: an eighth of all."""
    seeds: Positive = 1
    """Students per trial, trained side by side; the metric is their mean accuracy on the hold-out."""
    report_every: Positive = 1
    """Epochs between two measurements on the hold-out; the last epoch is always measured."""
    checkpoint_every: Positive | None = None
    """Epochs between two checkpoints of a trial, which goes on from the last after an interruption; None: 10 (`pbt`
    has one at every `perturb_epochs`)."""
    final_seeds: Count = 3
    """Fresh students of the winner, and of the unchanged run, that are tested at the end; 0: no test."""
    max_concurrent: Positive | None = None
    """Trials at once; None: as many as fit."""
    gpus_per_trial: NonNegative | None = None
    """GPU share of a trial's students; None: a quarter where there are GPUs; 0 keeps them on the CPU."""
    workers_per_trial: Positive = 1
    """Places for a trial's expert actors and tasks (`runtime.threads_per_actor` cores each, and what `gpus_per_trial`
    leaves of a GPU); only trials that make stages anew take them."""
    max_failures: Count = 1
    """How often a trial that failed is tried again from its checkpoint."""
    loggers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Where else results go, beside TensorBoard and the tables: Weights & Biases, MLflow (extras of the package)."""

    @model_validator(mode="after")
    def _check(self):
        if not self.space:
            raise ValueError("space is empty; name at least one setting, e.g. {evaluate.temperature: {grid: [4, 20]}}")
        several = self.space.get(SEVERAL)
        if several and not all(isinstance(value, Mapping) and value for value in several.values or (None,)):
            raise ValueError(f"space.{SEVERAL} lists mappings of dotted settings, e.g. {{grid: [{{voting.size: 3}}]}}")
        for key in self.changed():
            if key.split(".")[0] in ("runtime", "storage", "sweep"):
                raise ValueError(f"space.{key} decides where work runs and not what comes out; sweep another setting")
            if key.split(".")[0] in ("seed", "data") and key != "data.flip":
                raise ValueError(
                    f"space.{key} changes the hold-out; trials are only compared on one, sweep another setting"
                )
        for key, domain in self.space.items():
            allowed = {"grid": ("grid",), "optuna": _DRAWN, "random": ("grid", *_DRAWN)}[self.search]
            if domain.kind not in allowed:
                raise ValueError(f"space.{key}: search {self.search!r} takes {', '.join(allowed)}, got {domain.kind}")
        for section, domain in self.space.items():
            named_there = {name for value in domain.values or () if isinstance(value, Mapping) for name in value}
            prefix = "" if section == SEVERAL else f"{section}."
            twice = [key for key in self.space if key in {f"{prefix}{name}" for name in named_there}]
            if twice:
                raise ValueError(f"space.{twice[0]} is also changed by space.{section}; vary it in one of the two")
        idle = sorted(set(self.changed()) & set(_NO_EFFECT))
        if idle:
            raise ValueError(f"space.{idle[0]} changes nothing that a trial measures; {_NO_EFFECT[idle[0]]}")
        if (self.search == "grid") != (self.num_trials is None):
            needs = (
                "has as many trials as combinations; leave num_trials out" if self.num_trials else "needs num_trials"
            )
            raise ValueError(f"search {self.search!r} {needs}")
        self._check_scheduler()
        return self

    def changed(self) -> list[str]:
        """Return every dotted setting that some point changes; a mapping changes the settings it names."""
        names = []
        for key, domain in self.space.items():
            prefix = "" if key == SEVERAL else f"{key}."
            inside = [
                f"{prefix}{name}" for value in domain.values or () if isinstance(value, Mapping) for name in value
            ]
            names += inside or [key]
        return names

    def _check_scheduler(self) -> None:
        for option, scheduler in _ONLY_WITH.items():
            if getattr(self, option) is not None and self.scheduler != scheduler:
                raise ValueError(f"{option} has no effect with scheduler {self.scheduler!r}; it is for {scheduler!r}")
        epochs = [key for key in self.changed() if key in ("evaluate.epochs", "relabel.epochs")]
        if self.scheduler == "asha" and epochs:
            raise ValueError(f"scheduler 'asha' compares trials at equal epochs; {epochs[0]} cannot be swept with it")
        if self.scheduler == "pbt":
            if self.checkpoint_every is not None:
                raise ValueError("checkpoint_every has no effect with scheduler 'pbt'; set perturb_epochs")
            fixed = [key for key in self.space if key not in MUTABLE]
            if fixed:
                raise ValueError(
                    f"scheduler 'pbt' changes running students: it takes {', '.join(MUTABLE)}, got {fixed[0]}"
                )
            if self.search != "random" or any(domain.kind == "grid" for domain in self.space.values()):
                raise ValueError("scheduler 'pbt' needs search 'random' without grids")
            if self.num_trials < 2:
                raise ValueError("scheduler 'pbt' needs a population: num_trials of at least 2")


_DRAWN = tuple(kind for kind in Domain.model_fields if kind != "grid")
_NO_EFFECT = {
    "evaluate.seeds": "set sweep.seeds", "evaluate.test_every": "set sweep.report_every",
    "evaluate.baselines": "they belong to `cvdd run`", "evaluate.first_seed": "set sweep.seeds",
    "pretrain.workers": "its experts train in one process each", "pretrain.checkpoint_minutes": "set it in the base recipe",
    "evaluate.workers": "its students train in one process", "evaluate.checkpoint_minutes": "set sweep.checkpoint_every",
}  # fmt: skip
_ONLY_WITH = {"grace_epochs": "asha", "reduction_factor": "asha", "perturb_epochs": "pbt"}


class SweepConfig(RunConfig):
    """A run and its sweep. Trials differ from the run in the swept settings alone."""

    sweep: SearchConfig

    @model_validator(mode="after")
    def _check_points(self):
        grid = 1
        for domain in self.sweep.space.values():
            grid *= len(domain.values) if domain.kind == "grid" else 1
        if grid > MAX_GRID:
            raise ValueError(f"sweep.space has {grid} combinations; at most {MAX_GRID}: use search random or optuna")
        s, epochs = self.sweep, self.student_epochs
        for option, most in (("grace_epochs", epochs), ("perturb_epochs", epochs - 1)):
            if (getattr(s, option) or 0) > most:
                raise ValueError(
                    f"sweep.{option}: got {getattr(s, option)}, a trial has {epochs} epochs; at most {most}"
                )
        if s.scheduler == "pbt" and self.evaluate.phases:
            raise ValueError("evaluate.phases: scheduler 'pbt' finds phases of its own; leave them out")
        for values in ({}, *samples(self.sweep.space, TRIED)):
            try:
                self.trial_config(values)
            except ConfigError as error:
                where = f"sweep.space, at {named(values)}: " if values else ""
                raise ValueError(f"{where}{error}") from None
        return self

    def run_config(self) -> RunConfig:
        """Return the run without its sweep: what the trials start from, and the default they are compared with. It has
        no baselines, which belong to `cvdd run`.  Raises ConfigError as trial_config."""
        return self.trial_config({})

    def trial_config(self, values: Mapping[str, Any]) -> RunConfig:
        """Return the run with these dotted settings changed.

        Raises ConfigError when they do not fit together, or leave more than one IPC or student to be measured, or several
        workers to train it.
        """
        plain = without_place(self).model_dump(exclude={"sweep"})
        plain["evaluate"]["baselines"] = ()
        config = with_settings(RunConfig(**plain), flat(values))
        for name, many in (("ipc", config.ipc), ("evaluate.students", config.evaluate.students)):
            if len(many) != 1:
                raise ConfigError(f"{name}: a trial measures one, got {list(many)}; set {name}=[{many[0]}]")
        require_one_worker(config)
        if not config.labels_are_soft or config.evaluate.learned_lr:
            name, value = ("learned_lr", "true") if config.labels_are_soft else ("labels", "hard")
            raise ConfigError(
                f"evaluate.{name}: got {value}; a trial's students learn from soft labels at a learning rate that is given"
            )
        return config

    def num_trials(self) -> int:
        """Return how many trials the sweep has."""
        grids = [len(domain.values) for domain in self.sweep.space.values() if domain.kind == "grid"]
        total = self.sweep.num_trials or 1
        for size in grids:
            total *= size
        return total


def require_one_worker(config: RunConfig) -> None:
    """Raise ConfigError for students that several workers train together: a trial is one process."""
    if config.evaluate.workers > 1:
        raise ConfigError(
            f"evaluate.workers: got {config.evaluate.workers}, but a trial trains its students in one process (trials run "
            f"side by side); set evaluate.workers=1"
        )


def load_sweep(file: str, overrides=(), *, base: str | None = None) -> SweepConfig:
    """Return the checked sweep of a YAML file, with `section.key=value` overrides; `base` replaces the recipe it names.

    Raises ConfigError as load_config does, and for a space that holds an impossible run.
    """
    return load_config(file, overrides, model=SweepConfig, base=base)


def settings_of(space: Space, point: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a point of the space stands for (points name listed values by their labels)."""
    return flat({key: space[key].value(at) if key in space else at for key, at in point.items()})


def named(values: Mapping[str, Any]) -> str:
    """Return settings as short text: `evaluate.temperature=4, evaluate.eta=2`."""
    return ", ".join(f"{key}={label(value)}" for key, value in values.items())
