"""Real images chosen by features, against choices made by hand and by trying all."""

import pytest
import torch
from helpers import normal, tiny_net

from cvdd_ray.core.coresets import features, herding, k_center


def test_features_are_what_the_last_layer_is_given():
    net, images = tiny_net(1, dropout=0.5), normal(0, 5, 3, 8, 8)
    found = features(net, images)
    assert torch.allclose(net[-1](found), net(images), atol=1e-6)
    assert not net[-1]._forward_pre_hooks


def test_k_center_by_hand():
    """Mean 3.2: 3 is nearest; then the farthest of those chosen, and so on."""
    points = torch.tensor([[0.0], [1.0], [3.0], [4.0], [8.0]])
    assert k_center(points, 4) == [2, 4, 0, 1]  # 8 is 5 off, 0 is 3 off, then 1 and 4 are 1 off


def test_k_center_is_the_greedy_one():
    points = normal(0, 12, 4)
    chosen = k_center(points, 6)
    for count in range(1, 6):
        off = torch.cdist(points, points[chosen[:count]]).min(1).values
        assert float(off[chosen[count]]) == pytest.approx(float(off.max()))


def test_herding_is_the_greedy_one_and_follows_the_mean():
    points = normal(1, 12, 4)
    chosen = herding(points, 12)
    assert sorted(chosen) == list(range(12))
    for count in range(5):
        rest = [n for n in range(12) if n not in chosen[:count]]
        off = {n: float((points[[*chosen[:count], n]].mean(0) - points.mean(0)).norm()) for n in rest}
        assert off[chosen[count]] == pytest.approx(min(off.values()), rel=1e-5)


@pytest.mark.parametrize("choose", [k_center, herding])
def test_no_image_is_chosen_twice(choose):
    same = torch.ones(5, 3)
    assert sorted(choose(same, 5)) == list(range(5))
