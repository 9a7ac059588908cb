"""Squeeze against a naive loop (spec section 2)."""

import math

import pytest
import torch
from helpers import normal, tiny_net, two_group_norm
from torch.nn import functional as F

from cvdd_ray.core.training import (
    PretrainSettings,
    accuracy,
    padded_crops,
    pretrain_expert,
    resized_crops,
    shuffled_batches,
)

SIZE, CLASSES = 10, 4


# --- squeeze -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer_name", ["adam", "sgd"])
def test_pretraining_is_the_naive_loop(optimizer_name):
    data = [(normal(i, size, 3, SIZE, SIZE), torch.arange(size) % CLASSES) for i, size in enumerate((8, 8, 5))]
    numbers = PretrainSettings(epochs=3, optimizer=optimizer_name, lr=0.01, weight_decay=0.1, cosine_epochs=2)
    ours, reports = tiny_net(1, norm=two_group_norm), []
    pretrain_expert(
        ours, lambda epoch: [data[(i + epoch) % 3] for i in range(3)], numbers, lambda *row: reports.append(row)
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
            net, lambda epoch: [batch], numbers, lambda epoch, loss, accuracy, losses=losses: losses.append(loss)
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
