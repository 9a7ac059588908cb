"""Batch-specific soft labels against plain BatchNorm in train mode, and what must and must not change them (check 8)."""

import copy

import pytest
import torch
from helpers import normal, randomise_statistics, state_hash, tiny_net
from torch import nn
from torch.nn import functional as F

from cvdd_ray.core.augment import Views, cutmix
from cvdd_ray.core.softlabels import (
    Teacher,
    batch_views,
    committee_logits,
    epoch_plans,
    group_sizes,
    rescaled_logits,
)

B, HALF = 16, 8


def label(images, nets=None, weights=(1.0,), bn_group=HALF, *, batchnorm="batch", scope="bn", max_images=512):
    """Labels of one batch, from teachers made on the spot."""
    teachers = [Teacher(net, batchnorm=batchnorm, scope=scope) for net in nets or [tiny_net(1)]]
    return committee_logits(teachers, weights, [images], bn_group, max_images)[0]


@torch.no_grad()
def train_mode(net, images):
    """What a network with nn.BatchNorm2d in train mode says; its buffers are spoilt, so it is a copy."""
    return copy.deepcopy(net).train()(images)


# --- BSSL ----------------------------------------------------------------------------------------------------------


def test_labels_are_those_of_train_mode_batchnorm_on_each_half():
    net, images = tiny_net(1), normal(0, B, 3, 10, 10)
    expected = torch.cat([train_mode(net, images[:HALF]), train_mode(net, images[HALF:])])
    torch.testing.assert_close(label(images, [net]), expected, rtol=1e-5, atol=1e-5)


def test_one_half_knows_nothing_of_the_other():
    images = normal(0, B, 3, 10, 10)
    other = images.clone()
    other[HALF:] = 5 * normal(9, HALF, 3, 10, 10)
    before, after = label(images), label(other)
    assert torch.equal(before[:HALF], after[:HALF])
    assert not torch.isclose(before[HALF:], after[HALF:]).all(1).any()


def test_running_statistics_play_no_part():
    net, images = tiny_net(1), normal(0, B, 3, 10, 10)
    before = label(images, [net])
    randomise_statistics(net, 99)
    assert torch.equal(label(images, [net]), before)
    assert not torch.equal(label(images, [net], batchnorm="eval"), label(images, [tiny_net(1)], batchnorm="eval"))


def test_permuting_a_half_permutes_its_labels():
    images = normal(0, B, 3, 10, 10)
    order = torch.cat([torch.randperm(HALF, generator=torch.Generator().manual_seed(2)), torch.arange(HALF, B)])
    torch.testing.assert_close(label(images[order]), label(images)[order], rtol=1e-5, atol=1e-5)
    across = torch.arange(B)
    across[[0, HALF]] = across[[HALF, 0]]
    assert float((label(images[across]) - label(images)[across]).abs().max()) > 1e-2


def test_two_halves_are_not_one_batch_and_not_eval_mode():
    net, images = tiny_net(1), normal(0, B, 3, 10, 10)
    halves, whole = label(images, [net]), label(images, [net], bn_group=B)
    torch.testing.assert_close(whole, train_mode(net, images), rtol=1e-5, atol=1e-5)
    eval_mode = label(images, [net], batchnorm="eval")
    with torch.no_grad():
        torch.testing.assert_close(eval_mode, net(images), rtol=1e-5, atol=1e-5)
    assert float((halves - whole).abs().max()) > 1e-2
    assert float((halves - eval_mode).abs().max()) > 1e-2


