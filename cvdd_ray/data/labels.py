"""Soft labels on disk: rows keyed by (epoch, batch) in a memory-mapped Arrow file, with the views they belong to.

A file says in its metadata how logits are stored in it (`encoding`; float16 of every class if it says nothing), and for
how many epochs of a student its own are taken again and again (`replayed_epochs`).

Legend: B images of a batch, K classes, k classes whose logits are stored.
"""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cvdd_ray.core.augment import Views
from cvdd_ray.core.labelcodes import LabelEncoding, decode_logits, encode_logits
from cvdd_ray.core.softlabels import BatchPlan
from cvdd_ray.errors import ArtifactError

METADATA_KEY = b"cvdd_ray"
ONLINE = "online.json"
"""Instead of label files where nothing is stored: what teachers need to say the labels as a student trains."""

FULL = LabelEncoding()
_BOX = pa.list_(pa.int16(), 4)
_VIEWS = pa.schema(
    [
        ("epoch", pa.int32()),
        ("batch", pa.int32()),
        ("image_index", pa.list_(pa.int32())),  # rows of the image set
        ("crop", pa.list_(_BOX)),  # top, left, height, width in pixels, per image
        ("flip", pa.list_(pa.bool_())),
        ("partner", pa.list_(pa.int32())),  # CutMix partner, as position in the batch
        ("cutmix_box", _BOX),  # top, left, bottom, right, one for the batch
    ]
)


def label_schema(num_classes: int, encoding: LabelEncoding = FULL) -> pa.Schema:
    """Return the columns of a label file: views, then the parts of the labels (`LabelEncoding.parts`), row-major: `logits`
    are B x K numbers, or B x k with their `classes`; `tail`, `scale` and `offset` B."""
    parts = encoding.parts(num_classes)
    return pa.schema(
        [*_VIEWS, *(pa.field(name, pa.list_(pa.from_numpy_dtype(kind))) for name, (_, kind) in parts.items())]
    )


def epoch_bytes(num_images: int, num_batches: int, num_classes: int, encoding: LabelEncoding = FULL) -> int:
    """Return the bytes of an epoch in a label file, up to padding."""
    parts = len(encoding.parts(num_classes))
    lists = 4 + parts  # columns whose rows have a length, of 4 bytes
    views = 4 + 8 + 4 + 1 / 8  # index, crop, partner, flip
    return round(
        num_images * (views + encoding.image_bytes(num_classes)) + num_batches * (16 + 4 * lists) + 740 + 100 * parts
    )


def file_bytes(num_classes: int, encoding: LabelEncoding = FULL) -> int:
    """Return about how many bytes a label file has besides its epochs: schema and metadata, at its head and at its end."""
    return 2400 + 200 * len(encoding.parts(num_classes))


