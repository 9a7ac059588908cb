"""export: a run's distilled set in the layouts that others publish and read."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa

from cvdd_ray.data.artifacts import software_versions
from cvdd_ray.data.destination import CARD, MARKER, published_folder
from cvdd_ray.data.layouts import (
    as_published,
    class_folders,
    image_features,
    image_rows,
    label_features,
    write_class_folders,
    write_parquet,
    write_tars,
)
from cvdd_ray.data.shards import image_batches, label_batches
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError, require_within
from cvdd_ray.recipes import dump_config
from cvdd_ray.stages.card import Table, folder_card, hub_card, webdataset_card
from cvdd_ray.stages.context import Progress, Silent
from cvdd_ray.stages.pretrain import WEIGHTS
from cvdd_ray.stages.publishable import DistilledSet, Publishable, read_publishable
from cvdd_ray.stages.relabel import LABELS
from cvdd_ray.stages.synthesize import DISTILLED

SHARD_MB = 500


def export(
    path: str, to: str, dest: str, *, ipc: int | None = None, license: str = "unknown", shard_mb: float = SHARD_MB,
    overwrite: bool = False, progress: Progress | None = None,
) -> str:  # fmt: skip
    """Write the distilled set of a run directory (or s3:// URI) to the directory (or s3:// URI) `dest`; return where.

    `to`: `hub` (Parquet of images and soft labels, experts), `imagefolder` (train/CLASS/*.png) or `webdataset` (tar files).
    `ipc` picks one of several; the Hub layout takes all by default. `license` is the Hub's name of a licence, `shard_mb` the
    largest size of a Parquet or tar file in MiB. `overwrite` replaces an earlier export. Equal runs give equal bytes.

    Raises ConfigError for an unknown layout or several IPCs where one is needed; ArtifactError when nothing is finished, when
    what is there is out of date or altered, or when `dest` is taken. Nothing is left at `dest` after an error.
    """
    if to not in LAYOUTS:
        raise ConfigError(f"--to {to}: unknown layout; choose one of {', '.join(LAYOUTS)}")
    require_within("--shard-mb", shard_mb, 0.001, 1e6)
    require_within("--ipc", ipc, 1, 1_000_000)
    progress = progress or Silent()
    source = read_publishable(path, ipc)
    if to != "hub" and len(source.sets) > 1:
        there = ", ".join(str(one.ipc) for one in source.sets)
        raise ConfigError(f"--to {to} takes one IPC, the run has {there}; name one with --ipc")
    if source.reader.store.is_local:  # before anything is shown or written; they are not read through again
        for manifest in source.stages().values():
            for name in manifest.files:
                source.reader.artifacts.verify(manifest, name)
    with published_folder(dest, overwrite) as folder:
        for line in source.missing:
            progress.say(line)
        card = LAYOUTS[to](source, folder, license, int(shard_mb * (1 << 20)), progress)
        (folder / "recipe.yaml").write_text(dump_config(source.recipe), encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")
        _write_marker(source, folder, to)
    return Store(dest).display("").rstrip("/")


def write_hub(source: Publishable, folder: Path, license_id: str, shard_bytes: int, progress: Progress) -> str:
    """Write `data/images` and `data/soft_labels` (with `_ipc<n>` when there are several) and `experts/`; return the card."""
    several = len(source.sets) > 1
    tables = []
    for one in source.sets:
        batches = _images(source, one, progress)
        first = next(batches)
        features, rows = image_features(first.schema), as_published(chain([first], batches))
        name = f"images_ipc{one.ipc}" if several else "images"
        shards = write_parquet(folder / "data" / name, rows, features, shard_bytes)
        tables.append(Table(name, f"data/{name}", features, shards))
    for one in source.sets:
        if not one.has_label_files:
            continue
        batches = _labels(source, one, progress)
        first = next(batches)
        features = label_features(first.schema)
        name = f"soft_labels_ipc{one.ipc}" if several else "soft_labels"
        shards = write_parquet(folder / "data" / name, chain([first], batches), features, shard_bytes)
        tables.append(Table(name, f"data/{name}", features, shards))
    _write_experts(source, folder, progress)
    return hub_card(source, license_id, tables)


def write_image_folder(source: Publishable, folder: Path, license_id: str, shard_bytes: int, progress: Progress) -> str:
    """Write `train/CLASS/*.png` and `images.jsonl`; return the card."""
    folders = class_folders(source.classes)
    write_class_folders(folder, _image_rows(source, progress), folders)
    return folder_card(source, license_id, folders)


def write_webdataset(source: Publishable, folder: Path, license_id: str, shard_bytes: int, progress: Progress) -> str:
    """Write `train-00000.tar` and so on; return the card."""
    write_tars(folder, _image_rows(source, progress), shard_bytes)
    is_png = source.sets[0].images.identity["settings"]["synthesize"]["image_format"] == "png"
    return webdataset_card(source, license_id, "png" if is_png else "jpg")


LAYOUTS: dict[str, Callable[[Publishable, Path, str, int, Progress], str]] = {
    "hub": write_hub,
    "imagefolder": write_image_folder,
    "webdataset": write_webdataset,
}


def _images(source: Publishable, one: DistilledSet, progress: Progress) -> Iterator[pa.RecordBatch]:
    batches = image_batches(source.reader.artifacts, one.images, DISTILLED)
    return _shown(batches, progress, f"export images of ipc {one.ipc}", one.num_images, "images", len)


def _labels(source: Publishable, one: DistilledSet, progress: Progress) -> Iterator[pa.RecordBatch]:
    batches = label_batches(source.reader.artifacts, one.labels, LABELS)
    epochs = one.labels.facts["epochs"]
    return _shown(batches, progress, f"export soft labels of ipc {one.ipc}", epochs, "epochs", lambda batch: 1)


def _image_rows(source: Publishable, progress: Progress) -> Iterator[tuple[str, bytes, dict]]:
    return image_rows(as_published(_images(source, source.sets[0], progress)), source.classes)


def _shown(
    batches: Iterable[pa.RecordBatch], progress: Progress, title: str, total: int, unit: str, size: Callable
) -> Iterator[pa.RecordBatch]:
    """Yield the batches and show how many rows or epochs have passed."""
    progress.start(title, total, unit)
    done = 0
    for batch in batches:
        yield batch
        done += size(batch)
        progress.update(done)
    progress.finish()


def _write_experts(source: Publishable, folder: Path, progress: Progress) -> None:
    """Write `experts/NAME/model.safetensors`, and `config.json` with what is needed to build and feed the network."""
    progress.start("export experts", len(source.experts), "experts")
    about = {e.name: e for e in source.summary.experts}
    for done, (name, manifest) in enumerate(source.experts.items(), 1):
        settings = manifest.identity["settings"]
        target = folder / "experts" / name
        target.mkdir(parents=True)
        (target / WEIGHTS).write_bytes(source.reader.artifacts.read(manifest, WEIGHTS))
        card = {
            "architecture": name,
            "width": settings["committee.width"],
            **{key: source.info[key] for key in ("num_classes", "image_size", "mean", "std")},
            "classes": source.classes,
            "holdout_accuracy": manifest.facts["holdout_accuracy"],
            "prior": about[name].prior if name in about else None,
            "pretrain": settings["pretrain"],
        }
        (target / "config.json").write_text(json.dumps(card, indent=1), encoding="utf-8")
        progress.update(done)
    progress.finish()


def _write_marker(source: Publishable, folder: Path, to: str) -> None:
    """Write export.json: layout, class names in label order, hashes of what it was made from and of every file."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            files[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    about = {
        "layout": to,
        "dataset": source.info,
        "classes": source.classes,
        "made_from": {stage: manifest.content for stage, manifest in source.stages().items()},
        "files": files,
        "cvdd_ray": software_versions()["cvdd_ray"],
    }
    (folder / MARKER).write_text(json.dumps(about, indent=1), encoding="utf-8")
