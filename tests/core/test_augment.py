"""Views against torchvision and against a marker pixel, their distributions against torchvision's, CutMix by loops."""

import math
from collections import Counter

import pytest
import torch
from helpers import normal
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2 import functional as tvf

from cvdd_ray.core.augment import (
    Views,
    apply_views,
    cutmix,
    draw_boxes,
    draw_cutmix_box,
    draw_views,
    resample_matrix,
)


def draw(seed=0):
    return torch.Generator().manual_seed(seed)


def view(box, flip=False, roll=(0, 0)):
    return Views(torch.tensor([box]), torch.tensor([flip]), torch.tensor([roll]))


def naive_view(image_CHW, views, n, size):
    """Crop, then flip, then roll, by torchvision and torch.roll."""
    cropped = tvf.resized_crop(image_CHW, *views.boxes_N4[n].tolist(), [size, size], antialias=True)
    flipped = tvf.horizontal_flip(cropped) if views.flips_N[n] else cropped
    return torch.roll(flipped, tuple(views.rolls_N2[n].tolist()), (-2, -1))


# --- geometry ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(16, 16, 16), (12, 20, 32), (40, 28, 12), (33, 65, 16), (64, 9, 24)],
    ids=["same", "up", "down", "odd", "up and down"],
)
def test_views_are_torchvision_s(height, width, size):
    images = normal(1, 40, 3, height, width)
    boxes_N4 = draw_boxes(40, height, width, draw(2))
    boxes_N4[0] = torch.tensor([height - 1, width - 1, 1, 1])  # a single pixel
    boxes_N4[1] = torch.tensor([0, 0, height, width])
    views = Views(boxes_N4, torch.arange(40) % 2 == 0, torch.randint(5, (40, 2), generator=draw(3)))
    expected = torch.stack([naive_view(images[n], views, n, size) for n in range(40)])
    assert torch.allclose(apply_views(images, views, size), expected, atol=2e-6)


def test_gradient_through_a_view_is_torchvision_s():
    image = normal(1, 1, 3, 20, 14).requires_grad_(True)
    views = view((3, 2, 15, 9), flip=True, roll=(2, 3))
    for size in (8, 24):
        seed_gradient = normal(2, 1, 3, size, size)
        (ours,) = torch.autograd.grad(apply_views(image, views, size), image, seed_gradient)
        (theirs,) = torch.autograd.grad(naive_view(image[0], views, 0, size)[None], image, seed_gradient)
        assert torch.allclose(ours, theirs, atol=2e-6)
        outside = torch.ones(20, 14, dtype=torch.bool)
        outside[3:18, 2:11] = False
        assert not ours[0, :, outside].any()  # a crop does not look beyond its box


def test_a_view_is_linear_in_the_image():
    one, other = normal(1, 2, 5, 3, 9, 9), normal(2, 2, 5, 3, 9, 9)
    views = draw_views(2, 9, draw(), crop=True, flip=True, roll=2)
    both = apply_views(2 * one - 3 * other, views, 9)
    assert torch.allclose(both, 2 * apply_views(one, views, 9) - 3 * apply_views(other, views, 9), atol=1e-5)


def test_matrix_rows_are_weights_inside_the_cut():
    rows_NSH = resample_matrix(torch.tensor([0, 5, 2]), torch.tensor([16, 3, 13]), 16, 6)
    assert torch.allclose(rows_NSH.sum(2), torch.ones(3, 6))
    assert (rows_NSH >= 0).all()
    inside = torch.zeros(3, 16, dtype=torch.bool)
    inside[0], inside[1, 5:8], inside[2, 2:15] = True, True, True
    assert not rows_NSH.transpose(1, 2)[~inside].any()


def test_flip_comes_before_roll():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 2, 1] = 1.0  # column 1 -> 6 by the flip -> 6 + 4 = 10 = 2 by the roll; row 2 -> 5
    moved = apply_views(image, view((0, 0, 8, 8), flip=True, roll=(3, 4)), 8)
    assert moved.nonzero().tolist() == [[0, 0, 5, 2]]
    assert moved[0, 0, 5, 2] == 1.0


