"""Layouts others read: names fit for file systems, shards by size, equal bytes; read back with other readers."""

import io
import json
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import write_image_set
from PIL import Image

from cvdd_ray.core.labelcodes import LabelEncoding
from cvdd_ray.data.imagesets import ImageSet, encode_png
from cvdd_ray.data.labels import label_schema
from cvdd_ray.data.layouts import (
    VIEW_FEATURES,
    as_published,
    class_folders,
    image_features,
    image_rows,
    label_features,
    write_class_folders,
    write_parquet,
    write_tars,
)

CLASSES = ("air plane", "b", "c")


@pytest.fixture
def batches():
    """Seven noise images of three classes as record batches of three."""
    pixels = np.random.default_rng(0).integers(0, 256, (7, 3, 8, 8), np.uint8)
    columns = {"image_index": pa.array([0, 0, 0, 1, 1, 1, 2], pa.int32()), "voters": pa.array([["x", "y"]] * 7)}
    images = ImageSet(pixels, np.array([0, 1, 2, 0, 1, 2, 0]), CLASSES, columns)
    return pa.ipc.open_stream(write_image_set(images)).read_all().to_batches(max_chunksize=3)


def rows_of(batches):
    return list(image_rows(as_published(batches), CLASSES))


def test_rows_say_what_is_known_of_every_image(batches):
    rows = rows_of(batches)
    assert [row[0] for row in rows[2:4]] == ["class00002_id00000.png", "class00000_id00001.png"]
    assert rows[3][2] == {"label": 0, "class": "air plane", "id_in_class": 1, "voters": ["x", "y"]}
    assert rows[3][1] == batches[1]["image"][0]["bytes"].as_py()


@pytest.mark.parametrize("shard_bytes", [1, 900, 1 << 30])
def test_parquet_shards_hold_all_rows_in_order(batches, tmp_path, shard_bytes):
    features = image_features(batches[0].schema)
    shards = write_parquet(tmp_path / "data", as_published(batches), features, shard_bytes)
    assert len(shards.names) == {1: 7, 900: 4, 1 << 30: 1}[shard_bytes]
    names = [f"train-{k:05d}-of-{len(shards.names):05d}.parquet" for k in range(len(shards.names))]
    assert sorted(path.name for path in (tmp_path / "data").iterdir()) == list(shards.names) == names
    read = pa.concat_tables([pq.read_table(tmp_path / "data" / name) for name in names])
    assert read["image"].to_pylist() == [row for batch in batches for row in batch["image"].to_pylist()]
    assert read["id_in_class"].to_pylist() == [0, 0, 0, 1, 1, 1, 2]
    assert shards.num_rows == 7
    assert shards.disk_bytes == sum((tmp_path / "data" / name).stat().st_size for name in names)


def test_parquet_is_cut_into_row_groups_so_that_one_epoch_can_be_read_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("cvdd_ray.data.layouts.ROW_GROUP_BYTES", 100)
    epochs = [pa.record_batch([pa.array([e] * 10, pa.int32())], ["epoch"]) for e in range(6)]
    write_parquet(tmp_path / "data", epochs, {"epoch": VIEW_FEATURES["epoch"]}, 1 << 30)
    file = pq.ParquetFile(tmp_path / "data/train-00000-of-00001.parquet")
    cut = [file.metadata.row_group(k) for k in range(file.num_row_groups)]
    assert [group.num_rows for group in cut] == [20, 20, 20]
    assert cut[1].column(0).statistics.min == 2


@pytest.mark.parametrize(
    "encoding",
    [LabelEncoding(), LabelEncoding("int8"), LabelEncoding("int8", 3, "spread"), LabelEncoding("float16", 3)],
)
def test_label_features_are_those_of_the_stored_schema(encoding):
    schema = label_schema(1000, encoding)
    features = datasets.Features.from_dict(label_features(schema))
    assert features.arrow_schema.remove_metadata() == schema


