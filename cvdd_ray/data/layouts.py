"""Image sets in the layouts others read: Parquet shards of the Hugging Face Hub, class folders, WebDataset tar files.

Everything is written row by row to a local folder, with equal bytes for equal input.
"""

import io
import json
import os
import re
import tarfile
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from cvdd_ray.errors import ArtifactError

ROW_GROUP_BYTES = 16 << 20
MAX_NAME_BYTES = 100  # of a class's folder
RESERVED = {"con", "prn", "aux", "nul", *(f"{device}{k}" for device in ("com", "lpt") for k in range(1, 10))}  # Windows

VIEW_FEATURES: dict[str, dict] = {
    "epoch": {"dtype": "int32", "_type": "Value"},
    "batch": {"dtype": "int32", "_type": "Value"},
    "image_index": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "crop": {
        "feature": {"feature": {"dtype": "int16", "_type": "Value"}, "length": 4, "_type": "List"},
        "_type": "List",
    },
    "flip": {"feature": {"dtype": "bool", "_type": "Value"}, "_type": "List"},
    "partner": {"feature": {"dtype": "int32", "_type": "Value"}, "_type": "List"},
    "cutmix_box": {"feature": {"dtype": "int16", "_type": "Value"}, "length": 4, "_type": "List"},
}
"""The views of a label file as the Hub's features."""


@dataclass(frozen=True)
class Shards:
    """Files of one table: names without folder, rows, bytes as Arrow and on disk."""

    names: tuple[str, ...]
    num_rows: int
    num_bytes: int
    disk_bytes: int


def image_features(schema: pa.Schema) -> dict[str, dict]:
    """Return the Hub's features of an image set as published, from its Arrow schema (`as_published`)."""
    stored = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
    return {_published_name(name): stored[name] for name in schema.names}


def label_features(schema: pa.Schema) -> dict[str, dict]:
    """Return the Hub's features of a label file: views, and the lists of numbers that the labels are stored as."""
    kinds = {name: schema.field(name).type.value_type for name in schema.names if name not in VIEW_FEATURES}
    numbers = {name: "float16" if pa.types.is_float16(kind) else str(kind) for name, kind in kinds.items()}
    return VIEW_FEATURES | {
        name: {"feature": {"dtype": dtype, "_type": "Value"}, "_type": "List"} for name, dtype in numbers.items()
    }


