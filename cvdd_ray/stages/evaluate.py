"""evaluate (post-evaluation): train students from scratch on each image set and test them (spec section 7)."""

import json
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from cvdd_ray.core.experts import work_device
from cvdd_ray.core.keys import key
from cvdd_ray.core.models import build_seeded
from cvdd_ray.core.softlabels import BatchPlan, group_sizes
from cvdd_ray.core.students import Curve, StudentSettings, StudentTraining, train_student
from cvdd_ray.core.training import accuracy
from cvdd_ray.core.workers import ALONE, Workers
from cvdd_ray.data.datasets import DatasetInfo, network_inputs
from cvdd_ray.data.labels import ONLINE
from cvdd_ray.data.shards import label_files, open_labels
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError
from cvdd_ray.stages.arms import CEILING, TRAINING_SETS, sized_rows
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.initialize import load_image_set
from cvdd_ray.stages.kept import Kept
from cvdd_ray.stages.matching import RATE
from cvdd_ray.stages.real import Split, split_for_workers, test_batches
from cvdd_ray.stages.relabel import LABELS, Labeller, OnlineLabels, ViewSettings, online_labels

RESULTS = "results.json"


@dataclass(frozen=True)
class Arm:
    """What one row of the table trains on: images (uint8), labels, and its soft labels, as files or as teachers to be asked
    (neither: hard labels)."""

    images_NCHW: np.ndarray
    labels_N: np.ndarray
    content: str
    label_files: dict[str, str]
    online: OnlineLabels | None = None

    def soft_labels(
        self, store: Store, info: DatasetInfo
    ) -> Callable[[int], list[tuple[BatchPlan, torch.Tensor]]] | None:
        """Return what gives the (plan, logits_BK) of every batch of an epoch; None with hard labels.  Raises ArtifactError
        for label files of other images."""
        if self.online:
            return Labeller(self.images_NCHW, info, self.online.teachers, self.online.weights, self.online.views).epoch
        return open_labels(store, self.label_files, self.content).epoch if self.label_files else None


@dataclass(frozen=True)
class StudentTask:
    """One student: row of the table, network, seed number; where its checkpoint goes, and minutes between two of them."""

    arm: str
    student: str
    seed: int
    checkpoint: str
    checkpoint_minutes: float


def evaluate(run: Run, ipc: int) -> None:
    """Make `evaluate/ipc<n>`: results.json with every student's curve and, per row, mean and standard deviation of the
    last (primary) and the best test accuracy in percent.

    Raises ArtifactError when images or labels are missing, ConfigError as `check_workers`.
    """
    c = run.config.evaluate
    check_workers(run, ipc)
    epochs = run.config.student_epochs
    arms, inputs = load_arms(run, ipc)
    views = ViewSettings(run.config.seed, run.config.data.flip, run.info.image_size, run.config.relabel)
    student = student_settings(run, epochs, ipc * len(run.classes))
    if c.learned_lr:
        student = replace(student, lr=run.require(f"synthesize/ipc{ipc}", "synthesize").facts[RATE])
    evaluation = c.counted(exclude={"checkpoint_minutes"})
    evaluation["baselines"] = [name for name in c.baselines if name != CEILING]  # which has a stage of its own
    settings = {
        "evaluate": {**evaluation, "epochs": epochs, "width": run.width},
        "batch_size": student.batch_size,
        "bn_group": student.bn_group,
        "data.flip": run.config.data.flip,
        **({"student_lr": student.lr} if c.learned_lr else {}),
    }
    plan = run.plan(f"evaluate/ipc{ipc}", settings, {**inputs, "test": run.real.test.fingerprint})
    with run.stage(plan, f"evaluate ipc {ipc}") as work:
        if work is None:
            return
        names = {
            f"{arm}-{student}-seed{seed}": (arm, student, seed)
            for seed in range(c.first_seed, c.first_seed + c.seeds)
            for student in c.students
            for arm in arms
        }
        items = {
            name: StudentTask(*which, work.checkpoint(name), c.checkpoint_minutes) for name, which in names.items()
        }
        shared = (
            arms,
            run.store,
            split_for_workers(run.real.test, run.info),
            run.info,
            student,
            views,
            run.width,
        )
        doing = f"{len(items)} students, {epochs} epochs"
        done = work.each(run_student, items, shared, num_workers=c.workers, doing=doing)
        results = [json.loads(data) for data in done.values()]
        work.commit(
            {RESULTS: json.dumps({"runs": results, "table": summarize(results)}).encode()},
            test_images=len(run.real.test),
        )


def student_settings(run: Run, epochs: int, num_images: int) -> StudentSettings:
    """Return the numbers of a student's training on `num_images` images; its micro-batch is the labels' BatchNorm group
    (decision 6)."""
    c, r = run.config.evaluate, run.config.relabel
    return StudentSettings(
        epochs=epochs,
        batch_size=r.resolved_batch_size(num_images),
        bn_group=r.resolved_bn_group(num_images),
        lr=c.lr,
        weight_decay=c.weight_decay,
        eta=c.eta,
        temperature=c.temperature,
        test_every=c.test_every,
        schedule=c.schedule,
        warmup_epochs=c.warmup_epochs,
        phases=tuple((phase.from_epoch, phase.changes()) for phase in c.phases),
        label_weight=c.label_weight if c.loss == "mse_gt" else None,
        ema=c.ema,
        optimizer=c.optimizer,
        precision=c.precision,
    )


