"""What `import cvdd_ray` offers; loaded when it is first asked for."""

from cvdd_ray.config import RunConfig
from cvdd_ray.data.distilled import DistilledDataset, load_distilled
from cvdd_ray.errors import ArtifactError, ConfigError, CvddError, DataError, NumericsError
from cvdd_ray.recipes import load_config
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.evaluate import evaluate
from cvdd_ray.stages.export import export
from cvdd_ray.stages.initialize import initialize
from cvdd_ray.stages.pipeline import check, run_all
from cvdd_ray.stages.plan import Plan, plan
from cvdd_ray.stages.pretrain import pretrain
from cvdd_ray.stages.prior import prior
from cvdd_ray.stages.relabel import relabel
from cvdd_ray.stages.report import write_report
from cvdd_ray.stages.synthesize import synthesize
from cvdd_ray.sweepconfig import SweepConfig, load_sweep


def run(config: RunConfig, out: str, *, overwrite: bool = False) -> Run:
    """Run every stage of `config` below `out` and return the Run, whose `store` and `artifacts` hold the results.

    Uses Ray unless `runtime.engine` is `local`; Ray is shut down at the end.  Raises CvddError's kinds.
    """
    this = Run(config, out, overwrite=overwrite)
    check(this)
    this.store.require_writable()
    if config.runtime.engine == "ray":
        from cvdd_ray.runner import start_runtime

        this.runtime = start_runtime(config.runtime, this.store, this.progress.say)
    try:
        run_all(this)
    finally:
        this.close()
    return this


def sweep(config: SweepConfig, out: str, **options):
    """Run the sweep of `config` (from `load_sweep`) below `out`, or continue it, and return Ray Tune's ResultGrid.

    `options`: `reuse` (directories of runs or sweeps whose finished stages are taken over), `overwrite`, `verbose`,
    `progress` and `on_event`. Raises CvddError's kinds.
    """
    if config.runtime.address is None:
        from cvdd_ray.runner import protect_private_cluster

        protect_private_cluster()
    from cvdd_ray.runner.sweep import sweep as run_sweep

    return run_sweep(config, out, **options)


def trainable(config: RunConfig, out: str, **options):
    """Return a trainable for your own `ray.tune.Tuner`: it measures `config` with the dotted settings of a trial changed.

    Reports `holdout_accuracy` in percent, never the test set's. Stages are made below `out` and shared by all trials. The
    options (students per trial, epochs between reports, places for actors) are those of `runner.trainable.trainable`.
    """
    from cvdd_ray.runner.trainable import trainable as tune_trainable

    return tune_trainable(config, out, **options)
