"""The whole run: every stage in order, each skipped when its artifact is already there."""

from cvdd_ray.stages.context import Run
from cvdd_ray.stages.evaluate import evaluate, student_epochs
from cvdd_ray.stages.initialize import initialize
from cvdd_ray.stages.pretrain import pretrain
from cvdd_ray.stages.prior import prior
from cvdd_ray.stages.relabel import label_sets, relabel, teacher_names
from cvdd_ray.stages.synthesize import synthesize
from cvdd_ray.stages.votes import vote_of_image


def check(run: Run) -> None:
    """Raise ConfigError for settings that would only fail in a late stage, before anything is computed."""
    student_epochs(run)
    teacher_names(run)
    for ipc in run.config.ipc:
        for image_index in range(ipc):
            vote_of_image(run, dict.fromkeys(run.config.committee.experts, 0.0), ipc, image_index)


def run_all(run: Run) -> None:
    """Run every stage for every IPC of the configuration.  Raises what the stages raise."""
    check(run)
    pretrain(run)
    prior(run)
    for ipc in run.config.ipc:
        initialize(run, ipc)
        synthesize(run, ipc)
        for label_set in label_sets(run):
            relabel(run, ipc, label_set)
        evaluate(run, ipc)
