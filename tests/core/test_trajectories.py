"""Matched trajectories: against formulas of a linear model, one backward pass through the unroll, finite differences."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from cvdd_ray.core.models import build_model, build_seeded
from cvdd_ray.core.siamese import augmented, operations
from cvdd_ray.core.trajectories import (
    FlatNetwork,
    Step,
    TrajectorySettings,
    TrajectoryState,
    draw_piece,
    draw_steps,
    expert_trajectory,
    match_trajectories,
    matching_gradients,
)
from cvdd_ray.errors import ConfigError, NumericsError

PLAIN = ("flip", (0.9, 0.0, 0.0))  # leaves images as they are
SETTINGS = TrajectorySettings(
    seed=0, iterations=6, lr=2.0, lr_of_lr=1e-3, momentum=0.5, num_experts=3, max_start=2, target_epochs=2, steps=3,
    step_images=4, operations=operations(True), low_C=(-2.0,) * 3, high_C=(2.0,) * 3, checkpoint_every=2,
)  # fmt: skip


def squares(theta_P, views, labels_B):
    """Half the mean squared error of a linear model without bias."""
    return 0.5 * (views.flatten(1) @ theta_P - labels_B).square().mean()


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def small_network(seed=0):
    model = build_seeded("convnet3", 3, 8, width=0.0625, seed=seed).double()
    return FlatNetwork(model, "convnet3")


def whole(num_images, *drawn_steps):
    return [Step(torch.arange(num_images), one) for one in drawn_steps]


def test_the_loss_is_one_at_learning_rate_zero():
    network = small_network()
    x, y, start, target = drawn(6, 3, 8, 8), torch.arange(6) % 3, network.theta(), drawn(len(network.theta()))
    steps = whole(6, ("color", (0.2, 0.4, 0.6)), ("rotate", (0.9, 0.0, 0.0)))
    loss, of_images, of_lr = matching_gradients(network.loss, x, y, 0.0, start, target, steps)
    assert float(loss) == 1.0
    assert not of_images.any()
    assert of_lr != 0


@pytest.mark.parametrize("num_steps", [1, 2])
def test_a_linear_model_s_gradients_are_those_of_the_formulas(num_steps):
    """theta' = theta - a/B X^T (X theta - y) = A theta + b; everything by hand from there, in float64."""
    x, y, start, target, a = drawn(4, 1, 1, 5, seed=1), drawn(4, seed=2), drawn(5, seed=3), drawn(5, seed=4), 0.3
    loss, of_images, of_lr = matching_gradients(squares, x, y, a, start, target, whole(4, *[PLAIN] * num_steps))
    X, B = x.flatten(1), 4
    theta, way = start, []
    for _ in range(num_steps):
        way.append(theta)
        theta = theta - a / B * X.T @ (X @ theta - y)
    distance = (start - target) @ (start - target)
    back = 2 * (theta - target) / distance
    by_X, by_a = torch.zeros_like(X), 0.0
    for before in reversed(way):
        rest = X @ before - y
        # d/dX of back . X^T (X theta - y) = rest back^T + (X back) theta^T
        by_X -= a / B * (torch.outer(rest, back) + torch.outer(X @ back, before))
        by_a -= float(back @ (X.T @ rest)) / B
        back = back - a / B * X.T @ (X @ back)
    torch.testing.assert_close(loss, (theta - target) @ (theta - target) / distance, rtol=1e-12, atol=0)
    torch.testing.assert_close(of_images.flatten(1), by_X, rtol=1e-11, atol=1e-14)
    assert float(of_lr) == pytest.approx(by_a, rel=1e-11)


def test_step_by_step_is_one_backward_pass_through_the_whole_unroll():
    network = small_network()
    x, y, start, target = drawn(6, 3, 8, 8), torch.arange(6) % 3, network.theta(), network.theta() + 0.1
    steps = draw_steps(replace(SETTINGS, steps=5), 3, 6)
    found = matching_gradients(network.loss, x, y, 0.05, start, target, steps)
    x, lr, theta = x.clone().requires_grad_(True), torch.tensor(0.05, dtype=torch.float64, requires_grad=True), start
    for step in steps:
        theta = theta.requires_grad_(True)
        loss = network.loss(theta, augmented(x[step.index_B], step.drawn), y[step.index_B])
        theta = theta - lr * torch.autograd.grad(loss, theta, create_graph=True)[0]
    loss = (theta - target).square().sum() / (start - target).square().sum()
    for ours, expected in zip(found, (loss, *torch.autograd.grad(loss, (x, lr))), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)


def test_gradients_are_finite_differences():
    network = small_network()
    x, y, start, target = drawn(4, 3, 8, 8), torch.arange(4) % 3, network.theta(), network.theta() + 0.05
    steps = [Step(torch.tensor([2, 0, 1]), ("scale", (0.1, 0.8, 0.0))), Step(torch.tensor([3, 1]), PLAIN)]

    def value(x, lr):
        return float(matching_gradients(network.loss, x, y, lr, start, target, steps)[0])

    _, of_images, of_lr = matching_gradients(network.loss, x, y, 0.1, start, target, steps)
    along, e = drawn(4, 3, 8, 8, seed=9), 1e-5
    slope = (value(x + e * along, 0.1) - value(x - e * along, 0.1)) / (2 * e)
    assert float((of_images * along).sum()) == pytest.approx(slope, rel=1e-5)
    assert float(of_lr) == pytest.approx((value(x, 0.1 + e) - value(x, 0.1 - e)) / (2 * e), rel=1e-5)


