"""The whole run: every stage in order, each skipped when its artifact is already there."""

from collections.abc import Callable

from cvdd_ray.core.experts import work_device
from cvdd_ray.core.precision import require_tf32_device
from cvdd_ray.recipes import dump_config, parse_config, without_place
from cvdd_ray.stages.arms import label_sets
from cvdd_ray.stages.ceiling import ceiling, check_ceiling
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.evaluate import check_workers, evaluate
from cvdd_ray.stages.initialize import class_items, initialize, observer_name
from cvdd_ray.stages.pretrain import check_networks, pretrain
from cvdd_ray.stages.prior import check_given, prior
from cvdd_ray.stages.relabel import label_encoding, relabel, teacher_names
from cvdd_ray.stages.synthesize import synthesize
from cvdd_ray.stages.trajectories import check_network
from cvdd_ray.stages.votes import needs_priors, vote_of_image

CONFIG = "config.yaml"
SECTIONS = {
    "pretrain": ("committee", "pretrain"),
    "prior": ("prior",),
    "initialize": ("initialize",),
    "synthesize": ("voting", "synthesize"),
    "relabel": ("relabel",),
    "evaluate": ("evaluate",),
}


def check(run: Run) -> None:
    """Raise ConfigError or DataError for settings that would only fail in a late stage; nothing is computed or written."""
    c = run.config
    teacher_names(run)
    label_encoding(c.relabel, len(run.classes))
    observer_name(run)
    measured = needs_priors(c) and c.prior.method == "distill"
    if needs_priors(c) and not measured:
        check_given(run)
    for ipc in c.ipc:
        if c.synthesize.method == "committee":
            vote_of_image(run, dict.fromkeys(c.committee.experts, 0.0), ipc, 0)
        check_workers(run, ipc)
    if c.synthesize.method == "trajectories":
        check_network(run)
    check_ceiling(run)
    check_networks(run)
    check_precision(run)
    for ipc in {*c.ipc, *([c.prior.ipc] if measured else [])}:
        class_items(run, ipc)


def check_precision(run: Run) -> None:
    """Raise ConfigError for tf32 on a machine without a GPU where images are still to be made on it; what a joined cluster
    has, its workers see themselves."""
    c = run.config
    if c.synthesize.precision != "tf32" or c.runtime.address is not None:
        return
    if any(run.artifacts.manifest(f"synthesize/ipc{ipc}") is None for ipc in c.ipc):
        require_tf32_device(c.synthesize.precision, work_device())


def remember(run: Run, verb: str = "run") -> None:
    """Write the resolved configuration beside the artifacts, so that later verbs need only --out.

    A single verb that has done its work changes its own sections alone; the rest is what the other stages were made
    with. Where it ran and where it lies is left out.
    """
    config = without_place(run.config)
    if verb != "run" and run.store.exists(CONFIG):
        there = parse_config(run.store.read(CONFIG), run.store.display(CONFIG))
        config = there.model_copy(update={name: getattr(config, name) for name in SECTIONS[verb]})
    run.store.write(CONFIG, dump_config(config).encode())


def per_ipc(stage: Callable[[Run, int], object]) -> Callable[[Run], None]:
    """Return the stage for every IPC of the configuration."""

    def all_ipcs(run: Run) -> None:
        for ipc in run.config.ipc:
            stage(run, ipc)

    return all_ipcs


def relabel_all(run: Run, ipc: int) -> None:
    """Relabel the distilled images and what the baselines need."""
    if not run.config.labels_are_soft:
        run.progress.say("relabel: not needed, students learn from hard labels")
    for label_set in label_sets(run.config):
        relabel(run, ipc, label_set)


def evaluate_all(run: Run) -> None:
    """Train and test the students of every row of the table, those of the ceiling once for all IPCs."""
    per_ipc(evaluate)(run)
    ceiling(run)


STAGES: dict[str, Callable[[Run], None]] = {
    "pretrain": pretrain,
    "prior": prior,
    "initialize": per_ipc(initialize),
    "synthesize": per_ipc(synthesize),
    "relabel": per_ipc(relabel_all),
    "evaluate": evaluate_all,
}


def run_all(run: Run) -> None:
    """Run every stage for every IPC of the configuration.  Raises what the stages raise."""
    check(run)
    if not run.store.exists(CONFIG):
        remember(run)
    for stage in STAGES.values():
        stage(run)
    remember(run)
