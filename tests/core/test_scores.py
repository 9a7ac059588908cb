"""Scores against numbers worked out by hand."""

import math

import pytest

from cvdd_ray.core.scores import (
    augmentation_robust_score,
    hard_label_recovery,
    improvement_over_random,
    label_robust_score,
    normalised,
)


def test_gains_are_differences_of_accuracies():
    assert hard_label_recovery(0.9, 0.35) == pytest.approx(0.55)
    assert improvement_over_random(0.42, 0.45) == pytest.approx(-0.03)


def test_the_scale_ends_at_0_and_1_and_no_gain_is_0_269():
    assert [normalised(gain) for gain in (-1, 1)] == [0, 1]
    assert normalised(0) == pytest.approx((1 - 0.36787944) / (2.71828183 - 0.36787944))
    assert round(normalised(0), 3) == 0.269


def test_label_robust_score_by_hand():
    """HLR .5 and IOR .1: alpha = .5 * .1 - .5 * .5 = -.2, e^-.2 = .81873075, (.81873075 - .36787944) / 2.35040239."""
    assert label_robust_score(0.5, 0.1) == pytest.approx(0.45085131 / 2.35040239)
    assert label_robust_score(0.5, 0.1, weight=1) == pytest.approx((math.exp(0.1) - 0.36787944) / 2.35040239)
    assert label_robust_score(0.4, 0.1) > label_robust_score(0.5, 0.1)  # losing less without soft labels is better


def test_augmentation_robust_score_by_hand():
    """Gains .2 and -.1: .05, e^.05 = 1.05127110, (1.05127110 - .36787944) / 2.35040239."""
    assert augmentation_robust_score(0.2, -0.1) == pytest.approx(0.68339166 / 2.35040239)
    assert augmentation_robust_score(0.2, -0.1, weight=1) == pytest.approx(normalised(0.2))
    assert augmentation_robust_score(0.2, -0.1, weight=0) == pytest.approx(normalised(-0.1))
