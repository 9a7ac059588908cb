"""The ceiling of the table: students trained on all real images with hard labels, as `pretrain` trains experts.

It has no IPC, so it is one stage for all of them.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from cvdd_ray.config import PretrainConfig
from cvdd_ray.core.experts import work_device
from cvdd_ray.core.keys import key
from cvdd_ray.core.training import ExpertTraining, accuracy, pretrain_expert
from cvdd_ray.data.datasets import DatasetInfo
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError
from cvdd_ray.stages.arms import CEILING
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.evaluate import RESULTS, build_student, summarize
from cvdd_ray.stages.kept import Kept
from cvdd_ray.stages.pretrain import pretrain_settings
from cvdd_ray.stages.real import SMALL, Split, split_for_workers, test_batches, train_batches

STAGE = "evaluate/real"


@dataclass(frozen=True)
class CeilingTask:
    """One student: network, seed number, epochs between tests; where its checkpoint goes, and minutes between two of them."""

    student: str
    seed: int
    test_every: int
    checkpoint: str
    checkpoint_minutes: float


def ceiling(run: Run) -> None:
    """Make `evaluate/real`, if `evaluate.baselines` has it: results.json as that of an IPC, with one row per student.

    The section `pretrain` says how they are trained, on the train split without the hold-out; the last epoch counts.
    """
    c = run.config
    if CEILING not in c.evaluate.baselines:
        return
    shown = c.evaluate.model_dump(include={"students", "seeds", "first_seed", "test_every"})
    settings = {
        "evaluate": {**shown, "width": run.width},
        "pretrain": c.pretrain.counted(exclude={"workers", "checkpoint_minutes"}),
        "data.flip": c.data.flip,
    }
    plan = run.plan(STAGE, settings, {"train": run.real.train.fingerprint, "test": run.real.test.fingerprint})
    with run.stage(plan, "evaluate real") as work:
        if work is None:
            return
        names = {
            f"{student}-seed{seed}": (student, seed, c.evaluate.test_every)
            for seed in range(c.evaluate.first_seed, c.evaluate.first_seed + c.evaluate.seeds)
            for student in c.evaluate.students
        }
        minutes = c.pretrain.checkpoint_minutes
        items = {name: CeilingTask(*which, work.checkpoint(name), minutes) for name, which in names.items()}
        train, test = (split_for_workers(split, run.info) for split in (run.real.train, run.real.test))
        shared = (run.store, train, test, run.info, c.pretrain, run.width, c.data.flip, c.seed)
        done = work.each(train_on_all, items, shared, doing=f"{len(items)} students on all real images")
        results = [json.loads(data) for data in done.values()]
        work.commit(
            {RESULTS: json.dumps({"runs": results, "table": summarize(results)}).encode()},
            train_images=len(run.real.train), test_images=len(run.real.test),
        )  # fmt: skip


def check_ceiling(run: Run) -> None:
    """Raise ConfigError where the ceiling is asked for and its students cannot be trained."""
    c = run.config
    if CEILING not in c.evaluate.baselines:
        return
    if c.evaluate.workers > 1:
        raise ConfigError(
            f"evaluate.workers: got {c.evaluate.workers}, but one process trains a student of {CEILING}; use 1, or leave "
            f"{CEILING} out of evaluate.baselines"
        )
    if run.info.image_size > SMALL and c.pretrain.crop == "pad":
        raise ConfigError(
            f"pretrain.crop: 'pad' is for images up to {SMALL} px, {CEILING} of evaluate.baselines trains on images of "
            f"{run.info.image_size} px; use random_resized"
        )


def train_on_all(
    task: CeilingTask, store: Store, train: Split, test: Split, info: DatasetInfo, c: PretrainConfig, width: float, flip: bool,
    seed: int, report: Callable[[dict], None],
) -> bytes:  # fmt: skip
    """Train one student, from its checkpoint if there is one, and return its row as JSON, as `evaluate.run_student` does."""
    device, kept = work_device(), Kept(store, task.checkpoint, task.checkpoint_minutes, "student", report)
    model, model_seed = build_student(task.student, task.seed, info, seed, width)
    state, curve = kept.start or (None, [])

    def epoch_batches(epoch: int):
        return train_batches(
            train, info, batch_size=c.batch_size, crop=c.crop, pad=c.pad, flip=flip, seed=key(model_seed, "ceiling-data"),
            epoch=epoch, device=device,
        )  # fmt: skip

    def on_epoch(training: ExpertTraining, loss: float, train_accuracy: float) -> None:
        epoch = training.next_epoch - 1
        if epoch % task.test_every == 0 or epoch == c.epochs - 1:
            curve.append((epoch, loss, train_accuracy, accuracy(model, test_batches(test, info, device))))
        if training.next_epoch < c.epochs:
            kept.save(training.state, curve)
        report({"done": training.next_epoch / c.epochs})

    pretrain_expert(model, epoch_batches, pretrain_settings(c), on_epoch, seed=key(model_seed, "ceiling"), start=state)
    row = {"last": curve[-1][3], "best": max(row[3] for row in curve), "curve": curve}
    row["wall_s"] = kept.wall_s()
    return json.dumps({"arm": CEILING, "student": task.student, "seed": task.seed, **row}).encode()
