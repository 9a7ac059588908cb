"""The objective of one voter by hand and against plain torch, and the sum over voters (spec 5.2; checks 2 and 3)."""

import math

import pytest
import torch
from helpers import naive_objective, normal, state_hash, tiny_net
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import functional as tvf

from cvdd_ray.core.augment import Views, apply_views
from cvdd_ray.core.committee import Ballot, LocalCommittee, Voter

HAND = math.sqrt(97) + math.sqrt(5)


class Bare(nn.Module):
    """BatchNorms alone, called in the order given; the mean over pixels is the logits."""

    def __init__(self, *layers, order=None):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.order = order or range(len(layers))

    def forward(self, x):
        for index in self.order:
            x = self.layers[index](x)
        return x.mean((2, 3))


def batchnorm(mean, var):
    layer = nn.BatchNorm2d(len(mean), eps=0.0)
    layer.running_mean.copy_(torch.as_tensor(mean, dtype=torch.float32))
    layer.running_var.copy_(torch.as_tensor(var, dtype=torch.float32))
    return layer


def bn_term(model, views_GBCHW, first=1.0):
    labels = torch.zeros(views_GBCHW.shape[:2], dtype=torch.long)
    return Voter(model, bn_weight=1.0, first_bn_multiplier=first).vote(Ballot(views_GBCHW, labels)).bn_term_G


# --- the BatchNorm term --------------------------------------------------------------------------------------------


def test_bn_term_by_hand():
    zeros = torch.zeros(1, 2, 2, 4, 4)
    layer = batchnorm((1, 2), (4, 9))
    assert pytest.approx(12.0849, abs=1e-4) == HAND
    assert float(bn_term(Bare(layer), zeros)) == pytest.approx(HAND, rel=1e-6)
    assert float(bn_term(Bare(layer), zeros, first=10.0)) == pytest.approx(10 * HAND, rel=1e-6)


def test_only_the_first_layer_is_multiplied():
    first, second = batchnorm((1, 2), (4, 9)), batchnorm((1, 2), (4, 9))
    zeros = torch.zeros(1, 2, 2, 4, 4)  # the second sees -mean/std, constant per channel
    inner = math.hypot(4, 9) + math.hypot(1 + 1 / 2, 2 + 2 / 3)
    assert float(bn_term(Bare(first, second), zeros, first=10.0)) == pytest.approx(10 * HAND + inner, rel=1e-6)


def test_first_means_first_in_modules_order_not_first_called():
    registered_first, called_first = batchnorm((3, 0), (1, 1)), batchnorm((0, 0), (1, 1))
    model = Bare(registered_first, called_first, order=(1, 0))
    values = normal(0, 1, 3, 2, 4, 4)
    _, _, expected = naive_objective(
        model.eval(), values[0], torch.zeros(3, dtype=torch.long), bn_weight=1.0, first_bn_multiplier=10.0
    )
    expected = float(expected.detach())
    assert float(bn_term(model, values, first=10.0)) == pytest.approx(expected, rel=1e-5)
    assert expected > 30  # the mean of the one registered first is 3 off


def test_bn_term_and_its_gradient_are_zero_where_the_statistics_agree():
    values = torch.tensor([1.0, -1.0]).repeat(2 * 2 * 2 * 2).view(1, 2, 2, 2, 4)  # mean 0, biased variance 1, exactly
    labels = torch.zeros(1, 2, dtype=torch.long)
    ballot = Ballot(values, labels)
    with_term = Voter(Bare(batchnorm((0, 0), (1, 1))), bn_weight=5.0, first_bn_multiplier=10.0).vote(ballot)
    without = Voter(Bare(batchnorm((0, 0), (1, 1))), bn_weight=0.0, first_bn_multiplier=10.0).vote(ballot)
    assert float(with_term.bn_term_G) == 0.0
    assert torch.equal(with_term.gradient_GBCHW, without.gradient_GBCHW)


def test_twice_the_discrepancy_is_twice_the_term():
    values = normal(0, 1, 4, 3, 5, 5)
    mean, var = values[0].mean((0, 2, 3)), values[0].var((0, 2, 3), correction=0)
    offset = torch.tensor([0.3, -0.2, 0.5])
    once = bn_term(Bare(batchnorm(mean + offset, var + offset.abs())), values)
    twice = bn_term(Bare(batchnorm(mean + 2 * offset, var + 2 * offset.abs())), values)
    assert float(once) == pytest.approx(2 * float(offset.norm()), rel=1e-4)
    assert float(twice) == pytest.approx(2 * float(once), rel=1e-4)


def test_variance_is_biased():
    values = normal(0, 1, 4, 1, 2, 2)  # n = 16
    flat = values.flatten()
    unbiased = float(flat.var())
    off_by = bn_term(Bare(batchnorm([float(flat.mean())], [unbiased])), values)
    assert float(off_by) == pytest.approx(unbiased * (1 - 15 / 16), rel=1e-4)


def test_norms_run_over_channels_neither_squared_nor_averaged():
    one = bn_term(Bare(batchnorm([2.0], [1.0])), torch.zeros(1, 2, 1, 4, 4))
    four = bn_term(Bare(batchnorm([2.0] * 4, [1.0] * 4)), torch.zeros(1, 2, 4, 4, 4))
    assert float(one) == pytest.approx(3.0)
    assert float(four) == pytest.approx(6.0)  # sqrt(4) times as much


