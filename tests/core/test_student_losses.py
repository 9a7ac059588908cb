"""What students of other methods learn from and what is tested of them: mse_gt, averages of parameters, cos2 (spec 9.4, 9.5)."""

import math

import pytest
import torch
from helpers import normal
from test_students import CLASSES, SIZE, dropping_net, plans, same, settings, soft_epochs
from torch import nn

from cvdd_ray.core.schedules import student_lr
from cvdd_ray.core.softlabels import batch_views
from cvdd_ray.core.students import StudentTraining, mse_gt_loss, train_student


def test_mse_gt_by_hand():
    student, teacher = torch.tensor([[1.0, 3.0], [0.0, 0.0]]), torch.tensor([[0.0, 1.0], [2.0, 0.0]])
    squares = (1 + 4 + 4 + 0) / 4
    cross_entropy = (math.log(1 + math.exp(2.0)) + math.log(2)) / 2  # labels 0 and 1
    assert float(mse_gt_loss(student, teacher, torch.tensor([0, 1]), 0.15)) == pytest.approx(
        squares + 0.15 * cross_entropy, rel=1e-6
    )


def test_the_label_is_that_of_the_image_before_cutmix():
    """One epoch of a network without statistics against a plain loop: SGD-free, since only the last gradient is compared."""
    images, labels = normal(0, 20, 3, SIZE, SIZE), torch.arange(20) % CLASSES
    rows = soft_epochs(20)(0)
    net, twin = dropping_net(1), dropping_net(1)
    for one in (net, twin):
        one[-2] = nn.Identity()  # no dropout
    numbers = settings(lr=1e-30, weight_decay=0.0, label_weight=0.3)
    training = StudentTraining(net, images, numbers, seed=0, labels_N=labels)
    loss, _ = training.run_epoch(rows)
    total = 0.0
    for plan, logits in rows:
        twin.zero_grad()
        parts = zip(
            batch_views(images, plan).split(8), logits.split(8), labels[plan.image_index_B].split(8), strict=True
        )
        for view, theirs, own in parts:
            ours = twin(view)
            log_p = ours - ours.exp().sum(1, keepdim=True).log()
            value = ((ours - theirs) ** 2).mean() - 0.3 * log_p[torch.arange(len(own)), own].mean()
            (value / 2).backward()
            total += float(value.detach()) * len(own)
    assert any((plan.partner_B != torch.arange(len(plan.partner_B))).any() for plan, _ in rows)
    assert loss == pytest.approx(total / 20, rel=1e-5)
    for ours, theirs in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6 * float(theirs.grad.abs().max()))


def test_the_average_is_tested_and_goes_on_after_an_interruption():
    images, numbers = normal(0, 20, 3, SIZE, SIZE), settings(epochs=4, ema=0.6)
    soft, expected = soft_epochs(20), None
    steps = []

    class Noting(StudentTraining):
        def _add_up_gradients(self):
            steps.append([p.detach().clone() for p in self.student.parameters()])

    training = Noting(dropping_net(), images, numbers, seed=3)
    first = [p.detach().clone() for p in training.student.parameters()]
    for epoch in range(4):
        training.run_epoch(soft(epoch))
        if epoch == 1:
            state = training.state()
    after = [*steps[1:], [p.detach().clone() for p in training.student.parameters()]]  # parameters after every step
    expected = first
    for now in after:
        expected = [0.6 * old + 0.4 * new for old, new in zip(expected, now, strict=True)]
    own = [p.detach().clone() for p in training.student.parameters()]
    with training.averaged() as tested:
        assert all(
            torch.allclose(p, e, rtol=1e-4, atol=1e-6) for p, e in zip(tested.parameters(), expected, strict=True)
        )
        assert not all(torch.equal(p, o) for p, o in zip(tested.parameters(), own, strict=True))
    assert all(torch.equal(p, o) for p, o in zip(training.student.parameters(), own, strict=True))
    again = StudentTraining(dropping_net(9), images, numbers, seed=3)
    again.load(state)
    for epoch in (2, 3):
        again.run_epoch(soft(epoch))
    assert same(again.state(), training.state())
    assert len(state) == len(StudentTraining(dropping_net(), images, settings(), seed=3).state()) + len(own) * 4


def test_a_student_is_tested_with_its_average():
    images, seen = normal(0, 20, 3, SIZE, SIZE), []

    def test(network):
        seen.append(network[0].weight.detach().clone())
        return 0.0

    for ema in (0.0, 0.99):
        net = dropping_net()
        start = net[0].weight.detach().clone()
        train_student(net, images, soft_epochs(20), settings(ema=ema, lr=0.1), test)
        moved, tested = (float((w.detach() - start).abs().mean()) for w in (net[0].weight, seen[-1]))
        assert tested == pytest.approx(moved, rel=1e-6) if ema == 0 else tested < 0.05 * moved


def test_cos2_by_hand():
    """eta 2: half the height of a cosine for 5/6 of the epochs, then straight to 0."""
    turn = 0.5 * (1 + math.cos(math.pi * 5 / 12))
    for epoch, expected in (
        (0, 1.0),
        (30, 0.5 * (1 + math.cos(math.pi / 4))),
        (50, turn),
        (55, turn / 2),
        (59, turn / 10),
    ):
        assert student_lr("cosine_linear", 0.2, epoch, 60, eta=2.0) == pytest.approx(0.2 * expected, rel=1e-9)


def test_steps_are_phases_of_a_constant_rate():
    steps = settings(epochs=10, schedule="constant", lr=1.0, phases=((5, {"lr": 0.5}), (8, {"lr": 0.25})))
    assert [steps.lr_at(epoch) for epoch in range(10)] == [1.0] * 5 + [0.5] * 3 + [0.25] * 2


def test_views_of_the_tests_are_cut_and_mixed():
    assert any(bottom > top and right > left for plan in plans(0, 20) for top, left, bottom, right in [plan.box])


def test_sgd_has_momentum_and_decays_all_parameters():
    """Two epochs against the update written down; its momentum survives an interruption."""
    images, numbers = normal(0, 20, 3, SIZE, SIZE), settings(epochs=2, optimizer="sgd", lr=0.05, weight_decay=0.02)
    steps = []

    class Noting(StudentTraining):
        def _add_up_gradients(self):
            steps.append([(p.detach().clone(), p.grad.clone()) for p in self.student.parameters()])

    training, soft = Noting(dropping_net(), images, numbers, seed=3), soft_epochs(20)
    training.run_epoch(soft(0))
    state = training.state()
    training.run_epoch(soft(1))
    velocity = [torch.zeros_like(p) for p in training.student.parameters()]
    after = [[p for p, _ in step] for step in steps[1:]] + [[p.detach() for p in training.student.parameters()]]
    for number, (step, result) in enumerate(zip(steps, after, strict=True)):
        lr = numbers.lr_at(number // 2)  # two batches an epoch
        velocity = [0.9 * v + g + 0.02 * p for v, (p, g) in zip(velocity, step, strict=True)]
        expected = [p - lr * v for v, (p, _) in zip(velocity, step, strict=True)]
        assert all(torch.allclose(r, e, rtol=1e-4, atol=1e-6) for r, e in zip(result, expected, strict=True))
    again = StudentTraining(dropping_net(9), images, numbers, seed=3)
    again.load(state)
    again.run_epoch(soft(1))
    assert same(again.state(), training.state())
