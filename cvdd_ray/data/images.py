"""Real images of one split, decoded on demand or held in memory, and the rules for unusual and damaged files.

Shapes: N images, H W pixels (an image's own size), S side of the square network input. Pixels are uint8 RGB.
"""

import hashlib
import io
import json
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
from PIL import Image, UnidentifiedImageError

from cvdd_ray.data.datasets import SMALL_SIDE
from cvdd_ray.errors import DataError

VERIFY_LIMIT = 20_000
"""Sets above 64 px with more images than this are not read at load: a bad image shows when it is read."""
SLICE = 64
"""Consecutive images per task of the thread pool."""
THREADS = min(8, os.cpu_count() or 1)
REMOTE_THREADS = 16  # they wait for answers more than they decode
FORMATS = ("PNG", "JPEG", "BMP", "WEBP", "GIF", "TIFF", "PPM")  # others (EPS, PDF ...) may start foreign programs
ID_BYTES = 16


_opening = threading.Lock()  # warnings are silenced for all threads at once


class BadImage(Exception):  # noqa: N818 - a verdict on one file, not an error of the program
    """One image cannot be used; the text is the reason. Never leaves this package: policy turns it into DataError."""


# ---------------------------------------------------------------------------------------------- one image


def decode(data: bytes, thumbnail: bool = False) -> tuple[np.ndarray, str]:
    """Encoded bytes -> (uint8 (H, W, 3), kind), kind being the stored mode ("RGB", "P", ...) or "animated".

    Greyscale, palette, alpha, CMYK become RGB by Pillow's plain conversion (alpha is dropped), 16-bit grey is scaled
    to 8 bits, of an animation the first frame counts. `thumbnail` lets JPEG decode at 1/8 scale: all bytes are still
    read, so damage is found, but the pixels are only good for throwing away.

    Raises BadImage: empty, not an image, truncated, beyond Pillow's pixel limit (decompression bomb), 32-bit values.
    """
    if not data:
        raise BadImage("it is empty (0 bytes)")
    try:
        with _opening, warnings.catch_warnings():  # of what is refused below
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        with image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit and image.width * image.height > limit:
                raise BadImage(f"{image.width}x{image.height} is more than the limit of {limit} pixels")
            kind = "animated" if getattr(image, "is_animated", False) else image.mode
            if thumbnail:
                image.draft(None, (1, 1))
            image.load()  # before the mode decides on the conversion: some decoders settle it only now
            return np.asarray(_to_rgb(image)), kind
    except BadImage:
        raise
    except Image.DecompressionBombError:
        raise BadImage(f"it is more than the limit of {Image.MAX_IMAGE_PIXELS} pixels") from None
    except UnidentifiedImageError:
        raise BadImage("it is not an image of a known format") from None
    except Exception as error:  # decoders raise almost anything on damaged data
        raise BadImage(" ".join(str(error).split()) or type(error).__name__) from None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise BadImage("it holds floating-point values, whose range is unknown")
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's own conversion would clip at 255 instead of scaling
        values = np.asarray(image).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise BadImage("it holds 32-bit values beyond 65535")
        return Image.fromarray(((values * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # the direct way warns about palettes with transparency
    return image.convert("RGB")


def fit(image: np.ndarray, size: int, name: str) -> np.ndarray:
    """One image uint8 (H, W, 3) -> network input size, uint8 (3, S, S).

    Up to 64 px the image must have that size already. Above, the test transform of the 224 px sets: the shorter side
    becomes S*256/224 (bilinear), then a centre crop. Raises DataError naming the image. Source: spec section 1.
    """
    height, width = image.shape[:2]
    if size <= SMALL_SIDE:
        if (height, width) != (size, size):
            raise DataError(
                f"{name} is {width}x{height} pixels, but inputs up to {SMALL_SIDE} px must have their final size, here "
                f"{size}x{size}; resize the images beforehand or set data.image_size to their size"
            )
        return image.transpose(2, 0, 1)
    short, edge = min(height, width), size * 256 // 224
    new_width, new_height = (int(edge * side / short) for side in (width, height))
    left, top = round((new_width - size) / 2), round((new_height - size) / 2)
    resized = Image.fromarray(image).resize((new_width, new_height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size))).transpose(2, 0, 1)


# ------------------------------------------------------------------------------------- where images come from


class Source(Protocol):
    """Where the images of a split lie; cheap to pickle. `threads` read at once; `is_cheap`: so is reading any one image."""

    threads: ClassVar[int]
    is_cheap: ClassVar[bool]

    def name(self, index: int) -> str: ...
    def load(self, index: int) -> bytes: ...
    def stamp(self, index: int, data: bytes | None) -> bytes: ...
    def take(self, indices: np.ndarray) -> "Source": ...


@dataclass(frozen=True)
class Files:
    """Image files below an absolute `root`, named by relative paths with forward slashes."""

    root: str
    names: tuple[str, ...]
    threads: ClassVar[int] = THREADS
    is_cheap: ClassVar[bool] = True

    def name(self, index: int) -> str:
        return os.path.join(self.root, self.names[index])

    def load(self, index: int) -> bytes:
        try:
            with open(self.name(index), "rb") as file:
                return file.read()
        except OSError as error:
            raise BadImage(error.strerror or type(error).__name__) from None

    def stamp(self, index: int, data: bytes | None) -> bytes:
        length = os.path.getsize(self.name(index)) if data is None else len(data)
        return name_stamp(self.names[index], length, data)

    def take(self, indices: np.ndarray) -> "Files":
        return replace(self, names=tuple(self.names[i] for i in indices))


@dataclass(frozen=True, eq=False)
class Arrays:
    """Names of images that have no file; their pixels are in memory."""

    title: str
    rows: np.ndarray
    threads: ClassVar[int] = THREADS
    is_cheap: ClassVar[bool] = False

    def name(self, index: int) -> str:
        return f"{self.title} image {int(self.rows[index])}"

    def load(self, index: int) -> bytes:
        raise AssertionError("pixels of an in-memory set are never loaded")

    def stamp(self, index: int, data: bytes | None) -> bytes:
        return digest(data or b"")

    def take(self, indices: np.ndarray) -> "Arrays":
        return replace(self, rows=self.rows[indices])


def name_stamp(name: str, length: int, data: bytes | None) -> bytes:
    """Identity of a file: relative name and size, and the content if it has been read anyway."""
    return digest(name.encode("utf-8", "surrogateescape"), str(length).encode(), data or b"")


def digest(*parts: bytes) -> bytes:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(len(part).to_bytes(8, "little"))  # so that ("ab", "c") and ("a", "bc") differ
        hasher.update(part)
    return hasher.digest()[:ID_BYTES]


# --------------------------------------------------------------------------------------------- one split


class RealImages:
    """N labelled real images of one split.

    `classes`: names in label order; `labels`: int64 (N,); `bad`: names of images left out (data.on_bad_image=skip) and
    `converted`: how many images had another mode than 8-bit RGB, by mode - both found while loading the whole split
    this set is a part of. Made by `load_real`, `in_memory` or `subset`. A set of files pickles as paths, not pixels.
    """

    def __init__(
        self,
        classes: Sequence[str],
        labels: np.ndarray,
        source: Source,
        ids: np.ndarray,
        pixels: np.ndarray | None = None,
        bad: Sequence[str] = (),
        converted: dict[str, int] | None = None,
    ):
        self.classes = tuple(classes)
        self.labels = np.asarray(labels, dtype=np.int64)
        self.bad = tuple(bad)
        self.converted = dict(converted or {})
        self._source = source
        self._ids = ids  # uint8 (N, 16): identity of every image
        self._pixels = pixels  # uint8 (N, 3, S, S) or None

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        state = self.__dict__.copy()
        if self._source.is_cheap:
            state["_pixels"] = None
        return state

    def name(self, index: int) -> str:
        """What to call image `index` in a message: its path, its Parquet row, or its number."""
        return self._source.name(index)

    def read(self, index: int) -> np.ndarray:
        """Image `index` as uint8 (H, W, 3) RGB in its own size. Raises DataError if it is damaged."""
        if self._pixels is not None:
            return np.ascontiguousarray(self._pixels[index].transpose(1, 2, 0))
        try:
            return decode(self._source.load(index))[0]
        except BadImage as error:
            raise DataError(
                f"{self.name(index)} cannot be read: {error}; replace or delete it (sets of more than {VERIFY_LIMIT} "
                "images are not checked beforehand, so data.on_bad_image has no say here)"
            ) from None

    def stack(self, size: int) -> np.ndarray:
        """All images as network inputs: uint8 (N, 3, S, S), a copy.

        Pixels held in memory in that size come as stored; others go through `fit`. Raises DataError as `read` and
        `fit` do. Source: spec section 1 (test transform).
        """
        if self._pixels is not None and self._pixels.shape[-2:] == (size, size):
            return self._pixels.copy()
        out = np.empty((len(self), 3, size, size), np.uint8)

        def work(start: int, stop: int) -> None:
            for i in range(start, stop):
                out[i] = fit(self.read(i), size, self.name(i))

        for _ in _in_threads(len(self), work, self._source.threads):
            pass
        return out

    def subset(self, indices: Sequence[int] | np.ndarray) -> "RealImages":
        """The images at `indices`, in that order."""
        indices = np.asarray(indices, dtype=np.int64)
        return RealImages(
            self.classes,
            self.labels[indices],
            self._source.take(indices),
            self._ids[indices],
            None if self._pixels is None else self._pixels[indices],
            self.bad,
            self.converted,
        )

    @property
    def fingerprint(self) -> str:
        """Stable content id (sha256 hex) of classes, labels and images in their order.

        Images count by pixels (in memory), by encoded bytes (Parquet), or by relative name, size and bytes (files).
        Sets that are not read at load (above 64 px and more than 20,000 images) count by name and size alone, or by
        the Parquet file's footer and the row number.
        """
        hasher = hashlib.sha256(json.dumps(self.classes).encode())
        hasher.update(self.labels.astype("<i8").tobytes())
        hasher.update(self._ids.tobytes())
        return hasher.hexdigest()


def in_memory(title: str, pixels: np.ndarray, labels: np.ndarray, classes: Sequence[str]) -> RealImages:
    """A set from pixels uint8 (N, 3, S, S) and labels (N,); `title` names its images in messages."""
    source = Arrays(title, np.arange(len(labels)))
    ids = np.empty((len(labels), ID_BYTES), np.uint8)
    for i, image in enumerate(pixels):
        ids[i] = np.frombuffer(source.stamp(i, image.tobytes()), np.uint8)
    return RealImages(classes, labels, source, ids, pixels)


def load_images(classes: Sequence[str], labels: np.ndarray, source: Source, size: int, on_bad_image: str) -> RealImages:
    """Read the images of a source as far as its size allows (S = `size`, the network input's side).

    Up to 64 px everything is decoded into memory; above, up to 20,000 images are decoded once to find the bad ones;
    larger sets are left alone until read.

    Raises DataError: a bad image under the policy "error" (the first one), or a small image of the wrong size.
    """
    count, small = len(labels), size <= SMALL_SIDE
    ids = np.empty((count, ID_BYTES), np.uint8)
    if not small and count > VERIFY_LIMIT:
        for i in range(count):
            ids[i] = np.frombuffer(source.stamp(i, None), np.uint8)
        return RealImages(classes, labels, source, ids)
    pixels = np.empty((count, 3, size, size), np.uint8) if small else None

    def work(start: int, stop: int) -> tuple[list[tuple[int, str]], list[str]]:
        problems, kinds = [], []
        for i in range(start, stop):
            try:
                data = source.load(i)
                image, kind = decode(data, thumbnail=not small)
            except BadImage as error:
                problems.append((i, str(error)))
                continue
            kinds.append(kind)
            ids[i] = np.frombuffer(source.stamp(i, data), np.uint8)
            if pixels is not None:
                pixels[i] = fit(image, size, source.name(i))
        return problems, kinds

    bad: dict[int, str] = {}
    kinds: Counter[str] = Counter()
    for problems, slice_kinds in _in_threads(count, work, source.threads):
        kinds.update(slice_kinds)
        for i, reason in problems:
            if on_bad_image == "error":
                raise DataError(
                    f"{source.name(i)} cannot be read: {reason}; replace it, or set data.on_bad_image=skip to leave "
                    "such images out"
                )
            bad[i] = source.name(i)
    del kinds["RGB"]
    everything = RealImages(classes, labels, source, ids, pixels, tuple(bad.values()), kinds)
    return everything.subset([i for i in range(count) if i not in bad]) if bad else everything


def _in_threads(count: int, work: Callable[[int, int], Any], threads: int) -> Iterator[Any]:
    """Results of `work(start, stop)` over slices of 0..count, in order; the first exception stops the rest."""
    starts = range(0, count, SLICE)
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(lambda start: work(start, min(start + SLICE, count)), starts)
