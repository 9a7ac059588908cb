"""Hub-style Parquet files, on the local disk or in an object store, read by row groups. Shapes: N images."""

import fnmatch
import functools
import json
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cvdd_ray.data.images import REMOTE_THREADS, THREADS, BadImage, digest
from cvdd_ray.data.listing import Listing, numbered, one_line, short
from cvdd_ray.data.remote import Remote, below, is_uri, reading, without_secrets
from cvdd_ray.errors import DataError

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")


def list_parquet(root: Path | Remote, num_classes: int) -> tuple[Listing, Listing]:
    """Hub-style Parquet: train*.parquet, and test*.parquet or validation*.parquet, in `root` or its data/. Classes that
    have no names are numbered, `num_classes` of them (0: as many as there are)."""
    if isinstance(root, Path) and not root.is_dir():
        raise DataError(f"{root} is not a directory; data.path must hold train*.parquet and test*.parquet files")
    there = _names(root)
    inside = {
        folder: [name for name in there if name.rpartition("/")[0] == folder.rstrip("/")] for folder in ("", "data/")
    }
    folder = "" if fnmatch.filter(inside[""], "train*.parquet") else "data/"

    def files(split: str) -> list[str]:
        return sorted(fnmatch.filter(inside[folder], f"{folder}{split}*.parquet"))

    train_files, test_files = files("train"), next(filter(None, map(files, ("test", "validation"))), [])
    if not train_files or not test_files:
        top = sorted({name.split("/")[0] for name in there})
        raise DataError(
            f"{root} holds {short(top) if top else 'nothing'}; data.path must hold train*.parquet and test*.parquet (or "
            "validation*.parquet)"
        )
    names, labels, source = _list_parquet(root, train_files)
    test_names, test_labels, test_source = _list_parquet(root, test_files)
    if names is None and test_names is None:
        names = numbered(labels, num_classes, f"{root}/{folder}train*.parquet")
    names, test_names = names or test_names, test_names or names  # one split's names do for both
    return (
        Listing(f"{root}/{folder}train*.parquet", names, labels, source),
        Listing(f"{root}/{test_files[0]}", test_names, test_labels, test_source),
    )


def _names(root: Path | Remote) -> list[str]:
    """Relative names of what lies at a root and in its data/; of an object store, of all files."""
    if isinstance(root, Path):
        return [path.relative_to(root).as_posix() for path in (*root.iterdir(), *root.glob("data/*"))]
    return [info.path[len(root.base) + 1 :] for info in root.files(root.base)]


def _list_parquet(root: Path | Remote, names: list[str]) -> tuple[tuple[str, ...] | None, np.ndarray, "ParquetRows"]:
    """Class names (None if the schema has none), labels (N,) and rows of one split's files."""
    files = [str(root / name) if isinstance(root, Path) else below(root.uri, name) for name in names]
    all_names, labels, groups, row = [], [], [], 0
    with ThreadPoolExecutor(REMOTE_THREADS if isinstance(root, Remote) else 1) as pool:
        heads = list(pool.map(_parquet_head, files, [f"{root}/{name}" for name in names]))
    for number, head in enumerate(heads):
        labels.append(head.labels)
        all_names.append((head.image, head.names))
        for index, group_rows in enumerate(head.group_rows):
            groups.append((number, index, row))
            row += group_rows
    if len(set(all_names)) > 1:
        raise DataError(
            f"{root}: the files {names[0]} ... {names[-1]} name different image columns or "
            "classes; keep the files of one data set only"
        )
    if not row:
        raise DataError(f"{root}/{names[0]} has no rows; give files with images")
    group_file, group_index, group_start = np.array(groups, np.int64).reshape(-1, 3).T
    image, class_names = all_names[0]
    rows = ParquetRows(tuple(files), image, group_file, group_index, group_start, np.arange(row))
    return class_names, np.concatenate(labels), rows


@dataclass(frozen=True, eq=False)
class _ParquetHead:
    """What is known of a Parquet file before its images are read: image column, class names, labels, rows per group."""

    image: str
    names: tuple[str, ...] | None
    labels: np.ndarray
    group_rows: tuple[int, ...]


def _parquet_head(address: str, where: str) -> _ParquetHead:
    def read(stream: pa.NativeFile) -> _ParquetHead:
        file = pq.ParquetFile(stream, pre_buffer=is_uri(address))
        image, label = _columns(where, file.schema_arrow)
        column = file.read(columns=[label]).column(label)
        if pa.types.is_uint64(column.type) and (pc.max(column).as_py() or 0) >= 2**63:
            raise DataError(f"{where} has the label {pc.max(column).as_py()}; labels are numbers from 0 to classes - 1")
        if column.null_count:
            raise DataError(f"{where} has {column.null_count} rows without a {label}; remove or label them")
        group_rows = tuple(file.metadata.row_group(index).num_rows for index in range(file.num_row_groups))
        labels = column.to_numpy().astype(np.int64)
        return _ParquetHead(image, _class_names(where, file.schema_arrow, label), labels, group_rows)

    try:
        return reading(address, read)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{where} is no readable Parquet file: {one_line(error)}; replace it") from None


