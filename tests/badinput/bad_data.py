"""Images, Parquet and tar files that cannot be trained on."""

import gzip
import io
import json
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from badinput import Bad
from PIL import Image

SIDE = 16
IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def settings(folder: Path, source: str, **data) -> None:
    """Write my.yaml: a small run of the data in the case's folder `data`."""
    run = {
        "ipc": [1],
        "data": {"source": source, "path": "data", "image_size": SIDE} | data,
        "committee": {"experts": ["resnet18", "shufflenet_v2"], "width": 0.125},
        "runtime": {"engine": "local"},
    }
    (folder / "my.yaml").write_text(yaml.safe_dump(run))


def picture(seed: int = 0, side: int = SIDE, kind: str = "PNG", **options) -> bytes:
    """Return an image file of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


# ------------------------------------------------------------------------------------------------ class folders


def image_folders(folder: Path) -> Path:
    """Write class folders with three good images each; return their directory."""
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            place = folder / "data" / split / label
            place.mkdir(parents=True)
            for k in range(3):
                (place / f"{k}.png").write_bytes(picture(k))
    settings(folder, "folder")
    return folder / "data"


def _image(name: str, content: bytes | Callable[[], bytes], says: str, file: str = "1.png", theirs: str = "") -> Bad:
    def prepare(folder: Path) -> None:
        (image_folders(folder) / "train/cat" / file).write_bytes(content if isinstance(content, bytes) else content())

    return Bad("image", name, "run my.yaml --out {out}", says, prepare, theirs)


def _folders(
    name: str, says: str, change: Callable[[Path], object] = lambda data: None, theirs: str = "", **data
) -> Bad:
    def prepare(folder: Path) -> None:
        change(image_folders(folder))
        settings(folder, **{"source": "folder", **data})

    return Bad("image folder", name, "run my.yaml --out {out}", says, prepare, theirs)


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _png(width: int, height: int, *chunks: bytes) -> bytes:
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + _chunk(b"IEND", b"")


def _flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]


def _of_mode(array: np.ndarray, mode: str, kind: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array.astype({"F": np.float32, "I": np.int32}[mode])).save(buffer, kind)
    return buffer.getvalue()


IMAGES = [
    _image("zero bytes", b"", "it is empty (0 bytes)"),
    _image("text", b"a cat\n", "not an image of a known format"),
    _image("text named .jpg", b"a cat\n", "not an image of a known format", "1.jpg"),
    _image("a web page named .jpg", b"<!DOCTYPE html><html><body>404</body></html>", "not an image", "1.jpg"),
    _image("a drawing (SVG)", b'<svg xmlns="http://www.w3.org/2000/svg"/>', "not an image of a known format"),
    _image("a program (PostScript)", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n", "not an image"),
    _image("a truncated PNG", lambda: picture()[:400], "cannot be read", theirs=r"(?<=cannot be read: )[^;]+"),
    _image("a truncated JPEG", lambda: picture(kind="JPEG")[:500], "cannot be read", theirs=r"(?<=cannot be read: )[^;]+"),
    _image("only the start of a PNG", b"\x89PNG\r\n\x1a\n", "cannot be read", theirs=r"(?<=cannot be read: )[^;]+"),
    _image("a PNG with a flipped byte", lambda: _flipped(picture(), 60), "cannot be read", theirs=r"(?<=read: )[^;]+"),
    _image("a PNG of 4,000 megapixels", _png(65000, 65000, _chunk(b"IDAT", zlib.compress(b"\0" * 99))), "more than the limit"),
    _image("a PNG of 100 megapixels", _png(10000, 10000, _chunk(b"IDAT", zlib.compress(b"\0" * 99))), "more than the limit"),
    _image("a PNG of no size", _png(0, 16), "cannot be read", theirs=r"(?<=cannot be read: )[^;]+"),
    _image("a PNG with a text of 200 MB", lambda: _png(16, 16, _chunk(b"zTXt", b"a\0\0" + zlib.compress(b"\0" * 200_000_000))),
           "cannot be read", theirs=r"(?<=cannot be read: )[^;]+"),
    _image("another size", lambda: picture(side=20), "is 20x20 pixels"),
    _image("one pixel", lambda: picture(side=1), "is 1x1 pixels"),
    _image("floating-point values", lambda: _of_mode(np.ones((SIDE, SIDE)), "F", "TIFF"), "floating-point"),
    _image("32-bit values", lambda: _of_mode(np.full((SIDE, SIDE), 70_000), "I", "TIFF"), "beyond 65535"),
    _folders("a folder named as an image", "cannot be read", lambda data: (data / "train/cat/9.png").mkdir()),
    _folders("a link to nowhere", "cannot be read", lambda data: (data / "train/cat/9.png").symlink_to("nowhere")),
    _folders("no test images", "no folder test/val", lambda data: shutil.rmtree(data / "test")),
    _folders("an empty class", "has no images", lambda data: (data / "train/eel").mkdir()),
    _folders("a class that test lacks", "different classes", lambda data: shutil.rmtree(data / "test/dog")),
    _folders("a class with one image", "at least 2 train", lambda data: [(data / f"train/cat/{k}.png").unlink() for k in (1, 2)]),
    _folders("one class alone", "num_classes is 1", lambda data: [shutil.rmtree(data / s / "dog") for s in ("train", "test")]),
    _folders("images without classes", "no class folders", lambda data: [
        shutil.rmtree(data / "train" / c) for c in ("cat", "dog")] + [(data / "train/1.png").write_bytes(picture())]),
    _folders("a file", "no folder train", path="my.yaml"),
    _folders("a place that is not there", "does not exist", path="nope"),
    _folders("no image size", "set data.image_size", image_size=None),
    _folders("another data set's classes", "has 10", dataset="cifar10", image_size=32),
    _folders("nothing left for the hold-out", "at least 2", max_per_class=1),
    _folders("all images bad", "at least 2", lambda data: [file.write_bytes(b"x") for file in data.rglob("*.png")],
             on_bad_image="skip"),
    _folders("all test images bad", "no readable image", lambda data: [
        file.write_bytes(b"x") for file in (data / "test").rglob("*.png")], on_bad_image="skip"),
    _folders("torchvision's CIFAR-10 elsewhere", "torchvision's layout", source="cifar10", image_size=32,
             theirs=r"(?<=batches-py\): )[^;]+"),
    _folders("an unknown option of S3", "unknown option", path="s3://bucket/x?speed=9"),
    _folders("a secret in a broken address", "a port", path="s3://AKIAKEY:se/cret@bucket:90/x"),
    _folders("CIFAR from a bucket", "needs a local directory", source="cifar10", path="s3://bucket/x", image_size=32),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------------ Parquet


def good_table(rows: int = 6, *, names: list | None = None) -> pa.Table:
    """Return a Hub-style table of two classes."""
    images = pa.array([{"bytes": picture(k), "path": f"{k}.png"} for k in range(rows)], IMAGE)
    table = pa.table({"image": images, "label": pa.array([k % 2 for k in range(rows)], pa.int64())})
    if names is None:
        return table
    features = {"label": {"names": names, "_type": "ClassLabel"}}
    return table.replace_schema_metadata({b"huggingface": json.dumps({"info": {"features": features}})})


def parquet_files(folder: Path, train: pa.Table, test: pa.Table | None = None, **data) -> None:
    (folder / "data").mkdir()
    pq.write_table(train, folder / "data/train-00000-of-00001.parquet")
    if test is not None:
        pq.write_table(test, folder / "data/test-00000-of-00001.parquet")
    settings(folder, "parquet", **data)


def _parquet(name: str, says: str, change: Callable[[pa.Table], pa.Table], theirs: str = "", **data) -> Bad:
    def prepare(folder: Path) -> None:
        parquet_files(folder, change(good_table()), good_table(), **data)

    return Bad("Parquet", name, "run my.yaml --out {out}", says, prepare, theirs)


def _bytes_of_train(name: str, change: Callable[[bytes], bytes], says: str, theirs: str = "") -> Bad:
    def prepare(folder: Path) -> None:
        parquet_files(folder, good_table(), good_table())
        path = folder / "data/train-00000-of-00001.parquet"
        path.write_bytes(change(path.read_bytes()))

    return Bad("Parquet", name, "run my.yaml --out {out}", says, prepare, theirs or r"(?<=Parquet file: )[^;]+")


def _labels(*labels, kind: pa.DataType | None = None) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(1, "label", pa.array(labels, kind or pa.int64()))


def _images(values: list, kind: pa.DataType) -> Callable[[pa.Table], pa.Table]:
    return lambda table: table.set_column(0, "image", pa.array(values, kind))


def _with_bytes(content: bytes | None) -> Callable[[pa.Table], pa.Table]:
    return _images([{"bytes": content, "path": f"{k}.png"} for k in range(6)], IMAGE)


def _of_two(train: pa.Table, test: pa.Table, **data) -> Callable[[Path], None]:
    return lambda folder: parquet_files(folder, train, test, **data)


_PATH = pa.struct([("path", pa.string())])

PARQUET = [
    _bytes_of_train("zero bytes", lambda content: b"", "no readable Parquet file"),
    _bytes_of_train("text", lambda content: b"image,label\n1,2\n", "no readable Parquet file"),
    _bytes_of_train("truncated", lambda content: content[: len(content) // 2], "no readable Parquet file"),
    _bytes_of_train("without its start", lambda content: content[100:], "no readable Parquet file"),
    _bytes_of_train("a flipped byte in the footer", lambda content: _flipped(content, len(content) - 60), "Parquet file"),
    _parquet("no image column", "none called image or img", lambda table: table.rename_columns(["picture", "label"])),
    _parquet("no label column", "none called label", lambda table: table.rename_columns(["image", "class"])),
    _parquet("two label columns", "two columns label", lambda table: table.append_column("label", table["label"])),
    _parquet("images as plain bytes", "must be struct<bytes: binary, path>", _images([b"x"] * 6, pa.binary())),
    _parquet("images as paths", "must be struct<bytes: binary, path>", _images(["a.png"] * 6, pa.string())),
    _parquet("images as a struct of paths", "must be struct<bytes: binary, path>", _images([{"path": "a"}] * 6, _PATH)),
    _parquet("images as numbers", "bytes: binary", _images([{"bytes": 5}] * 6, pa.struct([("bytes", pa.int64())]))),
    _parquet("images as text", "bytes: binary", _images([{"bytes": "cat"}] * 6, pa.struct([("bytes", pa.string())]))),
    _parquet("null images", "null", _images([None] * 6, IMAGE)),
    _parquet("null bytes", "null", _with_bytes(None)),
    _parquet("empty images", "it is empty", _with_bytes(b"")),
    _parquet("text as images", "not an image", _with_bytes(b"a cat")),
    _parquet("labels as text", "must be an integer", _labels(*"ababab", kind=pa.string())),
    _parquet("labels as fractions", "must be an integer", _labels(0.0, 1.0, 0.0, 1.0, 0.5, 0.0, kind=pa.float64())),
    _parquet("labels as lists", "must be an integer", _labels([0], [1], [0], [1], [0], [1], kind=pa.list_(pa.int64()))),
    _parquet("labels as true and false", "must be an integer", _labels(*[True, False] * 3, kind=pa.bool_())),
    _parquet("a null label", "without a label", _labels(0, 1, None, 1, 0, 1)),
    _parquet("a negative label", "label -1", _labels(0, 1, -1, 1, 0, 1)),
    _parquet("a label too large for the data set", "label 12", _labels(0, 1, 12, 1, 0, 1), dataset="cifar10"),
    _parquet("a label too large for any", "18446744073709551615", _labels(0, 1, 2**64 - 1, 1, 0, 1, kind=pa.uint64())),
    _parquet("a label of a billion", "label 1000000000", _labels(0, 1, 10**9, 1, 0, 1)),
    _parquet("a class without images", "at least 2", _labels(0, 2, 0, 2, 0, 2)),
    _parquet("no rows", "no rows", lambda table: table.slice(0, 0)),
    Bad("Parquet", "no test file", "run my.yaml --out {out}", "test*.parquet",
        lambda folder: parquet_files(folder, good_table())),
    Bad("Parquet", "class names in another order", "run my.yaml --out {out}", "different classes",
        _of_two(good_table(names=["cat", "dog"]), good_table(names=["dog", "cat"]))),
    Bad("Parquet", "more labels than class names", "run my.yaml --out {out}", "label 1",
        _of_two(good_table(names=["cat"]), good_table(names=["cat"]))),
    Bad("Parquet", "a class name twice", "run my.yaml --out {out}", "different texts",
        _of_two(good_table(names=["cat", "cat"]), good_table(names=["cat", "cat"]))),
    Bad("Parquet", "a class name that is a number", "run my.yaml --out {out}", "different texts",
        _of_two(good_table(names=[1, 2]), good_table(names=[1, 2]))),
    Bad("Parquet", "a directory without files", "run my.yaml --out {out}", "holds nothing",
        lambda folder: ((folder / "data").mkdir(), settings(folder, "parquet"))),
    Bad("Parquet", "a file instead of a directory", "run my.yaml --out {out}", "is not a directory",
        lambda folder: settings(folder, "parquet", path="my.yaml")),
]  # fmt: skip


# ---------------------------------------------------------------------------------------------------- tar files


Member = tuple[str, bytes]


def good_members(count: int = 6) -> list[Member]:
    """Return the files of samples of two classes."""
    pairs = [((f"{k}.png", picture(k)), (f"{k}.cls", str(k % 2).encode())) for k in range(count)]
    return [member for pair in pairs for member in pair]


def tar_bytes(members: list[Member | tarfile.TarInfo]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for member in members:
            if isinstance(member, tarfile.TarInfo):
                tar.addfile(member)
                continue
            about = tarfile.TarInfo(member[0])
            about.size = len(member[1])
            tar.addfile(about, io.BytesIO(member[1]))
    return buffer.getvalue()


def _tar(name: str, says: str, train: Callable[[], bytes], theirs: str = "", classes: str = "", **data) -> Bad:
    def prepare(folder: Path) -> None:
        (folder / "data").mkdir()
        (folder / "data/train-0000.tar").write_bytes(train())
        (folder / "data/test-0000.tar").write_bytes(tar_bytes(good_members()))
        if classes:
            (folder / "data/classes.txt").write_text(classes)
        settings(folder, "webdataset", **data)

    return Bad("tar file", name, "run my.yaml --out {out}", says, prepare, theirs)


def _also(*members: Member | tarfile.TarInfo) -> Callable[[], bytes]:
    return lambda: tar_bytes([*good_members(), *members])


def _link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    about = tarfile.TarInfo(name)
    about.type, about.linkname = kind, target
    return about


def _lying() -> bytes:
    about = tarfile.TarInfo("9.png")
    about.size = 10**9
    return tar_bytes(good_members())[:-1024].rstrip(b"\0") + b"\0" * 512 + about.tobuf()


TARS = [
    _tar("zero bytes", "no readable tar file", lambda: b""),
    _tar("text", "no readable tar file", lambda: b"cat\n" * 500, theirs=r"(?<=tar file: )[^;]+"),
    _tar("truncated", "no readable tar file", lambda: tar_bytes(good_members())[:5000], theirs=r"(?<=tar file: )[^;]+"),
    _tar("compressed", "no readable tar file", lambda: gzip.compress(tar_bytes(good_members()), mtime=0),
         theirs=r"(?<=tar file: )[^;]+"),
    _tar("no members", "has no images", lambda: tar_bytes([])),
    _tar("a member longer than the file", "no readable tar file", _lying, theirs=r"(?<=tar file: )[^;]+"),
    _tar("a flipped byte in a header", "no readable tar file", lambda: _flipped(tar_bytes(good_members()), 1540),
         theirs=r"(?<=tar file: )[^;]+"),
    _tar("an image twice", "two images 3", _also(("3.jpg", picture(kind="JPEG")))),
    _tar("an image without a label", "no label", _also(("9.png", picture()))),
    _tar("a label without an image", "no image", _also(("9.cls", b"1"))),
    _tar("a link instead of an image", "no image", _also(_link("9.png", "/etc/passwd"), ("9.cls", b"1"))),
    _tar("a hard link instead of an image", "no image", _also(_link("9.png", "0.png", tarfile.LNKTYPE), ("9.cls", b"1"))),
    _tar("a device instead of an image", "no image", _also(_link("9.png", "", tarfile.CHRTYPE), ("9.cls", b"1"))),
    _tar("an image above the directory, without a label", "../../9", _also(("../../9.png", picture()))),
    _tar("two labels", "two labels for 3", _also(("3.json", b'{"label": 0}'))),
    _tar("a label as text", "must be an integer", _also(("9.png", picture()), ("9.cls", b"cat"))),
    _tar("a label as a fraction", "must be an integer", _also(("9.png", picture()), ("9.json", b'{"label": 1.5}'))),
    _tar("true as a label", "must be an integer", _also(("9.png", picture()), ("9.json", b'{"label": true}'))),
    _tar("an empty label", "must be an integer", _also(("9.png", picture()), ("9.cls", b""))),
    _tar("JSON without a label", "no label", _also(("9.png", picture()), ("9.json", b'{"class": 1}'))),
    _tar("broken JSON", "must be an integer", _also(("9.png", picture()), ("9.json", b'{"label": 1'))),
    _tar("JSON nested 100,000 deep", "must be an integer", _also(("9.png", picture()), ("9.json", b"[" * 100_000))),
    _tar("a label of 5,000 digits", "must be an integer", _also(("9.png", picture()), ("9.cls", b"9" * 5000))),
    _tar("a label beyond 64 bits", "label", _also(("9.png", picture()), ("9.cls", b"9" * 30))),
    _tar("a label of a billion", "label 1000000000", _also(("9.png", picture()), ("9.cls", b"1000000000"))),
    _tar("a negative label", "label -1", _also(("9.png", picture()), ("9.cls", b"-1"))),
    _tar("a label that no class has", "label 2", _also(("9.png", picture()), ("9.cls", b"2")), classes="cat\ndog\n"),
    _tar("a class name twice", "names a class twice", _also(), classes="cat\ncat\n"),
    _tar("a damaged image", "member 9", _also(("9.png", picture()[:300]), ("9.cls", b"1")), theirs=r"(?<=read: )[^;]+"),
    _tar("other files alone", "has no images", lambda: tar_bytes([("notes.txt", b"hello")])),
]  # fmt: skip

CASES = [*IMAGES, *PARQUET, *TARS]
