"""Image sets and soft labels of any size as artifacts: one file, or shards that workers write side by side.

How many shards there are depends on the settings alone (images per class, classes, pixels, epochs), never on workers.

A *piece* is what one worker finishes of an image set: an Arrow file with a record batch per (image index, run of
classes). Shards are put together from record batches of pieces, in the order image index, then class.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from cvdd_ray.data.artifacts import MANIFEST, Artifacts, Manifest, Written, sha256
from cvdd_ray.data.cache import mapped
from cvdd_ray.data.imagesets import ImageSet, joint_content, read_image_set, table_bytes
from cvdd_ray.data.labels import SoftLabels
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError

SHARD_BYTES = 256 << 20
"""Pixels of an image shard, logits of a label shard, as far as whole image indices and epochs allow."""

ROWS_AT_ONCE = 64  # of a set that is streamed


def shard_name(base: str, shard: int, num_shards: int) -> str:
    """Return the name of one file of a set: `base.arrow` if it is the only one."""
    return f"{base}.arrow" if num_shards == 1 else f"{base}-{shard:05d}-of-{num_shards:05d}.arrow"


def shard_files(files: Iterable[str], base: str) -> list[str]:
    """Return the files of a set among others, in order."""
    return sorted(name for name in files if re.fullmatch(rf"{re.escape(base)}(-\d{{5}}-of-\d{{5}})?\.arrow", name))


def per_shard(item_bytes: int) -> int:
    """Return how many items (image indices of all classes, epochs) of this many bytes go into one shard."""
    return max(1, SHARD_BYTES // item_bytes)


def cuts(num_items: int, size: int) -> list[range]:
    """Return 0..num_items cut into runs of `size`, the last one shorter."""
    return [range(start, min(start + size, num_items)) for start in range(0, num_items, size)]


# ------------------------------------------------------------------------------------------------- image sets


def write_piece(store: Store, name: str, tables: Sequence[pa.Table]) -> Written:
    """Write a piece whose record batch i is table i, which may be empty."""
    with store.writer(name) as stream:
        with pa.ipc.new_file(stream, tables[0].schema) as writer:
            for table in tables:
                arrays = [column.combine_chunks() for column in table.columns]
                writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=table.schema))
        return Written(name, stream.sha256())


def read_batches(store: Store, batches: Iterable[tuple[str, int]]) -> list[pa.RecordBatch]:
    """Return record batches of pieces by (piece, number)."""
    readers: dict[str, pa.ipc.RecordBatchFileReader] = {}
    found = []
    for piece, number in batches:
        if piece not in readers:
            readers[piece] = pa.ipc.open_file(store.open(piece))
        found.append(readers[piece].get_batch(number))
    return found


@dataclass(frozen=True)
class ShardTask:
    """One file of an image set to write: its name in the store, and the image indices it holds."""

    name: str
    indices: range


def shard_tasks(folder: str, base: str, ipc: int, index_bytes: int) -> dict[str, ShardTask]:
    """Return the files of a set of `ipc` image indices with `index_bytes` of pixels each, by file name, to be written to
    `folder`."""
    runs = cuts(ipc, per_shard(index_bytes))
    names = [shard_name(base, k, len(runs)) for k in range(len(runs))]
    return {name: ShardTask(f"{folder}/{name}", run) for name, run in zip(names, runs, strict=True)}


# Image index: record batches (piece, number) that hold it, class by class
Where = Mapping[int, Sequence[tuple[str, int]]]


def assemble_shard(
    task: ShardTask, store: Store, classes: Sequence[str], metadata: Mapping[str, Any], where: Where, report
) -> bytes:
    """Write one file of an image set from record batches that hold its rows; return its receipt."""
    batches = [place for index in task.indices for place in where[index]]
    return write_shard(store, task.name, pa.Table.from_batches(read_batches(store, batches)), classes, metadata)


def write_shard(store: Store, name: str, table: pa.Table, classes: Sequence[str], metadata: Mapping[str, Any]) -> bytes:
    """Write one file of an image set; return its receipt (sha256 of the file, content hash) as JSON."""
    data = table_bytes(table, classes, metadata)
    store.write(name, data)
    content = read_image_set(data, store.display(name)).content()
    return json.dumps({"sha256": sha256(data), "content": content}).encode()


def written_set(tasks: Mapping[str, ShardTask], receipts: Mapping[str, bytes]) -> tuple[dict[str, Written], str]:
    """Return the files of a set to commit, and its content hash."""
    found = {name: json.loads(receipts[name]) for name in tasks}
    files = {name: Written(task.name, found[name]["sha256"]) for name, task in tasks.items()}
    return files, joint_content([found[name]["content"] for name in tasks])


def load_images(artifacts: Artifacts, manifest: Manifest, base: str, upto: int | None = None) -> ImageSet:
    """Return the image set of a finished stage as one, or its first shards: up to the one that holds the image index before
    `upto`.  Raises ArtifactError when a file is missing or altered."""
    shards = []
    for name in shard_files(manifest.files, base):
        where = artifacts.store.display(f"{manifest.stage}/{name}")
        shards.append(read_image_set(artifacts.read(manifest, name), where))
        if upto is not None and shards[-1].columns["image_index"][-1].as_py() + 1 >= upto:
            break
    if not shards:
        raise ArtifactError(
            f"{artifacts.store.display(manifest.stage)}/{MANIFEST} names no file of {base}; remove its folder to make it anew"
        )
    return joined(shards)


def joined(shards: Sequence[ImageSet]) -> ImageSet:
    """Return consecutive shards as one set with the content hash of the whole."""
    if len(shards) == 1:
        return shards[0]
    columns = {name: pa.concat_arrays([shard.columns[name] for shard in shards]) for name in shards[0].columns}
    return replace(
        shards[0],
        images_NCHW=np.concatenate([shard.images_NCHW for shard in shards]),
        labels_N=np.concatenate([shard.labels_N for shard in shards]),
        columns=columns,
        shards=tuple(len(shard) for shard in shards),
    )


def image_batches(artifacts: Artifacts, manifest: Manifest, base: str) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a finished image set in order, few at a time, image files undecoded; the schema's metadata has the
    `huggingface` features.  Raises ArtifactError when a file is missing or altered."""
    for name in shard_files(manifest.files, base):
        with artifacts.store.open(artifacts.verify(manifest, name)) as file:
            for batch in pa.ipc.open_stream(file):
                for start in range(0, len(batch), ROWS_AT_ONCE):
                    yield batch.slice(start, ROWS_AT_ONCE)


