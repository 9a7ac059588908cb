"""Real data from every source: splits, labels, unusual and damaged images, and the errors a user sees."""

import hashlib
import io
import json
import os
import pickle
import shutil
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from cvdd_ray.config import DataConfig
from cvdd_ray.data import images
from cvdd_ray.data.choices import scaled_down
from cvdd_ray.data.datasets import DATASETS
from cvdd_ray.data.images import BadImage, decode, fit, in_memory
from cvdd_ray.data.sources import load_real
from cvdd_ray.errors import ConfigError, DataError

SHARED = Path(os.environ.get("CVDD_SHARED", Path(__file__).parents[3] / "shared"))
CIFAR = SHARED / "data" / "cifar10"


def same(a, b):
    return len(a) == len(b) and a.fingerprint == b.fingerprint


def ids(images_set):
    """Identity of every image of a set, as a set of strings."""
    return {images_set.subset([i]).fingerprint for i in range(len(images_set))}


def failure(data, seed=0):
    """The message of the DataError that loading must end in; it has to be one line."""
    with pytest.raises(DataError) as caught:
        load_real(data, seed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------ digits


@pytest.fixture(scope="module")
def digits():
    return load_real(DataConfig(), 0)


def test_digits_sizes_and_strata(digits):
    assert digits.info == DATASETS["digits"]
    assert len(digits.train) + len(digits.holdout) + len(digits.test) == 1797
    everything = np.concatenate([digits.train.labels, digits.holdout.labels, digits.test.labels])
    totals = np.bincount(everything)
    assert totals.tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]  # the data set's own counts
    assert np.bincount(digits.test.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]  # 20 %, rounded
    assert np.bincount(digits.holdout.labels).tolist() == [14, 15, 14, 15, 15, 15, 15, 14, 14, 14]  # 10 % of the rest
    assert digits.train.classes == tuple("0123456789")
    assert digits.train.labels.dtype == np.int64


