"""Small image sets (distilled, starting, random real) as Arrow that pyarrow and `datasets` open without this package.

Legend: N images, C channels, H W pixels.
"""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from cvdd_ray.data.artifacts import sha256
from cvdd_ray.errors import ArtifactError

METADATA_KEY = b"cvdd_ray"


@dataclass(frozen=True)
class ImageSet:
    """images_NCHW (uint8 RGB), labels_N (int64), class names in label order, further columns and free metadata."""

    images_NCHW: np.ndarray
    labels_N: np.ndarray
    classes: tuple[str, ...]
    columns: Mapping[str, pa.Array] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels_N)

    def content(self) -> str:
        """Return the sha256 of pixels and labels: what soft labels are bound to."""
        header = json.dumps([list(self.images_NCHW.shape), list(self.classes)]).encode()
        return sha256(header + np.ascontiguousarray(self.images_NCHW).tobytes() + self.labels_N.astype("<i8").tobytes())


def encode_png(image_CHW: np.ndarray) -> bytes:
    """Return lossless PNG bytes of one uint8 RGB image."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_CHW.transpose(1, 2, 0))).save(buffer, "PNG")
    return buffer.getvalue()


def encode_jpeg75(image_CHW: np.ndarray) -> bytes:
    """Return JPEG bytes at quality 75, 4:2:0, as the published code stores images (parity only; spec 5.7)."""
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image_CHW.transpose(1, 2, 0))).save(buffer, "JPEG")
    return buffer.getvalue()


def decode_image(data: bytes) -> np.ndarray:
    """Return a uint8 RGB image (3, H, W)."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def write_image_set(images: ImageSet, encoded: Sequence[bytes] | None = None) -> bytes:
    """Return an Arrow IPC stream with columns image (struct bytes/path, the Hub's image type), label and the set's own.

    `encoded` gives the image files when they are not PNG of `images_NCHW` (parity JPEG).  Schema metadata: `huggingface`
    features with class names, and `cvdd_ray` with classes and free metadata.
    """
    encoded = encoded or [encode_png(image) for image in images.images_NCHW]
    suffix = "jpg" if encoded[0][:2] == b"\xff\xd8" else "png"
    index = images.columns.get("image_index", pa.array(np.arange(len(images), dtype=np.int32)))
    paths = [
        f"class{label:05d}_id{i:05d}.{suffix}" for label, i in zip(images.labels_N, index.to_pylist(), strict=True)
    ]
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    columns = {
        "image": pa.array([{"bytes": b, "path": p} for b, p in zip(encoded, paths, strict=True)], image_type),
        "label": pa.array(images.labels_N, pa.int64()),
        **images.columns,
    }
    features = {name: _hub_feature(column.type) for name, column in columns.items()}
    features["image"] = {"_type": "Image"}
    features["label"] = {"names": list(images.classes), "_type": "ClassLabel"}
    own = {"classes": list(images.classes), **images.metadata}
    table = pa.table(columns).replace_schema_metadata(
        {
            b"huggingface": json.dumps({"info": {"features": features}}).encode(),
            METADATA_KEY: json.dumps(own).encode(),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def read_image_set(data: bytes, name: str) -> ImageSet:
    """Return the image set in Arrow bytes; `name` is used in messages.  Raises ArtifactError for anything else."""
    try:
        table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
        metadata = json.loads(table.schema.metadata[METADATA_KEY])
        decoded = [decode_image(row["bytes"]) for row in table["image"].to_pylist()]
        labels_N = table["label"].to_numpy().astype(np.int64)
        images_NCHW = np.stack(decoded)
        classes = tuple(metadata.pop("classes"))
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError, OSError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ArtifactError(
            f"{name} is not an image set of cvdd_ray ({reason}); give the .arrow file of a run"
        ) from None
    columns = {key: table[key].combine_chunks() for key in table.column_names if key not in ("image", "label")}
    return ImageSet(images_NCHW, labels_N, classes, columns, metadata)


def _hub_feature(kind: pa.DataType) -> dict:
    if pa.types.is_list(kind):
        return {"feature": _hub_feature(kind.value_type), "_type": "List"}
    return {"dtype": {"float": "float32", "double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}
