"""Class folders and Parquet in an object store are what they are on the disk: classes, pixels, names, fingerprints."""

import io
import json
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from cvdd_ray.config import DataConfig
from cvdd_ray.data import images, parquet
from cvdd_ray.data.sources import load_real
from cvdd_ray.errors import ArtifactError, ConfigError, DataError


def png(*key, size=8) -> bytes:
    pixels = np.random.default_rng(key).integers(0, 256, (size, size, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_folder(root, classes=("cat", "Dog", "a b#?%ü"), per_class=5, size=8, splits=("train", "test")):
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                (root / split / name / f"{i} x+y.png").write_bytes(png(s, c, i, size=size))
    for name in (
        "train/cat/._0.png",
        "train/cat/notes.txt",
        "train/cat/deeper/1.png",
        "train/.cache/1.png",
        "train/list.txt",
    ):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"x")
    return root


def make_parquet(root, train=(0, 1) * 6, test=(0, 1, 1), size=8):
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    features = {"image": {"_type": "Image"}, "label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    for s, (file, labels) in enumerate(
        {"train-0.parquet": train[:7], "train-1.parquet": train[7:], "test-0.parquet": test}.items()
    ):
        rows = [{"bytes": png(s, i, size=size), "path": f"{i}.png"} for i in range(len(labels))]
        table = pa.table({"image": pa.array(rows, kind), "label": pa.array(labels, pa.int64())})
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
        root.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, root / file, row_group_size=3)
    return root


def config(root, source="folder", **options):
    return DataConfig(**{"source": source, "path": str(root), "image_size": 8, **options})


def failure(data, kind=DataError):
    with pytest.raises(kind) as caught:
        load_real(data, 0)
    assert "\n" not in str(caught.value)
    assert "hush" not in str(caught.value)
    return str(caught.value)


def parts(a, b):
    return [(a.train, b.train), (a.holdout, b.holdout), (a.test, b.test)]


@pytest.mark.parametrize("size", [8, 80])  # decoded into memory, and checked only
def test_a_folder_in_an_object_store_is_the_folder_on_the_disk(s3, tmp_path, size):
    folder = make_folder(tmp_path / "f", size=size)
    s3.upload(folder, "some/data")
    local = load_real(config(folder, image_size=size), 1)
    cut = s3.fail("cut", r"GET /.*\.png", times=3, skip=2)
    lost = s3.fail("reset", r"HEAD /.*\.png", times=3, skip=5)
    remote = load_real(config(s3.uri("some/data"), image_size=size), 1)
    assert (cut.used, lost.used) == (3, 3)
    assert len(s3.seen("list-type=2")) == 1  # one listing, whatever the number of classes
    assert remote.train.classes == local.train.classes == ("Dog", "a b#?%ü", "cat")
    for there, here in parts(remote, local):
        assert there.fingerprint == here.fingerprint
        assert (there.labels == here.labels).all()
        assert (there.stack(size) == here.stack(size)).all()
        assert there.name(0) == here.name(0).replace(str(folder), f"s3://{s3.bucket}/some/data")
    copy = pickle.loads(pickle.dumps(remote.train))
    assert len(pickle.dumps(remote.train)) < 5000 + 200 * len(remote.train)
    assert (copy.read(3) == local.train.read(3)).all()


def test_a_large_set_in_an_object_store_is_only_listed(s3, tmp_path, monkeypatch):
    monkeypatch.setattr(images, "VERIFY_LIMIT", 3)
    folder = make_folder(tmp_path / "f", size=80, splits=("train", "val"))
    s3.upload(folder, "data")
    remote = load_real(config(s3.uri("data"), image_size=80), 0)
    assert [request.split("?")[0] for request in s3.requests] == [f"GET /{s3.bucket}"]
    assert remote.train.fingerprint == load_real(config(folder, image_size=80), 0).train.fingerprint
    s3.put("data/train/cat/0 x+y.png", png(9, size=80) + b"longer")
    assert load_real(config(s3.uri("data"), image_size=80), 0).train.fingerprint != remote.train.fingerprint
    s3.direct.delete_object(Bucket=s3.bucket, Key="data/val/cat/1 x+y.png")
    with pytest.raises(DataError, match=r"val/cat/1 x\+y\.png cannot be read: it is not there any more"):
        remote.test.stack(80)