def label_batch(rows: Iterable[tuple[BatchPlan, Tensor]], encoding: LabelEncoding = FULL) -> pa.RecordBatch:
    """Return one record batch (an epoch) from (plan, logits_BK)."""
    rows = list(rows)
    schema = label_schema(rows[0][1].shape[1], encoding)
    columns: dict[str, list] = {name: [] for name in schema.names}
    for plan, logits_BK in rows:
        columns["epoch"].append(plan.epoch)
        columns["batch"].append(plan.batch)
        columns["image_index"].append(plan.image_index_B.numpy().astype(np.int32))
        columns["crop"].append(plan.views.boxes_N4.tolist())
        columns["flip"].append(plan.views.flips_N.tolist())
        columns["partner"].append(plan.partner_B.numpy().astype(np.int32))
        columns["cutmix_box"].append(list(plan.box))
        for name, part in encode_logits(logits_BK.cpu(), encoding).items():
            kind = schema.field(name).type.value_type.to_pandas_dtype()
            columns[name].append(part.flatten().numpy().astype(kind))
    arrays = [pa.array(columns[field.name], field.type) for field in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def write_label_file(stream: Any, epochs: Iterable[pa.RecordBatch], metadata: Mapping[str, Any]) -> None:
    """Write an Arrow IPC file with one record batch per epoch, in order, to a binary stream; one epoch is in memory at a
    time. `metadata` must hold `images` (the content hash of the image set), `num_classes` and what `encoding_metadata` says
    of the record batches."""
    epochs = iter(epochs)
    batch = next(epochs)
    schema = batch.schema.with_metadata({METADATA_KEY: json.dumps(dict(metadata)).encode()})
    with pa.ipc.new_file(stream, schema) as writer:
        while batch is not None:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
            batch = next(epochs, None)


def encoding_metadata(encoding: LabelEncoding) -> dict[str, Any]:
    """Return what a label file says of its encoding."""
    return {} if encoding == FULL else {"encoding": asdict(encoding)}


def encoding_of(metadata: Mapping[str, Any]) -> LabelEncoding:
    """Return the encoding that a label file's metadata names."""
    return LabelEncoding(**metadata.get("encoding", {}))


class SoftLabels:
    """Reader of a label file, or of shards with `epochs_per_shard` epochs each (the last one fewer). Epochs are decoded
    when asked for, the rest stays on disk; shards are given as functions that open them, and are opened when needed.
    Where fewer epochs are stored than a student trains, epoch e is the stored epoch e mod `stored_epochs`.

    Raises ArtifactError when a file is not a label file, or was made for another image set than `images` (a content
    hash; None skips that check).
    """

    def __init__(self, source: pa.NativeFile | pa.Buffer | Sequence[Callable[[], pa.NativeFile]], name: str,
                 images: str | None):  # fmt: skip
        self._openers = list(source) if isinstance(source, (list, tuple)) else [lambda: source]
        self._readers: dict[int, pa.ipc.RecordBatchFileReader] = {}
        self._name, self._images = name, images
        self.metadata = self._metadata(self._reader(0))
        self.num_classes = int(self.metadata["num_classes"])
        self.encoding = encoding_of(self.metadata)

    def _reader(self, shard: int) -> pa.ipc.RecordBatchFileReader:
        if shard not in self._readers:
            try:
                self._readers[shard] = pa.ipc.open_file(self._openers[shard]())
            except pa.ArrowInvalid as error:
                raise self._refusal(error) from None
            made_for = self._metadata(self._readers[shard])["images"]
            if self._images is not None and made_for != self._images:
                raise ArtifactError(
                    f"{self._name} labels image set {made_for[:12]}, but was asked about {self._images[:12]}; "
                    f"use the images it was made for, or run `cvdd relabel` for these"
                )
        return self._readers[shard]

    def _metadata(self, reader: pa.ipc.RecordBatchFileReader) -> dict[str, Any]:
        try:
            metadata = json.loads(reader.schema.metadata[METADATA_KEY])
            str(metadata["images"])
            expected = label_schema(int(metadata["num_classes"]), encoding_of(metadata))
            missing = [name for name in expected.names if reader.schema.field(name).type != expected.field(name).type]
            if missing:
                raise ValueError(f"its {', '.join(missing)} are stored in another way than it says")
        except (KeyError, TypeError, ValueError) as error:
            raise self._refusal(error) from None
        return metadata

    def _refusal(self, error: Exception) -> ArtifactError:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return ArtifactError(f"{self._name} is not a soft-label file ({reason}); make it with `cvdd relabel`")

    @property
    def stored_epochs(self) -> int:
        return self.metadata["epochs"] if len(self._openers) > 1 else self._reader(0).num_record_batches

    @property
    def num_epochs(self) -> int:
        """Epochs that a student can train: those that are stored, or more."""
        return self.metadata.get("replayed_epochs", self.stored_epochs)

    def batch(self, epoch: int) -> pa.RecordBatch:
        """Return the columns of an epoch of the student as stored.  Raises ArtifactError past the last one."""
        if not 0 <= epoch < self.num_epochs:
            raise ArtifactError(
                f"epoch {epoch} has no soft labels, the file holds 0..{self.num_epochs - 1}; relabel more"
            )
        epoch %= self.stored_epochs
        shard, row = divmod(epoch, self.metadata["epochs_per_shard"]) if len(self._openers) > 1 else (0, epoch)
        return self._reader(shard).get_batch(row)

    def epoch(self, epoch: int) -> list[tuple[BatchPlan, Tensor]]:
        """Return (plan, logits_BK as fp32) of every batch of an epoch of the student; `plan.epoch` is the stored one.

        Raises ArtifactError past the last one.
        """
        columns = self.batch(epoch)
        starts = columns["image_index"].offsets.to_numpy()
        index = torch.from_numpy(columns["image_index"].flatten().to_numpy().astype(np.int64))
        partner = torch.from_numpy(columns["partner"].flatten().to_numpy().astype(np.int64))
        crop_N4 = torch.from_numpy(columns["crop"].flatten().flatten().to_numpy().astype(np.int64)).view(-1, 4)
        flip = torch.from_numpy(columns["flip"].flatten().to_numpy(zero_copy_only=False).copy())
        boxes = columns["cutmix_box"].flatten().to_numpy().reshape(-1, 4).tolist()
        logits_NK = self._logits(columns)
        rows = []
        for row, (start, stop) in enumerate(zip(starts[:-1] - starts[0], starts[1:] - starts[0], strict=True)):
            still = torch.zeros(stop - start, 2, dtype=torch.long)
            plan = BatchPlan(
                columns["epoch"][row].as_py(), columns["batch"][row].as_py(), index[start:stop],
                Views(crop_N4[start:stop], flip[start:stop], still), partner[start:stop], tuple(boxes[row]),
            )  # fmt: skip
            rows.append((plan, logits_NK[start:stop]))
        return rows

    def _logits(self, columns: pa.RecordBatch) -> Tensor:
        """Return the logits of an epoch as fp32, all batches in a row."""
        parts = {}
        for name, (count, kind) in self.encoding.parts(self.num_classes).items():
            values = columns[name].flatten().to_numpy().reshape(-1, count)
            parts[name] = torch.from_numpy(values.astype(np.int64 if kind.startswith("uint") else np.float32))
        return decode_logits(parts, self.num_classes)
