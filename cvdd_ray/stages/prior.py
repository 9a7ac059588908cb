"""prior: how well a student does on data distilled from one expert alone (paper section 3.3, spec section 3)."""

import json
import statistics
from collections.abc import Callable
from dataclasses import replace

from cvdd_ray.core.experts import ExpertSpec
from cvdd_ray.data.datasets import DatasetInfo
from cvdd_ray.data.imagesets import read_image_set
from cvdd_ray.data.shards import joined
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError
from cvdd_ray.stages.calibrate import group_size
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.evaluate import fit_student, student_settings
from cvdd_ray.stages.initialize import initialize
from cvdd_ray.stages.pretrain import load_experts
from cvdd_ray.stages.real import Split, split_for_workers
from cvdd_ray.stages.relabel import ViewSettings, labelled_epochs
from cvdd_ray.stages.statistics import with_statistics
from cvdd_ray.stages.synthesize import distill, image_jobs, resolved_synthesis, voter_settings
from cvdd_ray.stages.votes import PRIORS, needs_priors

STUDENT = {
    "lr", "weight_decay", "eta", "temperature", "schedule", "warmup_epochs", "phases", "loss", "label_weight", "ema",
    "optimizer", "precision",
}  # fmt: skip
"""Settings of `evaluate` that a prior depends on."""


def prior(run: Run) -> None:
    """Make `prior`: priors.json with every expert's prior in percent.

    `distill`: for each expert alone (one voter, weight 1) images are distilled, labelled by that expert with BSSL, and
    students are trained on them; the prior is their mean accuracy on the hold-out, never on test (decision 40).
    `given`: the configured values.  Raises ConfigError when a given value is missing or names no expert.
    """
    c = run.config
    if not needs_priors(c):
        run.progress.say("prior: not needed, nothing in this run depends on it")
    elif c.prior.method == "given":
        given_priors(run)
    else:
        measure_priors(run)


def measure_priors(run: Run) -> None:
    """Make `prior` by measuring every expert, whether or not this run's own votes depend on it."""
    c = run.config
    initialized = initialize(run, c.prior.ipc)
    specs, hashes = load_experts(run)
    guides, matched = with_statistics(run, specs, hashes)
    sets = {name: image_jobs(run, c.prior.ipc, lambda i, name=name: ((name,), (1.0,))) for name in specs}
    size = group_size(run, "prior", list(sets.values()), guides, lambda: voter_settings(run))
    iterations = c.prior.iterations or c.synthesize.iterations
    epochs = c.prior.epochs or c.student_epochs
    views = ViewSettings(c.seed, c.data.flip, run.info.image_size, c.relabel)
    given = {name: getattr(c.prior, name) for name in ("lr", "eta") if getattr(c.prior, name) is not None}
    student = replace(student_settings(run, epochs, c.prior.ipc * len(run.classes)), **given)
    settings = {
        "prior": {**c.prior.counted(exclude={"lr", "eta"}), "iterations": iterations, "epochs": epochs},
        "synthesize": {**resolved_synthesis(run, size), "iterations": iterations},
        "relabel": c.relabel.model_dump(
            include={"batchnorm", "scope", "batch_size", "bn_group", "cutmix", "crop_scale"}
        ),
        "evaluate": c.evaluate.counted(include=STUDENT) | given,
        "width": run.width,
        "data.flip": c.data.flip,
    }
    inputs = {**hashes, **matched, "initialize": initialized.content, "holdout": run.real.holdout.fingerprint}
    plan = run.plan("prior", settings, inputs)
    with run.stage(plan, "prior") as work:
        if work is None:
            return
        distilled = distill(run, work, sets, c.prior.ipc, iterations, guides, size, doing="distil each expert alone")
        items = {
            f"{name}-seed{seed}": (name, [file.name for file in distilled[name][0].values()], seed)
            for name in specs
            for seed in range(c.prior.seeds)
        }
        holdout = split_for_workers(run.real.holdout, run.info)
        shared = (run.store, specs, holdout, run.info, views, student, c.prior.student, run.width)
        done = work.each(measure_expert, items, shared, doing="train a student on each")
        per_seed = {name: [json.loads(done[f"{name}-seed{s}"])["last"] for s in range(c.prior.seeds)] for name in specs}
        priors = {name: statistics.fmean(values) for name, values in per_seed.items()}
        files = {file: written for images, _, _ in distilled.values() for file, written in images.items()}
        files[PRIORS] = json.dumps({"priors": priors, "per_seed": per_seed, "split": "holdout"}).encode()
        tests = sum(student.is_tested(epoch) for epoch in range(epochs))
        work.commit(files, priors=priors, tests=tests, holdout_images=len(run.real.holdout))
        run.progress.say("prior: " + ", ".join(f"{name} {value:.1f} %" for name, value in priors.items()))


def check_given(run: Run) -> None:
    """Raise ConfigError unless `prior.values` has one number for every expert."""
    c = run.config
    if set(c.prior.values) != set(c.committee.experts):
        raise ConfigError(
            f"prior.values: got {sorted(c.prior.values)}, needs exactly one number in percent for each of "
            f"{', '.join(c.committee.experts)}"
        )


def given_priors(run: Run) -> None:
    """Make `prior` from `prior.values`."""
    check_given(run)
    c = run.config
    plan = run.plan("prior", {"prior": c.prior.model_dump(include={"method", "values"})}, {})
    with run.stage(plan, "prior") as work:
        if work is not None:
            priors = {name: c.prior.values[name] for name in c.committee.experts}
            work.commit({PRIORS: json.dumps({"priors": priors, "split": "given"}).encode()}, priors=priors)


def measure_expert(
    item: tuple[str, list[str], int], store: Store, specs: dict[str, ExpertSpec], holdout: Split, info: DatasetInfo,
    views: ViewSettings, s, student: str, width: float, report: Callable[[dict], None],
) -> bytes:  # fmt: skip
    """Label one expert's images by that expert, train one student, return its hold-out accuracy (percent) as JSON."""
    name, files, seed_number = item
    images = joined([read_image_set(store.read(file), store.display(file)) for file in files])
    epochs = labelled_epochs(images.images_NCHW, info, [specs[name]], [1.0], views, range(s.epochs))
    train = images.images_NCHW, images.labels_N
    curve = fit_student(
        student, seed_number, train, lambda epoch: next(epochs), holdout, info, s, views.seed, width, report
    )
    return json.dumps({"last": curve[-1][3], "curve": curve}).encode()
