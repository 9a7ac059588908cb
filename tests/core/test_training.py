"""Squeeze against a naive loop (spec section 2)."""

import copy
import math

import pytest
import torch
from helpers import Threads, normal, tiny_net, two_group_norm
from torch.nn import functional as F

from cvdd_ray.core.training import (
    ExpertTraining,
    PretrainSettings,
    accuracy,
    padded_crops,
    pretrain_expert,
    resized_crops,
    shuffled_batches,
)
from cvdd_ray.core.workers import Workers

SIZE, CLASSES = 10, 4


# --- squeeze -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_name", ["adam", "sgd"])
def test_pretraining_is_the_naive_loop(optimizer_name):
    data = [(normal(i, size, 3, SIZE, SIZE), torch.arange(size) % CLASSES) for i, size in enumerate((8, 8, 5))]
    numbers = PretrainSettings(epochs=3, optimizer=optimizer_name, lr=0.01, weight_decay=0.1, cosine_epochs=2)
    ours, reports = tiny_net(1, norm=two_group_norm), []
    pretrain_expert(
        ours,
        lambda epoch: [data[(i + epoch) % 3] for i in range(3)],
        numbers,
        lambda training, *row: reports.append((training.next_epoch - 1, *row)),
    )

    net = tiny_net(1, norm=two_group_norm).train()
    expected, velocity = [], [torch.zeros_like(p) for p in net.parameters()]
    first = [torch.zeros_like(p) for p in net.parameters()]
    second, step = [torch.zeros_like(p) for p in net.parameters()], 0
    for epoch in range(3):
        lr, loss_sum, correct = 0.01 * 0.5 * (1 + math.cos(math.pi * epoch / 2)), 0.0, 0
        for i in range(3):
            x, y = data[(i + epoch) % 3]
            logits = net(x)
            loss = F.cross_entropy(logits, y)
            step += 1
            with torch.no_grad():
                for k, (p, g) in enumerate(
                    zip(net.parameters(), torch.autograd.grad(loss, list(net.parameters())), strict=True)
                ):
                    g = g + 0.1 * p  # coupled
                    if optimizer_name == "sgd":
                        velocity[k] = 0.9 * velocity[k] + g
                        p -= lr * velocity[k]
                    else:
                        first[k] = 0.9 * first[k] + 0.1 * g
                        second[k] = 0.999 * second[k] + 0.001 * g**2
                        p -= lr * (first[k] / (1 - 0.9**step)) / ((second[k] / (1 - 0.999**step)).sqrt() + 1e-8)
            loss_sum += float(loss.detach()) * len(y)
            correct += int((logits.argmax(1) == y).sum())
        expected.append((epoch, loss_sum / 21, 100 * correct / 21))
    for p, q in zip(ours.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-3, atol=2e-4)
    for row, wanted in zip(reports, expected, strict=True):
        assert row == pytest.approx(wanted, rel=1e-3)
    assert not ours.training


def test_the_climb_comes_before_the_cosine(monkeypatch):
    """Rates of 7 epochs, 2 of them climb: 1/3, 2/3, then a cosine over 5 (formula of spec 5.4)."""
    rates, step = [], torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self: (rates.append(self.param_groups[0]["lr"]), step(self))[1])
    numbers = PretrainSettings(7, "sgd", lr=0.3, weight_decay=0.0, cosine_epochs=7, warmup_epochs=2)
    pretrain_expert(tiny_net(1), lambda epoch: [(normal(0, 4, 3, SIZE, SIZE), torch.arange(4))], numbers)
    assert rates == pytest.approx([0.1, 0.2, *(0.15 * (1 + math.cos(math.pi * k / 5)) for k in range(5))])


def test_pretraining_updates_running_statistics_and_ends_in_eval_mode():
    net = tiny_net(1)
    before = net[1].running_mean.clone()
    pretrain_expert(
        net, lambda epoch: [(normal(0, 8, 3, SIZE, SIZE), torch.arange(8) % CLASSES)],
        PretrainSettings(epochs=1, optimizer="adam", lr=0.01, weight_decay=0.0, cosine_epochs=1),
    )  # fmt: skip
    assert not torch.equal(net[1].running_mean, before)
    assert not net.training


