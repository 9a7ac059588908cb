"""The two stand-ins for BatchNorm against nn.BatchNorm2d, elementary sums and finite differences."""

import pytest
import torch
from helpers import normal, randomise_statistics, state_hash, tiny_net
from torch import nn

from cvdd_ray.core.batchnorm import (
    GroupBatchNorm,
    MatchingBatchNorm,
    StatisticsDistance,
    _AffineWithMoments,
    group_moments,
    with_batchnorm_replaced,
)


def batchnorm(channels=3, affine=True, eps=1e-5):
    layer = nn.BatchNorm2d(channels, eps=eps, affine=affine)
    randomise_statistics(layer, 1)
    if affine:
        nn.init.normal_(layer.weight)
        nn.init.normal_(layer.bias)
    return layer.eval()


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_group_moments_are_sums_over_the_group_with_biased_variance(layout, device):
    x = (3 * normal(0, 6, 2, 3, 5) + 1).to(device, memory_format=layout)
    mean_GC, var_GC = group_moments(x, 3)
    for group in range(3):
        for channel in range(2):
            values = x[2 * group : 2 * group + 2, channel].flatten().tolist()
            mean = sum(values) / 30
            assert float(mean_GC[group, channel]) == pytest.approx(mean, abs=1e-5)
            biased = sum((v - mean) ** 2 for v in values) / 30
            assert float(var_GC[group, channel]) == pytest.approx(biased, rel=1e-5)


@pytest.mark.parametrize("num_groups", [1, 2])
def test_gradient_of_the_affine_with_moments_is_that_of_finite_differences(num_groups):
    x = normal(0, 4, 3, 2, 2, dtype=torch.float64).requires_grad_(True)
    scale, shift = normal(1, 3, dtype=torch.float64), normal(2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: _AffineWithMoments.apply(x, scale, shift, num_groups), (x,))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("eps", [1e-5, 0.1])
def test_matching_batchnorm_gives_what_the_layer_gives_in_eval_mode(affine, eps):
    layer, tape, x = batchnorm(affine=affine, eps=eps), {}, normal(0, 6, 3, 4, 4)
    matching = MatchingBatchNorm(layer, 7, tape, [2])
    assert torch.allclose(matching(x), layer(x), atol=2e-6)
    mean_GC, var_GC = tape[7]
    assert torch.allclose(mean_GC, x.view(2, 3, 3, 4, 4).mean((1, 3, 4)), atol=1e-6)
    assert var_GC.shape == (2, 3)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_output_and_moments_are_those_of_plain_torch(layout):
    layer, tape = batchnorm(), {}
    x = normal(0, 6, 3, 4, 4).contiguous(memory_format=layout).requires_grad_(True)
    dy, dmean, dvar = normal(1, 6, 3, 4, 4), normal(2, 2, 3), normal(3, 2, 3)
    y = MatchingBatchNorm(layer, 0, tape, [2])(x)
    (ours,) = torch.autograd.grad((y, *tape[0]), x, (dy, dmean, dvar))
    groups = x.view(2, 3, 3, 4, 4)
    moments = groups.mean((1, 3, 4)), groups.var((1, 3, 4), correction=0)
    (theirs,) = torch.autograd.grad((layer(x), *moments), x, (dy, dmean, dvar))
    assert torch.allclose(ours, theirs, atol=2e-6)


def test_distance_of_layers_of_several_widths_is_that_of_each_alone():
    widths, multipliers, groups = (3, 1, 5), (10.0, 1.0, 2.0), 2
    running = [(normal(w, w), normal(10 + w, w).abs()) for w in widths]
    moments = [
        (normal(20 + w, groups, w).requires_grad_(True), normal(30 + w, groups, w).requires_grad_(True)) for w in widths
    ]
    ours_G = StatisticsDistance(running, multipliers)(moments)
    theirs_G = sum(
        m * ((var_C - var_GC).norm(dim=1) + (mean_C - mean_GC).norm(dim=1))
        for m, (mean_C, var_C), (mean_GC, var_GC) in zip(multipliers, running, moments, strict=True)
    )
    assert torch.allclose(ours_G, theirs_G)
    inputs, weight_G = [tensor for pair in moments for tensor in pair], torch.tensor([1.0, -3.0])
    ours = torch.autograd.grad((ours_G * weight_G).sum(), inputs)
    theirs = torch.autograd.grad((theirs_G * weight_G).sum(), inputs)
    assert all(torch.allclose(one, other) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("affine", [True, False])
def test_group_batchnorm_is_train_mode_batchnorm_per_group(affine):
    layer, x = batchnorm(affine=affine, eps=0.01), 5 * normal(0, 6, 3, 4, 4) + 2
    ours = GroupBatchNorm(layer, [3])(x)
    untouched = state_hash(layer)
    reference = nn.BatchNorm2d(3, eps=0.01, affine=affine, track_running_stats=False).train()
    if affine:
        reference.load_state_dict({"weight": layer.weight, "bias": layer.bias})
    assert torch.allclose(ours, torch.cat([reference(part) for part in x.split(2)]), atol=2e-6)
    assert state_hash(layer) == untouched


def test_group_batchnorm_moves_with_its_network():
    moved = nn.Sequential(GroupBatchNorm(batchnorm(), [1])).double()
    assert moved(normal(0, 2, 3, 4, 4, dtype=torch.float64)).dtype == torch.float64
    assert not list(moved.parameters())
    assert not list(moved.buffers())


def test_replacement_goes_in_modules_order_and_leaves_the_model_alone():
    model = tiny_net().train()
    before, seen = state_hash(model), []
    twin = with_batchnorm_replaced(
        model, lambda layer, index: seen.append((index, layer.num_features)) or nn.Identity()
    )
    assert seen == [(0, 4), (1, 8)]
    assert not any(isinstance(layer, nn.BatchNorm2d) for layer in twin.modules())
    assert not any(layer.training for layer in twin if not isinstance(layer, nn.Identity))
    assert not any(parameter.requires_grad for parameter in twin.parameters())
    assert state_hash(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.training
    assert isinstance(model[1], nn.BatchNorm2d)


def test_nested_layers_are_found():
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Sequential(nn.Sequential(batchnorm()), batchnorm()))
    order = []
    twin = with_batchnorm_replaced(model, lambda layer, index: order.append(layer) or nn.Identity())
    assert isinstance(twin[1][0][0], nn.Identity)
    assert isinstance(twin[1][1], nn.Identity)
    assert len(order) == 2


def test_the_copy_works_channels_last_on_a_cpu_and_gives_what_the_model_gives():
    model, x, layouts = tiny_net().eval(), normal(0, 2, 3, 10, 10), []
    twin = with_batchnorm_replaced(model, lambda layer, index: layer)
    convolutions = [module for module in twin.modules() if isinstance(module, nn.Conv2d)]
    for convolution in convolutions:
        convolution.register_forward_pre_hook(
            lambda _, given: layouts.append(given[0].is_contiguous(memory_format=torch.channels_last))
        )
    assert torch.allclose(twin(x), model(x), atol=1e-5)
    assert layouts == [True] * len(convolutions)
