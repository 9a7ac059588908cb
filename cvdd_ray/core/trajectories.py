"""Matching training trajectories (MTT): images on which a few steps of SGD lead where epochs on real images lead (spec 9.6).

Legend: P parameters of a network in one vector, N synthetic images, B images of a step, C channels, S pixels.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from cvdd_ray.core.keys import generator
from cvdd_ray.core.siamese import Drawn, augmented, draw_operation
from cvdd_ray.core.synthesis import is_traced
from cvdd_ray.errors import ConfigError, NumericsError

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(theta_P, views_BCSS, labels_B) -> mean loss."""


class FlatNetwork:
    """A network without buffers as a function of one vector of all its parameters.

    Raises ConfigError for one with buffers (BatchNorm): they would have a trajectory of their own.
    """

    def __init__(self, model: nn.Module, name: str):
        if next(model.buffers(), None) is not None:
            raise ConfigError(
                f"synthesize.trajectories.network: {name} has BatchNorm, whose running statistics are no parameters; use a "
                f"network without, e.g. convnet3"
            )
        self._model = model
        self._shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def theta(self) -> Tensor:
        """Return a copy of the parameters as they are, theta_P."""
        return torch.cat([parameter.detach().flatten() for parameter in self._model.parameters()])

    def loss(self, theta_P: Tensor, views_BCSS: Tensor, labels_B: Tensor) -> Tensor:
        """Return the mean cross-entropy of the network with these parameters; differentiable twice."""
        parts = theta_P.split([shape.numel() for shape in self._shapes.values()])
        parameters = {name: part.view(self._shapes[name]) for name, part in zip(self._shapes, parts, strict=True)}
        return F.cross_entropy(functional_call(self._model, parameters, (views_BCSS,)), labels_B)


def expert_trajectory(
    loss: Loss, theta_P: Tensor, epoch_batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]], epochs: int, lr: float,
    on_epoch: Callable[[int, float], None] = lambda epoch, loss: None,
) -> Tensor:  # fmt: skip
    """Return the parameters at the start and after every epoch of plain SGD, (epochs + 1, P) on the CPU.

    `epoch_batches(epoch)` yields (views, labels); `on_epoch` gets (epoch, loss of its last step).  Raises NumericsError when
    the loss stops being finite.
    """
    rows = [theta_P.cpu()]
    for epoch in range(epochs):
        for views_BCSS, labels_B in epoch_batches(epoch):
            theta_P = theta_P.detach().requires_grad_(True)
            step_loss = loss(theta_P, views_BCSS, labels_B)
            (gradient_P,) = torch.autograd.grad(step_loss, theta_P)
            step_loss = step_loss.detach()
            theta_P = theta_P.detach() - lr * gradient_P
        if not torch.isfinite(step_loss):
            raise NumericsError(
                f"an expert's trajectory diverged in epoch {epoch + 1}: the loss is not finite; lower "
                f"synthesize.trajectories.expert_lr"
            )
        rows.append(theta_P.cpu())
        on_epoch(epoch, float(step_loss))
    return torch.stack(rows)


@dataclass(frozen=True)
class Step:
    """One step on synthetic images: which of them (no image twice), and under which operation."""

    index_B: Tensor
    drawn: Drawn


