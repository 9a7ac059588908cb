"""Tar files as a source: found, indexed by their headers, read in place; the same images as a folder of them."""

import io
import json
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cvdd_ray.config import DataConfig
from cvdd_ray.data import images, webdataset
from cvdd_ray.data.sources import load_real
from cvdd_ray.data.webdataset import Shard, index_tar
from cvdd_ray.errors import DataError

CLASSES = ("cat", "dog", "eel")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("CVDD_RAY_CACHE", str(tmp_path / "local-cache"))
    return tmp_path / "local-cache"


def png(*key, size=8) -> bytes:
    pixels = np.random.default_rng(key).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members, **options):
    """Members are (name, bytes)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as tar:
        for name, content in members:
            about = tarfile.TarInfo(name)
            about.size = len(content)
            tar.addfile(about, io.BytesIO(content))


def write_both(root, per_class=6, size=8, shards=2):
    """The same images as class folders and as tar files, whose samples are in the folders' order."""
    for s, split in enumerate(("train", "test")):
        samples = []
        for label, name in enumerate(CLASSES):
            for i in range(per_class):
                data = png(s, label, i, size=size)
                file = root / "folder" / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(data)
                samples.append((f"{name}-{i}", data, label))
        for k in range(shards):
            part = samples[k * len(samples) // shards : (k + 1) * len(samples) // shards]
            members = [
                m for key, data, label in part for m in ((f"{key}.cls", str(label).encode()), (f"{key}.png", data))
            ]
            write_tar(root / "tars" / f"{split}-{k:05d}.tar", members)
    (root / "tars" / "classes.txt").write_text("\n".join(CLASSES) + "\n")
    return root / "folder", root / "tars"


def config(root, source="webdataset", **options):
    return DataConfig(**{"source": source, "path": str(root), "image_size": 8, **options})


def failure(data):
    with pytest.raises(DataError) as caught:
        load_real(data, 0)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal_pixels(a, b, size):
    parts = [(a.train, b.train), (a.holdout, b.holdout), (a.test, b.test)]
    return all((x.stack(size) == y.stack(size)).all() and (x.labels == y.labels).all() for x, y in parts)


@pytest.mark.parametrize("size", [8, 96])
def test_tar_files_give_what_a_folder_of_the_same_images_gives(tmp_path, size):
    folder, tars = write_both(tmp_path, size=size)
    a = load_real(config(folder, "folder", image_size=size), 3)
    b = load_real(config(tars, image_size=size), 3)
    assert b.train.classes == a.train.classes == CLASSES
    assert equal_pixels(a, b, size)
    assert b.train.name(0).startswith(f"{tars}/train-00000.tar member cat-")


def test_a_set_pickles_as_places_and_reads_in_another_process(tmp_path):
    _, tars = write_both(tmp_path, size=96, per_class=40)
    real = load_real(config(tars, image_size=96), 0)
    blob = pickle.dumps(real.train)
    assert len(blob) < 6000 + 200 * len(real.train)
    copy = pickle.loads(blob)
    assert copy.fingerprint == real.train.fingerprint
    assert (copy.subset([5, 2]).stack(96) == real.train.stack(96)[[5, 2]]).all()


def test_fingerprints_see_content_and_where_nothing_is_read_places(tmp_path, monkeypatch):
    _, a = write_both(tmp_path / "a", size=80)
    _, b = write_both(tmp_path / "b", size=80, shards=3)
    options = {"image_size": 80}
    assert load_real(config(a, **options), 0).test.fingerprint == load_real(config(b, **options), 0).test.fingerprint
    monkeypatch.setattr(images, "VERIFY_LIMIT", 3)
    unread = load_real(config(a, **options), 0)
    assert unread.test.fingerprint != load_real(config(b, **options), 0).test.fingerprint
    (tmp_path / "elsewhere").mkdir()
    a.rename(tmp_path / "elsewhere" / "tars")
    assert load_real(config(tmp_path / "elsewhere" / "tars", **options), 0).test.fingerprint == unread.test.fingerprint


@pytest.mark.parametrize(
    ("train", "test"),
    [
        ("train-0000.tar", "test-0000.tar"), ("train-0000.tar", "val-0000.tar"), ("train/0000.tar", "val/0000.tar"),
        ("imagenet1k-train-0000.tar", "imagenet1k-validation-00.tar"), ("train/a_test.tar", "test/a_train.tar"),
    ],
)  # fmt: skip
def test_splits_are_told_by_folder_or_by_a_word_of_the_name(tmp_path, train, test):
    for name, count in ((train, 4), (test, 2), ("training.tar", 1), (".hidden/train-1.txt", 1)):
        write_tar(tmp_path / name, [m for i in range(count) for m in ((f"{i}.png", png(i)), (f"{i}.cls", b"0"))])
    real = load_real(config(tmp_path), 0)
    assert (len(real.train) + len(real.holdout), len(real.test)) == (4, 2)


def test_labels_come_from_cls_or_json_and_names_from_the_list_the_setting_or_numbers(tmp_path):
    samples = [
        ("a/0.JPEG", png(0)), ("a/0.cls", b" 1\n"), ("b/0.json", json.dumps({"label": 0, "file": "x"}).encode()),
        ("b/0.webp", png(1)), ("./c.png", png(2)), ("./c.cls", b"1"), ("./c.json", b'{"label": 1}'), ("d.json", b'{"width": 3}'),
        ("d.png", png(3)), ("d.cls", b"0"), ("._d.png", b"x"), ("notes.txt", b"x"), ("e.png", png(4)), ("e.cls", b"0"),
    ]  # fmt: skip
    for split in ("train", "test"):
        write_tar(tmp_path / f"{split}-0.tar", samples)
    real = load_real(config(tmp_path), 0)
    assert real.test.labels.tolist() == [1, 0, 1, 0, 0]
    assert [real.test.name(i).split()[-1] for i in range(5)] == ["a/0", "b/0", "c", "d", "e"]
    assert (real.test.read(3) == np.asarray(Image.open(io.BytesIO(png(3))))).all()
    assert real.train.classes == ("0", "1")
    assert load_real(config(tmp_path, classes=("x", "y")), 0).train.classes == ("x", "y")
    (tmp_path / "classes.txt").write_text("second\n\nfirst\n")
    assert load_real(config(tmp_path), 0).train.classes == ("second", "first")
    assert "data.classes is [x, y]" in failure(config(tmp_path, classes=("x", "y")))
    (tmp_path / "classes.txt").write_text("one\n")
    assert "train-0.tar member a/0 has label 1, but 1 classes allow 0..0" in failure(config(tmp_path))
    (tmp_path / "classes.txt").write_text("one\none\n")
    assert "classes.txt names a class twice" in failure(config(tmp_path))


@pytest.mark.parametrize("format_", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_every_format_of_tar_with_long_names(tmp_path, format_):
    folder = "f" * 90 if format_ == tarfile.USTAR_FORMAT else "f" * 300
    path = tmp_path / "train-0.tar"
    write_tar(path, [(f"{folder}/{i}.png", png(i)) if k else (f"{folder}/{i}.cls", b"0") for i in range(5) for k in (0, 1)],
              format=format_)  # fmt: skip
    table = index(path)
    assert table["key"].to_pylist() == [f"{folder}/{i}" for i in range(5)]
    content = path.read_bytes()
    places = zip(table["offset"].to_pylist(), table["size"].to_pylist(), strict=True)
    assert [content[offset : offset + size] for offset, size in places] == [png(i) for i in range(5)]


def index(path):
    about = os.stat(path)
    return index_tar(Shard(str(path), str(path), about.st_size, about.st_mtime_ns))


SAMPLE = [("a.png", b"1"), ("a.cls", b"0")]
WRONG = {
    "no label": ([("b.png", b"2"), *SAMPLE], "b has no label (b.cls, or b.json with `label`)"),
    "json without label": ([("b.png", b"2"), ("b.json", b'{"x": 1}')], "b has no label"),
    "no image": ([*SAMPLE, ("b.cls", b"1")], "b has no image beside its label"),
    "two labels": ([*SAMPLE, ("a.json", b'{"label": 3}')], "two labels for a, 0 and 3"),
    "two labels of a kind": ([*SAMPLE, ("a.cls", b"1")], "two labels for a, 0 and 1"),
    "two images": ([*SAMPLE, ("a.jpg", b"1")], "two images a"),
    "text": ([("a.png", b"1"), ("a.cls", b"cat")], "a.cls says 'cat', but a label must be an integer"),
    "float": ([("a.png", b"1"), ("a.json", b'{"label": 1.5}')], "a.json says 1.5, but a label"),
    "true": ([("a.png", b"1"), ("a.json", b'{"label": true}')], "a.json says True, but a label"),
    "broken json": ([("a.png", b"1"), ("a.json", b"{")], "a.json says '{', but a label"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_labels_are_one_line(tmp_path, case):
    members, message = WRONG[case]
    write_tar(tmp_path / "train-0.tar", members)
    write_tar(tmp_path / "test-0.tar", SAMPLE)
    found = failure(config(tmp_path))
    assert message in found
    assert str(tmp_path / "train-0.tar") in found


def test_tar_files_cut_anywhere_are_damaged(tmp_path):
    """Also where the cut falls between two members, which Python's reader takes for the end."""
    whole, path = tmp_path / "whole.tar", tmp_path / "train-0.tar"
    write_tar(whole, [(f"{i}.{kind}", data) for i in range(3) for kind, data in (("png", png(i)), ("cls", b"0"))])
    content = whole.read_bytes()
    ends = [cut for cut in range(0, len(content), 256) if content[cut:].strip(b"\0")]
    assert len(ends) > 10
    for cut in [*ends, *(end + 1 for end in ends[:5])]:
        path.write_bytes(content[:cut])
        with pytest.raises(DataError, match="is no readable tar file"):
            index(path)
    for damaged in (content[:1024] + b"\xff" * 512 + content[1536:], b"\x1f\x8b" + content, b"", b"text" * 500):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="is no readable tar file"):
            index(path)


def test_what_is_missing_is_said(tmp_path):
    assert "holds no .tar files; data.path must hold train-*.tar" in failure(config(tmp_path))
    write_tar(tmp_path / "train-0.tar", SAMPLE)
    assert "holds [train-0.tar]" in failure(config(tmp_path))
    write_tar(tmp_path / "test-0.tar", [("a.txt", b"x")])
    assert "test-0.tar has no images" in failure(config(tmp_path))


def test_damaged_images_follow_the_policy(tmp_path):
    members = [(f"{i}.{kind}", data) for i in range(6) for kind, data in (("png", png(i)), ("cls", b"0"))]
    members[4] = ("2.png", b"text")
    for split in ("train", "test"):
        write_tar(tmp_path / f"{split}-0.tar", members)
    assert f"{tmp_path}/train-0.tar member 2 cannot be read: it is not an image" in failure(config(tmp_path))
    real = load_real(config(tmp_path, on_bad_image="skip"), 0)
    assert real.test.bad == (f"{tmp_path}/test-0.tar member 2",)
    assert (real.test.stack(8)[2] == np.asarray(Image.open(io.BytesIO(png(3)))).transpose(2, 0, 1)).all()


def test_an_index_is_made_once_per_version_of_a_file(tmp_path, monkeypatch, cache):
    _, tars = write_both(tmp_path)
    made, real = [], webdataset.index_tar
    monkeypatch.setattr(webdataset, "index_tar", lambda shard: made.append(Path(shard.address).name) or real(shard))
    first = load_real(config(tars), 0)
    assert sorted(made) == ["test-00000.tar", "test-00001.tar", "train-00000.tar", "train-00001.tar"]
    again = load_real(config(tars), 0)
    assert len(made) == 4
    assert again.train.fingerprint == first.train.fingerprint
    write_tar(tars / "train-00001.tar", [("x.png", png(9)), ("x.cls", b"2"), ("y.png", png(10)), ("y.cls", b"2")])
    assert len(load_real(config(tars), 0).train) < len(first.train)
    assert made[4:] == ["train-00001.tar"]
    for kept in cache.rglob("*.arrow"):
        kept.write_bytes(b"damaged")
    assert load_real(config(tars), 0).test.fingerprint == first.test.fingerprint
    assert len(made) == 9


def test_without_a_cache_it_works_all_the_same(tmp_path, monkeypatch):
    _, tars = write_both(tmp_path)
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("CVDD_RAY_CACHE", str(tmp_path / "file"))
    assert load_real(config(tars), 0).train.classes == CLASSES


def test_indexing_reads_headers_and_skips_images(tmp_path, monkeypatch):
    """Of 20 MB in members of 1 MB, less than 1 MB is read."""
    path = tmp_path / "train-0.tar"
    write_tar(
        path, [(f"{i}.{kind}", data) for i in range(20) for kind, data in (("png", bytes(1 << 20)), ("cls", b"0"))]
    )
    read = []

    class Counting(io.FileIO):
        def readinto(self, buffer):
            read.append(super().readinto(buffer))
            return read[-1]

    monkeypatch.setattr(webdataset, "open", lambda name, mode: io.BufferedReader(Counting(name, "r")), raising=False)
    assert len(index(path)) == 20
    assert sum(read) < 1 << 20


# ------------------------------------------------------------------------------------------------ object stores


def test_tar_files_in_an_object_store_are_those_of_the_disk(s3, tmp_path, monkeypatch):
    _, tars = write_both(tmp_path, size=96)
    s3.upload(tars, "data")
    cut = s3.fail("cut", "GET /.*train-00000.tar", times=3, skip=1)
    busy = s3.fail("status", "GET /.*list-type=2", times=2)
    local = load_real(config(tars, image_size=96), 0)
    remote = load_real(config(s3.uri("data"), image_size=96), 0)
    assert (cut.used, busy.used) == (3, 2)
    assert equal_pixels(local, remote, 96)
    assert remote.train.fingerprint == local.train.fingerprint
    assert remote.train.name(0).startswith(f"s3://{s3.bucket}/data/train-0000")
    s3.requests.clear()
    copy = pickle.loads(pickle.dumps(remote.train))
    webdataset._remote_file.cache_clear()
    assert (copy.read(0) == local.train.read(0)).all()
    assert (copy.read(1) == local.train.read(1)).all()
    assert len(s3.seen("HEAD")) == 1  # one range request per image
    assert len(s3.seen("GET")) == 2
    monkeypatch.setattr(images, "VERIFY_LIMIT", 3)
    s3.requests.clear()
    unread = load_real(config(s3.uri("data"), image_size=96), 0)
    assert [request.split("?")[0] for request in s3.requests] == [f"GET /{s3.bucket}", f"HEAD /{s3.bucket}/data/classes.txt",
                                                                  f"GET /{s3.bucket}/data/classes.txt"]  # fmt: skip
    assert unread.train.fingerprint == load_real(config(tars, image_size=96), 0).train.fingerprint


def test_large_images_in_an_object_store_are_skipped_while_indexing(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(webdataset, "BLOCK_BYTES", 4096)
    path = tmp_path / "train-0.tar"
    write_tar(
        path, [(f"{i}.{kind}", data) for i in range(5) for kind, data in (("png", bytes(1 << 18)), ("cls", b"0"))]
    )
    s3.put("x/train-0.tar", path.read_bytes())
    remote = index_tar(Shard(s3.uri("x/train-0.tar"), "x", path.stat().st_size, 0))
    assert remote.equals(index(path))
    assert s3.sent < 1 << 17


def test_a_tar_file_that_is_gone_or_out_of_reach(s3, tmp_path, monkeypatch):
    from cvdd_ray.errors import ArtifactError

    _, tars = write_both(tmp_path, size=96)
    s3.upload(tars, "data")
    real = load_real(config(s3.uri("data"), image_size=96, on_bad_image="skip"), 0)
    monkeypatch.setenv("CVDD_RAY_S3_RETRY_S", "0.2")
    s3.fail("status", "GET /.*tar", times=10**6)
    with pytest.raises(ArtifactError, match=r"cannot be read: .* the same command again"):  # an outage is no bad image
        load_real(config(s3.uri("data"), image_size=96, on_bad_image="skip"), 0)
    with pytest.raises(ArtifactError, match="run the same command again"):
        real.train.read(0)
    s3.faults.clear()
    monkeypatch.setenv("CVDD_RAY_S3_RETRY_S", "60")  # a server that takes its time is no outage
    for key in s3.object_keys():
        s3.direct.delete_object(Bucket=s3.bucket, Key=key)
    with pytest.raises(DataError, match=r"member .* cannot be read"):
        real.train.read(0)
