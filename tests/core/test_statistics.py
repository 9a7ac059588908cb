"""Matching of convolutions' statistics against plain hooks and loops (spec 9.4, 9.5), memory, densification."""

import math

import pytest
import torch
from helpers import normal, tiny_net
from torch import nn
from torch.nn import functional as F

from cvdd_ray.core.committee import Ballot
from cvdd_ray.core.statistics import (
    Matching,
    MatchingVoter,
    Recorder,
    Targets,
    densification,
    densification_gradient,
    patch_moments,
    read_targets,
    training_statistics,
    write_targets,
)

PATCH, SIZE = 4, 10
KEYS = torch.tensor([7])


def by_hand(net, x, patch=PATCH):
    """[(is a convolution, mean, var, ...)] of every convolution's and BatchNorm's input, by hooks and loops over tiles."""
    sites = [
        (m, isinstance(m, nn.Conv2d)) for _, m in net.named_modules() if isinstance(m, (nn.Conv2d, nn.BatchNorm2d))
    ]
    inputs = {}
    hooks = [m.register_forward_pre_hook(lambda m, args: inputs.update({m: args[0]})) for m, _ in sites]
    logits = net(x)
    for hook in hooks:
        hook.remove()
    rows = []
    for site, is_convolution in sites:
        given = inputs[site]
        channels = given.transpose(0, 1).flatten(1)
        row = [channels.mean(1), channels.var(1, correction=0)]
        if is_convolution:
            height = math.ceil(given.shape[2] / patch) * patch
            given = F.interpolate(given, (height, height), mode="bilinear", align_corners=False)
            tiles = [
                given[:, :, top : top + patch, left : left + patch].flatten()
                for top in range(0, height, patch)
                for left in range(0, height, patch)
            ]
            row += [torch.stack([t.mean() for t in tiles]), torch.stack([t.var(correction=0) for t in tiles])]
        rows.append((is_convolution, *row))
    return logits, rows


def flat(rows):
    return torch.cat([values for _, *row in rows for values in row])


def targets_of(net, seed=3, num_classes=None):
    size = len(flat(by_hand(net, normal(0, 2, 3, SIZE, SIZE))[1]))
    return Targets(normal(seed, size).abs(), None if num_classes is None else normal(seed + 1, num_classes, size).abs())


def voter(net, targets, *, momentum=0.0, drop_rate=0.0, class_share=0.0, weight=0.5, first=10.0):
    matching = Matching(PATCH, momentum, drop_rate, class_share)
    return MatchingVoter(net, targets, matching=matching, weight=weight, first_multiplier=first)


def ballot(views_GBCHW, labels, memory=None, keys=KEYS):
    num_groups = len(views_GBCHW)
    memory = torch.zeros(num_groups, 0) if memory is None else memory
    return Ballot(views_GBCHW, torch.tensor(labels), memory, keys)


def naive(net, x, labels, targets, *, weight=0.5, first=10.0, share=0.0, average=lambda s: s, kept=None):
    """The objective in plain torch; `average` makes of statistics what is compared, `kept` says of each site if it counts."""
    logits, rows = by_hand(net, x)
    now, position, term = average(flat(rows)), 0, 0.0
    of_class = 0.0 if targets.class_KS is None else targets.class_KS[labels].sum(0) / len(labels)
    for number, (_, *row) in enumerate(rows):
        for values in row:
            stretch = slice(position, position + len(values))
            distance = ((targets.all_S[stretch] - now[stretch]) ** 2).sum().sqrt()
            if share:
                distance = (1 - share) * distance + share * ((of_class[stretch] - now[stretch]) ** 2).sum().sqrt()
            if kept is None or kept[number]:
                term = term + (first if number == 0 else 1.0) * distance
            position += len(values)
    cross_entropy = F.cross_entropy(logits, labels)
    return cross_entropy + weight * term, cross_entropy, term


@pytest.mark.parametrize("size", [8, 10, 3])
def test_statistics_of_tiles_by_hand(size):
    x = normal(0, 6, 2, size, size)
    mean, var = patch_moments(x, 2, 4)
    side = math.ceil(size / 4) * 4
    for g in range(2):
        big = F.interpolate(x[3 * g : 3 * g + 3], (side, side), mode="bilinear", align_corners=False)
        tiles = big.unfold(2, 4, 4).unfold(3, 4, 4).permute(2, 3, 0, 1, 4, 5).flatten(0, 1).flatten(1)
        assert torch.allclose(mean[g], tiles.mean(1), atol=1e-6)
        assert torch.allclose(var[g], tiles.var(1, correction=0), atol=1e-6)


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_a_vote_is_value_and_gradient_of_the_objective_in_plain_torch(share):
    net, views, labels = tiny_net(3), normal(1, 1, 4, 3, SIZE, SIZE), torch.tensor([0, 3, 3, 2])
    targets = targets_of(net, num_classes=4)
    vote = voter(net, targets, class_share=share).vote(ballot(views, [labels.tolist()]))
    x = views[0].clone().requires_grad_(True)
    loss, cross_entropy, term = naive(net, x, labels, targets, share=share)
    (gradient,) = torch.autograd.grad(loss, x)
    assert float(vote.cross_entropy_G) == pytest.approx(float(cross_entropy.detach()), rel=1e-5)
    assert float(vote.bn_term_G) == pytest.approx(float(term.detach()), rel=1e-5)
    assert torch.allclose(vote.gradient_GBCHW[0], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))


