"""Starting patches: ranks and tiles by hand and by numpy, scores by formula, at most one patch per real image."""

import itertools
import tempfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import normal, tiny_net
from torch import nn
from torch.nn import functional as F

from cvdd_ray.config import InitializeConfig
from cvdd_ray.core.patches import mosaic_ranks, observer_losses, random_patches, rank_window, tile
from cvdd_ray.data.datasets import DatasetInfo
from cvdd_ray.data.imagesets import read_image_set
from cvdd_ray.data.shards import ShardTask
from cvdd_ray.data.storage import Store
from cvdd_ray.stages.initialize import (
    START,
    ClassImages,
    Patching,
    Scorer,
    chosen_cuts,
    cut_piece,
    read_crops,
    tile_shard,
)

INFO = DatasetInfo("toy", 2, 16, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 1, 2)


def test_mosaic_of_two_images_with_four_cells():
    assert mosaic_ranks(2, 2) == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(("num_images", "factor"), [(1, 1), (5, 1), (3, 2), (4, 3)])
def test_mosaics_use_every_rank_once_and_give_later_cells_higher_ones(num_images, factor):
    ranks = mosaic_ranks(num_images, factor)
    assert sorted(itertools.chain(*ranks)) == list(range(num_images * factor**2))
    columns = np.array(ranks).T  # cell k of all images
    assert (columns[1:].min(1, initial=10**6) > columns[:-1].max(1, initial=-1)).all()


@pytest.mark.parametrize(
    ("num_candidates", "needed", "difficulty", "first"),
    [
        (10, 4, "easy", 0),
        (10, 4, "medium", 3),
        (10, 4, "hard", 6),
        (9, 4, "medium", 2),
        (4, 4, "medium", 0),
        (4, 4, "hard", 0),
    ],
)
def test_rank_windows(num_candidates, needed, difficulty, first):
    assert list(rank_window(num_candidates, needed, difficulty)) == list(range(first, first + needed))