# --- the vote ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bn_weight", [0.0, 0.01, 1.0])
def test_a_vote_is_value_and_gradient_of_the_objective_in_plain_torch(bn_weight):
    net, views, labels = tiny_net(3), normal(1, 1, 4, 3, 10, 10), torch.tensor([[0, 1, 2, 3]])
    vote = Voter(net, bn_weight=bn_weight, first_bn_multiplier=10.0).vote(Ballot(views, labels))
    x = views[0].clone().requires_grad_(True)
    loss, cross_entropy, bn = naive_objective(net, x, labels[0], bn_weight=bn_weight, first_bn_multiplier=10.0)
    (gradient,) = torch.autograd.grad(loss, x)
    assert float(vote.cross_entropy_G) == pytest.approx(float(cross_entropy.detach()), rel=1e-5)
    assert float(vote.bn_term_G) == pytest.approx(float(bn.detach()), rel=1e-5)
    assert torch.allclose(vote.gradient_GBCHW[0], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_groups_in_one_call_are_as_if_asked_one_by_one():
    voter = Voter(tiny_net(1), bn_weight=0.5, first_bn_multiplier=10.0)
    views, labels = normal(2, 3, 4, 3, 10, 10), torch.tensor([[0, 1, 2, 3], [3, 3, 0, 1], [1, 0, 1, 0]])
    together = voter.vote(Ballot(views, labels))
    assert together.cross_entropy_G.shape == together.bn_term_G.shape == (3,)
    for g in range(3):
        alone = voter.vote(Ballot(views[g : g + 1], labels[g : g + 1]))
        assert torch.allclose(together.gradient_GBCHW[g], alone.gradient_GBCHW[0], rtol=1e-4, atol=1e-6)
        assert float(together.cross_entropy_G[g]) == pytest.approx(float(alone.cross_entropy_G), rel=1e-5)
        assert float(together.bn_term_G[g]) == pytest.approx(float(alone.bn_term_G), rel=1e-5)


def test_a_vote_leaves_no_trace_in_expert_or_ballot():
    net = tiny_net(1, dropout=0.5).train()
    voter = Voter(net, bn_weight=0.01, first_bn_multiplier=10.0)
    views, labels = normal(2, 1, 4, 3, 10, 10), torch.tensor([[0, 1, 2, 3]])
    before, kept = state_hash(net), views.clone()
    votes = [voter.vote(Ballot(views, labels)) for _ in range(10)]
    assert all(torch.equal(vote.gradient_GBCHW, votes[0].gradient_GBCHW) for vote in votes)  # eval mode, dropout off
    assert state_hash(net) == before
    assert net.training
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())
    assert torch.equal(views, kept)
    assert not views.requires_grad
    assert not votes[0].gradient_GBCHW.requires_grad


def test_joint_gradient_is_the_weighted_sum_through_the_view():
    """One gradient pushed back through the view once, against a joint loss that runs everything through autograd."""
    weights, experts = (0.66, 0.34), (tiny_net(1), tiny_net(2, width=5))
    images, labels = normal(4, 1, 3, 3, 12, 12).requires_grad_(True), torch.tensor([[0, 1, 2]])
    views = Views(torch.tensor([[2, 1, 8, 9]]), torch.tensor([True]), torch.tensor([[3, 1]]))

    seen = apply_views(images, views, 12)
    ballot = Ballot(seen.detach(), labels)
    votes = [Voter(net, bn_weight=0.01, first_bn_multiplier=10.0).vote(ballot) for net in experts]
    mixed = sum(w * vote.gradient_GBCHW for w, vote in zip(weights, votes, strict=True))
    (ours,) = torch.autograd.grad(seen, images, mixed)

    x = images.detach()[0].clone().requires_grad_(True)
    view = torch.roll(tvf.hflip(tvf.resized_crop(x, 2, 1, 8, 9, [12, 12])), (3, 1), (-2, -1))
    terms = [naive_objective(net, view, labels[0], bn_weight=0.01, first_bn_multiplier=10.0)[0] for net in experts]
    (joint,) = torch.autograd.grad(weights[0] * terms[0] + weights[1] * terms[1], x)
    assert torch.allclose(ours[0], joint, rtol=1e-3, atol=1e-5 * float(joint.abs().max()))


def test_cross_entropy_is_hard_and_unsmoothed():
    logits = torch.tensor([[2.0, -1.0, 0.5]])
    views = logits[:, :, None, None].expand(1, 3, 4, 4)[None]
    vote = Voter(Bare(), bn_weight=1.0, first_bn_multiplier=1.0).vote(Ballot(views, torch.tensor([[2]])))
    expected = -math.log(math.exp(0.5) / (math.exp(2) + math.exp(-1) + math.exp(0.5)))
    assert float(vote.cross_entropy_G) == pytest.approx(expected, rel=1e-5)
    assert float(vote.bn_term_G) == 0.0
    assert float(F.cross_entropy(logits, torch.tensor([2]))) == pytest.approx(expected, rel=1e-5)


def test_local_committee_asks_whom_the_ballots_name():
    voters = {name: Voter(tiny_net(i), bn_weight=0.1, first_bn_multiplier=1.0) for i, name in enumerate("abc")}
    ballot = Ballot(normal(0, 1, 2, 3, 8, 8), torch.tensor([[0, 1]]))
    votes = LocalCommittee(voters).vote({"c": ballot, "a": ballot})
    assert set(votes) == {"a", "c"}
    assert torch.equal(votes["c"].gradient_GBCHW, voters["c"].vote(ballot).gradient_GBCHW)
    assert not torch.equal(votes["a"].gradient_GBCHW, votes["c"].gradient_GBCHW)
