"""The dataset table against the figures of the spec, and the way to the network's input against hand arithmetic."""

from dataclasses import replace

import pytest
import torch

from cvdd_ray.config import DataConfig
from cvdd_ray.data.datasets import DATASETS, dataset_info, denormalize, normalize, pixel_bounds
from cvdd_ray.errors import ConfigError

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
# name: classes, size, mean, std, roll, chunk - typed from the table of spec section 1, not from the code
SPEC = {
    "cifar10": (10, 32, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616), 4, 10),
    "cifar100": (100, 32, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761), 4, 100),
    "tiny_imagenet": (200, 64, *IMAGENET, 4, 100),
    "imagenette": (10, 224, *IMAGENET, 32, 10),
    "imagewoof": (10, 224, *IMAGENET, 32, 10),
    "imagenet100": (100, 224, *IMAGENET, 32, 100),
    "imagenet1k": (1000, 224, *IMAGENET, 32, 100),
}


@pytest.mark.parametrize("name", SPEC)
def test_row_is_the_specs(name):
    row = DATASETS[name]
    assert (row.num_classes, row.image_size, row.mean, row.std, row.roll, row.class_chunk) == SPEC[name]
    assert row.name == name


def test_table_has_no_other_rows_than_digits():
    assert set(DATASETS) == {*SPEC, "digits"}
    digits = DATASETS["digits"]
    assert (digits.num_classes, digits.image_size, digits.roll, digits.class_chunk) == (10, 16, 1, 10)


@pytest.mark.parametrize(
    ("source", "row"),
    [
        ("digits", "digits"),
        ("cifar10", "cifar10"),
        ("cifar100", "cifar100"),
        ("imagenette", "imagenette"),
        ("imagenet", "imagenet1k"),
    ],
)
def test_source_has_its_row(source, row):
    assert dataset_info(DataConfig(source=source)) == DATASETS[row]


@pytest.mark.parametrize("source", ["folder", "parquet"])
def test_dataset_names_the_row_of_files(source):
    assert dataset_info(DataConfig(source=source, dataset="tiny_imagenet")) == DATASETS["tiny_imagenet"]


@pytest.mark.parametrize(("size", "roll"), [(32, 4), (64, 4), (65, 32), (224, 32)])
def test_unnamed_files_get_imagenet_statistics(size, roll):
    info = dataset_info(DataConfig(source="folder", image_size=size))
    assert (info.num_classes, info.image_size, info.mean, info.std, info.roll) == (0, size, *IMAGENET, roll)


def test_unnamed_files_need_a_size():
    with pytest.raises(ConfigError, match=r"data\.image_size"):
        dataset_info(DataConfig(source="folder"))


def test_image_size_overrides_and_roll_follows_across_64_px():
    digits = dataset_info(DataConfig(image_size=32))
    assert (digits.image_size, digits.roll) == (32, 1)
    assert digits.mean == DATASETS["digits"].mean
    assert dataset_info(DataConfig(source="imagenette", image_size=64)).roll == 4
    assert dataset_info(DataConfig(source="cifar10", image_size=224)).roll == 32


def test_unknown_dataset_lists_the_known():
    with pytest.raises(ConfigError, match=r"'mnist' is unknown.*tiny_imagenet"):
        dataset_info(DataConfig(source="folder", dataset="mnist"))


def test_dataset_must_not_contradict_the_source():
    with pytest.raises(ConfigError, match=r"'cifar100' contradicts data\.source 'cifar10'"):
        dataset_info(DataConfig(source="cifar10", dataset="cifar100"))
    assert dataset_info(DataConfig(source="imagenet", dataset="imagenet1k")).num_classes == 1000


def test_normalize_by_hand():
    pixels = torch.tensor([[0, 255], [51, 102]], dtype=torch.uint8).expand(2, 3, 2, 2)
    x = normalize(pixels, DATASETS["cifar10"])
    assert x.dtype == torch.float32
    assert x.shape == (2, 3, 2, 2)
    assert x[0, 0, 0, 0].item() == pytest.approx(-0.4914 / 0.2470, rel=1e-6)
    assert x[1, 1, 0, 1].item() == pytest.approx((1 - 0.4822) / 0.2435, rel=1e-6)
    assert x[1, 2, 1, 0].item() == pytest.approx((0.2 - 0.4465) / 0.2616, rel=1e-6)


def test_normalize_refuses_floats():
    with pytest.raises(TypeError, match="uint8"):
        normalize(torch.zeros(1, 3, 2, 2), DATASETS["cifar10"])


@pytest.mark.parametrize("name", DATASETS)
def test_denormalize_inverts_normalize_for_every_pixel_value(name):
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).repeat(1, 3, 1, 1)
    assert torch.equal(denormalize(normalize(pixels, DATASETS[name]), DATASETS[name]), pixels)


def test_denormalize_rounds_and_clamps():
    info = DATASETS["cifar10"]
    wanted = torch.tensor([-3.0, 99.4, 99.6, 300.0])  # in pixel values; truncation would give 99 twice
    x = (wanted.view(1, 1, 1, 4) / 255 - torch.tensor(info.mean).view(1, 3, 1, 1)) / torch.tensor(info.std).view(
        1, 3, 1, 1
    )
    assert denormalize(x, info)[0, 2, 0].tolist() == [0, 99, 100, 255]
    assert denormalize(x, info).dtype == torch.uint8


def test_pixel_bounds_are_black_and_white():
    info = DATASETS["imagenette"]
    low, high = pixel_bounds(info)
    assert low.tolist() == pytest.approx([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225])
    assert high.tolist() == pytest.approx([0.515 / 0.229, 0.544 / 0.224, 0.594 / 0.225])


def test_given_colours_take_the_tables_place():
    """SRe2L normalises CIFAR in its own way; the rest of the row stays."""
    given = {"mean": (0.4914, 0.4822, 0.4465), "std": (0.2023, 0.1994, 0.2010)}
    row = dataset_info(DataConfig(source="cifar100", path="x", **given))
    assert (row.mean, row.std) == (given["mean"], given["std"])
    assert replace(row, mean=DATASETS["cifar100"].mean, std=DATASETS["cifar100"].std) == DATASETS["cifar100"]
    assert dataset_info(DataConfig(source="folder", path="x", image_size=224, mean=(0.1, 0.2, 0.3))).mean == (
        0.1,
        0.2,
        0.3,
    )
