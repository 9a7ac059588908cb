"""pretrain (squeeze): train the committee's experts on the real train split, side by side (spec section 2)."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from cvdd_ray.config import PretrainConfig
from cvdd_ray.core.experts import ExpertSpec, work_device
from cvdd_ray.core.keys import key
from cvdd_ray.core.models import (
    build_model,
    build_seeded,
    load_weights,
    require_batchnorm,
    save_weights,
    weights_from_bytes,
)
from cvdd_ray.core.training import ExpertTraining, PretrainSettings, accuracy, pretrain_expert
from cvdd_ray.core.workers import ALONE, Workers
from cvdd_ray.data.artifacts import StagePlan, sha256
from cvdd_ray.data.cache import local_copy
from cvdd_ray.data.datasets import DatasetInfo
from cvdd_ray.data.remote import is_uri, without_secrets
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError, CvddError
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.kept import Kept
from cvdd_ray.stages.real import SMALL, Split, split_for_workers, test_batches, train_batches

WEIGHTS = "model.safetensors"
Curve = list[tuple[int, float, float]]  # epoch, loss, train accuracy in percent


@dataclass(frozen=True)
class ExpertTask:
    """One expert: network, given weights (None: it is trained), seed; where its checkpoint goes, and minutes between two."""

    name: str
    given: bytes | None
    seed: int
    checkpoint: str
    checkpoint_minutes: float


def pretrain(run: Run) -> None:
    """Make `pretrain/<expert>` (weights as safetensors, training curve, hold-out accuracy in percent) for every expert.

    Experts with given weights are checked and stored as they are.  Raises ConfigError for models that cannot vote,
    DataError for weights that do not fit.
    """
    if not run.config.needs_experts:
        run.progress.say("pretrain: not needed, nothing in this run asks the committee")
        return
    given = {name: given_weights(run, name) for name in run.config.committee.experts}
    plans = expert_plans(run, given)
    if missing := _missing(run, plans):
        with run.artifacts.making(*(plans[name] for name in missing)):
            _train_missing(run, plans, given)
    for name in plans:
        if name not in missing:
            run.progress.say(f"pretrain {name}: already there")


def _missing(run: Run, plans: Mapping[str, StagePlan]) -> list[str]:
    return [name for name, plan in plans.items() if run.artifacts.finished(plan) is None]


def _train_missing(run: Run, plans: Mapping[str, StagePlan], given: Mapping[str, bytes | None]) -> None:
    """Train or store the experts that are not there, side by side, and commit each as it is done."""
    c, todo = run.config, _missing(run, plans)  # another process may have made some meanwhile
    if not todo:
        return
    items = {
        name: ExpertTask(
            name,
            given[name],
            c.seed,
            f"{run.artifacts.partial(plans[name])}/{name}.checkpoint",
            c.pretrain.checkpoint_minutes,
        )
        for name in todo
    }
    holdout = split_for_workers(run.real.holdout, run.info)
    shared = (
        run.store,
        split_for_workers(run.real.train, run.info),
        holdout,
        run.info,
        c.pretrain,
        c.committee.width,
        c.data.flip,
    )
    counted = {"train_images": len(run.real.train), "holdout_images": len(run.real.holdout)}
    shares = dict.fromkeys(items, 0.0)
    notes: dict[str, str] = {}
    if c.pretrain.precision == "bfloat16" and has_slow_bfloat16():
        run.progress.say(
            "pretrain: this machine emulates bfloat16, several times slower than float32; consider "
            "--set pretrain.precision=float32"
        )
    run.progress.start("pretrain", len(items), "experts")

    def on_report(name: str, report: dict) -> None:
        if "say" in report:
            run.progress.say(report["say"])
        shares[name], notes[name] = report.get("done", shares[name]), report.get("note", notes.get(name, ""))
        run.progress.update(sum(shares.values()), "  ".join(filter(None, notes.values())))

    if c.pretrain.workers == 1:
        made = run.runtime.map(train_one, items, shared, on_report)
    else:
        made = run.runtime.train(train_one, items, shared, c.pretrain.workers, on_report)
    for name, (weights, curve, holdout_accuracy, wall_s) in made:
        files = {WEIGHTS: weights, "curve.json": json.dumps(curve).encode()}
        run.artifacts.commit(plans[name], files, wall_s=wall_s, facts={"holdout_accuracy": holdout_accuracy, **counted})
        notes.pop(name, None)
        shares[name] = 1.0
        run.progress.say(f"pretrain {name}: {holdout_accuracy:.1f} % on the hold-out after {wall_s:.0f} s")
        run.progress.update(sum(shares.values()), "  ".join(notes.values()))
    run.progress.finish()


def has_slow_bfloat16() -> bool:
    """Return whether this machine has neither a GPU nor a CPU with bfloat16 instructions."""
    return not torch.cuda.is_available() and not torch.cpu._is_avx512_bf16_supported()


def check_networks(run: Run) -> None:
    """Raise ConfigError for experts that cannot vote, and for experts or students that do not exist at this size;
    DataError for given weights that do not fit."""
    c, info = run.config, run.info
    for name in c.committee.experts:
        network = build_model(name, info.num_classes, info.image_size, width=c.committee.width)
        if c.synthesize.method == "committee" and not c.synthesize.matching.convolutions:
            require_batchnorm(network, name)
        if given_weights(run, name) is None and info.image_size > SMALL and c.pretrain.crop == "pad":
            raise ConfigError(
                f"pretrain.crop: 'pad' is for images up to {SMALL} px that all have one size, these have "
                f"{info.image_size} px; use random_resized"
            )
    for name in {*c.evaluate.students, c.prior.student}:
        build_model(name, info.num_classes, info.image_size, width=run.width)


def given_weights(run: Run, name: str) -> bytes | None:
    """Return the configured weights of an expert as safetensors bytes, None if it is to be trained.

    Read here, once, so that workers on other machines need no file; an s3:// URI comes through the local cache.  Raises
    DataError that names the setting.
    """
    source = run.config.committee.weights.get(name)
    if source is None:
        return None
    with torch.random.fork_rng(devices=[]):
        model = build_model(name, run.info.num_classes, run.info.image_size, width=run.config.committee.width)
    try:
        if is_uri(source):
            load_weights(model, without_secrets(source), name=name, content=Path(local_copy(source)).read_bytes())
        else:
            load_weights(model, source, name=name)
    except CvddError as error:
        raise type(error)(f"committee.weights.{name}: {error}") from None
    return save_weights(model)


def expert_plans(run: Run, given: Mapping[str, bytes | None]) -> dict[str, StagePlan]:
    """Return the plan of every expert's pretraining; given weights count by content, not by where they lie."""
    c = run.config
    inputs = {"train": run.real.train.fingerprint, "holdout": run.real.holdout.fingerprint}
    plans = {}
    for name in c.committee.experts:
        weights = given[name]
        settings = {
            "expert": name,
            "committee.width": c.committee.width,
            "committee.weights": None if weights is None else "given",
            "pretrain": None if weights is not None else c.pretrain.counted(exclude={"checkpoint_minutes"}),
            "data.flip": c.data.flip,
        }
        content = {} if weights is None else {"weights": sha256(weights)}
        plans[name] = run.plan(f"pretrain/{name}", settings, {**inputs, **content})
    return plans


