"""Image sets (distilled, starting, random real) as Arrow that pyarrow and `datasets` open without this package.

Legend: N images, C channels, H W pixels.
"""

import hashlib
import io
import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from cvdd_ray.data.artifacts import sha256
from cvdd_ray.errors import ArtifactError

METADATA_KEY = b"cvdd_ray"
IMAGE_TYPE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True)
class ImageSet:
    """images_NCHW (uint8 RGB), labels_N (int64), class names in label order, further columns and free metadata.

    `shards`: numbers of images of the files it was read from, when there are several.
    """

    images_NCHW: np.ndarray
    labels_N: np.ndarray
    classes: tuple[str, ...]
    columns: Mapping[str, pa.Array] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    shards: tuple[int, ...] = ()

    def __len__(self) -> int:
        return len(self.labels_N)

    def content(self) -> str:
        """Return the sha256 of pixels and labels: what soft labels are bound to. Of several shards it is the hash of
        their hashes, so that they can be hashed where they are made."""
        ends = np.cumsum([0, *(self.shards or [len(self)])])
        return joint_content([self._content(slice(*cut)) for cut in pairwise(ends)])

    def _content(self, cut: slice) -> str:
        images_NCHW = np.ascontiguousarray(self.images_NCHW[cut])
        digest = hashlib.sha256(json.dumps([list(images_NCHW.shape), list(self.classes)]).encode())
        digest.update(images_NCHW)
        digest.update(self.labels_N[cut].astype("<i8").tobytes())
        return digest.hexdigest()


def joint_content(contents: Sequence[str]) -> str:
    """Return the content hash of a set from those of its shards."""
    return contents[0] if len(contents) == 1 else sha256(json.dumps(list(contents)).encode())


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


def image_table(images: ImageSet, encoded: Sequence[bytes] | None = None) -> pa.Table:
    """Return the columns image (struct bytes/path, the Hub's image type), label and the set's own.

    `encoded` gives the image files when they are not PNG of `images_NCHW` (parity JPEG).
    """
    encoded = encoded or [encode_png(image) for image in images.images_NCHW]
    suffix = "jpg" if encoded[0][:2] == b"\xff\xd8" else "png"
    index = images.columns.get("image_index", pa.array(np.arange(len(images), dtype=np.int32)))
    paths = [
        f"class{label:05d}_id{i:05d}.{suffix}" for label, i in zip(images.labels_N, index.to_pylist(), strict=True)
    ]
    return pa.table(
        {
            "image": pa.array([{"bytes": b, "path": p} for b, p in zip(encoded, paths, strict=True)], IMAGE_TYPE),
            "label": pa.array(images.labels_N, pa.int64()),
            **images.columns,
        }
    )


def table_bytes(table: pa.Table, classes: Sequence[str], metadata: Mapping[str, Any]) -> bytes:
    """Return the Arrow IPC stream of an `image_table`. Schema metadata: `huggingface` features with class names, and
    `cvdd_ray` with classes and free metadata."""
    features = {name: _hub_feature(table.schema.field(name).type) for name in table.column_names}
    features["image"] = {"_type": "Image"}
    features["label"] = {"names": list(classes), "_type": "ClassLabel"}
    table = table.replace_schema_metadata(
        {
            b"huggingface": json.dumps({"info": {"features": features}}).encode(),
            METADATA_KEY: json.dumps({"classes": list(classes), **metadata}).encode(),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return sink.getvalue().to_pybytes()


def read_image_set(data: bytes, name: str, rows: slice = slice(None)) -> ImageSet:
    """Return the image set in Arrow bytes, or these rows of it; `name` is used in messages.

    Raises ArtifactError for anything else.
    """
    table = read_table(data, name)
    start, stop, _ = rows.indices(len(table))
    table = table.slice(start, stop - start)
    try:
        metadata = json.loads(table.schema.metadata[METADATA_KEY])
        images_NCHW = _decode_all([row["bytes"] for row in table["image"].to_pylist()])
        labels_N = table["label"].to_numpy().astype(np.int64)
        classes = tuple(metadata.pop("classes"))
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError, OSError) as error:
        raise _refusal(name, error) from None
    columns = {key: table[key].combine_chunks() for key in table.column_names if key not in ("image", "label")}
    return ImageSet(images_NCHW, labels_N, classes, columns, metadata)


def read_table(data: bytes, name: str) -> pa.Table:
    """Return the table of an image set with its files undecoded.  Raises ArtifactError for anything else."""
    try:
        table = pa.ipc.open_stream(pa.py_buffer(data)).read_all()
        table.validate(full=True)
        json.loads((table.schema.metadata or {})[METADATA_KEY])["classes"]
    except (pa.ArrowInvalid, KeyError, TypeError, ValueError, OSError) as error:
        raise _refusal(name, error) from None
    return table


def _refusal(name: str, error: Exception) -> ArtifactError:
    reason = (str(error) or type(error).__name__).splitlines()[0]
    return ArtifactError(f"{name} is not an image set of cvdd_ray ({reason}); give the .arrow file of a run")


def _decode_all(encoded: Sequence[bytes]) -> np.ndarray:
    """Return uint8 images (N, 3, H, W) of image files.  Raises ValueError when there are none, or of several sizes."""
    if not encoded:
        raise ValueError("no rows")
    shape = decode_image(encoded[0]).shape
    images_NCHW = np.empty((len(encoded), *shape), np.uint8)

    def work(i: int) -> None:
        image_CHW = decode_image(encoded[i])
        if image_CHW.shape != shape:
            raise ValueError(f"image {i} has the shape {image_CHW.shape}, the first one {shape}")
        images_NCHW[i] = image_CHW

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in pool.map(work, range(len(encoded))):
            pass
    return images_NCHW


def _hub_feature(kind: pa.DataType) -> dict:
    if pa.types.is_list(kind):
        return {"feature": _hub_feature(kind.value_type), "_type": "List"}
    return {"dtype": {"float": "float32", "double": "float64"}.get(str(kind), str(kind)), "_type": "Value"}
