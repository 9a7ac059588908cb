"""Squeeze and post-evaluation against naive loops, the distillation step by formula (spec sections 2 and 7, check 10)."""

import math

import pytest
import torch
from helpers import normal, tiny_net, two_group_norm
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tvf

from cvdd_ray.core.augment import Views
from cvdd_ray.core.models import build_model
from cvdd_ray.core.softlabels import BatchPlan, epoch_plans
from cvdd_ray.core.training import (
    PretrainSettings,
    StudentSettings,
    accuracy,
    adamw_groups,
    kd_loss,
    padded_crops,
    pretrain_expert,
    resized_crops,
    shuffled_batches,
    train_student,
)

SIZE, CLASSES = 10, 4


def settings(**changes):
    numbers = {
        "epochs": 1, "batch_size": 16, "bn_group": 8, "lr": 0.01, "weight_decay": 0.01, "eta": 1.0, "temperature": 20.0,
        "test_every": 10,
    }  # fmt: skip
    return StudentSettings(**{**numbers, **changes})


def plans(epoch, num_images, batch_size=16):
    return epoch_plans(
        3, epoch, num_images, SIZE, batch_size=batch_size, flip=True, use_cutmix=True, crop_scale=(0.08, 1)
    )


def soft_epochs(num_images, batch_size=16):
    """Rows of (plan, made-up logits) for every epoch."""
    return lambda epoch: [
        (plan, 8 * normal(100 * epoch + plan.batch, len(plan.image_index_B), CLASSES))
        for plan in plans(epoch, num_images, batch_size)
    ]


def gradients_after(net, images, rows, **changes):
    """Gradients of the last step of one epoch, with a learning rate too small to move the weights."""
    train_student(net, images, lambda epoch: rows, settings(lr=1e-30, weight_decay=0.0, **changes), lambda net: 0.0)
    return [parameter.grad.clone() for parameter in net.parameters()]


def distance(one, other):
    flat, flat2 = (torch.cat([g.flatten() for g in gradients]) for gradients in (one, other))
    return float((flat - flat2).norm() / flat.norm())


# --- the distillation loss -----------------------------------------------------------------------------------------


def test_kd_gradient_is_q_minus_p_over_t_b():
    temperature, batch = 20, 6
    teacher = 10 * normal(1, batch, CLASSES, dtype=torch.float64)
    student = (10 * normal(0, batch, CLASSES, dtype=torch.float64)).requires_grad_(True)
    (gradient,) = torch.autograd.grad(kd_loss(student, teacher, temperature), student)
    q, p = ((z / temperature).exp() for z in (student.detach(), teacher))
    q, p = q / q.sum(1, keepdim=True), p / p.sum(1, keepdim=True)
    assert float((gradient - (q - p) / (temperature * batch)).abs().max()) < 1e-9
    assert float(gradient.abs().max()) > 1e-3


def test_kd_loss_is_the_divergence_and_zero_for_equal_logits():
    p, q = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64), torch.tensor([[0.2, 0.2, 0.6]], dtype=torch.float64)
    by_hand = 0.5 * math.log(0.5 / 0.2) + 0.3 * math.log(0.3 / 0.2) + 0.2 * math.log(0.2 / 0.6)
    assert float(kd_loss(7 * q.log(), 7 * p.log() + 3, 7)) == pytest.approx(by_hand, rel=1e-9)
    same = (10 * normal(0, 5, CLASSES, dtype=torch.float64)).requires_grad_(True)
    loss = kd_loss(same, same.detach().clone(), 20)
    (gradient,) = torch.autograd.grad(loss, same)
    assert abs(float(loss.detach())) < 1e-15
    assert float(gradient.abs().max()) < 1e-15


# --- accumulation --------------------------------------------------------------------------------------------------


def test_accumulation_is_the_full_batch_with_groupnorm_but_not_with_batchnorm():
    images, rows = normal(0, 16, 3, SIZE, SIZE), soft_epochs(16)(0)
    apart = {}
    for kind, norm in (("group", two_group_norm), ("batch", nn.BatchNorm2d)):
        two = gradients_after(tiny_net(1, norm=norm), images, rows, bn_group=8)
        one = gradients_after(tiny_net(1, norm=norm), images, rows, bn_group=16)
        apart[kind] = distance(one, two)
    assert apart["group"] < 1e-6
    assert apart["batch"] > 1e-2


def test_a_last_batch_of_four_has_half_the_weight():
    images, rows = normal(0, 20, 3, SIZE, SIZE), soft_epochs(20)(0)
    assert [len(plan.image_index_B) for plan, _ in rows] == [16, 4]
    net = tiny_net(1, norm=two_group_norm)
    ours = gradients_after(net, images, rows)  # of the last step
    plan, targets = rows[1]
    reference = tiny_net(1, norm=two_group_norm)
    loss = kd_loss(reference(naive_batch(images, plan)), targets, 20.0)
    full = torch.autograd.grad(loss, list(reference.parameters()))
    assert distance([g / 2 for g in full], ours) < 1e-4


def test_student_batchnorm_sees_groups_of_the_labels_size():
    seen = []

    class Listener(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, CLASSES)

        def forward(self, x):
            seen.append((len(x), self.training))
            return self.linear(x.mean((2, 3)))

    images = normal(0, 33, 3, SIZE, SIZE)
    train_student(Listener(), images, soft_epochs(33), settings(), lambda net: 0.0)
    assert seen == [(8, True), (8, True), (8, True), (9, True)]  # 33 = 16 + 17: no image stands alone