def _columns(path: str, schema: pa.Schema) -> tuple[str, str]:
    image = next((name for name in IMAGE_COLUMNS if name in schema.names), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    for found, allowed in ((image, IMAGE_COLUMNS), (label, LABEL_COLUMNS)):
        if found is None:
            raise DataError(
                f"{path} has the columns {short(schema.names)}, but none called {' or '.join(allowed)}; rename the "
                "right one"
            )
        if schema.names.count(found) > 1:
            raise DataError(f"{path} has two columns {found}; keep the right one")
    kind = schema.field(image).type
    at = kind.get_field_index("bytes") if pa.types.is_struct(kind) else -1
    if at < 0 or not (pa.types.is_binary(kind.field(at).type) or pa.types.is_large_binary(kind.field(at).type)):
        raise DataError(
            f"{path} column {image} is {kind}, but must be struct<bytes: binary, path>; write it as a Hub image"
        )
    if not pa.types.is_integer(schema.field(label).type):
        raise DataError(f"{path} column {label} is {schema.field(label).type}, but must be an integer class number")
    return image, label


def _class_names(where: str, schema: pa.Schema, label: str) -> tuple[str, ...] | None:
    """`info.features.<label>.names` of the `huggingface` schema metadata, if it is there."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features[label]["names"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return None
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise DataError(
            f"{where}: the class names of {label} in its metadata are {short(names) if isinstance(names, list) else names!r}; "
            f"they must be a list of different texts"
        )
    return tuple(names)


@dataclass(frozen=True, eq=False)
class ParquetRows:
    """Rows of Parquet files whose image column is struct<bytes, path>; groups hold one entry per row group.

    Single reads decode a whole row group (the last few are kept), so read in row order where you can; a large set
    that is read at random is better kept as a folder.
    """

    files: tuple[str, ...]
    column: str
    group_file: np.ndarray
    group_index: np.ndarray
    group_start: np.ndarray
    rows: np.ndarray
    threads: ClassVar[int] = THREADS
    is_cheap: ClassVar[bool] = False

    def _locate(self, index: int) -> tuple[str, int, int, int]:
        row = int(self.rows[index])
        group = int(np.searchsorted(self.group_start, row, side="right")) - 1
        number = int(self.group_file[group])
        first = int(self.group_start[np.searchsorted(self.group_file, number)])
        return self.files[number], int(self.group_index[group]), row - int(self.group_start[group]), row - first

    def name(self, index: int) -> str:
        path, _, _, row = self._locate(index)
        return f"{without_secrets(path) if is_uri(path) else path} row {row}"

    def load(self, index: int) -> bytes:
        path, group, offset, _ = self._locate(index)
        try:
            data = _row_group(path, _changed_ns(path), group, self.column)[offset].as_py()
        except (pa.ArrowException, OSError) as error:
            raise BadImage(f"its row group: {' '.join(str(error).split())}") from None
        if data is None:
            raise BadImage("its `bytes` are null (a path alone is not followed)")
        return data

    def stamp(self, index: int, data: bytes | None) -> bytes:
        """Identity of one row: the encoded image, or the file's footer and the row if it has not been read."""
        if data is not None:
            return digest(data)
        path, _, _, row = self._locate(index)
        return digest(_footer(path, _changed_ns(path)), str(row).encode())

    def take(self, indices: np.ndarray) -> "ParquetRows":
        return replace(self, rows=self.rows[indices])


@functools.lru_cache(maxsize=THREADS + 1)  # every thread of a pass over the set keeps its row group
def _row_group(path: str, mtime_ns: int, group: int, column: str) -> Any:
    columns = [f"{column}.bytes"]
    table = reading(path, lambda file: pq.ParquetFile(file).read_row_group(group, columns=columns))
    return table.column(column).combine_chunks().field("bytes")


@functools.lru_cache(maxsize=4)
def _footer(path: str, mtime_ns: int) -> bytes:
    def of_footer(file: pa.NativeFile) -> bytes:
        length = int.from_bytes(file.read_at(4, file.size() - 8), "little")
        return digest(str(file.size()).encode(), file.read_at(length, file.size() - 8 - length))

    return reading(path, of_footer)


def _changed_ns(path: str) -> int:
    """When a local file was changed; a file of an object store counts as one that stays."""
    return 0 if is_uri(path) else os.stat(path).st_mtime_ns
