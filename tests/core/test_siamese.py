"""DSA: one operation for a batch, a function of the key, differentiable; each does what it says."""

import math

import pytest
import torch
from torch.nn import functional as F

from cvdd_ray.core.keys import generator
from cvdd_ray.core.siamese import OPERATIONS, augmented, draw_operation, operations

SIZE = 12


def images(num=3, dtype=torch.float64):
    return torch.randn(num, 3, SIZE, SIZE, dtype=dtype, generator=torch.Generator().manual_seed(1))


def test_what_is_drawn_depends_on_the_place_alone_and_covers_all_operations():
    drawn = [draw_operation(operations(True), generator(0, "x", k)) for k in range(200)]
    assert drawn == [draw_operation(operations(True), generator(0, "x", k)) for k in range(200)]
    assert {name for name, _ in drawn} == set(OPERATIONS)
    assert len({numbers for _, numbers in drawn}) == 200
    assert all(0 <= number < 1 for _, numbers in drawn for number in numbers)
    assert "flip" not in operations(False)
    assert set(operations(False)) | {"flip"} == set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_all_images_of_a_batch_get_the_same_view_and_a_second_call_the_same_bits(name):
    for numbers in ((0.1, 0.9, 0.3), (0.7, 0.2, 0.8)):
        together = augmented(images(), (name, numbers))
        assert torch.equal(together, augmented(images(), (name, numbers)))
        assert together.shape == images().shape
        for one, view in zip(images(), together, strict=True):
            torch.testing.assert_close(augmented(one[None], (name, numbers))[0], view)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_differentiable_as_finite_differences_say(name):
    x = images(2)[:, :, :8, :8].clone().requires_grad_(True)
    assert torch.autograd.gradcheck(lambda x: augmented(x, (name, (0.31, 0.62, 0.77))), x)


def test_colour_is_what_its_numbers_say():
    x = images()
    torch.testing.assert_close(augmented(x, ("color", (0.5, 0.5, 0.5))), x)
    torch.testing.assert_close(augmented(x, ("color", (0.9, 0.5, 0.5))), x + 0.4)
    grey = augmented(x, ("color", (0.5, 0.0, 0.5)))
    torch.testing.assert_close(grey, x.mean(1, keepdim=True).expand_as(x))
    strong = augmented(x, ("color", (0.5, 0.5, 0.999999999)))
    torch.testing.assert_close(strong.std((1, 2, 3)), 1.5 * x.std((1, 2, 3)))


def test_a_crop_moves_and_a_cut_out_box_is_zero():
    x = images() + 100
    moved = augmented(
        x, ("crop", (0.0, 0.999, 0.0))
    )  # shift of 2 of 12 pixels: down the padding's end, and to its other
    torch.testing.assert_close(moved[:, :, 2:, :-2], x[:, :, :-2, 2:])
    assert not moved[:, :, :2].any()
    assert not moved[:, :, :, -2:].any()
    holes = [(augmented(x, ("cutout", (a / 13, b / 13, 0.0))) == 0)[0, 0] for a in range(13) for b in range(13)]
    sizes = {int(hole.sum()) for hole in holes}
    assert max(sizes) == 36  # half the side, squared
    assert min(sizes) == 9  # around a corner
    assert sum(holes).bool().all(), "every pixel can be cut out"


def test_a_flip_happens_half_the_time():
    x = images()
    torch.testing.assert_close(augmented(x, ("flip", (0.49, 0.0, 0.0))), x.flip(3))
    assert torch.equal(augmented(x, ("flip", (0.5, 0.0, 0.0))), x)


@pytest.mark.parametrize("name", ["scale", "rotate"])
def test_turns_and_zooms_are_those_of_grid_sample(name):
    """Against torch's own resampling, with the affine map written down for its coordinates (right, down)."""
    numbers = (0.2, 0.9, 0.0)
    if name == "scale":
        down, right = (1 / 1.2 + u * (1.2 - 1 / 1.2) for u in numbers[:2])
        theta = [[right, 0.0, 0.0], [0.0, down, 0.0]]
    else:
        a = math.radians(30 * numbers[0] - 15)
        theta = [[math.cos(a), math.sin(a), 0.0], [-math.sin(a), math.cos(a), 0.0]]
    x = images(dtype=torch.float32)
    grid = F.affine_grid(torch.tensor([theta] * len(x)), list(x.shape), align_corners=False)
    expected = F.grid_sample(x, grid, align_corners=False)
    torch.testing.assert_close(augmented(x, (name, numbers)), expected, atol=1e-5, rtol=1e-5)
