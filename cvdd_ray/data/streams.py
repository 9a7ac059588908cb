"""Finished image sets and soft labels as streams of record batches: sets larger than memory pass through, undecoded."""

import re
from collections.abc import Iterator

import pyarrow as pa

from cvdd_ray.data.artifacts import Artifacts, Manifest

ROWS_AT_ONCE = 64


def set_files(manifest: Manifest, base: str) -> list[str]:
    """Return the files of a set, `base.arrow` or its shards `base-00000-of-00002.arrow`, in order."""
    return sorted(name for name in manifest.files if re.fullmatch(rf"{base}(-\d{{5}}-of-\d{{5}})?\.arrow", name))


def image_batches(artifacts: Artifacts, manifest: Manifest, base: str = "distilled") -> Iterator[pa.RecordBatch]:
    """Yield the rows of an image set in order, few at a time, image files undecoded; the schema's metadata has the
    `huggingface` features.

    Raises ArtifactError when a file is missing or altered.
    """
    for name in set_files(manifest, base):
        with artifacts.store.open(artifacts.verify(manifest, name)) as file:
            for batch in pa.ipc.open_stream(file):
                for start in range(0, len(batch), ROWS_AT_ONCE):
                    yield batch.slice(start, ROWS_AT_ONCE)


def label_batches(artifacts: Artifacts, manifest: Manifest, base: str = "labels") -> Iterator[pa.RecordBatch]:
    """Yield soft labels epoch by epoch, a row per batch (`labels.SCHEMA`).

    Raises ArtifactError when a file is missing or altered.
    """
    for name in set_files(manifest, base):
        with artifacts.store.open(artifacts.verify(manifest, name)) as file:
            reader = pa.ipc.open_file(file)
            for epoch in range(reader.num_record_batches):
                yield reader.get_batch(epoch)