def test_the_first_multiplier_is_the_first_convolution_s():
    net, views = tiny_net(3), normal(1, 1, 4, 3, SIZE, SIZE)
    targets = targets_of(net)
    terms = [voter(net, targets, first=f).vote(ballot(views, [[0] * 4])).bn_term_G for f in (1.0, 11.0)]
    _, rows = by_hand(net, views[0])
    position, expected = 0, 0.0
    assert rows[0][0]
    for values in rows[0][1:]:
        expected += float((targets.all_S[position : position + len(values)] - values.detach()).norm())
        position += len(values)
    assert float(terms[1] - terms[0]) == pytest.approx(10 * expected, rel=1e-4)


def test_the_class_term_is_the_global_one_where_classes_have_the_global_statistics():
    net, views = tiny_net(3), normal(1, 1, 4, 3, SIZE, SIZE)
    targets = targets_of(net)
    same = Targets(targets.all_S, targets.all_S.expand(4, -1))
    whole, half = (voter(net, same, class_share=s).vote(ballot(views, [[0, 1, 2, 3]])) for s in (0.0, 0.5))
    assert torch.allclose(whole.gradient_GBCHW, half.gradient_GBCHW, atol=1e-6)
    assert float(whole.bn_term_G) == pytest.approx(float(half.bn_term_G), rel=1e-5)


def test_the_average_starts_at_nothing_and_has_the_gradient_of_the_present():
    """a_1 = (1 - momentum) s_1, a_2 = momentum a_1 + (1 - momentum) s_2; the gradient is of s alone, whole."""
    net, labels = tiny_net(3), torch.tensor([0, 1, 2, 3])
    targets, memory, before = targets_of(net), None, 0.0
    one = voter(net, targets, momentum=0.8)
    for step in range(3):
        views = normal(step, 1, 4, 3, SIZE, SIZE)
        vote = one.vote(ballot(views, [labels.tolist()], memory))
        now = flat(by_hand(net, views[0])[1]).detach()
        expected = 0.8 * before + 0.2 * now
        assert torch.allclose(vote.memory_GS[0], expected, rtol=1e-4, atol=1e-5)
        x = views[0].clone().requires_grad_(True)
        loss, _, term = naive(net, x, labels, targets, average=lambda s, e=expected: e + s - s.detach())
        (gradient,) = torch.autograd.grad(loss, x)
        assert float(vote.bn_term_G) == pytest.approx(float(term.detach()), rel=1e-5)
        assert torch.allclose(vote.gradient_GBCHW[0], gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))
        memory, before = vote.memory_GS, expected


def test_a_dropped_convolution_has_no_term_and_keeps_its_average():
    net, views, labels = tiny_net(3), normal(1, 1, 4, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3])
    targets = targets_of(net)
    one, seen = voter(net, targets, momentum=0.5, drop_rate=0.5, weight=1.0), set()
    _, rows = by_hand(net, views[0])
    old = torch.full((1, len(targets.all_S)), 9.0)
    sizes = [sum(map(len, row)) for _, *row in rows]
    for key in range(12):
        vote = one.vote(ballot(views, [labels.tolist()], old, torch.tensor([key])))
        again = one.vote(ballot(views, [labels.tolist()], old, torch.tensor([key])))
        assert torch.equal(vote.memory_GS, again.memory_GS)
        kept = [not torch.equal(part, torch.full_like(part, 9.0)) for part in vote.memory_GS[0].split(sizes)]
        assert all(k for k, (is_convolution, *_) in zip(kept, rows, strict=True) if not is_convolution)
        average = vote.memory_GS[0]
        _, _, term = naive(net, views[0], labels, targets, average=lambda s, a=average: a, kept=kept)
        assert float(vote.bn_term_G) == pytest.approx(float(term), rel=1e-5)
        seen.add(tuple(kept))
    assert len(seen) == 4  # two convolutions, kept or not


