"""Several micro-batches in one call: the statistics of as many calls, and who may not share one."""

import copy

import pytest
import torch
from helpers import normal, tiny_net
from torch import nn
from torchvision.ops import StochasticDepth

from cvdd_ray.core import microbatches
from cvdd_ray.core.microbatches import draws_numbers, micro_batches_per_call, own_statistics

SIZES = [3, 5, 2]


def test_batchnorm_alone_is_one_call_per_micro_batch_to_the_bit():
    alone = nn.BatchNorm2d(4, momentum=0.3)
    nn.init.normal_(alone.weight)
    together, x = copy.deepcopy(alone), normal(0, 10, 4, 5, 5)
    expected = torch.cat([alone(part) for part in x.split(SIZES)])
    with own_statistics(together) as sizes:
        sizes[:] = SIZES
        assert torch.equal(together(x), expected)
    assert not torch.equal(copy.deepcopy(alone)(x), expected)
    assert all(torch.equal(*pair) for pair in zip(together.buffers(), alone.buffers(), strict=True))
    assert int(together.num_batches_tracked) == 3


def test_a_network_has_the_gradients_and_statistics_of_as_many_calls():
    alone = tiny_net(1).train()
    together, x, weights = copy.deepcopy(alone), normal(0, 10, 3, 8, 8), normal(1, 10, 4)
    for part, weight in zip(x.split(SIZES), weights.split(SIZES), strict=True):
        (alone(part) * weight).sum().backward()
    with own_statistics(together) as sizes:
        sizes[:] = SIZES
        (together(x) * weights).sum().backward()
    for one, other in zip(together.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)
    for one, other in zip(together.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_layers_are_what_they_were_even_after_an_error():
    net = tiny_net(1).train()
    with pytest.raises(ZeroDivisionError), own_statistics(net):
        raise ZeroDivisionError
    assert not any("forward" in vars(layer) for layer in net.modules())
    with torch.no_grad():
        assert torch.equal(net(normal(0, 4, 3, 8, 8)), tiny_net(1).train()(normal(0, 4, 3, 8, 8)))


@pytest.mark.parametrize(
    ("layer", "draws"),
    [(nn.Dropout(0.1), True), (nn.Dropout2d(0.1), True), (StochasticDepth(0.1, "row"), True), (nn.Dropout(0.0), False),
     (StochasticDepth(0.0, "row"), False), (nn.BatchNorm2d(3), False)],
)  # fmt: skip
def test_who_draws_numbers_has_calls_of_its_own(layer, draws):
    net = nn.Sequential(nn.Sequential(layer))
    assert draws_numbers(net) is draws
    assert (micro_batches_per_call(net, 8, 32) == 1) is draws


def test_calls_are_bounded_by_their_pixels():
    net = tiny_net()
    assert micro_batches_per_call(net, 8, 32) == 2048 // 8
    assert micro_batches_per_call(net, 8, 224) == 41 // 8
    assert micro_batches_per_call(net, 100, 224) == 1
    assert microbatches.MAX_PIXELS == 2048 * 32 * 32
