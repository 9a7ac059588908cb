"""pretrain (squeeze): train the committee's experts on the real train split, side by side (spec section 2)."""

import json
import time
from collections.abc import Callable, Mapping
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
from cvdd_ray.core.training import PretrainSettings, accuracy, pretrain_expert
from cvdd_ray.data.artifacts import StagePlan, sha256
from cvdd_ray.data.cache import local_copy
from cvdd_ray.data.datasets import DatasetInfo
from cvdd_ray.data.remote import is_uri, without_secrets
from cvdd_ray.errors import ConfigError, CvddError
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.real import SMALL, Split, split_for_workers, test_batches, train_batches

WEIGHTS = "model.safetensors"


def pretrain(run: Run) -> None:
    """Make `pretrain/<expert>` (weights as safetensors, training curve, hold-out accuracy in percent) for every expert.

    Experts with given weights are checked and stored as they are.  Raises ConfigError for models that cannot vote,
    DataError for weights that do not fit.
    """
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
    items = {name: (name, given[name], c.seed) for name in todo}
    holdout = split_for_workers(run.real.holdout, run.info)
    shared = (
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
        shares[name], notes[name] = report["done"], report["note"]
        run.progress.update(sum(shares.values()), "  ".join(notes.values()))

    for name, (weights, curve, holdout_accuracy, wall_s) in run.runtime.map(train_one, items, shared, on_report):
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
        if not c.synthesize.matching.convolutions:
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
            "pretrain": None if weights is not None else c.pretrain.counted(),
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
    item: tuple[str, bytes | None, int], train: Split, holdout: Split, info: DatasetInfo, c: PretrainConfig, width: float,
    flip: bool, report: Callable[[dict], None],
) -> tuple[bytes, list[tuple[int, float, float]], float, float]:  # fmt: skip
    """Train or load one expert; return (safetensors, rows (epoch, loss, train accuracy), hold-out accuracy, seconds)."""
    name, given, seed = item
    started = time.monotonic()
    device = work_device()
    model = build_seeded(name, info.num_classes, info.image_size, width=width, seed=key(seed, "pretrain", name))
    curve: list[tuple[int, float, float]] = []
    if given is not None:
        weights_from_bytes(model, given)
        model.eval().to(device)
    else:
        model.to(device)

        def epoch_batches(epoch: int):
            return train_batches(
                train, info, batch_size=c.batch_size, crop=c.crop, pad=c.pad, flip=flip,
                seed=key(seed, "pretrain-data", name), epoch=epoch, device=device,
            )  # fmt: skip

        def on_epoch(epoch: int, loss: float, train_accuracy: float) -> None:
            curve.append((epoch, loss, train_accuracy))
            note = f"{name} {epoch + 1}/{c.epochs} loss {loss:.2f} acc {train_accuracy:.0f}%"
            report({"done": (epoch + 1) / c.epochs, "note": note})

        pretrain_expert(model, epoch_batches, pretrain_settings(c), on_epoch)
    holdout_accuracy = accuracy(model, test_batches(holdout, info, device))
    return save_weights(model), curve, holdout_accuracy, time.monotonic() - started