def load_experts(run: Run) -> tuple[dict[str, ExpertSpec], dict[str, str]]:
    """Return the finished experts in committee order and their content hashes.

    Raises ArtifactError for one that is missing or was made with other settings.
    """
    specs, hashes = {}, {}
    plans = expert_plans(run, {name: given_weights(run, name) for name in run.config.committee.experts})
    for name, plan in plans.items():
        manifest = run.artifacts.finished(plan) or run.require(plan.stage, "pretrain")
        specs[name] = run.expert(name, run.artifacts.read(manifest, WEIGHTS))
        hashes[f"pretrain/{name}"] = manifest.content
    return specs, hashes


def pretrain_settings(c: PretrainConfig) -> PretrainSettings:
    """Return the numbers of a training on real images."""
    t_max = None if c.schedule == "constant" else c.cosine_epochs or c.epochs
    return PretrainSettings(c.epochs, c.optimizer, c.lr, c.weight_decay, t_max, c.precision, c.warmup_epochs)


def train_one(
    task: ExpertTask, store: Store, train: Split, holdout: Split, info: DatasetInfo, c: PretrainConfig, width: float,
    flip: bool, report: Callable[[dict], None], workers: Workers = ALONE,
) -> tuple[bytes, Curve, float, float]:  # fmt: skip
    """Train one expert, from its checkpoint if there is one, or load it; return (safetensors, curve, hold-out accuracy, seconds).
    Several workers train it together; the first one keeps the checkpoint."""
    name, device, kept = (
        task.name,
        work_device(),
        Kept(store, task.checkpoint, task.checkpoint_minutes, "network", report),
    )
    seed = key(task.seed, "pretrain", name)
    model = build_seeded(name, info.num_classes, info.image_size, width=width, seed=seed)
    state, curve = kept.start or (None, [])
    if task.given is not None:
        weights_from_bytes(model, task.given)
        model.eval().to(device)
    else:
        model.to(device)

        def epoch_batches(epoch: int):
            return train_batches(
                train, info, batch_size=c.batch_size, crop=c.crop, pad=c.pad, flip=flip,
                seed=key(task.seed, "pretrain-data", name), epoch=epoch, device=device, workers=workers,
            )  # fmt: skip

        def on_epoch(training: ExpertTraining, loss: float, train_accuracy: float) -> None:
            done = training.next_epoch
            curve.append((done - 1, loss, train_accuracy))
            if workers.rank == 0 and done < c.epochs:
                kept.save(training.state, curve)
            report(
                {"done": done / c.epochs, "note": f"{name} {done}/{c.epochs} loss {loss:.2f} acc {train_accuracy:.0f}%"}
            )

        pretrain_expert(model, epoch_batches, pretrain_settings(c), on_epoch, seed=seed, workers=workers, start=state)
    holdout_accuracy = accuracy(model, test_batches(holdout, info, device, workers), workers)
    return save_weights(model), curve, holdout_accuracy, kept.wall_s()