# --- tiles ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "factor"), [(8, 1), (8, 2), (9, 3), (7, 2), (11, 3), (16, 5)])
def test_tile_is_numpy_s(size, factor):
    side = -(-size // factor)
    patches = normal(0, factor**2, 3, side, side)
    edges = [size // factor + (cell < size % factor) for cell in range(factor)]
    starts = np.cumsum([0, *edges])
    expected = np.empty((3, size, size), np.float32)
    for cell, patch in enumerate(patches.numpy()):
        row, column = divmod(cell, factor)
        ys = np.arange(edges[row]) * side // edges[row]
        xs = np.arange(edges[column]) * side // edges[column]
        expected[:, starts[row] : starts[row + 1], starts[column] : starts[column + 1]] = patch[:, ys][:, :, xs]
    tiled = tile(list(patches), factor, size)
    assert tiled.shape == (3, size, size)
    np.testing.assert_array_equal(tiled.numpy(), expected)


# --- scores --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("side", "before"), [(12, 0), (6, 3), (7, 2)])
def test_observer_sees_the_patch_in_the_middle_of_the_mean_colour(side, before):
    net, patches = tiny_net(1), normal(0, 5, 3, side, side)
    padded = torch.zeros(5, 3, 12, 12)
    padded[:, :, before : before + side, before : before + side] = patches
    with torch.no_grad():
        expected = -F.softmax(net(padded), 1)[:, 2].log()
    torch.testing.assert_close(observer_losses(net, patches, 2, 12), expected, rtol=1e-4, atol=1e-6)


def test_a_hopeless_patch_has_a_finite_loss():
    observer = nn.Sequential(nn.Flatten(), nn.Linear(12, 2))
    with torch.no_grad():
        observer[1].weight.copy_(torch.stack([torch.full((12,), 100.0), torch.full((12,), -100.0)]))
    loss = observer_losses(observer, torch.ones(1, 3, 2, 2), 1, 2)
    assert float(loss[0]) == pytest.approx(2400, rel=1e-3)  # softmax itself underflows


def test_patches_are_square_parts_of_the_image():
    rows = torch.arange(20.0)[:, None].expand(20, 30)
    columns = torch.arange(30.0)[None, :].expand(20, 30)
    patches = random_patches(torch.stack([rows, columns, rows]), 200, 5, torch.Generator().manual_seed(0))
    assert patches.shape == (200, 3, 5, 5)
    heights = patches[:, 0, -1, 0] - patches[:, 0, 0, 0]
    widths = patches[:, 1, 0, -1] - patches[:, 1, 0, 0]
    inner = heights / 0.8  # four of five steps; the antialiased edge rows are pulled inwards
    assert torch.allclose(heights, widths, atol=1e-3)
    assert (patches >= 0).all()
    assert (patches[:, 0] <= 19).all()
    assert (patches[:, 1] <= 29).all()
    area = (inner / 20) * (inner / 30)
    assert 0.03 < float(area.min()) < 0.15
    assert len({round(float(left), 3) for left in patches[:, 1, 0, 0]}) > 100


# --- from real images to starting images ---------------------------------------------------------------------------


class Brightness(nn.Module):
    """An observer to which class 1 is bright: its loss falls with the mean pixel."""

    def forward(self, x):
        bright = x.mean((1, 2, 3))
        return torch.stack([-bright, bright], 1)


OBSERVER = SimpleNamespace(build=lambda device: Brightness())


def flat_images(levels):
    """One image of one colour per level, so that every patch shows where it came from."""
    return np.stack([np.full((3, 16, 16), level, np.uint8) for level in levels])


def starting(levels, ipc, factor, difficulty="easy", seed=0, num_crops=3):
    config = InitializeConfig(difficulty=difficulty, num_crops=num_crops)
    images = flat_images(levels)
    return scored_and_chosen(images, Patching(config, ipc, factor, seed, INFO))


def scored_and_chosen(images, patching):
    """Starting images of class 1 of 2, as the stage makes them: losses of all crops first, then the chosen crops."""
    one = ClassImages(1, np.arange(len(images)), np.array([], int))
    scorer = Scorer(images, patching, OBSERVER)
    places = [(index, 1, index) for index in range(len(images))]
    rows = np.concatenate([scorer(block) for block in read_crops(places, images, patching, OBSERVER)])
    assert rows[:, :2].tolist() == [[1, position] for position in range(len(images))]
    with tempfile.TemporaryDirectory() as folder:
        store, report = Store(folder), lambda report: None
        cuts = chosen_cuts([one], {1: rows[:, 2:]}, patching)
        for name, part in (("a", cuts[: len(cuts) // 2]), ("b", cuts[len(cuts) // 2 :])):
            cut_piece((part, name), images, patching, store, report)
        task = ShardTask("set", range(patching.ipc))
        tile_shard(task, store, ("bright",), {"kind": START, "ipc": patching.ipc}, ["a", "b"], patching, report)
        return read_image_set(store.read("set"), "set").images_NCHW


def cell_levels(image, factor):
    side = 16 // factor
    return [
        int(np.unique(image[:, r * side : (r + 1) * side, c * side : (c + 1) * side]).item())
        for r in range(factor)
        for c in range(factor)
    ]


LEVELS = [10, 200, 60, 120, 240, 90, 30, 160, 140, 80, 220, 50]  # brightest first: 240 220 200 160 140 120 90 80 ...


def test_every_patch_comes_from_another_image_and_the_first_cells_hold_the_best():
    start = starting(LEVELS, ipc=2, factor=2)
    assert start.dtype == np.uint8
    assert start.shape == (2, 3, 16, 16)
    cells = [cell_levels(image, 2) for image in start]
    assert cells == [[240, 200, 140, 90], [220, 160, 120, 80]]
    assert len(set(itertools.chain(*cells))) == 8


@pytest.mark.parametrize(
    ("difficulty", "expected"), [("easy", [240, 220, 200]), ("medium", [140, 120, 90]), ("hard", [50, 30, 10])]
)
def test_difficulty_chooses_the_window_of_ranks(difficulty, expected):
    levels = [*LEVELS, 5][:12]
    start = starting(levels, ipc=3, factor=1, difficulty=difficulty)
    by_rank = sorted(levels, reverse=True)
    first = {"easy": 0, "medium": 4, "hard": 9}[difficulty]
    assert [cell_levels(image, 1)[0] for image in start] == by_rank[first : first + 3] == expected


def test_the_best_crop_of_an_image_is_kept():
    """Half black, half white: the kept crop of many is nearly all white, that of one is not."""
    image = np.zeros((1, 3, 16, 16), np.uint8)
    image[:, :, :, 8:] = 255

    def brightness(num_crops, seed):
        config = InitializeConfig(difficulty="easy", num_crops=num_crops)
        return scored_and_chosen(image, Patching(config, 1, 1, seed, INFO)).mean()

    assert np.mean([brightness(20, seed) for seed in range(5)]) > 220
    assert np.mean([brightness(1, seed) for seed in range(20)]) < 190


def test_starting_images_repeat_and_depend_on_the_seed():
    draw = np.random.default_rng(0)
    images = draw.integers(0, 256, (6, 3, 16, 16), dtype=np.uint8)

    def make(seed):
        return scored_and_chosen(images, Patching(InitializeConfig(), 2, 1, seed, INFO))

    assert np.array_equal(make(0), make(0))
    assert not np.array_equal(make(0), make(1))
