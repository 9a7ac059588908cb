"""WebDataset-style tar files, on the local disk or in an object store: KEY.jpg and KEY.cls side by side. Shapes: N images.

A tar file is indexed once, by its headers; the index is kept in the local cache, and images are then read in place.
"""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO, ClassVar

import numpy as np
import pyarrow as pa

from cvdd_ray.data.cache import kept
from cvdd_ray.data.folders import EXTENSIONS
from cvdd_ray.data.images import REMOTE_THREADS, THREADS, BadImage, digest
from cvdd_ray.data.listing import Listing, numbered, one_line, short
from cvdd_ray.data.remote import Remote, RemoteFile, below, is_uri, without_secrets
from cvdd_ray.errors import DataError
from cvdd_ray.recipes import without_login

INDEX_VERSION = 1
BLOCK_BYTES = 1 << 20
"""What is read at once of a tar file in an object store while it is indexed: a round trip costs as much time as about this
many bytes, so that data is skipped where it is larger, and read through where it is smaller."""
OPEN_FILES = 2048
CLASSES = "classes.txt"
INDEX = pa.schema([("key", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("label", pa.int64())])


@dataclass(frozen=True)
class Shard:
    """One tar file: its address (path or URI), what to call it, and what tells another version of it."""

    address: str
    where: str
    size: int
    changed_ns: int

    def index_name(self) -> str:
        about = [INDEX_VERSION, without_login(self.address), self.size, self.changed_ns]
        return f"tar/{hashlib.sha256(json.dumps(about).encode()).hexdigest()}.arrow"


def list_webdataset(
    root: Path | Remote, num_classes: int, given: Sequence[str] | None
) -> tuple[Listing, Listing]:  # fmt: skip
    """Tar files of train, and of test or val: by a word of their name (train-0000.tar) or by the folder they are in.

    Class names: classes.txt (a name per line, in label order), `given`, or numbers, `num_classes` of them (0: as many as
    there are). Images keep the order of the files and their order in there.
    """
    shards, lines = _find(root)
    splits = {
        name: [shard for file, shard in shards.items() if _split(file) == name] for name in ("train", "test", "val")
    }
    test = "test" if splits["test"] else "val"
    if not splits["train"] or not splits[test]:
        raise DataError(
            f"{root} holds {short(sorted(shards)) if shards else 'no .tar files'}; data.path must hold train-*.tar and "
            f"test-*.tar (or val-*.tar, or folders of these names); compressed ones cannot be read in place"
        )
    indices = {name: _indices(splits[name]) for name in ("train", test)}
    labels = {name: np.concatenate([table["label"].to_numpy() for table in tables]) for name, tables in indices.items()}
    classes = lines or tuple(given or ()) or numbered(labels["train"], num_classes, f"{root} (train)")
    return tuple(
        Listing(
            f"{root} ({name}, {len(splits[name])} tar files)", classes, labels[name], _members(splits[name], indices[name])
        )
        for name in ("train", test)
    )  # fmt: skip


def _find(root: Path | Remote) -> tuple[dict[str, Shard], tuple[str, ...]]:
    """Return the tar files by relative name, in order, and the lines of classes.txt, if it is there."""
    shards, lines = {}, b""
    if isinstance(root, Path):
        files = {path.relative_to(root).as_posix(): path for kind in ("*.tar", "*/*.tar") for path in root.glob(kind)}
        for name, path in sorted(files.items()):
            about = path.stat()
            shards[name] = Shard(str(path), str(path), about.st_size, about.st_mtime_ns)
        with suppress(FileNotFoundError):
            lines = (root / CLASSES).read_bytes()
    else:
        files = {info.path[len(root.base) + 1 :]: info for info in root.files(root.base)}
        for name in sorted(name for name in files if name.endswith(".tar") and name.count("/") < 2):
            info = files[name]
            shards[name] = Shard(below(root.uri, name), root.where(info.path), info.size, info.mtime_ns or 0)
        if CLASSES in files:
            lines = root.read(files[CLASSES].path)
    names = tuple(line.strip() for line in lines.decode("utf-8", "replace").splitlines() if line.strip())
    if len(set(names)) < len(names):
        raise DataError(f"{root}/{CLASSES} names a class twice; write one name per line, in label order")
    return shards, names


def _split(name: str) -> str | None:
    """Return train, test or val: the folder's name, or a word of the file's own."""
    folder, _, file = name.rpartition("/")
    for words in ([folder.lower()], re.split(r"[^A-Za-z0-9]+", file.lower())):
        for split, spellings in {"train": {"train"}, "test": {"test"}, "val": {"val", "validation"}}.items():
            if spellings & set(words):
                return split
    return None


def _members(shards: Sequence[Shard], indices: Sequence[pa.Table]) -> "TarMembers":
    table = pa.concat_tables(indices)
    return TarMembers(
        tuple(shard.address for shard in shards),
        np.repeat(np.arange(len(shards), dtype=np.int32), [len(index) for index in indices]),
        table["offset"].to_numpy(),
        table["size"].to_numpy(),
        pa.concat_arrays(table["key"].chunks),
    )


# ------------------------------------------------------------------------------------------------ reading in place


@dataclass(frozen=True, eq=False)
class TarMembers:
    """Images inside tar files: which file (addresses), first byte and bytes in there, and their keys for messages."""

    files: tuple[str, ...]
    file: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    keys: pa.Array
    is_cheap: ClassVar[bool] = True

    @property
    def threads(self) -> int:
        return REMOTE_THREADS if is_uri(self.files[0]) else THREADS

    def name(self, index: int) -> str:
        address = self.files[self.file[index]]
        return f"{without_secrets(address) if is_uri(address) else address} member {self.keys[index]}"

    def load(self, index: int) -> bytes:
        address, offset, size = self.files[self.file[index]], int(self.offset[index]), int(self.size[index])
        try:
            if is_uri(address):
                return _remote_file(address).read_at(offset, size)
            with open(address, "rb") as file:
                file.seek(offset)
                return file.read(size)
        except OSError as error:
            raise BadImage(error.strerror or type(error).__name__) from None

    def stamp(self, index: int, data: bytes | None) -> bytes:
        """Identity of one image: its bytes, or its place in the tar file if it has not been read."""
        if data is not None:
            return digest(data)
        place = f"{self.files[self.file[index]].partition('?')[0].rpartition('/')[2]} {self.offset[index]} {self.size[index]}"
        return digest(place.encode("utf-8", "surrogateescape"), str(self.keys[index]).encode())

    def take(self, indices: np.ndarray) -> "TarMembers":
        return replace(
            self, file=self.file[indices], offset=self.offset[indices], size=self.size[indices],
            keys=self.keys.take(pa.array(indices)),
        )  # fmt: skip


@lru_cache(maxsize=OPEN_FILES)
def _remote_file(address: str) -> RemoteFile:
    remote = Remote(address)
    return remote.open(remote.base)


# ------------------------------------------------------------------------------------------------ the index


def _indices(shards: Sequence[Shard]) -> list[pa.Table]:
    threads = REMOTE_THREADS if is_uri(shards[0].address) else THREADS
    with ThreadPoolExecutor(threads) as pool:
        indices = list(pool.map(_index, shards))
    if not sum(map(len, indices)):
        raise DataError(f"{shards[0].where} has no images ({', '.join(EXTENSIONS)}); give files with images")
    return indices


def _index(shard: Shard) -> pa.Table:
    """Return the index of a tar file, from the local cache if it is there and the file is the same."""
    made: list[pa.Table] = []

    def make(stream: BinaryIO) -> None:
        made.append(index_tar(shard))
        with pa.ipc.new_file(stream, INDEX) as writer:
            writer.write_table(made[0])

    try:
        path = kept(shard.index_name(), make)
        return made[0] if made else pa.ipc.open_file(pa.OSFile(str(path))).read_all()
    except (OSError, pa.ArrowInvalid):  # a cache that cannot be used: the index is only not kept
        return made[0] if made else index_tar(shard)


def index_tar(shard: Shard) -> pa.Table:
    """Return key, first byte, bytes and label of every image of a tar file; image data is skipped.

    Raises DataError when the file is damaged, or an image has no label, or several.
    """
    samples: dict[str, dict] = {}
    try:
        with _opened(shard.address) as stream, tarfile.open(fileobj=stream, mode="r:") as tar:
            for member in tar:
                _note(member, stream, samples, shard.where)
            stream.seek(tar.offset)
            if stream.read(tarfile.BLOCKSIZE).strip(b"\0") or tar.offset >= shard.size:
                raise tarfile.ReadError(f"it ends or is damaged at byte {tar.offset}")
    except (tarfile.TarError, EOFError, ValueError, OverflowError) as error:
        raise DataError(
            f"{shard.where} is no readable tar file: {one_line(error)}; replace it (compressed ones cannot be read in place)"
        ) from None
    return pa.table([_column(samples, shard.where, name) for name in INDEX.names], schema=INDEX)


def _opened(address: str) -> BinaryIO:
    if not is_uri(address):
        return open(address, "rb")
    remote = Remote(address)
    return io.BufferedReader(remote.open(remote.base), BLOCK_BYTES)


def _note(member: tarfile.TarInfo, stream: BinaryIO, samples: dict[str, dict], where: str) -> None:
    """Add what a member says about its sample; folders, hidden files and other kinds of members say nothing."""
    folder, slash, file = member.name.removeprefix("./").rpartition("/")
    stem, _, extension = file.partition(".")
    if not member.isreg() or not stem:
        return
    extension = f".{extension.lower()}"
    key = f"{folder}{slash}{stem}".encode("utf-8", "surrogateescape").decode("utf-8", "replace")
    if extension in EXTENSIONS:
        sample = samples.setdefault(key, {})
        if "offset" in sample:
            raise DataError(f"{where} has two images {key}; give every image a key of its own")
        if member.issparse():
            raise DataError(f"{where} stores {key} sparsely; write the tar file without --sparse")
        sample |= {"offset": member.offset_data, "size": member.size}
    elif extension in (".cls", ".json"):
        stream.seek(member.offset_data)
        content = stream.read(member.size)
        if len(content) < member.size:
            raise tarfile.ReadError(f"it ends inside {member.name}")
        label = _label(content, extension, f"{where}: {key}{extension}")
        if label is None:
            return
        there = samples.setdefault(key, {}).setdefault("label", label)
        if there != label:
            raise DataError(f"{where} has two labels for {key}, {there} and {label}; keep the right one")


def _label(content: bytes, extension: str, where: str) -> int | None:
    """Return the label in a .cls or .json member, None where JSON has none."""
    try:
        value = json.loads(content) if extension == ".json" else int(content)
    except (ValueError, RecursionError):
        value = content[:20].decode("utf-8", "replace")
    if isinstance(value, dict):
        if "label" not in value:
            return None
        value = value["label"]
    if type(value) is not int or not -(2**63) <= value < 2**63:  # True is an int, too
        raise DataError(f"{where} says {repr(value)[:40]}, but a label must be an integer (from 0 on); correct it")
    return value


def _column(samples: dict[str, dict], where: str, name: str) -> pa.Array:
    if name == "key":
        return pa.array(list(samples), pa.string())
    lacking = next((key for key, sample in samples.items() if name not in sample), None)
    if lacking is not None:
        lacks = (
            f"no label ({lacking}.cls, or {lacking}.json with `label`)"
            if name == "label"
            else "no image beside its label"
        )
        raise DataError(f"{where}: {lacking} has {lacks}; complete it or leave it out")
    return pa.array([sample[name] for sample in samples.values()], pa.int64())