# --- the student's loop --------------------------------------------------------------------------------------------


def naive_batch(images, plan):
    """Views of a batch by torchvision and loops."""
    views = []
    for row, index in enumerate(plan.image_index_B.tolist()):
        view = tvf.resized_crop(images[index], *plan.views.boxes_N4[row].tolist(), [SIZE, SIZE], antialias=True)
        views.append(view.flip(-1) if plan.views.flips_N[row] else view)
    mixed = torch.stack(views)
    top, left, bottom, right = plan.box
    for row, partner in enumerate(plan.partner_B.tolist()):
        mixed[row, :, top:bottom, left:right] = views[partner][:, top:bottom, left:right]
    return mixed


@pytest.mark.parametrize("temperature", [20.0, None])
def test_student_training_is_the_naive_loop(temperature):
    images, epochs, eta, lr, decay = normal(0, 20, 3, SIZE, SIZE), 3, 2.0, 0.01, 0.5
    labels = torch.arange(20) % CLASSES
    soft = soft_epochs(20)

    def rows(epoch):
        if temperature:
            return soft(epoch)
        return [(plan, labels[plan.image_index_B]) for plan in plans(epoch, 20)]

    student, losses = tiny_net(1, norm=two_group_norm), []
    curve = train_student(
        student, images, rows,
        settings(epochs=epochs, eta=eta, lr=lr, weight_decay=decay, temperature=temperature, test_every=1), lambda net: 12.5,
    )  # fmt: skip

    net = tiny_net(1, norm=two_group_norm).train()
    decayed = [p for p in net.parameters() if p.ndim > 1]
    others = [p for p in net.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW([{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0}])
    for epoch in range(epochs):
        loss_sum, agreed = 0.0, 0
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * epoch / (epochs * eta)))
        for plan, targets in rows(epoch):
            optimizer.zero_grad()
            x, size = naive_batch(images, plan), len(targets)
            for first in range(0, size, 8):
                logits, wanted = net(x[first : first + 8]), targets[first : first + 8]
                if temperature:
                    q, p = F.log_softmax(logits / temperature, 1), F.softmax(wanted / temperature, 1)
                    loss = (p * (p.log() - q)).sum(1).mean()
                    wanted = wanted.argmax(1)
                else:
                    loss = F.cross_entropy(logits, wanted)
                (loss / 2).backward()
                loss_sum += float(loss.detach()) * len(logits)
                agreed += int((logits.argmax(1) == wanted).sum())
            optimizer.step()
        losses.append((epoch, loss_sum / 20, 5.0 * agreed, 12.5))

    for ours, theirs in zip(student.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=2e-4)
    for row, expected in zip(curve, losses, strict=True):
        assert row == pytest.approx(expected, rel=1e-3)


def test_tests_come_at_their_cadence_and_after_the_last_epoch():
    epochs, modes = [], []

    def test(net):
        modes.append(net.training)
        return 10.0 * len(modes)

    curve = train_student(
        tiny_net(1),
        normal(0, 16, 3, SIZE, SIZE),
        soft_epochs(16),
        settings(epochs=6, test_every=4),
        test,
        epochs.append,
    )
    assert [row[0] for row in curve] == [0, 4, 5]
    assert [row[3] for row in curve] == [10.0, 20.0, 30.0]
    assert epochs == [0, 1, 2, 3, 4, 5]


def test_student_is_back_in_train_mode_after_a_test():
    modes = []

    class Listener(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, CLASSES)

        def forward(self, x):
            modes.append(self.training)
            return self.linear(x.mean((2, 3)))

    train_student(
        Listener(), normal(0, 16, 3, SIZE, SIZE), soft_epochs(16), settings(epochs=3, test_every=1),
        lambda net: net.eval() and 0.0,
    )  # fmt: skip
    assert modes == [True] * 6


def test_weight_decay_groups_of_resnet18_with_100_classes():
    with torch.device("meta"):
        model = build_model("resnet18", 100, 32)
    decayed, free = adamw_groups(model, 0.01)
    assert sum(p.numel() for p in decayed["params"]) == 11_210_432
    assert sum(p.numel() for p in free["params"]) == 9_700
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)


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


def test_a_lone_plan_trains_without_cutmix():
    """The smallest epoch there is: one batch, an empty box, whole images."""
    plan = BatchPlan(
        0, 0, torch.tensor([1, 0]),
        Views(torch.tensor([[0, 0, SIZE, SIZE]] * 2), torch.tensor([False, False]), torch.zeros(2, 2, dtype=torch.long)),
        torch.tensor([1, 0]), (0, 0, 0, 0),
    )  # fmt: skip
    images = normal(0, 2, 3, SIZE, SIZE)
    seen = []

    class Listener(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(3, CLASSES)

        def forward(self, x):
            seen.append(x.clone())
            return self.linear(x.mean((2, 3)))

    train_student(Listener(), images, lambda epoch: [(plan, normal(1, 2, CLASSES))], settings(), lambda net: 0.0)
    assert torch.equal(torch.cat(seen), images[[1, 0]])
