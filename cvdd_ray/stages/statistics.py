"""statistics: those of the train split in every expert, for methods that match more than BatchNorm's (spec 9.4, 9.5).

Made by the stages that need it, and only when `synthesize.matching` asks for it.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace

from cvdd_ray.config import PretrainConfig
from cvdd_ray.core.experts import ExpertSpec, work_device
from cvdd_ray.core.statistics import training_statistics, write_targets
from cvdd_ray.data.datasets import DatasetInfo
from cvdd_ray.matchingconfig import MatchingConfig
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.real import Split, split_for_workers, train_batches


def with_statistics(
    run: Run, specs: Mapping[str, ExpertSpec], hashes: Mapping[str, str]
) -> tuple[dict[str, ExpertSpec], dict[str, str]]:
    """Return the experts with the statistics they are to match, and the content hash these count by; as they are, and none,
    where BatchNorm alone is matched. Makes the stage `statistics` if it is not there.

    Raises what pretraining's reading of images raises.
    """
    c = run.config
    m = c.synthesize.matching
    if not m.convolutions:
        return dict(specs), {}
    settings = {
        "patch_size": m.tile(run.info.image_size),
        "batch_size": m.batch_size,
        "by_class": m.class_share > 0,
        "pretrain": c.pretrain.model_dump(include={"crop", "pad"}),
        "data.flip": c.data.flip,
    }
    plan = run.plan("statistics", settings, {**hashes, "train": run.real.train.fingerprint})
    with run.stage(plan, "statistics") as work:
        if work is not None:
            shared = split_for_workers(run.real.train, run.info), run.info, c.pretrain, m, c.data.flip, c.seed
            made = work.each(measure_statistics, dict(specs), shared)
            work.commit({f"{name}.safetensors": data for name, data in made.items()})
    manifest = run.require("statistics", "synthesize")
    found = {name: run.artifacts.read(manifest, f"{name}.safetensors") for name in specs}
    return {n: replace(spec, statistics=found[n]) for n, spec in specs.items()}, {"statistics": manifest.content}


def measure_statistics(
    spec: ExpertSpec, train: Split, info: DatasetInfo, pretrain: PretrainConfig, m: MatchingConfig, flip: bool, seed: int,
    report: Callable[[dict], None],
) -> bytes:  # fmt: skip
    """Return the statistics of one pass over the augmented train split as safetensors bytes."""
    device = work_device()

    def batches():
        seen = 0
        for images_BCSS, labels_B in train_batches(
            train, info, batch_size=m.batch_size, crop=pretrain.crop, pad=pretrain.pad, flip=flip, seed=seed, epoch=0,
            device=device,
        ):  # fmt: skip
            yield images_BCSS, labels_B
            seen += len(labels_B)
            report({"done": min(1.0, seen / len(train[1])), "note": f"{spec.name} {seen}/{len(train[1])}"})

    targets = training_statistics(
        spec.build(device), batches(), m.tile(info.image_size), info.num_classes, by_class=m.class_share > 0
    )
    return write_targets(targets)
