"""Class folders below train/ and test/ or val/, on the local disk or in an object store. Shapes: N images."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from cvdd_ray.data.images import REMOTE_THREADS, BadImage, Files, Source, name_stamp
from cvdd_ray.data.listing import Listing
from cvdd_ray.data.remote import Remote, below
from cvdd_ray.errors import DataError

EXTENSIONS = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def list_folders(tree: "Tree", test_names: tuple[str, ...]) -> tuple[Listing, Listing]:
    """Class folders of train and of the first of `test_names` that exists. Label: the folder's lexicographic rank."""
    test_name = next((name for name in test_names if tree.has(name)), None)
    missing = [name for name, there in (("train", tree.has("train")), ("/".join(test_names), test_name)) if not there]
    if missing:
        raise DataError(
            f"{tree.root} has no folder {' and no folder '.join(missing)}; data.path must hold train/CLASS/* and "
            f"{' or '.join(f'{name}/CLASS/*' for name in test_names)} images"
        )
    return _list_folder(tree, "train"), _list_folder(tree, test_name)


def _list_folder(tree: "Tree", split: str) -> Listing:
    """Images directly in the class folders, sorted; hidden files, subfolders and other extensions are no images."""
    where, folders = f"{tree.root}/{split}", tree.folders(split)
    classes = sorted(name for name in folders if name[0] != ".")
    if not classes:
        raise DataError(f"{where} has no class folders; put the images into {where}/CLASS/")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = sorted(file for file in folders[name] if file[0] != "." and file.lower().endswith(EXTENSIONS))
        if not files:
            raise DataError(
                f"class folder {where}/{name} has no images ({', '.join(EXTENSIONS)}, directly in it); add "
                "images or remove the folder from every split"
            )
        names += [f"{split}/{name}/{file}" for file in files]
        labels += [label] * len(files)
    return Listing(where, tuple(classes), np.array(labels, np.int64), tree.source(names))


class Tree(Protocol):
    """A folder with folders in it; names of files are relative, with forward slashes."""

    root: Path | Remote

    def below(self, name: str) -> "Tree": ...
    def has(self, folder: str) -> bool: ...
    def folders(self, name: str) -> dict[str, list[str]]:
        """Return the files directly in every folder directly in `name`."""
        ...

    def source(self, names: Sequence[str]) -> Source: ...


@dataclass(frozen=True)
class LocalTree:
    root: Path

    def below(self, name: str) -> "LocalTree":
        return LocalTree(self.root / name)

    def has(self, folder: str) -> bool:
        return (self.root / folder).is_dir()

    def folders(self, name: str) -> dict[str, list[str]]:
        inside = [entry.name for entry in os.scandir(self.root / name) if entry.is_dir()]
        return {folder: [entry.name for entry in os.scandir(self.root / name / folder)] for folder in inside}

    def source(self, names: Sequence[str]) -> Files:
        return Files(str(self.root), tuple(names))


class RemoteTree:
    """A tree in an object store, from one recursive listing; a folder is there when a file is in it."""

    def __init__(self, root: Remote, sizes: dict[str, int] | None = None):
        self.root = root
        if sizes is None:
            prefix = len(root.base) + 1
            sizes = {info.path[prefix:]: info.size for info in root.files(root.base)}
            if not sizes:
                raise DataError(f"data.path {root} holds nothing; give the path where the images lie")
        self._sizes = sizes

    def below(self, name: str) -> "RemoteTree":
        if not name:
            return self
        prefix = f"{name}/"
        inside = {file[len(prefix) :]: size for file, size in self._sizes.items() if file.startswith(prefix)}
        return RemoteTree(Remote(below(self.root.uri, name)), inside)

    def has(self, folder: str) -> bool:
        return any(name.startswith(f"{folder}/") for name in self._sizes)

    def folders(self, name: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for file in self._sizes:
            split, _, rest = file.partition("/")
            folder, _, inside = rest.partition("/")
            if split == name and inside:
                files = found.setdefault(folder, [])
                if "/" not in inside:
                    files.append(inside)
        return found

    def source(self, names: Sequence[str]) -> "RemoteFiles":
        return RemoteFiles(self.root, tuple(names), np.array([self._sizes[name] for name in names], np.int64))


def open_tree(root: Path | Remote) -> Tree:
    return LocalTree(root) if isinstance(root, Path) else RemoteTree(root)


@dataclass(frozen=True, eq=False)
class RemoteFiles:
    """Image files in an object store below `root`, with their sizes in bytes; each is read when it is asked for."""

    root: Remote
    names: tuple[str, ...]
    sizes: np.ndarray
    threads: ClassVar[int] = REMOTE_THREADS
    is_cheap: ClassVar[bool] = True

    def _path(self, index: int) -> str:
        return f"{self.root.base}/{self.names[index]}"

    def name(self, index: int) -> str:
        return self.root.where(self._path(index))

    def load(self, index: int) -> bytes:
        try:
            return self.root.read(self._path(index))
        except FileNotFoundError:
            raise BadImage("it is not there any more") from None

    def stamp(self, index: int, data: bytes | None) -> bytes:
        """The same identity as that of a local file of this relative name."""
        return name_stamp(self.names[index], int(self.sizes[index]) if data is None else len(data), data)

    def take(self, indices: np.ndarray) -> "RemoteFiles":
        return replace(self, names=tuple(self.names[i] for i in indices), sizes=self.sizes[indices])
