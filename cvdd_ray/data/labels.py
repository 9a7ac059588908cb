"""Soft labels on disk: rows keyed by (epoch, batch) in a memory-mapped Arrow file, with the views they belong to.

Legend: B images of a batch, K classes.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from cvdd_ray.core.augment import Views
from cvdd_ray.core.softlabels import BatchPlan
from cvdd_ray.errors import ArtifactError

METADATA_KEY = b"cvdd_ray"
_BOX = pa.list_(pa.int16(), 4)
SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("batch", pa.int32()),
        ("image_index", pa.list_(pa.int32())),  # rows of the image set
        ("crop", pa.list_(_BOX)),  # top, left, height, width in pixels, per image
        ("flip", pa.list_(pa.bool_())),
        ("partner", pa.list_(pa.int32())),  # CutMix partner, as position in the batch
        ("cutmix_box", _BOX),  # top, left, bottom, right, one for the batch
        ("logits", pa.list_(pa.float16())),  # B x K, row-major
    ]
)


def label_batch(rows: Iterable[tuple[BatchPlan, Tensor]]) -> pa.RecordBatch:
    """Return one record batch (an epoch) from (plan, logits_BK)."""
    columns: dict[str, list] = {name: [] for name in SCHEMA.names}
    for plan, logits_BK in rows:
        columns["epoch"].append(plan.epoch)
        columns["batch"].append(plan.batch)
        columns["image_index"].append(plan.image_index_B.numpy().astype(np.int32))
        columns["crop"].append(plan.views.boxes_N4.tolist())
        columns["flip"].append(plan.views.flips_N.tolist())
        columns["partner"].append(plan.partner_B.numpy().astype(np.int32))
        columns["cutmix_box"].append(list(plan.box))
        columns["logits"].append(logits_BK.to("cpu", torch.float16).flatten().numpy())
    arrays = [pa.array(columns[field.name], field.type) for field in SCHEMA]
    return pa.RecordBatch.from_arrays(arrays, schema=SCHEMA)


def write_labels(epochs: Sequence[pa.RecordBatch], metadata: Mapping[str, Any]) -> bytes:
    """Return an Arrow IPC file with one record batch per epoch, in order; `metadata` must hold `images` (the content
    hash of the image set) and `num_classes`."""
    schema = SCHEMA.with_metadata({METADATA_KEY: json.dumps(dict(metadata)).encode()})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, schema) as writer:
        for batch in epochs:
            writer.write_batch(batch.replace_schema_metadata(schema.metadata))
    return sink.getvalue().to_pybytes()


class SoftLabels:
    """Reader of a label file; epochs are decoded when asked for, the rest stays on disk.

    Raises ArtifactError when the file is not a label file, or was made for another image set than `images` (a content
    hash; None skips that check).
    """

    def __init__(self, source: pa.NativeFile | pa.Buffer, name: str, images: str | None):
        try:
            self._reader = pa.ipc.open_file(source)
            self.metadata = json.loads(self._reader.schema.metadata[METADATA_KEY])
            self.num_classes = int(self.metadata["num_classes"])
        except (pa.ArrowInvalid, KeyError, TypeError, ValueError) as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise ArtifactError(f"{name} is not a soft-label file ({reason}); make it with `cvdd relabel`") from None
        if images is not None and self.metadata["images"] != images:
            raise ArtifactError(
                f"{name} labels image set {self.metadata['images'][:12]}, but was asked about {images[:12]}; "
                f"use the images it was made for, or run `cvdd relabel` for these"
            )

    @property
    def num_epochs(self) -> int:
        return self._reader.num_record_batches

    def epoch(self, epoch: int) -> list[tuple[BatchPlan, Tensor]]:
        """Return (plan, logits_BK as fp32) of every batch of an epoch.  Raises ArtifactError past the last one."""
        if not 0 <= epoch < self.num_epochs:
            raise ArtifactError(
                f"epoch {epoch} has no soft labels, the file holds 0..{self.num_epochs - 1}; relabel more"
            )
        columns = self._reader.get_batch(epoch)
        starts = columns["image_index"].offsets.to_numpy()
        index = torch.from_numpy(columns["image_index"].flatten().to_numpy().astype(np.int64))
        partner = torch.from_numpy(columns["partner"].flatten().to_numpy().astype(np.int64))
        crop_N4 = torch.from_numpy(columns["crop"].flatten().flatten().to_numpy().astype(np.int64)).view(-1, 4)
        flip = torch.from_numpy(columns["flip"].flatten().to_numpy(zero_copy_only=False).copy())
        boxes = columns["cutmix_box"].flatten().to_numpy().reshape(-1, 4).tolist()
        logits = columns["logits"].flatten().to_numpy().astype(np.float32).reshape(-1, self.num_classes)
        rows = []
        for row, (start, stop) in enumerate(zip(starts[:-1] - starts[0], starts[1:] - starts[0], strict=True)):
            still = torch.zeros(stop - start, 2, dtype=torch.long)
            plan = BatchPlan(
                columns["epoch"][row].as_py(), columns["batch"][row].as_py(), index[start:stop],
                Views(crop_N4[start:stop], flip[start:stop], still), partner[start:stop], tuple(boxes[row]),
            )  # fmt: skip
            rows.append((plan, torch.from_numpy(logits[start:stop])))
        return rows