def test_labelling_twice_is_equal_and_leaves_the_expert_as_it_was():
    net, images = tiny_net(1, dropout=0.5), normal(0, B, 3, 10, 10).requires_grad_(True)
    before, kept = state_hash(net), images.detach().clone()
    teacher = Teacher(net, batchnorm="batch")
    first, second = (committee_logits([teacher], [1.0], [images], HALF)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert state_hash(net) == before
    assert not net.training
    assert torch.equal(images, kept)
    assert not first.requires_grad


def test_dropout_is_random_only_with_scope_full():
    net, images = tiny_net(1, dropout=0.5), normal(0, B, 3, 10, 10)
    assert torch.equal(label(images, [net], scope="bn"), label(images, [tiny_net(1)], scope="bn"))
    teacher = Teacher(net, batchnorm="batch", scope="full")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = (committee_logits([teacher], [1.0], [images], HALF)[0] for _ in range(2))
    assert not torch.equal(first, second)
    assert not net[8].training
    without = [label(images, [tiny_net(1)], scope="full") for _ in range(2)]
    assert torch.equal(*without)


@pytest.mark.parametrize("batchnorm", ["batch", "eval"])
def test_a_teacher_in_train_mode_is_no_different(batchnorm):
    images = normal(0, B, 3, 10, 10)
    net = tiny_net(1, dropout=0.5)
    expected = label(images, [net], batchnorm=batchnorm)
    assert torch.equal(label(images, [net.train()], batchnorm=batchnorm), expected)


# --- committee and batches -----------------------------------------------------------------------------------------


def test_committee_label_is_the_weighted_sum_of_logits():
    nets, weights = [tiny_net(seed) for seed in (1, 2, 3)], (0.5, 0.3, 0.2)
    images = normal(0, B, 3, 10, 10)
    expected = sum(
        w * torch.cat([train_mode(net, images[:HALF]), train_mode(net, images[HALF:])])
        for net, w in zip(nets, weights, strict=True)
    )
    torch.testing.assert_close(label(images, nets, weights), expected, rtol=1e-5, atol=1e-5)


def test_softened_label_is_the_normalised_geometric_mean():
    nets, images = [tiny_net(1), tiny_net(2)], normal(0, B, 3, 10, 10)
    mixed = F.softmax(label(images, nets, (0.7, 0.3)) / 20, 1)
    one, two = (F.softmax(label(images, [net]) / 20, 1) for net in nets)
    geometric = one**0.7 * two**0.3
    torch.testing.assert_close(mixed, geometric / geometric.sum(1, keepdim=True), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("max_images", [1, 8, 20, 512])
def test_stacking_groups_of_many_batches_is_labelling_one_by_one(max_images):
    net = tiny_net(1)
    sizes = (16, 16, 20, 8, 17, 4, 9, 6)  # full, short and joined groups
    batches = [normal(i, size, 3, 10, 10) for i, size in enumerate(sizes)]
    stacked = committee_logits([Teacher(net, batchnorm="batch")], [1.0], batches, HALF, max_images)
    for batch, logits in zip(batches, stacked, strict=True):
        parts = batch.split(group_sizes(len(batch), HALF))
        expected = torch.cat([train_mode(net, part) for part in parts])
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("batch", "bn_group", "sizes"),
    [
        (16, 8, [8, 8]),
        (10, 5, [5, 5]),
        (4, 8, [4]),
        (12, 8, [8, 4]),
        (9, 8, [9]),
        (17, 8, [8, 9]),
        (3, 2, [3]),
        (8, 8, [8]),
    ],
)
def test_group_sizes_never_leave_an_image_alone(batch, bn_group, sizes):
    assert group_sizes(batch, bn_group) == sizes


# --- plans ---------------------------------------------------------------------------------------------------------


def plans(epoch=0, num_images=40, *, seed=0, batch_size=16, flip=True, use_cutmix=True, crop_scale=(0.08, 1.0)):
    return epoch_plans(
        seed, epoch, num_images, 12, batch_size=batch_size, flip=flip, use_cutmix=use_cutmix, crop_scale=crop_scale
    )


def as_numbers(rows):
    return [
        (p.epoch, p.batch, p.image_index_B.tolist(), p.views.boxes_N4.tolist(), p.views.flips_N.tolist(),
         p.partner_B.tolist(), p.box) for p in rows
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("num_images", "batch_size", "sizes"),
    [(40, 16, [16, 16, 8]), (32, 16, [16, 16]), (33, 16, [16, 17]), (17, 16, [17]), (20, 16, [16, 4]), (4, 16, [4]),
     (1, 16, [1]), (18, 16, [16, 2])],
)  # fmt: skip
def test_an_epoch_takes_every_image_once_and_leaves_none_alone(num_images, batch_size, sizes):
    rows = plans(num_images=num_images, batch_size=batch_size)
    assert [len(p.image_index_B) for p in rows] == sizes
    assert [(p.epoch, p.batch) for p in rows] == [(0, b) for b in range(len(sizes))]
    assert sorted(torch.cat([p.image_index_B for p in rows]).tolist()) == list(range(num_images))
    for p in rows:
        size = len(p.image_index_B)
        assert len(p.views) == len(p.views.flips_N) == size
        assert sorted(p.partner_B.tolist()) == list(range(size))


def test_plans_repeat_and_differ_by_epoch_and_seed():
    assert as_numbers(plans(3)) == as_numbers(plans(3))
    orders = {
        tuple(torch.cat([p.image_index_B for p in plans(e, seed=s)]).tolist()) for e in range(5) for s in range(2)
    }
    assert len(orders) == 10
    assert len({p.box for e in range(5) for p in plans(e)}) > 10


def test_views_are_drawn_per_image_without_roll():
    rows = [plans(e) for e in range(10)]
    assert not any(p.views.rolls_N2.any() for epoch in rows for p in epoch)
    boxes = torch.cat([p.views.boxes_N4 for epoch in rows for p in epoch])
    assert len(boxes.unique(dim=0)) > 250
    flips = torch.cat([p.views.flips_N for epoch in rows for p in epoch])
    assert 140 < int(flips.sum()) < 260
    assert not any(p.views.flips_N.any() for p in plans(flip=False))
    whole = plans(crop_scale=(1.0, 1.0))
    assert float(torch.cat([p.views.boxes_N4[:, 2:].prod(1) for p in whole]).double().mean()) > 130


def test_without_cutmix_order_and_views_stay_the_same():
    mixed, plain = plans(2), plans(2, use_cutmix=False)
    assert {p.box for p in plain} == {(0, 0, 0, 0)}
    for one, other in zip(mixed, plain, strict=True):
        assert torch.equal(one.image_index_B, other.image_index_B)
        assert torch.equal(one.views.boxes_N4, other.views.boxes_N4)
        assert torch.equal(one.views.flips_N, other.views.flips_N)


def test_batch_views_are_chosen_viewed_and_then_mixed():
    images = normal(0, 40, 3, 12, 12)
    kept = images.clone()
    p = next(p for e in range(9) for p in plans(e) if p.box[2] - p.box[0] > 4)
    top, left, bottom, right = p.box
    mixed = batch_views(images, p)
    still = [images[i] for i in p.image_index_B.tolist()]
    plain = torch.stack([
        batch_views(image[None], one_image_plan(p, row))[0] for row, image in enumerate(still)
    ])  # fmt: skip
    torch.testing.assert_close(mixed, cutmix(plain, p.partner_B, p.box), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(mixed[:, :, top:bottom, left:right], plain[:, :, top:bottom, left:right])
    assert torch.equal(images, kept)


def one_image_plan(plan, row):
    """The view of one image of a batch, unmixed."""
    v = plan.views
    one = Views(v.boxes_N4[row : row + 1], v.flips_N[row : row + 1], v.rolls_N2[row : row + 1])
    return type(plan)(plan.epoch, plan.batch, torch.tensor([0]), one, torch.tensor([0]), (0, 0, 0, 0))


def test_cutmix_is_what_leaks_between_halves():
    images = normal(0, 40, 3, 12, 12)
    p = next(p for e in range(9) for p in plans(e) if p.box[2] - p.box[0] > 4 and len(p.partner_B) == B)
    other = images.clone()
    other[p.image_index_B[HALF:]] += 3.0
    assert not torch.equal(label(batch_views(images, p))[:HALF], label(batch_views(other, p))[:HALF])
    unmixed = next(q for q in plans(p.epoch, use_cutmix=False) if q.batch == p.batch)
    before, after = label(batch_views(images, unmixed)), label(batch_views(other, unmixed))
    assert torch.equal(before[:HALF], after[:HALF])


def test_networks_without_batchnorm_are_labelled_the_same_in_both_modes():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()
    images = normal(0, B, 3, 10, 10)
    torch.testing.assert_close(label(images, [net]), label(images, [net], batchnorm="eval"))


def test_rescaled_logits_have_the_mean_norm_of_the_teachers_batch_by_batch():
    """Three lines of plain torch, for batches of which one is short; equal weights."""
    nets = [tiny_net(seed) for seed in (1, 2, 3)]
    for factor, net in enumerate(nets, 1):
        net[-1].weight.data *= factor
    teachers = [Teacher(net, batchnorm="eval", scope="bn") for net in nets]
    batches = [normal(0, 8, 3, 10, 10), normal(1, 5, 3, 10, 10)]
    found = rescaled_logits(teachers, [1 / 3] * 3, batches, 4, 64)
    for batch, ours in zip(batches, found, strict=True):
        with torch.no_grad():
            each = [net.eval()(batch) for net in nets]
        mean_norm = sum(float((logits**2).sum()) ** 0.5 for logits in each) / 3
        expected = sum(logits * mean_norm / float((logits**2).sum()) ** 0.5 for logits in each) / 3
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-5)
        plain = sum(each) / 3
        assert not torch.allclose(ours, plain, rtol=1e-2)