def test_crop_comes_before_flip_and_roll():
    image = torch.zeros(1, 1, 8, 8)
    image[0, 0, 4, 1] = 1.0  # in the box: row 2, column 0; doubled: rows 4-5, columns 0-1
    cut = apply_views(image, view((2, 1, 4, 4)), 8)[0, 0]
    assert tuple(divmod(int(cut.argmax()), 8)) in {(4, 0), (5, 0)}
    assert not cut[:2].any()
    assert not cut[:, 4:].any()
    moved = apply_views(image, view((2, 1, 4, 4), flip=True, roll=(1, 2)), 8)[0, 0]
    assert torch.equal(moved, cut.flip(1).roll((1, 2), (0, 1)))
    assert not torch.equal(moved, cut.roll((1, 2), (0, 1)).flip(1))


def test_roll_is_circular_downwards_and_to_the_right():
    image = torch.zeros(1, 1, 4, 4)
    image[0, 0, 3, 0] = 1.0
    assert apply_views(image, view((0, 0, 4, 4), roll=(1, 0)), 4).nonzero().tolist() == [[0, 0, 0, 0]]
    assert apply_views(image, view((0, 0, 4, 4), roll=(0, 1)), 4).nonzero().tolist() == [[0, 0, 3, 1]]


def test_whole_box_without_flip_and_roll_changes_no_bit():
    images = normal(3, 2, 3, 16, 16)
    views = draw_views(2, 16, draw(), crop=False, flip=False, roll=0)
    assert torch.equal(apply_views(images, views, 16), images)


def test_all_images_of_a_job_share_one_view():
    image = normal(1, 3, 12, 12)
    views = draw_views(2, 12, draw(5), crop=True, flip=True, roll=4)
    replicated = apply_views(image.expand(2, 6, 3, 12, 12), views, 12)
    assert replicated.shape == (2, 6, 3, 12, 12)
    assert all(torch.equal(replicated[:, 0], replicated[:, b]) for b in range(6))
    assert not torch.equal(replicated[0], replicated[1])
    assert torch.allclose(replicated[1, 3], naive_view(image, views, 1, 12), atol=2e-6)


# --- what is drawn -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("roll", [0, 1, 4])
def test_rolls_are_uniform_and_never_negative(roll):
    rolls_N2 = draw_views(8000, 8, draw(), crop=False, flip=False, roll=roll).rolls_N2
    counts = Counter(map(tuple, rolls_N2.tolist()))
    assert set(counts) == {(a, b) for a in range(roll + 1) for b in range(roll + 1)}
    expected = 8000 / (roll + 1) ** 2
    assert all(abs(count - expected) <= 5 * math.sqrt(expected) for count in counts.values())


def test_rolls_go_both_ways_where_that_is_asked_for():
    rolls_N2 = draw_views(8000, 8, draw(), crop=False, flip=False, roll=2, roll_both_ways=True).rolls_N2
    counts = Counter(map(tuple, rolls_N2.tolist()))
    assert set(counts) == {(a, b) for a in range(-2, 3) for b in range(-2, 3)}
    assert all(abs(count - 320) <= 5 * math.sqrt(320) for count in counts.values())
    image = torch.arange(64.0).view(1, 1, 8, 8)
    back = Views(torch.tensor([[0, 0, 8, 8]]), torch.tensor([False]), torch.tensor([[-1, -2]]))
    assert torch.equal(apply_views(image, back, 8), image.roll((-1, -2), (2, 3)))


def test_every_box_may_have_a_smallest_area_of_its_own():
    lows = torch.tensor([0.08, 0.5, 1.0], dtype=torch.float64).repeat_interleave(2000)
    boxes_N4 = draw_boxes(6000, 40, 40, draw(), (lows, 1.0))
    shares = (boxes_N4[:, 2] * boxes_N4[:, 3] / 1600).view(3, 2000)
    assert 0.06 < shares[0].min() < 0.12
    assert 0.47 < shares[1].min() < 0.54
    assert (shares[2] > 0.95).all()
    assert (boxes_N4[:, 0] + boxes_N4[:, 2] <= 40).all()


def test_flips_are_fair_or_off_and_boxes_whole_without_crop():
    flips_N = draw_views(4000, 8, draw(), crop=False, flip=True, roll=0).flips_N
    assert abs(int(flips_N.sum()) - 2000) < 160
    still = draw_views(100, 8, draw(), crop=False, flip=False, roll=0)
    assert len(still) == 100
    assert not still.flips_N.any()
    assert (still.boxes_N4 == torch.tensor([0, 0, 8, 8])).all()