def test_groups_in_one_call_are_as_if_asked_one_by_one():
    net = tiny_net(1)
    one = voter(net, targets_of(net, num_classes=4), momentum=0.7, drop_rate=0.4, class_share=0.5)
    views, labels = normal(2, 3, 4, 3, SIZE, SIZE), [[0, 1, 2, 3], [3, 3, 0, 1], [1, 0, 1, 0]]
    memory, keys = normal(5, 3, len(targets_of(net).all_S)), torch.tensor([1, 2, 3])
    together = one.vote(ballot(views, labels, memory, keys))
    for g in range(3):
        alone = one.vote(ballot(views[g : g + 1], labels[g : g + 1], memory[g : g + 1], keys[g : g + 1]))
        assert torch.allclose(together.gradient_GBCHW[g], alone.gradient_GBCHW[0], rtol=1e-4, atol=1e-5)
        assert torch.allclose(together.memory_GS[g], alone.memory_GS[0], rtol=1e-4, atol=1e-6)
        assert float(together.bn_term_G[g]) == pytest.approx(float(alone.bn_term_G), rel=1e-5)


def test_targets_are_means_over_batches_running_statistics_and_means_of_images_per_class():
    net, images, labels = tiny_net(4), normal(6, 7, 3, SIZE, SIZE), torch.tensor([0, 1, 2, 3, 3, 0, 1])
    batches = [(images[:5], labels[:5]), (images[5:], labels[5:])]
    targets = read_targets(write_targets(training_statistics(net, batches, PATCH, 4, by_class=True)))
    with torch.no_grad():
        parts = [by_hand(net, x)[1] for x, _ in batches]
        weighted = (5 * flat(parts[0]) + 2 * flat(parts[1])) / 7
        layers = iter(layer for layer in net.modules() if isinstance(layer, nn.BatchNorm2d))
        position, expected = 0, weighted.clone()
        for is_convolution, *row in parts[0]:
            size = sum(map(len, row))
            if not is_convolution:
                layer = next(layers)
                expected[position : position + size] = torch.cat([layer.running_mean, layer.running_var])
            position += size
        singles = torch.stack([flat(by_hand(net, image[None])[1]) for image in images])
        by_class = torch.stack([singles[labels == k].mean(0) for k in range(4)])
    assert torch.allclose(targets.all_S, expected, rtol=1e-4, atol=1e-5)
    assert torch.allclose(targets.class_KS, by_class, rtol=1e-4, atol=1e-5)
    assert training_statistics(net, batches, PATCH, 4, by_class=False).class_KS is None


def test_a_network_without_batchnorm_has_statistics_too():
    net = tiny_net(2, norm=lambda channels: nn.InstanceNorm2d(channels, affine=True))
    recorder = Recorder(net, PATCH)
    logits, found = recorder(normal(0, 4, 3, SIZE, SIZE), 2)
    assert {part.site for part in recorder.parts} == {"0", "3"}
    assert torch.allclose(logits, net(normal(0, 4, 3, SIZE, SIZE)), atol=1e-5)
    assert torch.allclose(found[0], flat(by_hand(net, normal(0, 4, 3, SIZE, SIZE)[:2])[1]), atol=1e-5)


# --- densification -------------------------------------------------------------------------------------------------


def test_densification_by_hand():
    """Four equal images: eigenvalues 8, 0, 0, 0 of the products; as many images at right angles: all equal."""
    pixels = torch.zeros(1, 4, 3, 32, 32)
    pixels[:, :, 0, 0, 0] = math.sqrt(2)
    assert float(densification(pixels, 4.0)) == pytest.approx(1.3928, abs=2e-4)
    apart = torch.zeros(1, 4, 3, 32, 32)
    for image in range(4):
        apart[0, image, 0, 0, image] = math.sqrt(2)
    assert float(densification(apart, 4.0)) == pytest.approx(0.0, abs=1e-6)
    assert float(densification(normal(0, 5, 1, 3, 32, 32), 4.0)) == 0.0  # one image per class
    both = torch.cat([pixels, apart])
    assert float(densification(both, 4.0)) == pytest.approx(1.3928, abs=2e-4)


def test_densification_s_gradient_is_that_of_the_formula_with_the_first_distribution_fixed():
    views = 0.02 * normal(3, 2, 6, 3, 32, 32)  # 2 jobs of 2 classes with 3 images
    ours = densification_gradient(views, 2, 4.0)
    x = views.double().requires_grad_(True)
    total = 0.0
    for job in range(2):
        for label in range(2):
            rows = x[job, 3 * label : 3 * label + 3].flatten(1)
            values = torch.linalg.eigh(rows @ rows.T)[0]
            p, q = torch.softmax(values.detach() / 4, 0), torch.softmax(values, 0)
            total = total + (p * (p.log() - q.log())).sum()
    (expected,) = torch.autograd.grad(total, x)
    assert torch.allclose(ours.double(), expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))
    assert float(expected.abs().max()) > 0


def test_images_of_other_sizes_are_pooled():
    small = normal(1, 1, 3, 3, 16, 16) * 0.02
    repeated = small.repeat_interleave(2, 3).repeat_interleave(2, 4)
    assert float(densification(small, 4.0)) == pytest.approx(float(densification(repeated, 4.0)), rel=1e-5)