def as_published(batches: Iterable[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    """Yield the rows of an image set with the image's number within its class named `id_in_class`: the soft labels'
    `image_index` are row numbers."""
    for batch in batches:
        yield pa.RecordBatch.from_arrays(batch.columns, [_published_name(name) for name in batch.schema.names])


def _published_name(name: str) -> str:
    return "id_in_class" if name == "image_index" else name


def image_rows(
    batches: Iterable[pa.RecordBatch], classes: Sequence[str]
) -> Iterator[tuple[str, bytes, dict[str, Any]]]:
    """Yield (file name, file content, what is known of it) for every row of `as_published` batches."""
    for batch in batches:
        for row in batch.to_pylist():
            image = row.pop("image")
            if not re.fullmatch(r"[\w-][\w.-]*", image["path"] or ""):
                raise ArtifactError(
                    f"an image of the set is called {image['path']!r}, which is no plain file name; make it anew"
                )
            yield image["path"], image["bytes"], {"label": row["label"], "class": classes[row["label"]], **row}


def write_parquet(
    folder: Path, batches: Iterable[pa.RecordBatch], features: Mapping[str, dict], shard_bytes: int
) -> Shards:
    """Write `train-00000-of-0000N.parquet`, each of at most about `shard_bytes` before compression, cut between row
    groups of at most 16 MiB: readers of one epoch skip the others."""
    folder.mkdir(parents=True)
    metadata = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    sizes: list[int] = []
    num_rows = 0
    with ExitStack() as current:
        for group in _row_groups(batches, min(ROW_GROUP_BYTES, shard_bytes)):
            if not sizes or sizes[-1] + group.nbytes > shard_bytes:
                current.close()
                schema, path = group.schema.with_metadata(metadata), folder / f"{len(sizes):05d}.tmp"
                writer = current.enter_context(pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False))
                sizes.append(0)
            writer.write_table(group.replace_schema_metadata(metadata), row_group_size=len(group))
            sizes[-1] += group.nbytes
            num_rows += len(group)
    names = tuple(f"train-{k:05d}-of-{len(sizes):05d}.parquet" for k in range(len(sizes)))
    for k, name in enumerate(names):
        os.rename(folder / f"{k:05d}.tmp", folder / name)
    return Shards(names, num_rows, sum(sizes), sum((folder / name).stat().st_size for name in names))


def _row_groups(batches: Iterable[pa.RecordBatch], max_bytes: int) -> Iterator[pa.Table]:
    """Yield the rows again in tables of at most about `max_bytes` (a row may be larger)."""
    waiting: list[pa.RecordBatch] = []
    size = 0
    for batch in batches:
        rows = max(1, max_bytes * len(batch) // max(1, batch.nbytes))
        for start in range(0, len(batch), rows):
            part = batch.slice(start, rows)
            if waiting and size + part.nbytes > max_bytes:
                yield pa.Table.from_batches(waiting)
                waiting, size = [], 0
            waiting.append(part)
            size += part.nbytes
    if waiting:
        yield pa.Table.from_batches(waiting)


def write_tars(folder: Path, rows: Iterable[tuple[str, bytes, dict[str, Any]]], shard_bytes: int) -> list[str]:
    """Write `train-00000.tar` and so on, of at most about `shard_bytes` each; sample KEY is KEY.png (or .jpg), KEY.cls
    (the label) and KEY.json. No time, user or group is in them."""
    names: list[str] = []
    size = 0
    with ExitStack() as current:
        for file_name, content, about in rows:
            key, _, suffix = file_name.rpartition(".")
            members = {suffix: content, "cls": str(about["label"]).encode(), "json": json.dumps(about).encode()}
            sample = sum(512 + -(-len(data) // 512) * 512 for data in members.values())
            if not names or size + sample > shard_bytes:
                current.close()
                names.append(f"train-{len(names):05d}.tar")
                path = folder / names[-1]
                tar, size = current.enter_context(tarfile.open(path, "w", format=tarfile.USTAR_FORMAT)), 0
            for kind, data in members.items():
                member = tarfile.TarInfo(f"{key}.{kind}")  # mtime, uid and gid 0, no names
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
            size += sample
    return names


def class_folders(classes: Sequence[str]) -> list[str]:
    """Return a folder name per class, fit for every usual file system and in the order of the labels when sorted: the
    class's name, and with its label in front of it where the plain names would not do."""
    plain = [_file_name(name) for name in classes]
    fit = all(name and name.split(".")[0].lower() not in RESERVED for name in plain)
    if fit and sorted(plain) == plain and len({name.casefold() for name in plain}) == len(plain):
        return plain
    digits = len(str(len(classes) - 1))
    return [f"{label:0{digits}d}_{name}".rstrip("_") for label, name in enumerate(plain)]


def _file_name(text: str) -> str:
    """Return text with what file systems or `datasets` take amiss replaced: separators, wild cards, hidden names."""
    plain = re.sub(r"[^\w+,()'.-]+", "_", unicodedata.normalize("NFC", text))
    return plain.encode()[:MAX_NAME_BYTES].decode(errors="ignore").strip("._")


def write_class_folders(
    folder: Path, rows: Iterable[tuple[str, bytes, dict[str, Any]]], folders: Sequence[str]
) -> None:
    """Write `train/CLASS/FILE` and `images.jsonl`, a line of what is known per file. It is not named metadata.jsonl,
    because `datasets` would then take the labels from nowhere else."""
    for name in folders:
        (folder / "train" / name).mkdir(parents=True)
    with open(folder / "images.jsonl", "w", encoding="utf-8", newline="\n") as lines:
        for file_name, content, about in rows:
            path = f"train/{folders[about['label']]}/{file_name}"
            (folder / path).write_bytes(content)
            lines.write(json.dumps({"file_name": path, **about}, ensure_ascii=False) + "\n")
