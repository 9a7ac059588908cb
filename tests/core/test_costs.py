"""Costs counted on the meta device, against published figures, hand arithmetic and what a real pass allocates."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile
from torchvision import models

from cvdd_ray.core.augment import apply_views, draw_views
from cvdd_ray.core.committee import Ballot, Voter
from cvdd_ray.core.costs import (
    Network,
    forward_cost,
    image_flops,
    measured,
    training_cost,
    view_flops,
    vote_cost,
    weight_bytes,
)
from cvdd_ray.core.models import build_seeded, save_weights
from cvdd_ray.errors import ConfigError

PUBLISHED = {  # torchvision publishes multiply-adds, in billions
    "resnet18": models.ResNet18_Weights.IMAGENET1K_V1.meta["_ops"],
    "resnet50": models.ResNet50_Weights.IMAGENET1K_V1.meta["_ops"],
    "mobilenet_v2": models.MobileNet_V2_Weights.IMAGENET1K_V1.meta["_ops"],
    "shufflenet_v2": models.ShuffleNet_V2_X1_0_Weights.IMAGENET1K_V1.meta["_ops"],
    "densenet121": models.DenseNet121_Weights.IMAGENET1K_V1.meta["_ops"],
}
FIRST_LAYER = {  # output pixels x output channels x weights per output channel, twice
    "resnet18": 2 * 112**2 * 64 * 3 * 7**2,
    "mobilenet_v2": 2 * 112**2 * 32 * 3 * 3**2,
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_forward_pass_is_the_published_one(name):
    assert forward_cost(Network(name, 1000, 224)).flops == pytest.approx(2e9 * PUBLISHED[name], rel=0.005)


def test_resnet18_takes_3_6_gflop():
    assert round(forward_cost(Network("resnet18", 1000, 224)).flops / 1e9, 1) == 3.6


@pytest.mark.parametrize("name", FIRST_LAYER)
def test_a_vote_leaves_out_the_weights_gradient_and_training_that_of_the_images(name):
    network = Network(name, 1000, 224)
    forward = forward_cost(network).flops
    assert vote_cost(network, 2, 3).flops == 6 * 2 * forward
    assert training_cost(network, 2).flops == 2 * (3 * forward - FIRST_LAYER[name])


def test_a_network_whose_factory_needs_numbers_is_counted_too():
    assert forward_cost(Network("regnet_x_8gf", 1000, 224)).flops == pytest.approx(16.0e9, rel=0.01)


def test_classes_size_and_width_matter():
    base = forward_cost(Network("resnet18", 10, 32, 0.5)).flops
    assert forward_cost(Network("resnet18", 20, 32, 0.5)).flops == base + 2 * 10 * 256
    assert 3.9 < (forward_cost(Network("resnet18", 10, 64, 0.5)).flops - 2 * 10 * 256) / base < 4.0
    assert 3.8 < forward_cost(Network("resnet18", 10, 32, 1.0)).flops / base < 4.0


def test_one_layer_by_hand():
    """Input and output of a convolution live together; its output's gradient is as large as the output."""
    layer = nn.Conv2d(3, 8, 3, padding=1, device="meta")
    cost = measured(lambda: layer(torch.empty(2, 3, 16, 16, device="meta")))
    assert cost.flops == 2 * 2 * 8 * 3 * 9 * 16**2
    assert cost.peak_bytes == 4 * 2 * (3 + 8) * 16**2


def test_a_view_is_two_matrix_products():
    images = torch.rand(1, 3, 20, 20)
    assert (
        view_flops(20)
        == measured(
            lambda: apply_views(images, draw_views(1, 20, torch.Generator(), crop=True, flip=True, roll=2), 20)
        ).flops
    )
    assert view_flops(20) == 2 * 2 * 3 * 20**3


def allocated(call) -> int:
    """Return the most bytes that torch's allocator had handed out at one time, from its own record."""
    call()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        call()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


@pytest.mark.parametrize("name", ["mobilenet_v2", "densenet121", "shufflenet_v2"])
def test_peak_bytes_are_what_a_real_pass_allocates(name):
    network = Network(name, 10, 32, 0.25)
    model = build_seeded(name, 10, 32, width=0.25, seed=0)
    voter = Voter(model, bn_weight=0.01, first_bn_multiplier=10.0)
    labels = torch.zeros(2, 4, dtype=torch.long)
    votes = allocated(lambda: voter.vote(Ballot(torch.randn(2, 4, 3, 32, 32), labels)))
    assert vote_cost(network, 2, 4).peak_bytes == pytest.approx(votes, rel=0.03)

    def step():
        model.zero_grad(set_to_none=True)
        F.cross_entropy(model.train()(torch.randn(8, 3, 32, 32)), labels.flatten()).backward()

    assert training_cost(network, 8).peak_bytes == pytest.approx(allocated(step), rel=0.03)


def test_weights_take_what_is_stored():
    network = Network("shufflenet_v2", 10, 32, 0.25)
    model = build_seeded("shufflenet_v2", 10, 32, width=0.25, seed=0)
    stored, trained = weight_bytes(network)
    header = 8 + int.from_bytes(save_weights(model)[:8], "little")
    assert stored == len(save_weights(model)) - header
    assert trained == 4 * sum(parameter.numel() for parameter in model.parameters())


def test_nothing_random_is_touched_and_unknown_networks_are_named():
    before = torch.random.get_rng_state()
    forward_cost(Network("convnet3", 7, 32))
    assert torch.equal(before, torch.random.get_rng_state())
    with pytest.raises(ConfigError, match="unknown network"):
        forward_cost(Network("vgg", 7, 32))


@pytest.mark.parametrize(
    ("name", "size"), [("resnet18", 16), ("shufflenet_v2", 16), ("densenet121", 16), ("convnet3", 32)]
)
def test_flops_per_image_are_those_of_whole_calls(name, size):
    network = Network(name, 10, size, 0.25)
    one = image_flops(network)
    assert one.forward == forward_cost(network).flops
    assert 6 * one.training == training_cost(network, 6).flops
    if name != "convnet3":  # which has no BatchNorm to match
        assert 6 * one.vote == vote_cost(network, 2, 3).flops
