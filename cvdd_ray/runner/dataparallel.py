"""One student on several GPUs or processes: Ray Train places the workers, joins them and starts them again.

Ray Train's checkpoints are not used: students keep their own in the run's store, wherever that is, in tensors and not in
pickles.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import ray
from ray import train
from ray.train.torch import TorchTrainer

from cvdd_ray.core.experts import prepare_torch
from cvdd_ray.core.workers import Workers
from cvdd_ray.errors import CvddError
from cvdd_ray.runner.cluster import Share
from cvdd_ray.runner.mailbox import tell

# Read when ray.train is imported: its second version also where that is not yet the default, and relative paths of the
# data stay what they are.
ENVIRONMENT = {"RAY_TRAIN_V2_ENABLED": "1", "RAY_CHDIR_TO_TRIAL_DIR": "0"}
MAX_FAILURES = 20  # of a student's workers; a student that keeps losing them is given up


class WorkerGroups:
    """Runs items, each with a group of workers of its own; as an actor with an `ENVIRONMENT` of its own.

    Workers leave their result, or the error that a user can mend, here: Ray Train would start the group again whatever
    the error is, and tells nothing of a result.
    """

    def __init__(self, num_workers: int, share: Share, threads: int):
        self._num_workers, self._share, self._threads = num_workers, share, threads
        self._results: dict[str, Any] = {}
        self._errors: dict[str, CvddError] = {}

    def run(self, name: str, item: Any, function: Callable, shared_refs: Sequence[Any], mailbox: Any) -> Any:
        """Return function(item, *shared, workers=..., report=...) of rank 0; its reports go to the mailbox, with the `place`
        (placement group) of the workers.

        Raises the CvddError of any rank, Ray Train's WorkerGroupError when the workers were lost too often, and RayActorError
        when Ray Train's own actor was.
        """
        context = ray.get_runtime_context()
        me, call = context.current_actor, context.get_task_id()
        work = partial(_work, function, item, name, shared_refs, me, mailbox, call, self._threads)
        with tempfile.TemporaryDirectory() as unused:  # Ray Train wants a place for checkpoints
            trainer = TorchTrainer(
                work,
                scaling_config=train.ScalingConfig(
                    num_workers=self._num_workers, use_gpu=self._share.num_gpus > 0,
                    resources_per_worker={"CPU": self._share.num_cpus, "GPU": self._share.num_gpus},
                ),
                run_config=train.RunConfig(
                    name=name, storage_path=unused, failure_config=train.FailureConfig(max_failures=MAX_FAILURES)
                ),
            )  # fmt: skip
            trainer.fit()
        if name in self._errors:
            raise self._errors[name]
        return self._results.pop(name)

    def keep(self, name: str, result: Any) -> None:
        """Take the result of an item."""
        self._results[name] = result

    def fail(self, name: str, error: CvddError) -> None:
        """Take the error that ended an item."""
        self._errors[name] = error

    def has_failed(self, name: str) -> bool:
        return name in self._errors


def _work(
    function: Callable, item: Any, name: str, shared_refs: Sequence[Any], groups: Any, mailbox: Any, call: str, threads: int
) -> None:  # fmt: skip
    """One worker of an item: set torch up, run, leave the result or the error with the actor over the workers."""
    beside = {"concurrency_group": "tell"}  # answered while others run
    if ray.get(groups.has_failed.options(**beside).remote(name)):
        return  # started again after an error that would only come again
    prepare_torch(threads)
    context, place = train.get_context(), ray.util.get_current_placement_group()
    workers = Workers(context.get_world_rank(), context.get_world_size())
    tell(mailbox, "actor_started", f"worker {workers.rank} of {name}", f"{call}/{workers.rank}")

    def report(said: dict) -> None:
        if workers.rank == 0:
            mailbox.put.remote(name, {**said, "place": place})

    report({})
    try:
        result = function(item, *ray.get(list(shared_refs)), workers=workers, report=report)
    except CvddError as error:
        ray.get(groups.fail.options(**beside).remote(name, error))
        raise
    if workers.rank == 0:
        ray.get(groups.keep.options(**beside).remote(name, result))