def test_tars_are_read_by_tarfile_and_carry_no_time_or_user(batches, tmp_path):
    names = write_tars(tmp_path, rows_of(batches), 1 << 30)
    assert names == ["train-00000.tar"]
    with tarfile.open(tmp_path / names[0]) as tar:
        members = {member.name: (member, tar.extractfile(member).read()) for member in tar}
    assert len(members) == 21
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname) for m, _ in members.values()} == {(0, 0, 0, "", "")}
    assert members["class00001_id00001.cls"][1] == b"1"
    assert json.loads(members["class00000_id00002.json"][1])["class"] == "air plane"
    pixels = np.asarray(Image.open(io.BytesIO(members["class00000_id00002.png"][1])))
    assert encode_png(pixels.transpose(2, 0, 1)) == batches[2]["image"][0]["bytes"].as_py()


def test_tars_are_cut_by_size(batches, tmp_path):
    sample = 3 * 1024  # a header and a block for each of three members
    assert len(write_tars(tmp_path, rows_of(batches), 3 * sample)) == 3
    again = tmp_path / "again"
    again.mkdir()
    write_tars(again, rows_of(batches), 3 * sample)
    for path in again.iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
    found = datasets.load_dataset(
        "webdataset", data_files=str(tmp_path / "*.tar"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert found["cls"][:] == [0, 1, 2, 0, 1, 2, 0]


@pytest.mark.parametrize(
    ("classes", "folders"),
    [
        (["airplane", "bird", "cat"], ["airplane", "bird", "cat"]),
        (["0", "1", "9"], ["0", "1", "9"]),
        (["cat", "bird"], ["0_cat", "1_bird"]),  # not in alphabetical order
        (["a/b", "c:d*", "été"], ["a_b", "c_d", "été"]),
        (["e\u0301te\u0301", "z"], ["0_\xe9t\xe9", "1_z"]),  # composed, as every file system keeps it; sorts behind z
        (["a b", "a/b"], ["0_a_b", "1_a_b"]),  # the same once they are safe
        (["Crane", "crane"], ["0_Crane", "1_crane"]),  # the same where case does not count
        (["..", ".hidden", "__x__"], ["0", "1_hidden", "2_x"]),
        (["aux.1", "b"], ["0_aux.1", "1_b"]),  # a device's name on Windows
        ([str(k) for k in range(11)], [f"{k:02d}_{k}" for k in range(11)]),
    ],
)
def test_class_folders_are_safe_and_sorted_as_the_labels(classes, folders):
    assert class_folders(classes) == folders
    assert sorted(folders) == folders


def test_long_class_names_fit_a_file_system_and_stay_apart(tmp_path):
    folders = class_folders(["é" * 300 + "a", "é" * 300 + "b"])
    for name in folders:
        (tmp_path / name).mkdir()
    assert len(set(folders)) == 2


def test_image_folders_give_the_same_labels_to_torchvision_and_datasets(batches, tmp_path):
    """Also with a class whose name reads like a split, and one whose name no file system takes."""
    from torchvision.datasets import ImageFolder

    folders = class_folders(["test tube", "CON", "../../etc"])
    rows = rows_of(batches)
    write_class_folders(tmp_path, rows, folders)
    expected = sorted((about["label"], content) for _, content, about in rows)
    dataset = ImageFolder(str(tmp_path / "train"))
    assert dataset.classes == folders
    assert sorted((label, Path(path).read_bytes()) for path, label in dataset.samples) == expected
    found = datasets.load_dataset(
        "imagefolder", data_dir=str(tmp_path), split="train", cache_dir=str(tmp_path / "cache")
    )
    found = found.cast_column("image", datasets.Image(decode=False))
    assert found.features["label"].names == folders
    assert sorted((row["label"], Path(row["image"]["path"]).read_bytes()) for row in found) == expected
    lines = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    assert [(tmp_path / line["file_name"]).read_bytes() for line in lines] == [row[1] for row in rows]
