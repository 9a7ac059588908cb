"""Keys: numbers that depend on their place alone. Schedules: the values the spec lists (section 11, check 5)."""

import itertools
import math

import pytest
import torch

from cvdd_ray.core.keys import generator, key
from cvdd_ray.core.schedules import recover_lr, smallest_area, smoothed_cosine_lr, student_lr


def test_a_key_depends_on_every_part_and_its_type():
    places = [
        (0,),
        (1,),
        (0, "view"),
        (0, "view", 1),
        (0, "view", "1"),
        (0, 1, "view"),
        (0, "view", 1, 2),
        (0, "view", 2, 1),
    ]
    keys = [key(*place) for place in places]
    assert len(set(keys)) == len(places)
    assert all(0 <= number < 2**63 for number in keys)
    assert keys == [key(*place) for place in places]


def test_a_key_never_changes():
    assert key(7, "synthesis-view", 3, 0) == 287042472807403041  # checkpoints and finished runs rest on it


def test_keys_are_spread_over_the_whole_range():
    high = sum(key(0, i) >= 2**62 for i in range(2000))
    odd = sum(key(0, i) % 2 for i in range(2000))
    assert abs(high - 1000) < 150
    assert abs(odd - 1000) < 150


def test_generators_of_one_place_agree_and_leave_the_global_one_alone():
    before = torch.get_rng_state()
    one, same, other = (torch.rand(8, generator=generator(*place)) for place in ((3, "a", 1), (3, "a", 1), (3, "a", 2)))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)
    assert torch.equal(before, torch.get_rng_state())


def test_recover_schedule_has_the_listed_values():
    values = [recover_lr(0.25, t, 4000) for t in (0, 2000, 3999)]
    assert values[:2] == pytest.approx([0.25, 0.125], rel=1e-12)
    assert values[2] == pytest.approx(3.9e-8, abs=0.05e-8)
    rates = [recover_lr(0.25, t, 4000) for t in range(4000)]
    assert all(later < earlier for earlier, later in itertools.pairwise(rates))


@pytest.mark.parametrize(
    ("eta", "epoch", "multiplier"),
    [(1, 0, 1.0), (1, 150, 0.5), (2, 0, 1.0), (2, 150, 0.85355), (2, 240, 0.65451), (2, 299, 0.50262)],
)
def test_student_schedule_has_the_listed_values(eta, epoch, multiplier):
    assert smoothed_cosine_lr(1.0, epoch, 300, eta) == pytest.approx(multiplier, abs=5e-6)
    assert smoothed_cosine_lr(0.001, epoch, 300, eta) == pytest.approx(0.001 * multiplier, abs=5e-9)


def test_eta_one_ends_near_zero_and_eta_two_above_one_half():
    assert 0 < smoothed_cosine_lr(1.0, 299, 300, 1) < 3e-5
    assert min(smoothed_cosine_lr(1.0, e, 300, 2) for e in range(300)) > 0.5
    assert smoothed_cosine_lr(1.0, 10, 100, 1) == pytest.approx((1 + math.cos(math.pi / 10)) / 2, rel=1e-12)


@pytest.mark.parametrize(
    ("kind", "eta", "epoch", "multiplier"),
    [("linear", 1, 0, 1.0), ("linear", 1, 75, 0.25), ("linear", 2, 100, 0.5), ("constant", 1, 60, 1.0),
     ("cosine", 1, 50, 0.5)],
)  # fmt: skip
def test_kinds_of_schedules_by_hand(kind, eta, epoch, multiplier):
    assert student_lr(kind, 0.02, epoch, 100, eta=eta) == pytest.approx(0.02 * multiplier, rel=1e-12)


def test_warmup_climbs_in_equal_steps_and_the_schedule_has_the_rest():
    rates = [student_lr("linear", 1.0, e, 14, eta=1.0, warmup_epochs=4) for e in range(14)]
    assert rates[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert rates[4:] == pytest.approx([1 - k / 10 for k in range(10)])


def test_smallest_crops_shrink_as_cda_does():
    """Spec 9.2 and check 5: five values of 4,000 iterations; the other courses and a milestone by hand."""
    at = (0, 1000, 2000, 3000, 3999)
    found = [smallest_area("cosine", 0.08, 1.0, t, 4000, 1.0) for t in at]
    assert found == pytest.approx([1, 0.86527, 0.54, 0.21473, 0.08], abs=1e-5)
    assert [smallest_area("linear", 0.08, 1.0, t, 4000, 0.5) for t in at] == pytest.approx([1, 0.54, 0.08, 0.08, 0.08])
    assert [smallest_area("step", 0.2, 0.9, t, 4000, 0.5) for t in at] == [0.9, 0.9, 0.2, 0.2, 0.2]
    assert {smallest_area("constant", 0.2, 0.9, t, 4000, 1.0) for t in at} == {0.2}