def matching_gradients(
    loss: Loss, images_NCSS: Tensor, labels_N: Tensor, lr: float, start_P: Tensor, target_P: Tensor, steps: Sequence[Step],
    view: Callable[[Tensor, Drawn], Tensor] = augmented,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the matching loss |theta_N - target|^2 / |start - target|^2 after these steps of SGD from `start_P`, its gradient
    with respect to the images (N, C, S, S), and that with respect to the learning rate.

    The gradient goes back through the unrolled steps one at a time: of the way there only the parameters are kept, and every
    step is computed once more with its graph. Memory is that of one step, whatever their number; the value is that of one
    backward pass through all of them.  Source: spec 9.6; the loss is 1 with learning rate 0.
    """
    theta_P, way = start_P, []
    for step in steps:
        theta_P = theta_P.detach().requires_grad_(True)
        way.append(theta_P)
        views_BCSS = view(images_NCSS[step.index_B], step.drawn)
        (gradient_P,) = torch.autograd.grad(loss(theta_P, views_BCSS, labels_N[step.index_B]), theta_P)
        theta_P = theta_P.detach() - lr * gradient_P
    distance = (start_P - target_P).square().sum()
    back_P = 2 * (theta_P - target_P) / distance  # gradient of the loss with respect to the parameters after a step
    of_images_NCSS, of_lr = torch.zeros_like(images_NCSS), torch.zeros_like(distance)
    for step, before_P in zip(reversed(steps), reversed(way), strict=True):
        chosen_BCSS = images_NCSS[step.index_B].requires_grad_(True)
        step_loss = loss(before_P, view(chosen_BCSS, step.drawn), labels_N[step.index_B])
        (gradient_P,) = torch.autograd.grad(step_loss, before_P, create_graph=True)
        along = back_P @ gradient_P
        of_before_P, of_chosen_BCSS = torch.autograd.grad(along, (before_P, chosen_BCSS), materialize_grads=True)
        of_images_NCSS[step.index_B] -= lr * of_chosen_BCSS
        of_lr -= along.detach()
        back_P = back_P - lr * of_before_P
    return (theta_P - target_P).square().sum() / distance, of_images_NCSS, of_lr


@dataclass(frozen=True)
class TrajectorySettings:
    """Plain numbers of the loop; `low_C`/`high_C`: the pixel range in normalised space, others as the configuration has
    them."""

    seed: int
    iterations: int
    lr: float
    lr_of_lr: float
    momentum: float
    num_experts: int
    max_start: int
    target_epochs: int
    steps: int
    step_images: int | None
    operations: tuple[str, ...]
    low_C: tuple[float, ...]
    high_C: tuple[float, ...]
    checkpoint_every: int


@dataclass(frozen=True)
class TrajectoryState:
    """Everything an unfinished set needs to go on: images and their momentum, the learning rate and its, the number of
    finished iterations, `trace`: rows (iteration, matching loss, learning rate before its step)."""

    images_NCSS: Tensor
    velocity_NCSS: Tensor
    lr: float
    lr_velocity: float = 0.0
    iteration: int = 0
    trace: tuple[tuple[int, float, float], ...] = field(default_factory=tuple)

    @classmethod
    def start(cls, images_NCSS: Tensor, lr: float) -> "TrajectoryState":
        return cls(images_NCSS.clone(), torch.zeros_like(images_NCSS), lr)


def draw_piece(s: TrajectorySettings, iteration: int) -> tuple[int, int]:
    """Return the expert and the epoch that the piece of trajectory of an iteration begins at."""
    draw = generator(s.seed, "trajectory", iteration)
    return int(torch.randint(s.num_experts, (), generator=draw)), int(torch.randint(s.max_start, (), generator=draw))


def draw_steps(s: TrajectorySettings, iteration: int, num_images: int) -> list[Step]:
    """Return the steps of an iteration: batches of one random order of the images after the other, each with an operation."""
    draw, batches, steps = generator(s.seed, "trajectory-steps", iteration), [], []
    for _ in range(s.steps):
        if not batches:
            batches = list(torch.randperm(num_images, generator=draw).split(s.step_images or num_images))
        steps.append(Step(batches.pop(0), draw_operation(s.operations, draw)))
    return steps


def match_trajectories(
    loss: Loss,
    labels_N: Tensor,
    state: TrajectoryState,
    settings: TrajectorySettings,
    parameters: Callable[[int, int], Tensor],
    *,
    on_progress: Callable[[TrajectoryState], None] = lambda state: None,
    on_checkpoint: Callable[[TrajectoryState], None] = lambda state: None,
) -> TrajectoryState:
    """Advance a set to its last iteration and return its state; images stay inside the pixel range after every step.

    `state` is the start or a checkpoint; both lead to the same bits. `parameters(expert, epoch)` are an expert's. Images and
    learning rate are moved by SGD with momentum. `on_progress` is called after every iteration, `on_checkpoint` every
    `checkpoint_every`.  Raises NumericsError at the first loss or gradient that is not finite, and where the learning rate
    falls to 0, before the step is kept.  Source: spec 9.6; the pixel range is spec 5.4's, published images have none.
    """
    s, device = settings, state.images_NCSS.device
    low, high = (torch.tensor(values, device=device)[:, None, None] for values in (s.low_C, s.high_C))
    while state.iteration < s.iterations:
        iteration = state.iteration
        expert, epoch = draw_piece(s, iteration)
        start_P, target_P = (parameters(expert, at).to(device) for at in (epoch, epoch + s.target_epochs))
        steps = draw_steps(s, iteration, len(labels_N))
        matching_loss, of_images, of_lr = matching_gradients(
            loss, state.images_NCSS, labels_N, state.lr, start_P, target_P, steps
        )
        velocity_NCSS = s.momentum * state.velocity_NCSS + of_images
        lr_velocity = s.momentum * state.lr_velocity + float(of_lr)
        moved = replace(
            state,
            images_NCSS=(state.images_NCSS - s.lr * velocity_NCSS).clamp(low, high),
            velocity_NCSS=velocity_NCSS,
            lr=state.lr - s.lr_of_lr * lr_velocity,
            lr_velocity=lr_velocity,
            iteration=iteration + 1,
        )
        if not bool(torch.isfinite(matching_loss) & torch.isfinite(of_images).all() & torch.isfinite(of_lr)):
            raise NumericsError(
                f"iteration {iteration}: expert {expert} from epoch {epoch} gives a loss or gradient that is not finite; lower "
                f"synthesize.lr or synthesize.trajectories.lr_start"
            )
        if moved.lr <= 0:
            raise NumericsError(
                f"iteration {iteration}: the learning rate of the steps fell from {state.lr:.3g} to {moved.lr:.3g}; lower "
                f"synthesize.trajectories.lr_of_lr"
            )
        if is_traced(iteration, s.iterations):
            moved = replace(moved, trace=(*state.trace, (iteration, float(matching_loss), state.lr)))
        state = moved
        on_progress(state)
        if state.iteration % s.checkpoint_every == 0 and state.iteration < s.iterations:
            on_checkpoint(state)
    return state