def test_bfloat16_pretraining_is_near_and_leaves_plain_float32_weights():
    batch, trained = (normal(0, 8, 3, SIZE, SIZE), torch.arange(8) % CLASSES), {}
    for precision in ("float32", "bfloat16"):
        net, losses = tiny_net(1), []
        numbers = PretrainSettings(3, optimizer="sgd", lr=0.01, weight_decay=0.0, cosine_epochs=9, precision=precision)
        pretrain_expert(
            net, lambda epoch: [batch], numbers, lambda training, loss, accuracy, losses=losses: losses.append(loss)
        )
        trained[precision] = net, losses
        assert {tensor.dtype for tensor in net.state_dict().values()} == {torch.float32, torch.int64}
        assert all(tensor.is_contiguous() for tensor in net.state_dict().values())
    (exact, exact_losses), (rough, rough_losses) = trained["float32"], trained["bfloat16"]
    assert rough_losses == pytest.approx(exact_losses, rel=0.03)
    assert rough_losses != pytest.approx(exact_losses, rel=1e-6)
    for p, q in zip(rough.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0.05, atol=0.01)


@pytest.mark.parametrize("flip", [False, True])
def test_padded_crops_are_windows_of_the_padded_image(flip):
    pad, size = 2, 6
    images = torch.arange(1, 60 * 3 * size * size + 1).float().view(60, 3, size, size)
    crops = padded_crops(images, pad, torch.Generator().manual_seed(0), flip=flip)
    padded, found = F.pad(images, (pad,) * 4), set()
    for image, crop in zip(padded, crops, strict=True):
        fits = []
        for top in range(2 * pad + 1):
            for left in range(2 * pad + 1):
                window = image[:, top : top + size, left : left + size]
                fits += [(top, left, False)] * torch.equal(crop, window)
                fits += [(top, left, True)] * torch.equal(crop, window.flip(-1))
        found.update(fits)
        assert len(fits) == 1
    assert {top for top, _, _ in found} == {left for _, left, _ in found} == set(range(2 * pad + 1))
    assert {mirrored for *_, mirrored in found} == ({False, True} if flip else {False})


def test_resized_crops_keep_shape_range_and_draw_per_image():
    image = torch.rand(1, 3, 12, 12, generator=torch.Generator().manual_seed(0)).expand(30, 3, 12, 12)
    crops = resized_crops(image, torch.Generator().manual_seed(1), flip=True)
    assert crops.shape == image.shape
    assert float(crops.min()) >= float(image.min()) - 1e-5
    assert float(crops.max()) <= float(image.max()) + 1e-5
    assert len(crops.flatten(1).unique(dim=0)) > 25
    assert torch.equal(crops, resized_crops(image, torch.Generator().manual_seed(1), flip=True))


# --- accuracy and batches ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("training", [True, False])
def test_accuracy_is_top_1_in_percent_in_eval_mode(training):
    net = tiny_net(1).train(training)
    batches = [(normal(i, size, 3, SIZE, SIZE), torch.arange(size) % CLASSES) for i, size in enumerate((7, 3))]
    with torch.no_grad():
        reference = tiny_net(1)
        right = sum(int((reference(x).argmax(1) == y).sum()) for x, y in batches)
    assert accuracy(net, batches) == pytest.approx(10.0 * right)
    assert net.training == training
    assert torch.equal(net[1].running_mean, reference[1].running_mean)


@pytest.mark.parametrize(("num_images", "sizes"), [(20, [8, 8, 4]), (17, [8, 8]), (16, [8, 8]), (1, [1])])
def test_pretraining_batches_cover_the_set_and_leave_out_a_lone_image(num_images, sizes):
    batches, _ = shuffled_batches(num_images, 8, seed=0, epoch=0)
    assert [len(batch) for batch in batches] == sizes
    assert len(set(torch.cat(batches).tolist())) == sum(sizes)
    again, _ = shuffled_batches(num_images, 8, seed=0, epoch=0)
    assert all(torch.equal(one, two) for one, two in zip(batches, again, strict=True))
    if num_images > 1:
        others = [torch.cat(shuffled_batches(num_images, 8, seed=s, epoch=e)[0]) for s, e in ((0, 1), (1, 0))]
        assert not any(torch.equal(torch.cat(batches), other) for other in others)


def test_a_constant_rate_stays():
    """Plain SGD on a constant gradient: with a cosine the last epochs hardly move a bias, with a constant rate they do."""
    batch, moved = (torch.zeros(4, 3, 8, 8), torch.zeros(4, dtype=torch.long)), {}
    for cosine_epochs in (None, 20):
        net, seen = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 2)), []
        settings = PretrainSettings(20, "sgd", 1e-4, 0.0, cosine_epochs)

        def note(*_, net=net, seen=seen):
            seen.append(float(net[1].bias[0].detach()))

        pretrain_expert(net, lambda epoch: [batch], settings, note)
        moved[cosine_epochs] = seen[-1] - seen[-2]
    assert moved[None] > 4 * moved[20] > 0


# --- an expert that goes on, and one that several workers train ------------------------------------------------------


def batches_of(epoch, number=3):
    return [(normal(10 * epoch + i, 8, 3, SIZE, SIZE), (torch.arange(8) + i) % CLASSES) for i in range(number)]


