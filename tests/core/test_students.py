"""Post-evaluation against a naive loop, the distillation step by formula (spec section 7, check 10)."""

import math

import pytest
import torch
from helpers import Listener, normal, tiny_net, two_group_norm
from torch import nn
from torch.nn import functional as F
from torchvision.transforms.v2 import functional as tvf

from cvdd_ray.core import microbatches
from cvdd_ray.core.augment import Views
from cvdd_ray.core.models import build_model
from cvdd_ray.core.softlabels import BatchPlan, epoch_plans
from cvdd_ray.core.students import StudentSettings, StudentTraining, adamw_groups, kd_loss, train_student

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


@pytest.mark.parametrize("max_pixels", [1, 8 * 8 * SIZE**2])
def test_student_batchnorm_sees_groups_of_the_labels_size(monkeypatch, max_pixels):
    """Whatever a call holds, running statistics are those of groups of 8, 8, 8 and 9 (33 = 16 + 17: no image stands alone)."""
    monkeypatch.setattr(microbatches, "MAX_PIXELS", max_pixels)
    net, images, rows, calls = tiny_net(1), normal(0, 33, 3, SIZE, SIZE), soft_epochs(33)(0), []
    net.register_forward_pre_hook(lambda _net, given: calls.append(len(given[0])))
    train_student(net, images, lambda epoch: rows, settings(lr=1e-30, weight_decay=0.0), lambda net: 0.0)
    assert calls == ([8, 8, 8, 9] if max_pixels == 1 else [16, 17])
    expected = tiny_net(1).train()
    with torch.no_grad():
        for group in [part for plan, _ in rows for part in naive_batch(images, plan).tensor_split([8])]:
            expected(group)
    for one, other in zip(net.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


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
        lambda training, curve: epochs.append((training.next_epoch, len(curve))),
    )
    assert [row[0] for row in curve] == [0, 4, 5]
    assert [row[3] for row in curve] == [10.0, 20.0, 30.0]
    assert epochs == [(1, 1), (2, 1), (3, 1), (4, 1), (5, 2), (6, 3)]


def test_student_is_back_in_train_mode_after_a_test():
    modes = []

    listener = Listener(CLASSES, lambda x, net: modes.append(net.training))
    train_student(
        listener, normal(0, 16, 3, SIZE, SIZE), soft_epochs(16), settings(epochs=3, test_every=1),
        lambda net: net.eval() and 0.0,
    )  # fmt: skip
    assert modes == [True] * 3


def test_weight_decay_groups_of_resnet18_with_100_classes():
    with torch.device("meta"):
        model = build_model("resnet18", 100, 32)
    decayed, free = adamw_groups(model, 0.01)
    assert sum(p.numel() for p in decayed["params"]) == 11_210_432
    assert sum(p.numel() for p in free["params"]) == 9_700
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.01, 0.0)


def test_a_lone_plan_trains_without_cutmix():
    """The smallest epoch there is: one batch, an empty box, whole images."""
    plan = BatchPlan(
        0, 0, torch.tensor([1, 0]),
        Views(torch.tensor([[0, 0, SIZE, SIZE]] * 2), torch.tensor([False, False]), torch.zeros(2, 2, dtype=torch.long)),
        torch.tensor([1, 0]), (0, 0, 0, 0),
    )  # fmt: skip
    images = normal(0, 2, 3, SIZE, SIZE)
    seen = []

    listener = Listener(CLASSES, lambda x, net: seen.append(x.clone()))
    train_student(listener, images, lambda epoch: [(plan, normal(1, 2, CLASSES))], settings(), lambda net: 0.0)
    assert torch.equal(torch.cat(seen), images[[1, 0]])


# --- saving, going on, changing on the way ---------------------------------------------------------------------------


def dropping_net(seed=1):
    return tiny_net(seed, norm=two_group_norm, dropout=0.5)


def losses_of(training, epochs, changed=None):
    soft = soft_epochs(20)
    return [training.run_epoch(soft(epoch), changed) for epoch in epochs]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_student_taken_up_again_goes_on_bit_for_bit():
    images, numbers = normal(0, 20, 3, SIZE, SIZE), settings(epochs=6)
    undisturbed = StudentTraining(dropping_net(), images, numbers, seed=3)
    losses = losses_of(undisturbed, range(6))
    first = StudentTraining(dropping_net(), images, numbers, seed=3)
    assert losses_of(first, range(2)) == losses[:2]
    state = first.state()
    losses_of(first, range(2, 4))  # the state is a copy
    second = StudentTraining(dropping_net(9), images, numbers, seed=3)
    second.load(state)
    torch.manual_seed(12345)  # what is drawn depends on (seed, epoch) and not on the process
    assert second.next_epoch == 2
    assert losses_of(second, range(2, 6)) == losses[2:]
    assert same(second.state(), undisturbed.state())
    other = StudentTraining(dropping_net(), images, numbers, seed=4)
    assert losses_of(other, range(6)) != losses  # another seed drops other units


def test_every_micro_batch_draws_numbers_of_its_own():
    drawn = []
    listener = Listener(CLASSES, lambda x, net: drawn.append(float(torch.rand(()))))
    listener.dropout = nn.Dropout(0.5)  # says that the network draws
    images = normal(0, 20, 3, SIZE, SIZE)
    losses_of(StudentTraining(listener, images, settings(), seed=3), range(2))
    assert len(drawn) == len(set(drawn)) == 2 * 3  # of two epochs with micro-batches of 8, 8 and 4
    again = StudentTraining(listener, images, settings(), seed=3)
    again.next_epoch = 1
    losses_of(again, [1])
    assert drawn[6:] == drawn[3:6]


def test_training_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    losses_of(StudentTraining(dropping_net(), normal(0, 20, 3, SIZE, SIZE), settings(), seed=3), [0])
    assert torch.equal(before, torch.get_rng_state())


def test_phases_are_settings_that_change_on_the_way():
    images = normal(0, 20, 3, SIZE, SIZE)
    change = {"lr": 0.05, "temperature": 2.0, "weight_decay": 0.3, "eta": 2.0}
    planned = settings(epochs=4, phases=((2, change),))
    one = StudentTraining(dropping_net(), images, planned, seed=0)
    losses_of(one, range(4))
    other = StudentTraining(dropping_net(), images, settings(epochs=4), seed=0)
    losses_of(other, range(2))
    losses_of(other, range(2, 4), settings(epochs=4, **change))
    assert same(one.state(), other.state())
    unchanged = StudentTraining(dropping_net(), images, settings(epochs=4), seed=0)
    losses_of(unchanged, range(4))
    assert not same(one.state(), unchanged.state())


def test_phases_by_hand():
    s = settings(
        epochs=10, lr=1.0, schedule="constant", phases=((3, {"lr": 0.5}), (6, {"lr": 0.1, "temperature": 7.0}))
    )
    assert [s.lr_at(epoch) for epoch in range(10)] == [1.0] * 3 + [0.5] * 3 + [0.1] * 4
    assert [s.at(epoch).temperature for epoch in (2, 5, 6)] == [20.0, 20.0, 7.0]
    hard = settings(temperature=None, phases=((0, {"temperature": 7.0}),))
    assert hard.at(3).temperature is None