def test_imagenette_is_found_below_its_prefix(s3, tmp_path):
    wnids = [f"n{i:08d}" for i in range(10)]
    folder = make_folder(tmp_path / "imagenette2-160", wnids, per_class=2, size=70, splits=("train", "val"))
    for junk in ("cat", ".cache", "list.txt"):
        path = folder / "train" / junk
        for file in [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]:
            file.unlink()
    s3.upload(tmp_path, "sets")
    remote = load_real(DataConfig(source="imagenette", path=s3.uri("sets")), 0)
    for inner in (folder / "train" / "cat" / "deeper", folder / "train" / "cat", folder / "train" / ".cache"):
        inner.rmdir()
    local = load_real(DataConfig(source="imagenette", path=str(tmp_path)), 0)
    assert remote.train.fingerprint == local.train.fingerprint
    assert "1000" in failure(DataConfig(source="imagenet", path=s3.uri("sets/imagenette2-160")))
    assert "does not hold Imagenette" in failure(
        DataConfig(source="imagenette", path=s3.uri("sets/imagenette2-160/train"))
    )


@pytest.mark.parametrize("limit", [20_000, 2])
def test_parquet_in_an_object_store_is_parquet_on_the_disk(s3, tmp_path, monkeypatch, limit):
    monkeypatch.setattr(images, "VERIFY_LIMIT", limit)
    folder = make_parquet(tmp_path / "p", size=80)
    s3.upload(folder, "hub/data")
    local = load_real(config(folder, "parquet", image_size=80), 2)
    cut = s3.fail("cut", r"GET /.*train-0\.parquet", times=2, skip=1)
    remote = load_real(config(s3.uri("hub"), "parquet", image_size=80), 2)
    assert cut.used == 2
    parquet._row_group.cache_clear()
    s3.requests.clear()
    s3.fail("status", r"GET /.*test-0\.parquet", times=2)
    for there, here in parts(remote, local):
        assert there.fingerprint == here.fingerprint
        assert there.classes == here.classes
        assert (there.stack(80) == here.stack(80)).all()
    assert remote.train.name(0).startswith(f"s3://{s3.bucket}/hub/data/train-0.parquet row ")
    copy = pickle.loads(pickle.dumps(remote.train))
    assert (copy.read(1) == local.train.read(1)).all()


def test_what_is_missing_or_wrong_is_one_line(s3, tmp_path):
    assert f"data.path s3://{s3.bucket}/nothing holds nothing" in failure(config(s3.uri("nothing")))
    assert "there is no such bucket" in failure(
        config(s3.uri("x").replace(s3.bucket, "nowhere"), "parquet"), ArtifactError
    )
    s3.put("empty/train/cat/notes.txt", b"x")
    s3.put("empty/test/cat/1.png", png(0))
    assert f"class folder s3://{s3.bucket}/empty/train/cat has no images" in failure(config(s3.uri("empty")))
    assert "has no folder train" in failure(config(s3.uri("empty/test")))
    assert f"s3://{s3.bucket}/empty holds [test, train]; data.path must hold train*.parquet" in failure(
        config(s3.uri("empty"), "parquet")
    )
    s3.put("broken/train.parquet", b"text" * 100)
    s3.put("broken/test.parquet", b"text" * 100)
    message = failure(config(s3.uri("broken"), "parquet"))
    assert f"s3://{s3.bucket}/broken/train.parquet is no readable Parquet file" in message
    login = s3.uri("x").replace("s3://", "s3://me:hush@")
    assert "needs a local directory" in failure(config(login, "cifar10", image_size=None), ConfigError)
    assert "data.download needs a local" in failure(
        config(login, "imagenette", image_size=None, download=True), ConfigError
    )
    assert "cannot open 's3://bucket/x' (unknown option a" in failure(config("s3://me:hush@bucket/x?a=b"), ConfigError)


def test_an_outage_is_no_bad_image(s3, tmp_path, monkeypatch):
    s3.upload(make_folder(tmp_path / "f"), "data")
    monkeypatch.setenv("CVDD_RAY_S3_RETRY_S", "0.2")
    s3.fail("status", r"HEAD /.*cat/3", times=10**6)
    message = failure(config(s3.uri("data"), on_bad_image="skip"), ArtifactError)
    assert "train/cat/3 x+y.png cannot be read: it answered HTTP 503" in message
    s3.faults.clear()
    s3.put("data/train/cat/3 x+y.png", b"text")
    assert load_real(config(s3.uri("data"), on_bad_image="skip"), 0).train.bad == (
        f"s3://{s3.bucket}/data/train/cat/3 x+y.png",
    )