def equal_states(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("warmup_epochs", [0, 2])
def test_training_goes_on_from_any_epoch_to_the_same_bits(optimizer, warmup_epochs):
    """With dropout, whose draws belong to the epoch."""
    numbers = PretrainSettings(5, optimizer, 0.01, 0.1, cosine_epochs=5, warmup_epochs=warmup_epochs)
    whole, states, rows = tiny_net(1, dropout=0.5), [], []

    def keep(training, *row):
        states.append(training.state())
        rows.append(row)

    pretrain_expert(whole, batches_of, numbers, keep, seed=3)
    for state, after in zip(states[:-1], range(1, 5), strict=True):
        torch.rand(after)  # whatever the process has drawn before
        resumed, again = tiny_net(2, dropout=0.5), []
        pretrain_expert(resumed, batches_of, numbers, lambda training, *row: again.append(row), seed=3, start=state)  # noqa: B023
        assert equal_states(resumed, whole)
        assert again == rows[after:]
    other = tiny_net(1, dropout=0.5)
    pretrain_expert(other, batches_of, numbers, seed=4)
    assert not equal_states(other, whole)


def test_two_workers_are_a_loop_with_their_batchnorm_apart():
    """Each half of every batch is normalised by itself; gradients of the mean over all images, statistics averaged per epoch."""
    numbers = PretrainSettings(2, "sgd", 0.05, 0.0, cosine_epochs=None)
    sizes, start = (8, 8, 5), tiny_net(1)
    data = [(normal(i, size, 3, SIZE, SIZE), torch.arange(size) % CLASSES) for i, size in enumerate(sizes)]

    def work(workers):
        net, own = copy.deepcopy(start), [(x[workers.rank :: 2], y[workers.rank :: 2]) for x, y in data]
        rows = []
        pretrain_expert(net, lambda epoch: own, numbers, lambda training, *row: rows.append(row), workers=workers)
        return net, rows

    (net, rows), (second, rows_too) = Threads(2).run(work)
    assert equal_states(net, second)
    assert rows == rows_too

    halves, velocity = (
        [copy.deepcopy(start).train() for _ in range(2)],
        [torch.zeros_like(p) for p in start.parameters()],
    )
    for epoch in range(2):
        loss_sum = 0.0
        for x, y in data:
            total = [torch.zeros_like(p) for p in start.parameters()]
            for k, half in enumerate(halves):
                loss = F.cross_entropy(half(x[k::2]), y[k::2], reduction="sum") / len(y)
                for t, g in zip(total, torch.autograd.grad(loss, list(half.parameters())), strict=True):
                    t += g
                loss_sum += float(loss.detach()) * len(y)
            velocity = [0.9 * v + g for v, g in zip(velocity, total, strict=True)]
            with torch.no_grad():
                for half in halves:
                    for p, v in zip(half.parameters(), velocity, strict=True):
                        p -= 0.05 * v
        for one, two in zip(*(half.buffers() for half in halves), strict=True):
            if one.is_floating_point():
                mean = (one + two) / 2
                one.copy_(mean)
                two.copy_(mean)
        assert rows[epoch][0] == pytest.approx(loss_sum / sum(sizes), rel=1e-5)
    for (name, ours), theirs in zip(net.state_dict().items(), halves[0].state_dict().values(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize(("num_images", "sizes"), [(20, [8, 8, 4]), (19, [8, 8]), (16, [8, 8])])
def test_workers_share_the_batches_of_one(num_images, sizes):
    """No worker gets a lone image, each draws its own augmentation."""
    whole, _ = shuffled_batches(num_images, 8, seed=0, epoch=0)
    shares = [shuffled_batches(num_images, 8, 0, 0, Workers(rank, 2)) for rank in range(2)]
    for k, size in enumerate(sizes):
        parts = torch.cat([batches[k] for batches, _ in shares])
        assert len(parts) == size
        assert sorted(parts.tolist()) == sorted(whole[k].tolist())
    assert len(shares[0][0]) == len(shares[1][0]) == len(sizes)
    assert not torch.equal(*(torch.rand(4, generator=draw) for _, draw in shares))


def test_the_state_is_all_that_an_epoch_depends_on():
    numbers = PretrainSettings(2, "sgd", 0.05, 0.0, cosine_epochs=2)
    training = ExpertTraining(tiny_net(1), numbers, seed=0)
    training.run_epoch(batches_of(0))
    state = training.state()
    assert int(state["next_epoch"]) == 1
    assert any(name.endswith("momentum_buffer") for name in state)
    training.run_epoch(batches_of(1))
    assert int(state["next_epoch"]) == 1  # a copy