def test_an_expert_s_trajectory_is_that_of_torch_s_sgd():
    model = build_seeded("convnet3", 3, 8, width=0.0625, seed=1).double()
    batches = [(drawn(5, 3, 8, 8, seed=k), torch.arange(5) % 3) for k in range(3)]
    network = FlatNetwork(model, "convnet3")
    rows = expert_trajectory(network.loss, network.theta(), lambda epoch: batches[epoch : epoch + 2], 2, 0.1)
    assert rows.shape == (3, len(network.theta()))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(2):
        torch.testing.assert_close(rows[epoch], FlatNetwork(model, "x").theta())
        for views, labels in batches[epoch : epoch + 2]:
            optimizer.zero_grad()
            F.cross_entropy(model(views), labels).backward()
            optimizer.step()
    torch.testing.assert_close(rows[2], FlatNetwork(model, "x").theta())
    with pytest.raises(
        NumericsError, match=r"epoch 1: the loss is not finite; lower synthesize\.trajectories\.expert_lr"
    ):
        expert_trajectory(network.loss, network.theta() * torch.inf, lambda epoch: batches, 1, 0.1)


def test_a_network_with_batchnorm_is_refused():
    with pytest.raises(ConfigError, match="resnet18 has BatchNorm, whose running statistics are no parameters; use a"):
        FlatNetwork(build_model("resnet18", 3, 8, width=0.125), "resnet18")
    FlatNetwork(nn.Linear(3, 2), "linear")


def test_pieces_and_steps_depend_on_the_iteration_alone():
    pieces = [draw_piece(SETTINGS, t) for t in range(60)]
    assert pieces == [draw_piece(SETTINGS, t) for t in range(60)]
    assert set(pieces) == {(expert, start) for expert in range(3) for start in range(2)}
    steps = draw_steps(replace(SETTINGS, steps=5), 7, 10)
    assert [len(step.index_B) for step in steps] == [4, 4, 2, 4, 4]
    assert sorted(torch.cat([step.index_B for step in steps[:3]]).tolist()) == list(range(10))
    assert len({step.drawn for step in steps}) == 5
    again = draw_steps(replace(SETTINGS, steps=5), 7, 10)
    assert all(torch.equal(a.index_B, b.index_B) and a.drawn == b.drawn for a, b in zip(steps, again, strict=True))
    assert len(draw_steps(replace(SETTINGS, step_images=None), 0, 10)[0].index_B) == 10


def matched(state=None, settings=SETTINGS, **calls):
    network, y = small_network(), torch.arange(6) % 3
    towards = drawn(len(network.theta()), seed=5) / 50
    state = state or TrajectoryState.start(drawn(6, 3, 8, 8).clamp(-2, 2), 0.05)

    def parameters(expert, epoch):
        return network.theta() + epoch * (expert + 1) * towards

    return match_trajectories(network.loss, y, state, settings, parameters, **calls)


def test_the_loop_is_sgd_with_momentum_inside_the_pixel_range():
    states = []
    final = matched(on_progress=states.append)
    assert [state.iteration for state in states] == [1, 2, 3, 4, 5, 6]
    assert final.images_NCSS.abs().max() <= 2
    assert [row[0] for row in final.trace] == list(range(6))
    assert final.trace[1][2] == states[0].lr
    network, y = small_network(), torch.arange(6) % 3
    towards, (expert, start) = drawn(len(network.theta()), seed=5) / 50, draw_piece(SETTINGS, 1)
    pieces = [network.theta() + epoch * (expert + 1) * towards for epoch in (start, start + 2)]
    steps = draw_steps(SETTINGS, 1, 6)
    loss, of_images, of_lr = matching_gradients(network.loss, states[0].images_NCSS, y, states[0].lr, *pieces, steps)
    velocity = 0.5 * states[0].velocity_NCSS + of_images
    torch.testing.assert_close(states[1].images_NCSS, (states[0].images_NCSS - 2 * velocity).clamp(-2, 2))
    assert states[1].lr == pytest.approx(states[0].lr - 1e-3 * (0.5 * states[0].lr_velocity + float(of_lr)), rel=1e-12)
    assert final.trace[1][1] == pytest.approx(float(loss), rel=1e-12)


def test_a_checkpoint_leads_to_the_same_bits():
    kept = []
    final = matched(on_checkpoint=kept.append)
    assert [state.iteration for state in kept] == [2, 4]
    again = matched(kept[1])
    assert torch.equal(final.images_NCSS, again.images_NCSS)
    assert (final.lr, final.lr_velocity, final.trace) == (again.lr, again.lr_velocity, again.trace)


def test_what_goes_astray_is_said_before_it_is_kept():
    with pytest.raises(
        NumericsError, match=r"iteration 0: expert . from epoch . gives a loss or gradient that is not fin"
    ):
        matched(replace(TrajectoryState.start(drawn(6, 3, 8, 8), 0.05), lr=float("inf")))
    with pytest.raises(NumericsError, match=r"the learning rate of the steps fell from .* lower synth.*lr_of_lr"):
        matched(settings=replace(SETTINGS, lr_of_lr=1e6, iterations=30))