def test_digits_splits_are_disjoint(digits):
    parts = [ids(part) for part in (digits.train, digits.holdout, digits.test)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 1797  # no two digits are equal


def test_digits_pixels_are_the_enlarged_originals(digits):
    from sklearn.datasets import load_digits

    small = {
        Image.fromarray(np.round(image * 255 / 16).astype(np.uint8))
        .resize((16, 16), Image.Resampling.BILINEAR)
        .tobytes()
        for image in load_digits().images
    }
    pixels = digits.train.stack(16)
    assert pixels.shape == (len(digits.train), 3, 16, 16)
    assert pixels.dtype == np.uint8
    assert pixels.max() > 200
    assert (pixels[:, 0] == pixels[:, 1]).all()
    assert (pixels[:, 0] == pixels[:, 2]).all()
    assert {image.tobytes() for image in pixels[:, 0]} <= small


def test_digits_mean_and_std_of_the_table(digits):
    grey = np.concatenate([digits.train.stack(16), digits.holdout.stack(16)])[:, 0] / 255
    assert DATASETS["digits"].mean == (round(float(grey.mean()), 4),) * 3
    assert DATASETS["digits"].std == (round(float(grey.std()), 4),) * 3


def test_seed_moves_holdout_but_never_test(digits):
    again, other = load_real(DataConfig(), 0), load_real(DataConfig(), 1)
    assert same(again.train, digits.train)
    assert same(again.holdout, digits.holdout)
    assert not same(other.holdout, digits.holdout)
    assert same(other.test, digits.test)


def test_limits_are_stratified_nested_and_seeded(digits):
    few = load_real(DataConfig(max_per_class=20, max_test=55), 3)
    fewer = load_real(DataConfig(max_per_class=10), 3)
    assert np.bincount(few.train.labels).tolist() == [18] * 10
    assert np.bincount(few.holdout.labels).tolist() == [2] * 10
    assert len(few.test) == 55
    assert set(np.bincount(few.test.labels)) == {5, 6}
    assert ids(few.test) <= ids(digits.test)
    assert ids(fewer.train) | ids(fewer.holdout) <= ids(few.train) | ids(few.holdout)
    assert not same(load_real(DataConfig(max_per_class=20, max_test=55), 4).test, few.test)


@pytest.mark.parametrize(
    ("total", "expected"),
    [(None, [50, 30, 20]), (100, [50, 30, 20]), (9, [4, 3, 2]), (7, [4, 2, 1]), (3, [1, 1, 1]), (1, [1, 0, 0])],
)
def test_scaled_down_gives_the_largest_remainders_first(total, expected):
    # by hand: 9 -> 4.5 2.7 1.8; 7 -> 3.5 2.1 1.4; 3 -> 1.5 .9 .6; 1 -> .5 .3 .2
    assert scaled_down(np.array([50, 30, 20]), total).tolist() == expected


def test_holdout_needs_two_images():
    assert "at least 2 train images" in failure(DataConfig(max_per_class=1))
    two = load_real(DataConfig(max_per_class=2, holdout=0.01), 0)
    assert (len(two.train), len(two.holdout)) == (10, 10)  # a share of nearly nothing is still one image


def test_size_override_and_download_without_effect():
    assert load_real(DataConfig(image_size=32, max_per_class=2), 0).train.stack(32).shape == (10, 3, 32, 32)
    with pytest.raises(ConfigError, match="download has no effect"):
        load_real(DataConfig(download=True), 0)


def test_given_classes(digits):
    assert same(load_real(DataConfig(classes=tuple("0123456789")), 0).train, digits.train)
    message = failure(DataConfig(classes=tuple("0123456798")))
    assert "first difference at label 8" in message
    assert "leave data.classes out" in message
    assert "(1000 in all)" in failure(DataConfig(classes=tuple(map(str, range(1000)))))


# ------------------------------------------------------------------------------------------------ RealImages


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def test_read_subset_and_names(digits):
    part = digits.train.subset([5, 2])
    assert part.labels.tolist() == digits.train.labels[[5, 2]].tolist()
    assert (part.read(1) == digits.train.stack(16)[2].transpose(1, 2, 0)).all()
    assert part.read(0).shape == (16, 16, 3)
    assert part.name(0) == digits.train.name(5)
    assert part.subset([1]).fingerprint == digits.train.subset([2]).fingerprint


def test_stack_is_a_copy(digits):
    before = digits.train.fingerprint, digits.train.read(0).copy()
    digits.train.stack(16)[:] = 7
    assert (digits.train.read(0) == before[1]).all()


def test_stack_never_resizes_small_images(digits):
    with pytest.raises(DataError, match=r"digits train image \d+ is 16x16 pixels.*32x32.*data\.image_size"):
        digits.train.stack(32)


def test_fingerprint_sees_pixels_labels_order_and_classes():
    pixels, labels = noise(4, 3, 8, 8), np.array([0, 1, 0, 1])
    base = in_memory("x", pixels, labels, "ab")
    assert base.fingerprint == in_memory("y", pixels.copy(), labels, ["a", "b"]).fingerprint
    changed = pixels.copy()
    changed[3, 2, 7, 7] ^= 1
    others = [
        in_memory("x", changed, labels, "ab"),
        in_memory("x", pixels, 1 - labels, "ab"),
        in_memory("x", pixels, labels, "ba"),
        base.subset([2, 1, 0, 3]),
        base.subset([0, 1, 2]),
    ]
    assert len({base.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert len(base.fingerprint) == 64


@pytest.mark.parametrize(
    ("height", "width", "size"), [(300, 500, 224), (500, 301, 224), (90, 120, 96), (257, 257, 224)]
)
def test_fit_is_torchvisions_test_transform(height, width, size):
    from torchvision.transforms import v2

    image = noise(height, width, 3)
    chain = v2.Compose([v2.Resize(size * 256 // 224), v2.CenterCrop(size)])
    expected = np.asarray(chain(Image.fromarray(image))).transpose(2, 0, 1)
    assert (fit(image, size, "x") == expected).all()


def test_large_inputs_are_resized_from_memory(digits):
    few = digits.train.subset([0, 1])
    assert (few.stack(96)[1] == fit(few.read(1), 96, "x")).all()


# ------------------------------------------------------------------------------------------------ decoding


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_unusual_modes_become_rgb():
    rgb = Image.fromarray(noise(8, 8, 3))
    grey = rgb.convert("L")
    for mode in ("L", "LA", "P", "RGBA", "1"):
        data = encoded(rgb.convert(mode))
        pixels, kind = decode(data)
        assert kind == mode
        assert (pixels == np.asarray(rgb.convert(mode).convert("RGB"))).all()
    assert (decode(encoded(grey))[0] == np.asarray(grey)[:, :, None]).all()
    flat = Image.new("CMYK", (8, 8), (255, 0, 0, 0))  # pure cyan
    pixels, kind = decode(encoded(flat, "JPEG"))
    assert kind == "CMYK"
    assert np.abs(pixels.astype(int) - [0, 255, 255]).max() <= 2


def test_transparency_is_dropped_not_blended():
    clear_red = Image.new("RGBA", (8, 8), (255, 0, 0, 0))
    assert (decode(encoded(clear_red))[0] == [255, 0, 0]).all()
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert (decode(encoded(palette, transparency=b"\x00\x80"))[0] == [10, 20, 30]).all()


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_is_scaled_not_clipped(kind):
    values = np.array([[0, 257, 128 * 257, 65535], [300, 40000, 65407, 65406]], np.uint16)
    pixels, mode = decode(encoded(Image.fromarray(values), kind))
    assert mode.startswith("I")
    assert pixels[:, :, 1].tolist() == [[0, 1, 128, 255], [1, 156, 255, 254]]  # value / 257, rounded


def test_ranges_that_nobody_knows_are_bad():
    for values in (np.full((8, 8), 0.5, np.float32), np.full((8, 8), 70000, np.int32)):
        with pytest.raises(BadImage):
            decode(encoded(Image.fromarray(values), "TIFF"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_first_frame_of_an_animation(kind):
    frames = [Image.new("RGB", (8, 8), color) for color in ((250, 0, 0), (0, 250, 0))]
    options = {"lossless": True} if kind == "WEBP" else {}
    pixels, mode = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert mode == "animated"
    assert (pixels == [250, 0, 0]).all()


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [12, 40])  # between limit and twice the limit Pillow only warns; beyond, it raises
def test_decompression_bomb_is_bad(monkeypatch, side):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadImage, match="pixel"):
        decode(encoded(Image.new("RGB", (side, side))))


@pytest.mark.parametrize("thumbnail", [False, True])
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_truncation_is_found(kind, thumbnail):
    data = encoded(Image.fromarray(noise(64, 64, 3)), kind)
    decode(data, thumbnail)
    with pytest.raises(BadImage):
        decode(data[: len(data) * 2 // 3], thumbnail)


# ------------------------------------------------------------------------------------------------ folders


def make_folder(root, classes=("cat", "dog"), per_class=4, size=8, splits=("train", "test")):
    for s, split in enumerate(splits):
        for c, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(per_class):
                pixels = noise(size, size, 3, seed=1000 * s + 100 * c + i)
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def folder(root, **options):
    return DataConfig(**{"source": "folder", "path": str(root), "image_size": 8, **options})


def test_folder_labels_are_lexicographic_ranks(tmp_path):
    real = load_real(folder(make_folder(tmp_path, ("10", "9", "2", "Z", "a")), holdout=0.25), 0)
    assert real.train.classes == ("10", "2", "9", "Z", "a")
    assert (real.info.num_classes, real.info.class_chunk, real.info.name) == (5, 5, "folder")
    for part in (real.train, real.holdout, real.test):
        for i in range(len(part)):
            path = Path(part.name(i))
            assert part.classes[part.labels[i]] == path.parent.name
            assert (part.read(i) == np.asarray(Image.open(path))).all()
            assert (part.stack(8)[i] == part.read(i).transpose(2, 0, 1)).all()
    assert [len(real.train), len(real.holdout), len(real.test)] == [15, 5, 20]


def test_val_serves_when_there_is_no_test_and_test_goes_first(tmp_path):
    make_folder(tmp_path, splits=("train", "val"))
    assert "/val/" in load_real(folder(tmp_path), 0).test.name(0)
    make_folder(tmp_path / "b", splits=("train", "val", "test"))
    assert "/test/" in load_real(folder(tmp_path / "b"), 0).test.name(0)


def test_other_files_are_not_images(tmp_path):
    make_folder(tmp_path)
    cat = tmp_path / "train" / "cat"
    for name in ("._0.png", "notes.txt", "Thumbs.db"):
        (cat / name).write_bytes(b"x")
    (cat / "0.png").rename(cat / "0.PNG")
    (tmp_path / "train" / ".cache").mkdir()
    real = load_real(folder(tmp_path), 0)
    assert len(real.train) + len(real.holdout) == 8


def test_unusual_files_in_a_folder_are_converted_and_counted(tmp_path):
    cat = make_folder(tmp_path) / "train" / "cat"
    rgb = Image.fromarray(noise(8, 8, 3))
    for name, mode in (("grey.png", "L"), ("alpha.png", "RGBA"), ("palette.png", "P")):
        rgb.convert(mode).save(cat / name)
    Image.fromarray(np.full((8, 8), 40000, np.uint16)).save(cat / "deep.png")
    rgb.save(cat / "moving.webp", "WEBP", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    (cat / "gif.webp").write_bytes(encoded(rgb, "GIF", save_all=True, append_images=[Image.new("RGB", (8, 8))]))
    real = load_real(folder(tmp_path), 0)
    assert len(real.train) + len(real.holdout) == 14
    assert real.train.converted["L"] == real.train.converted["RGBA"] == real.train.converted["P"] == 1
    assert real.train.converted["animated"] == 2
    assert sum(real.train.converted.values()) == 6
    assert real.test.converted == {}


BAD = {
    "truncated": lambda good: good[: len(good) // 2],
    "empty": lambda good: b"",
    "text": lambda good: b"<html>404 not found</html>",
}


@pytest.mark.parametrize("size", [8, 80])  # decoded into memory, and checked only
@pytest.mark.parametrize("damage", BAD)
def test_bad_image_stops_or_is_skipped(tmp_path, damage, size):
    victim = make_folder(tmp_path, size=size) / "train" / "dog" / "2.png"
    victim.write_bytes(BAD[damage](victim.read_bytes()))
    message = failure(folder(tmp_path, image_size=size))
    assert str(victim) in message
    assert "data.on_bad_image=skip" in message
    real = load_real(folder(tmp_path, image_size=size, on_bad_image="skip"), 0)
    assert real.train.bad == (str(victim),)
    assert real.test.bad == ()
    assert len(real.train) + len(real.holdout) == 7
    names = [part.name(i) for part in (real.train, real.holdout) for i in range(len(part))]
    assert str(victim) not in names
    for part in (real.train, real.holdout):  # pixels, labels and names moved up together
        for i in range(len(part)):
            assert (part.read(i) == np.asarray(Image.open(part.name(i)))).all()
            assert part.classes[part.labels[i]] == Path(part.name(i)).parent.name


def test_skipping_until_a_class_is_too_small(tmp_path):
    make_folder(tmp_path, per_class=2)
    (tmp_path / "train" / "cat" / "0.png").write_bytes(b"")
    message = failure(folder(tmp_path, on_bad_image="skip"))
    assert "cat" in message
    assert "1 bad" in message


def test_large_sets_are_checked_when_read(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "VERIFY_LIMIT", 3)
    make_folder(tmp_path, size=80)
    (tmp_path / "test" / "cat" / "0.png").write_bytes(b"")
    real = load_real(folder(tmp_path, image_size=80), 0)
    with pytest.raises(DataError, match=r"cat/0\.png cannot be read: it is empty"):
        real.test.stack(80)
    assert real.train.stack(80).shape == (6, 3, 80, 80)
    before = real.train.fingerprint
    with open(real.train.name(0), "ab") as file:
        file.write(b"x")
    assert load_real(folder(tmp_path, image_size=80), 0).train.fingerprint != before


def test_wrong_size_names_the_image(tmp_path):
    make_folder(tmp_path)
    Image.fromarray(noise(8, 9, 3)).save(tmp_path / "train" / "cat" / "3.png")
    message = failure(folder(tmp_path))
    assert str(tmp_path / "train" / "cat" / "3.png") in message
    assert "9x8" in message
    assert "data.image_size" in message


def test_class_folders_must_agree(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "test" / "dog").rename(tmp_path / "test" / "wolf")
    message = failure(folder(tmp_path))
    assert "only in" in message
    assert "[dog]" in message
    assert "[wolf]" in message


def test_empty_class_and_missing_folders(tmp_path):
    make_folder(tmp_path)
    (tmp_path / "train" / "cow").mkdir()
    assert "cow has no images" in failure(folder(tmp_path))
    shutil.rmtree(tmp_path / "test")
    assert "no folder test/val" in failure(folder(tmp_path))
    shutil.rmtree(tmp_path / "train")
    assert "no folder train" in failure(folder(tmp_path))
    assert "does not exist" in failure(folder(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"data\.path is not set"):
        load_real(folder(tmp_path, path=None), 0)


def test_named_dataset_fixes_the_number_of_classes(tmp_path):
    make_folder(tmp_path, size=32)
    message = failure(folder(tmp_path, dataset="cifar10", image_size=None))
    assert "has 2 classes, but dataset 'cifar10' has 10" in message


def test_given_classes_in_wrong_order(tmp_path):
    make_folder(tmp_path)
    message = failure(folder(tmp_path, classes=("dog", "cat")))
    assert "[dog, cat]" in message
    assert "[cat, dog]" in message


def test_fingerprint_of_files(tmp_path):
    first = load_real(folder(make_folder(tmp_path / "a")), 0)
    moved = load_real(folder(make_folder(tmp_path / "b")), 0)
    assert same(first.test, moved.test)  # the place does not count
    victim = tmp_path / "b" / "test" / "cat" / "1.png"
    pixels = np.array(Image.open(victim))
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(victim)
    assert not same(load_real(folder(tmp_path / "b"), 0).test, first.test)
    make_folder(tmp_path / "c", ("cat", "dogs"))
    assert not same(load_real(folder(tmp_path / "c"), 0).test, first.test)


@pytest.mark.parametrize("size", [16, 80])  # 768 bytes of pixels an image, or none held
def test_files_pickle_as_paths(tmp_path, size):
    real = load_real(folder(make_folder(tmp_path, per_class=40, size=size), image_size=size), 0)
    blob = pickle.dumps(real.train)
    assert len(blob) < 5000 + 200 * len(real.train)
    copy = pickle.loads(blob)
    assert copy.fingerprint == real.train.fingerprint
    assert (copy.stack(size) == real.train.stack(size)).all()
    assert (copy.labels == real.train.labels).all()
    assert (copy.classes, copy.name(3)) == (real.train.classes, real.train.name(3))


def test_large_images_keep_their_size_until_stacked(tmp_path):
    make_folder(tmp_path)
    for split in ("train", "test"):
        Image.fromarray(noise(120, 200, 3)).save(tmp_path / split / "cat" / "0.png")
    real = load_real(folder(tmp_path, image_size=112), 0)
    assert real.test.read(0).shape == (120, 200, 3)
    assert real.test.read(1).shape == (8, 8, 3)
    assert real.test.stack(112).shape == (8, 3, 112, 112)


def test_imagenet_and_imagenette_trees(tmp_path):
    wnids = [f"n{i:08d}" for i in range(10)]
    make_folder(tmp_path / "imagenette2-160", wnids, per_class=2, size=70, splits=("train", "val"))
    real = load_real(DataConfig(source="imagenette", path=str(tmp_path)), 0)
    assert real.train.classes == tuple(wnids)
    assert real.info == DATASETS["imagenette"]
    assert real.test.stack(224).shape == (20, 3, 224, 224)
    message = failure(DataConfig(source="imagenet", path=str(tmp_path / "imagenette2-160")))
    assert "10 classes, but dataset 'imagenet1k' has 1000" in message
    assert "data.download=true" in failure(
        DataConfig(source="imagenette", path=str(tmp_path / "imagenette2-160/train"))
    )


# ------------------------------------------------------------------------------------------------ Parquet


def make_parquet(path, labels, names=("cat", "dog"), size=8, image="image", label="label", spoil=None, group=3):
    rows = [
        {"bytes": encoded(Image.fromarray(noise(size, size, 3, seed=i))), "path": f"{i}.png"}
        for i in range(len(labels))
    ]
    for index, data in (spoil or {}).items():
        rows[index]["bytes"] = data
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({image: pa.array(rows, kind), label: pa.array(labels, pa.int64())})
    if names is not None:
        features = {image: {"_type": "Image"}, label: {"names": list(names), "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)


def make_set(root, train=(0, 1) * 5, test=(0, 1, 1), **options):
    make_parquet(root / "train-00000-of-00002.parquet", list(train[:7]), **options)
    make_parquet(root / "train-00001-of-00002.parquet", list(train[7:]), **options)
    make_parquet(root / "test-00000-of-00001.parquet", list(test), **options)
    return root


def parquet(root, **options):
    return DataConfig(**{"source": "parquet", "path": str(root), "image_size": 8, **options})


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label"), ("image", "labels")])
def test_parquet_rows_come_in_order(tmp_path, image, label):
    real = load_real(parquet(make_set(tmp_path, image=image, label=label)), 0)
    assert real.train.classes == ("cat", "dog")
    assert real.test.labels.tolist() == [0, 1, 1]
    assert (real.test.read(2) == noise(8, 8, 3, seed=2)).all()
    assert len(real.train) + len(real.holdout) == 10
    for i in range(len(real.train)):
        file, row = real.train.name(i).split(" row ")
        assert (real.train.read(i) == noise(8, 8, 3, seed=int(row))).all()
        assert real.train.labels[i] == (int(row) + 7 * file.endswith("00001-of-00002.parquet")) % 2


@pytest.mark.parametrize("limit", [20_000, 2])
def test_large_parquet_images_are_read_on_demand(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(images, "VERIFY_LIMIT", limit)
    real = load_real(parquet(make_set(tmp_path, size=80), image_size=80), 0)
    copy = pickle.loads(pickle.dumps(real.train))
    assert len(pickle.dumps(real.train)) < 5000
    assert copy.fingerprint == real.train.fingerprint
    for i in range(len(copy)):
        assert (copy.read(i) == noise(80, 80, 3, seed=int(copy.name(i).split()[-1]))).all()
    make_set(tmp_path, size=80, spoil={1: encoded(Image.new("RGB", (80, 80)))})
    assert load_real(parquet(tmp_path, image_size=80), 0).test.fingerprint != real.test.fingerprint


def test_huggingface_datasets_reads_and_writes_the_same(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = {"image": [Image.fromarray(noise(8, 8, 3, seed=i)) for i in range(6)], "label": [0, 1, 2] * 2}
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["x", "y", "z"])})
    hub = datasets.Dataset.from_dict(rows, features=features)
    hub.to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    hub.to_parquet(str(tmp_path / "data" / "validation-00000-of-00001.parquet"))
    real = load_real(parquet(tmp_path), 0)
    assert real.test.classes == ("x", "y", "z")
    assert (real.test.stack(8) == np.stack([noise(8, 8, 3, seed=i) for i in range(6)]).transpose(0, 3, 1, 2)).all()


def test_parquet_without_names_numbers_its_classes(tmp_path):
    assert load_real(parquet(make_set(tmp_path, names=None)), 0).train.classes == ("0", "1")


def test_parquet_names_must_agree(tmp_path):
    make_set(tmp_path)
    make_parquet(tmp_path / "test-00000-of-00001.parquet", [0, 1], names=("dog", "cat"))
    assert "same names in another order" in failure(parquet(tmp_path))
    make_parquet(tmp_path / "train-00001-of-00002.parquet", [0, 1], names=("dog", "cat"))
    assert "one data set only" in failure(parquet(tmp_path))


def test_parquet_bad_images(tmp_path):
    make_set(tmp_path, spoil={1: b"text", 2: None})
    message = failure(parquet(tmp_path))
    assert "train-00000-of-00002.parquet row 1 cannot be read: it is not an image" in message
    real = load_real(parquet(tmp_path, on_bad_image="skip"), 0)
    assert len(real.train.bad) == 4
    assert real.train.bad[1].endswith("00000-of-00002.parquet row 2")
    assert real.test.labels.tolist() == [0]
    make_set(tmp_path, spoil={0: None})
    assert "row 0 cannot be read: its `bytes` are null" in failure(parquet(tmp_path))


def test_parquet_wrong_contents(tmp_path):
    make_set(tmp_path / "columns", image="photo")
    assert "none called image or img" in failure(parquet(tmp_path / "columns"))
    make_set(tmp_path / "labels", label="class")
    assert "none called label or labels or fine_label" in failure(parquet(tmp_path / "labels"))
    make_set(tmp_path / "range", train=(0, 1, 0, 1, 2, 0, 1, 0, 1))
    message = failure(parquet(tmp_path / "range"))
    assert "train-00000-of-00002.parquet row 4 has label 2, but 2 classes allow 0..1" in message
    make_set(tmp_path / "negative", test=(0, -1))
    assert "row 1 has label -1" in failure(parquet(tmp_path / "negative"))
    make_set(tmp_path / "null", test=(0, None))
    assert "1 rows without a label" in failure(parquet(tmp_path / "null"))
    make_set(tmp_path / "rows", test=())
    assert "has no rows" in failure(parquet(tmp_path / "rows"))
    broken = make_set(tmp_path / "broken") / "test-00000-of-00001.parquet"
    broken.write_bytes(broken.read_bytes()[:-9])
    assert "no readable Parquet file" in failure(parquet(tmp_path / "broken"))
    plain = pa.table({"image": [b"x"], "label": [0]})
    pq.write_table(plain, broken)
    assert "must be struct<bytes: binary, path>" in failure(parquet(tmp_path / "broken"))
    pq.write_table(pa.table({"image": [{"bytes": b"x"}], "label": [0.5]}), broken)
    assert "must be an integer" in failure(parquet(tmp_path / "broken"))


def test_parquet_missing_files(tmp_path):
    assert "holds nothing" in failure(parquet(tmp_path))
    make_parquet(tmp_path / "train.parquet", [0, 1, 0, 1])
    assert "test*.parquet" in failure(parquet(tmp_path))
    assert "is not a directory" in failure(parquet(tmp_path / "train.parquet"))


def test_parquet_fingerprint(tmp_path):
    base = load_real(parquet(make_set(tmp_path / "a")), 0)
    assert same(load_real(parquet(make_set(tmp_path / "b", group=100)), 0).test, base.test)
    changed = noise(8, 8, 3, seed=1)
    changed[0, 0, 0] ^= 1
    make_set(tmp_path / "c", spoil={1: encoded(Image.fromarray(changed))})
    make_set(tmp_path / "d", names=("cat", "dogs"))
    assert not same(load_real(parquet(tmp_path / "c"), 0).test, base.test)
    assert not same(load_real(parquet(tmp_path / "d"), 0).test, base.test)


# ------------------------------------------------------------------------------------------------ CIFAR


def make_cifar(root, monkeypatch, per_batch=4):
    """A tiny tree in CIFAR-10's own format; torchvision's list of file hashes is replaced by those of this tree."""
    from torchvision.datasets import CIFAR10

    base = root / CIFAR10.base_folder
    base.mkdir(parents=True)

    def write(name, content):
        blob = pickle.dumps(content)
        (base / name).write_bytes(blob)
        return [name, hashlib.md5(blob).hexdigest()]

    def batch(name, seed):
        return write(name, {"data": noise(per_batch * 10, 3072, seed=seed), "labels": list(range(10)) * per_batch})

    names = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    monkeypatch.setattr(CIFAR10, "train_list", [batch(f"data_batch_{i}", i) for i in range(1, 6)])
    monkeypatch.setattr(CIFAR10, "test_list", [batch("test_batch", 9)])
    meta = write("batches.meta", {"label_names": names})
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})
    return names


def test_torchvision_cifar10(tmp_path, monkeypatch):
    names = make_cifar(tmp_path, monkeypatch)
    real = load_real(DataConfig(source="cifar10", path=str(tmp_path)), 0)
    assert real.train.classes == tuple(names)
    assert (len(real.train), len(real.holdout), len(real.test)) == (180, 20, 40)
    assert (real.test.stack(32) == noise(40, 3072, seed=9).reshape(40, 3, 32, 32)).all()
    assert real.test.labels.tolist() == list(range(10)) * 4
    copy = pickle.loads(pickle.dumps(real.train))
    assert copy.fingerprint == real.train.fingerprint
    assert (copy.read(7) == real.train.read(7)).all()
    assert "never resized" in failure(DataConfig(source="cifar10", path=str(tmp_path), image_size=48))


def test_torchvision_cifar_missing(tmp_path):
    for source in ("cifar10", "cifar100"):
        message = failure(DataConfig(source=source, path=str(tmp_path)))
        assert str(tmp_path) in message
        assert "data.download=true" in message
        assert "another data.path" in message


@pytest.fixture(scope="module")
def cifar():
    if not CIFAR.is_dir():
        pytest.skip(f"real CIFAR-10 not checked: {CIFAR} does not exist (set CVDD_SHARED to the folder that has data/)")
    start = time.perf_counter()
    real = load_real(DataConfig(source="parquet", path=str(CIFAR), dataset="cifar10"), 0)
    print(f"\nCIFAR-10: 60,000 images listed and decoded in {time.perf_counter() - start:.1f} s")
    return real


def test_real_cifar10(cifar):
    assert cifar.info == DATASETS["cifar10"]
    assert len(cifar.train) + len(cifar.holdout) == 50_000
    assert len(cifar.test) == 10_000
    assert " ".join(cifar.train.classes) == "airplane automobile bird cat deer dog frog horse ship truck"
    assert np.bincount(cifar.holdout.labels).tolist() == [500] * 10
    assert np.bincount(cifar.train.labels).tolist() == [4500] * 10
    assert np.bincount(cifar.test.labels).tolist() == [1000] * 10
    assert cifar.train.bad == cifar.test.bad == ()


def test_real_cifar10_has_the_tables_statistics(cifar):
    pixels = torch.from_numpy(cifar.train.stack(32)).permute(1, 0, 2, 3).reshape(3, -1).to(torch.float32) / 255
    assert pixels.mean(1).tolist() == pytest.approx(DATASETS["cifar10"].mean, abs=2e-3)
    assert pixels.std(1).tolist() == pytest.approx(DATASETS["cifar10"].std, abs=2e-3)
