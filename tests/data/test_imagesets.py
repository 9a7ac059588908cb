"""Image sets open in pyarrow and `datasets` without this package, pixel by pixel, and damage is refused (check 6)."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import write_image_set
from PIL import Image

from cvdd_ray.data.artifacts import Artifacts, StagePlan
from cvdd_ray.data.datasets import DATASETS, denormalize, normalize, pixel_bounds
from cvdd_ray.data.imagesets import (
    ImageSet,
    decode_image,
    encode_jpeg75,
    encode_png,
    read_image_set,
)
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError
from cvdd_ray.stages.grouptask import quantize

CLASSES = ("ant", "bee", "cat")
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 3, 9, 11), dtype=np.uint8)  # not square: no axis can be mixed up
LABELS = np.array([0, 1, 2, 0, 1, 2])
COLUMNS = {
    "image_index": pa.array([0, 0, 0, 1, 1, 1], pa.int32()),
    "voters": pa.array([["a", "b"]] * 3 + [["b", "c"]] * 3, pa.list_(pa.string())),
    "voter_weights": pa.array([[0.75, 0.25]] * 6, pa.list_(pa.float32())),
    "job_seed": pa.array([2**62 + i for i in range(6)], pa.int64()),
    "bn_term": pa.array([0.5 * i for i in range(6)], pa.float32()),
}
SET = ImageSet(PIXELS, LABELS, CLASSES, COLUMNS, {"ipc": 2, "mean": [0.1, 0.2, 0.3]})


# --- opened by others ----------------------------------------------------------------------------------------------


@pytest.fixture(params=["from_file", "load_dataset"])
def hub_dataset(request, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "distilled.arrow"
    path.write_bytes(write_image_set(SET))
    if request.param == "from_file":
        return datasets.Dataset.from_file(str(path))
    return datasets.load_dataset("arrow", data_files=str(path), cache_dir=str(tmp_path / "cache"), split="train")


def test_the_datasets_library_opens_it(hub_dataset):
    assert len(hub_dataset) == 6
    assert hub_dataset.features["label"].names == list(CLASSES)
    assert hub_dataset.column_names == ["image", "label", *COLUMNS]
    for row, pixels, label in zip(hub_dataset, PIXELS, LABELS, strict=True):
        assert isinstance(row["image"], Image.Image)
        np.testing.assert_array_equal(np.asarray(row["image"]).transpose(2, 0, 1), pixels)
        assert row["label"] == label
    assert [hub_dataset.features[name].dtype for name in ("bn_term", "job_seed")] == ["float32", "int64"]
    assert list(hub_dataset["voters"]) == COLUMNS["voters"].to_pylist()
    assert list(hub_dataset["voter_weights"]) == COLUMNS["voter_weights"].to_pylist()
    assert list(hub_dataset["job_seed"]) == COLUMNS["job_seed"].to_pylist()


def test_plain_pyarrow_and_pillow_open_it():
    with pa.ipc.open_stream(write_image_set(SET)) as reader:
        table = reader.read_all()
    assert table.column_names == ["image", "label", *COLUMNS]
    assert table["label"].to_pylist() == LABELS.tolist()
    for row, pixels in zip(table["image"].to_pylist(), PIXELS, strict=True):
        with Image.open(io.BytesIO(row["bytes"])) as image:
            assert image.format == "PNG"
            np.testing.assert_array_equal(np.asarray(image).transpose(2, 0, 1), pixels)
    paths = [row["path"] for row in table["image"].to_pylist()]
    assert paths[:4] == [f"class{c:05d}_id{i:05d}.png" for c, i in ((0, 0), (1, 0), (2, 0), (0, 1))]
    about = json.loads(table.schema.metadata[b"cvdd_ray"])
    assert (about["classes"], about["ipc"], about["mean"]) == (list(CLASSES), 2, [0.1, 0.2, 0.3])


def test_it_reads_back_what_was_written():
    back = read_image_set(write_image_set(SET), "set")
    np.testing.assert_array_equal(back.images_NCHW, PIXELS)
    np.testing.assert_array_equal(back.labels_N, LABELS)
    assert back.images_NCHW.dtype == np.uint8
    assert (len(back), back.classes, back.metadata) == (6, CLASSES, {"ipc": 2, "mean": [0.1, 0.2, 0.3]})
    assert {name: column.to_pylist() for name, column in back.columns.items()} == {
        name: column.to_pylist() for name, column in COLUMNS.items()
    }
    assert back.content() == SET.content()
    assert write_image_set(back) == write_image_set(SET)


def test_a_set_without_further_columns():
    bare = ImageSet(PIXELS[:2], LABELS[:2], CLASSES)
    back = read_image_set(write_image_set(bare), "set")
    assert (dict(back.columns), dict(back.metadata)) == ({}, {})
    assert back.content() == bare.content()


def test_jpegs_given_instead_are_stored_as_they_are():
    encoded = [encode_jpeg75(image) for image in PIXELS]
    data = write_image_set(SET, encoded)
    rows = pa.ipc.open_stream(data).read_all()["image"].to_pylist()
    assert [row["bytes"] for row in rows] == encoded
    assert {row["path"][-4:] for row in rows} == {".jpg"}
    back = read_image_set(data, "set")
    np.testing.assert_array_equal(back.images_NCHW[0], decode_image(encoded[0]))
    assert back.content() != SET.content()  # what labels are bound to are the stored pixels


def test_content_names_pixels_labels_shape_and_classes():
    altered = PIXELS.copy()
    altered[5, 2, 8, 10] ^= 1
    others = [
        ImageSet(altered, LABELS, CLASSES), ImageSet(PIXELS, LABELS[::-1].copy(), CLASSES),
        ImageSet(PIXELS, LABELS, ("bee", "ant", "cat")), ImageSet(PIXELS[::-1], LABELS, CLASSES),
        ImageSet(PIXELS.transpose(0, 1, 3, 2), LABELS, CLASSES), ImageSet(PIXELS.reshape(6, 3, 11, 9), LABELS, CLASSES),
    ]  # fmt: skip
    assert len({SET.content(), *(other.content() for other in others)}) == 7
    same = ImageSet(np.asfortranarray(PIXELS), LABELS.astype(np.int32), list(CLASSES), metadata={"ipc": 9})
    assert same.content() == SET.content()


# --- pixels --------------------------------------------------------------------------------------------------------

INFO = DATASETS["cifar10"]


def natural(seed=0):
    """Normalised images with content on all scales, some of it outside the range of pixels."""
    draw = torch.Generator().manual_seed(seed)
    low, high = pixel_bounds(INFO)
    noise = torch.rand(4, 3, 32, 32, generator=draw) * 1.1 - 0.05
    return low[:, None, None] + noise * (high - low)[:, None, None]


def unit_range(x):
    mean, std = (torch.tensor(values, dtype=torch.float64)[:, None, None] for values in (INFO.mean, INFO.std))
    return (x.double() * std + mean).clamp(0, 1)


def test_stored_png_is_the_rounded_image_exactly():
    x = natural()
    pixels = quantize(x, INFO, "png")
    exact = 255 * unit_range(x)
    near_a_half = ((exact % 1) - 0.5).abs() < 1e-3  # there float32 may round to the other side
    assert torch.equal(pixels[~near_a_half], exact.round().to(torch.uint8)[~near_a_half])
    assert float((pixels.double() - exact).abs().max()) < 0.502
    assert abs(float((pixels.double() - exact).mean())) < 0.02
    for image in pixels.numpy():
        np.testing.assert_array_equal(decode_image(encode_png(image)), image)


def test_every_pixel_value_survives_normalisation():
    values = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    assert torch.equal(denormalize(normalize(values, INFO), INFO), values)


def test_parity_flag_truncates_and_jpeg_costs_levels():
    x = natural()
    pixels = quantize(x, INFO, "jpeg75_trunc")
    exact = 255 * unit_range(x)
    error = pixels.double() - exact
    inside = (exact > 0) & (exact < 255)
    assert float(error[inside].mean()) == pytest.approx(-0.5, abs=0.02)
    assert float(error.max()) < 1e-3
    jpegs = [encode_jpeg75(image) for image in pixels.numpy()]
    loss = np.mean([np.abs(decode_image(j).astype(int) - p).mean() for j, p in zip(jpegs, pixels.numpy(), strict=True)])
    assert loss > 1
    with Image.open(io.BytesIO(jpegs[0])) as image:
        assert image.format == "JPEG"
        assert image.size == (32, 32)


# --- damage --------------------------------------------------------------------------------------------------------


def test_flipped_bytes_are_refused_when_read_as_an_artifact(tmp_path):
    artifacts, plan = Artifacts(Store(str(tmp_path))), StagePlan("synthesize/ipc2", {}, {}, CLASSES, 0)
    data = write_image_set(SET)
    manifest = artifacts.commit(plan, {"distilled.arrow": data}, wall_s=0, facts={})
    assert artifacts.read(manifest, "distilled.arrow") == data
    for position in range(0, len(data), 97):
        flipped = bytearray(data)
        flipped[position] ^= 0x20
        artifacts.store.write("synthesize/ipc2/distilled.arrow", bytes(flipped))
        with pytest.raises(ArtifactError, match=r"distilled\.arrow does not have the sha256"):
            artifacts.read(manifest, "distilled.arrow")


def other_arrow(columns, metadata=None):
    table = pa.table(columns).replace_schema_metadata(metadata)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


OURS = {b"cvdd_ray": b'{"classes": ["a"]}'}
IMAGE = pa.array([{"bytes": encode_png(PIXELS[0])}])


@pytest.mark.parametrize(
    "data",
    [
        b"", b"not arrow", b"\x00" * 100, encode_png(PIXELS[0]),
        other_arrow({"image": IMAGE, "label": pa.array([0])}),
        other_arrow({"image": IMAGE, "label": pa.array([0])}, {b"huggingface": b"{}"}),
        other_arrow({"image": IMAGE, "label": pa.array([0])}, {b"cvdd_ray": b"{"}),
        other_arrow({"label": pa.array([0])}, OURS),
        other_arrow({"image": IMAGE}, OURS),
        other_arrow({"image": pa.array([{"bytes": b"no image"}]), "label": pa.array([0])}, OURS),
        other_arrow({"image": pa.array([{"bytes": encode_png(PIXELS[0])[:-40]}]), "label": pa.array([0])}, OURS),
        other_arrow({"image": pa.array([None], IMAGE.type), "label": pa.array([0])}, OURS),
        other_arrow({"image": IMAGE, "label": pa.array(["a"])}, OURS),
        other_arrow({"image": IMAGE[:0], "label": pa.array([], pa.int64())}, OURS),
        other_arrow({"image": IMAGE, "label": pa.array([0])}, {b"cvdd_ray": b'{"no": "classes"}'}),
        other_arrow({"image": IMAGE, "label": pa.array([0])}, {b"cvdd_ray": b"[]"}),
    ],
    ids=["empty", "text", "zeros", "a png", "no metadata", "another's metadata", "broken metadata", "no image", "no label",
         "no picture", "picture cut short", "null", "labels as text", "no rows", "no classes", "metadata is a list"],
)  # fmt: skip
def test_what_is_not_an_image_set_is_refused_by_name(data):
    with pytest.raises(ArtifactError, match=r"runs/x/distilled\.arrow is not an image set"):
        read_image_set(data, "runs/x/distilled.arrow")


def test_a_set_cut_short_anywhere_is_refused():
    data = write_image_set(SET)
    for length in range(0, len(data) - 8, 61):  # the last 8 bytes only say that nothing follows
        with pytest.raises(ArtifactError, match="not an image set"):
            read_image_set(data[:length], "set")
