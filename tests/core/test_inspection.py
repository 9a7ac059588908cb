"""What experts see in images, against hand arithmetic and plain torch."""

import math

import pytest
import torch
from helpers import normal, tiny_net
from torch import nn

from cvdd_ray.core.inspection import class_similarity, embeddings, statistics_gaps


def test_similarity_by_hand():
    """Class 0: angles of 90, 45 and 45 degrees; class 1: opposite; class 2: one image."""
    features = torch.tensor([[1.0, 0], [0, 5], [2, 2], [0, 1], [0, -3], [1, 1]])
    found = class_similarity(features, torch.tensor([0, 0, 0, 1, 1, 2]))
    assert found[:2].tolist() == pytest.approx([2 * math.sqrt(0.5) / 3, -1])
    assert math.isnan(found[2])


def test_embeddings_are_what_the_last_layer_gets():
    net, images = tiny_net(num_classes=4), normal(1, 5, 3, 8, 8)
    features = embeddings(net, images.split(2))
    assert features.shape == (5, 8)
    last = next(layer for layer in reversed(list(net.modules())) if isinstance(layer, nn.Linear))
    assert torch.allclose(last(features), net(images), atol=1e-5)
    assert not last._forward_pre_hooks


@torch.no_grad()
def test_gaps_are_those_of_plain_statistics():
    net = tiny_net()
    batches = [normal(1, 6, 3, 8, 8), 3 * normal(2, 6, 3, 8, 8)]
    mean_GL, var_GL = statistics_gaps(net, batches)
    assert mean_GL.shape == var_GL.shape == (2, 2)
    first = net[0](batches[1]).transpose(0, 1).flatten(1)
    assert mean_GL[1, 0] == pytest.approx(float((first.mean(1) - net[1].running_mean).abs().mean()), rel=1e-5)
    assert var_GL[1, 0] == pytest.approx(
        float((first.var(1, unbiased=False) - net[1].running_var).abs().mean()), rel=1e-5
    )
    second = net[3](net[2](net[1](net[0](batches[0])))).transpose(0, 1).flatten(1)
    assert mean_GL[0, 1] == pytest.approx(float((second.mean(1) - net[4].running_mean).abs().mean()), rel=1e-4)