# ------------------------------------------------------------------------------------------------- soft labels


def label_batches(artifacts: Artifacts, manifest: Manifest, base: str) -> Iterator[pa.RecordBatch]:
    """Yield the soft labels of a finished stage epoch by epoch, a row per batch (`labels.label_schema`).

    Raises ArtifactError when a file is missing or altered.
    """
    for name in shard_files(manifest.files, base):
        with artifacts.store.open(artifacts.verify(manifest, name)) as file:
            reader = pa.ipc.open_file(file)
            for epoch in range(reader.num_record_batches):
                yield reader.get_batch(epoch)


def label_files(artifacts: Artifacts, manifest: Manifest, base: str) -> dict[str, str]:
    """Return the files of a finished stage's label set: names in the store, in order, with their sha256. Those of a local
    disk are verified now, those of an object store when they are fetched.

    Raises ArtifactError when one is missing or altered.
    """
    names = shard_files(manifest.files, base)
    if artifacts.store.is_local:
        for name in names:
            artifacts.verify(manifest, name)
    return {f"{artifacts.folder(manifest.identity)}/{name}": manifest.files[name] for name in names}


def open_labels(store: Store, files: Mapping[str, str], images: str | None) -> SoftLabels:
    """Return the reader of a label set's files (names in the store, in order, with their sha256); a file is opened when one
    of its epochs is asked for, from the local cache where the store is an object store.  Raises ArtifactError as
    `SoftLabels`."""
    openers = [lambda name=name, digest=digest: mapped(store, name, digest) for name, digest in files.items()]
    return SoftLabels(openers, store.display(next(iter(files))), images)