def check_workers(run: Run, ipc: int) -> None:
    """Raise ConfigError when a student's batch has fewer micro-batches than `evaluate.workers`."""
    num_workers = run.config.evaluate.workers
    s = student_settings(run, run.config.student_epochs, ipc * len(run.classes))
    most = len(group_sizes(s.batch_size, s.bn_group))
    if num_workers > most:
        raise ConfigError(
            f"evaluate.workers: got {num_workers}, but at IPC {ipc} a batch of {s.batch_size} images in BatchNorm groups of "
            f"{s.bn_group} has work for {most}; use at most {most}"
        )


def load_arms(run: Run, ipc: int) -> tuple[dict[str, Arm], dict[str, str]]:
    """Return the rows of the table and the content hashes they depend on."""
    arms, inputs = {}, {}
    for name in sized_rows(run.config):
        (stage, file, verb), label_set = TRAINING_SETS[name].images, TRAINING_SETS[name].label_set
        images = load_image_set(run, stage.format(ipc=ipc), file, verb)
        files: dict[str, str] = {}
        online = None
        if label_set:
            label_stage = f"relabel/ipc{ipc}/{label_set}"
            labelled = run.require(label_stage, "relabel")
            inputs[label_stage] = labelled.content
            files = label_files(run.artifacts, labelled, LABELS)
            online = online_labels(run, labelled, images.content()) if ONLINE in labelled.files else None
        inputs[f"images/{name}"] = images.content()
        arms[name] = Arm(images.images_NCHW, images.labels_N, images.content(), files, online)
    return arms, inputs


def run_student(
    task: StudentTask, arms: dict[str, Arm], store: Store, test: Split, info: DatasetInfo, s: StudentSettings,
    views: ViewSettings, width: float, report: Callable[[dict], None], workers: Workers = ALONE,
) -> bytes:  # fmt: skip
    """Train one student, from its checkpoint if there is one, and return its row as JSON: accuracies in percent, curve,
    seconds. Several workers train it together; the first one keeps the checkpoint."""
    arm = arms[task.arm]
    epoch_rows = arm.soft_labels(store, info)
    if epoch_rows is None:
        s = StudentSettings(**{**vars(s), "temperature": None, "label_weight": None})
        hard_N = torch.from_numpy(np.array(arm.labels_N))

        def epoch_rows(epoch: int):  # the same views without CutMix, whose pasted boxes hard labels know nothing of
            plans = views_without_cutmix(views).plans(epoch, len(hard_N))
            return [(plan, hard_N[plan.image_index_B]) for plan in plans]

    kept = Kept(store, task.checkpoint, task.checkpoint_minutes, "student", report)
    curve = fit_student(
        task.student, task.seed, (arm.images_NCHW, arm.labels_N), epoch_rows, test, info, s, views.seed, width, report,
        workers=workers, kept=kept,
    )  # fmt: skip
    row = {"last": curve[-1][3], "best": max(row[3] for row in curve), "curve": curve, "wall_s": kept.wall_s()}
    return json.dumps({"arm": task.arm, "student": task.student, "seed": task.seed, **row}).encode()


def build_student(student: str, seed_number: int, info: DatasetInfo, seed: int, width: float) -> tuple[nn.Module, int]:
    """Return a fresh student on the work device, and the seed of what it draws while it trains; both are a function of
    (seed, network, seed number) alone."""
    model_seed = key(seed, "student", student, seed_number)
    model = build_seeded(student, info.num_classes, info.image_size, width=width, seed=model_seed)
    return model.to(work_device()), model_seed


def on_device(rows: Iterable[tuple[BatchPlan, torch.Tensor]], device: torch.device):
    """Yield (plan, targets) with the targets on the device."""
    return ((plan, targets.to(device)) for plan, targets in rows)


def fit_student(
    student: str, seed_number: int, train: tuple[np.ndarray, np.ndarray], epoch_rows: Callable, test: Split, info: DatasetInfo,
    s: StudentSettings, seed: int, width: float, report: Callable[[dict], None], *,
    workers: Workers = ALONE, kept: Kept | None = None,
) -> Curve:  # fmt: skip
    """Train one student on (plan, targets) rows of uint8 images and their labels, from where it was `kept`, and return its
    curve, see `train_student`."""
    device = work_device()
    model, model_seed = build_student(student, seed_number, info, seed, width)
    images_NCHW, labels_N = train
    pixels = network_inputs(images_NCHW, info, device)

    def on_epoch(training: StudentTraining, curve: Curve) -> None:
        if kept and workers.rank == 0 and training.next_epoch < s.epochs:
            kept.save(training.state, curve)
        report({"done": training.next_epoch / s.epochs})

    return train_student(
        model, pixels,
        lambda epoch: on_device(epoch_rows(epoch), device),
        s,
        lambda network: accuracy(network, test_batches(test, info, device, workers), workers),
        on_epoch,
        seed=model_seed, workers=workers, start=kept and kept.start, labels_N=torch.from_numpy(np.array(labels_N)),
    )  # fmt: skip


def views_without_cutmix(views: ViewSettings) -> ViewSettings:
    """Return the same views with an empty CutMix box."""
    return ViewSettings(views.seed, views.flip, views.size, views.c.model_copy(update={"cutmix": False}))


def summarize(results: list[dict]) -> list[dict]:
    """Return one row per (arm, student): mean and standard deviation (n-1) over seeds of last and best accuracy."""
    rows = []
    for arm, student in dict.fromkeys((r["arm"], r["student"]) for r in results):
        chosen = [r for r in results if (r["arm"], r["student"]) == (arm, student)]
        row = {"arm": arm, "student": student, "seeds": len(chosen)}
        for which in ("last", "best"):
            values = [r[which] for r in chosen]
            row[f"{which}_mean"] = statistics.fmean(values)
            row[f"{which}_std"] = statistics.stdev(values) if len(values) > 1 else None
        rows.append(row)
    return rows