def test_draws_repeat_and_leave_the_global_generator_alone():
    before = torch.get_rng_state()
    one, two = (draw_views(50, 16, draw(9), crop=True, flip=True, roll=4) for _ in range(2))
    assert draw_cutmix_box(16, draw(1)) == draw_cutmix_box(16, draw(1))
    assert all(torch.equal(getattr(one, name), getattr(two, name)) for name in ("boxes_N4", "flips_N", "rolls_N2"))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("height", "width", "scale", "ratio"),
    [(32, 32, (0.08, 1.0), (3 / 4, 4 / 3)), (24, 50, (0.08, 1.0), (3 / 4, 4 / 3)), (32, 32, (0.3, 0.5), (1.0, 1.0))],
)
def test_boxes_are_distributed_as_torchvision_s(height, width, scale, ratio):
    ours = draw_boxes(20_000, height, width, draw(), scale, ratio).double()
    image = torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        theirs = torch.tensor([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(4000)]).double()
    assert (ours >= 0).all()
    assert (ours[:, 2:] >= 1).all()
    assert (ours[:, 0] + ours[:, 2] <= height).all()
    assert (ours[:, 1] + ours[:, 3] <= width).all()
    for statistic in (  # area, aspect, and where there is room to move
        lambda b: b[:, 2] * b[:, 3] / (height * width),
        lambda b: (b[:, 3] / b[:, 2]).log(),
        lambda b: b[:, 0] / (height - b[:, 2]).clamp(min=1),
        lambda b: b[:, 1] / (width - b[:, 3]).clamp(min=1),
        lambda b: b[:, 3],
    ):
        one, two = statistic(ours), statistic(theirs)
        error = math.sqrt(float(one.var() / len(one) + two.var() / len(two))) + 1e-9
        assert abs(float(one.mean() - two.mean())) < 4 * error
        assert float(one.std()) == pytest.approx(float(two.std()), rel=0.06, abs=1e-9)


@pytest.mark.parametrize(("height", "width"), [(10, 100), (100, 10), (7, 300), (1, 50)])
def test_an_image_too_long_for_any_box_gets_torchvision_s_central_one(height, width):
    ours = draw_boxes(3, height, width, draw(), (1.0, 1.0))
    theirs = torch.tensor(RandomResizedCrop.get_params(torch.empty(3, height, width), [1.0, 1.0], [3 / 4, 4 / 3]))
    assert (ours[:, 2:] == theirs[2:]).all()
    assert ((ours[:, :2] - theirs[:2]).abs() <= 1).all()


def test_the_whole_square_when_scale_and_ratio_are_one():
    assert (draw_boxes(50, 32, 32, draw(), (1.0, 1.0), (1.0, 1.0)) == torch.tensor([0, 0, 32, 32])).all()


# --- CutMix --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box", [(1, 2, 5, 4), (0, 0, 6, 6), (3, 0, 3, 5)])
def test_cutmix_is_the_loop_and_leaves_its_input_alone(box):
    images = normal(1, 4, 3, 6, 6)
    kept, partner_B = images.clone(), torch.tensor([1, 2, 3, 0])
    expected = images.clone()
    for b in range(4):
        for row in range(box[0], box[2]):
            for column in range(box[1], box[3]):
                expected[b, :, row, column] = kept[partner_B[b], :, row, column]
    mixed = cutmix(images, partner_B, box)
    assert torch.equal(mixed, expected)
    assert torch.equal(images, kept)
    assert mixed.data_ptr() != images.data_ptr()


def test_cutmix_boxes_have_the_clipped_beta_area():
    size, shared = 32, draw(4)
    boxes = torch.tensor([draw_cutmix_box(size, shared) for _ in range(8000)])
    assert (boxes >= 0).all()
    assert (boxes <= size).all()
    assert (boxes[:, 2:] >= boxes[:, :2]).all()
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]) / size**2
    assert float(area.mean()) == pytest.approx(0.30, abs=0.012)
    assert 0.001 < float((area == 0).float().mean()) < 0.02
    middle = boxes[(boxes[:, 0] > 0) & (boxes[:, 2] < size) & (boxes[:, 1] > 0) & (boxes[:, 3] < size)]
    assert (middle[:, 2] - middle[:, 0] == middle[:, 3] - middle[:, 1]).all()  # a square where nothing is clipped
    assert float(boxes[:, 0].double().mean()) == pytest.approx(float(boxes[:, 1].double().mean()), abs=0.6)
