"""evaluate (post-evaluation): train students from scratch on each image set and test them (spec section 7)."""

import json
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from cvdd_ray.core.experts import work_device
from cvdd_ray.core.keys import key
from cvdd_ray.core.models import build_seeded
from cvdd_ray.core.softlabels import BatchPlan
from cvdd_ray.core.students import StudentSettings, train_student
from cvdd_ray.core.training import accuracy
from cvdd_ray.data.datasets import DatasetInfo, network_inputs
from cvdd_ray.data.shards import label_files, open_labels
from cvdd_ray.data.storage import Store
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.initialize import RANDOM, load_image_set
from cvdd_ray.stages.real import Split, split_for_workers, test_batches
from cvdd_ray.stages.relabel import BASELINE_LABELS, LABEL_SETS, LABELS, ViewSettings

RESULTS = "results.json"
OURS = "distilled"


@dataclass(frozen=True)
class Arm:
    """What one row of the table trains on: images (uint8), labels, and the files of its soft labels (none: hard labels)."""

    images_NCHW: np.ndarray
    labels_N: np.ndarray
    content: str
    label_files: dict[str, str]


@dataclass(frozen=True)
class StudentTask:
    """One student: row of the table, network, seed number."""

    arm: str
    student: str
    seed: int


def evaluate(run: Run, ipc: int) -> None:
    """Make `evaluate/ipc<n>`: results.json with every student's curve and, per row, mean and standard deviation of the
    last (primary) and the best test accuracy in percent.

    Raises ArtifactError when images or labels are missing.
    """
    c = run.config.evaluate
    epochs = run.config.student_epochs
    arms, inputs = load_arms(run, ipc)
    views = ViewSettings(run.config.seed, run.config.data.flip, run.info.image_size, run.config.relabel)
    student = student_settings(run, epochs, ipc * len(run.classes))
    settings = {
        "evaluate": {**c.model_dump(), "epochs": epochs, "width": run.width},
        "batch_size": student.batch_size,
        "bn_group": student.bn_group,
        "data.flip": run.config.data.flip,
    }
    plan = run.plan(f"evaluate/ipc{ipc}", settings, {**inputs, "test": run.real.test.fingerprint})
    with run.stage(plan, f"evaluate ipc {ipc}") as work:
        if work is None:
            return
        items = {
            f"{arm}-{student}-seed{seed}": StudentTask(arm, student, seed)
            for seed in range(c.first_seed, c.first_seed + c.seeds)
            for student in c.students
            for arm in arms
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
        done = work.each(run_student, items, shared, doing=f"{len(items)} students, {epochs} epochs")
        results = [json.loads(data) for data in done.values()]
        work.commit({RESULTS: json.dumps({"runs": results, "table": summarize(results)}).encode()})


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
    )


def load_arms(run: Run, ipc: int) -> tuple[dict[str, Arm], dict[str, str]]:
    """Return the rows of the table and the content hashes they depend on."""
    arms, inputs = {}, {}
    for name in (OURS, *run.config.evaluate.baselines):
        label_set = None if name == "random_hard" else BASELINE_LABELS.get(name, OURS)
        stage, file, verb = (
            LABEL_SETS[label_set].images if label_set else (f"initialize/ipc{ipc}", RANDOM, "initialize")
        )
        images = load_image_set(run, stage.format(ipc=ipc), file, verb)
        arm_labels: dict[str, str] = {}
        if label_set:
            label_stage = f"relabel/ipc{ipc}/{label_set}"
            labelled = run.require(label_stage, "relabel")
            inputs[label_stage] = labelled.content
            arm_labels = label_files(run.artifacts, labelled, LABELS)
        inputs[f"images/{name}"] = images.content()
        arms[name] = Arm(images.images_NCHW, images.labels_N, images.content(), arm_labels)
    return arms, inputs


def run_student(
    task: StudentTask, arms: dict[str, Arm], store: Store, test: Split, info: DatasetInfo, s: StudentSettings,
    views: ViewSettings, width: float, report: Callable[[dict], None],
) -> bytes:  # fmt: skip
    """Train one student and return its row as JSON: accuracies in percent, curve, seconds."""
    arm = arms[task.arm]
    if arm.label_files:
        labels = open_labels(store, arm.label_files, arm.content)

        def epoch_rows(epoch: int):
            return labels.epoch(epoch)
    else:
        s = StudentSettings(**{**vars(s), "temperature": None})
        hard_N = torch.from_numpy(np.array(arm.labels_N))

        def epoch_rows(epoch: int):  # the same views without CutMix, whose pasted boxes hard labels know nothing of
            plans = views_without_cutmix(views).plans(epoch, len(hard_N))
            return [(plan, hard_N[plan.image_index_B]) for plan in plans]

    row = fit_student(task.student, task.seed, arm.images_NCHW, epoch_rows, test, info, s, views.seed, width, report)
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
    student: str, seed_number: int, images_NCHW: np.ndarray, epoch_rows: Callable, test: Split, info: DatasetInfo,
    s: StudentSettings, seed: int, width: float, report: Callable[[dict], None],
) -> dict:  # fmt: skip
    """Train one student on (plan, targets) rows and return {"last", "best", "curve", "wall_s"}; accuracies in percent."""
    started = time.monotonic()
    device = work_device()
    model, model_seed = build_student(student, seed_number, info, seed, width)
    pixels = network_inputs(images_NCHW, info, device)
    curve = train_student(
        model, pixels,
        lambda epoch: on_device(epoch_rows(epoch), device),
        s,
        lambda network: accuracy(network, test_batches(test, info, device)),
        lambda epoch: report({"done": (epoch + 1) / s.epochs}),
        seed=model_seed,
    )  # fmt: skip
    return {
        "last": curve[-1][3],
        "best": max(row[3] for row in curve),
        "curve": curve,
        "wall_s": round(time.monotonic() - started, 2),
    }


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
