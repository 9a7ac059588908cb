"""Learning rates as functions of the step."""

import math
from collections.abc import Callable


def recover_lr(lr: float, iteration: int, iterations: int) -> float:
    """Return the pixel learning rate of one synthesis iteration, set before the step (spec 5.4)."""
    return 0.5 * lr * (1.0 + math.cos(math.pi * iteration / iterations))


def smoothed_cosine_lr(lr: float, epoch: float, epochs: float, eta: float) -> float:
    """Return the student's learning rate of one epoch: a cosine stretched by eta (paper Fig. 2, spec section 7)."""
    return 0.5 * lr * (1.0 + math.cos(math.pi * epoch / (epochs * eta)))


def cosine_linear_lr(lr: float, epoch: float, epochs: float, eta: float) -> float:
    """Return the learning rate of one epoch: the stretched cosine for five sixths of the epochs, from there a straight line
    to 0 (EDC's cos2, with eta 2; spec 9.5)."""
    turn = epochs * 5 / 6
    if epoch <= turn:
        return smoothed_cosine_lr(lr, epoch, epochs, eta)
    return smoothed_cosine_lr(lr, turn, epochs, eta) * (epochs - epoch) / (epochs - turn)


def linear_lr(lr: float, epoch: float, epochs: float, eta: float) -> float:
    """Return the learning rate of one epoch of a straight line to 0 at `epochs * eta`; eta 2 ends at one half
    (spec section 7 without `--cos`; EDC on ImageNet-1K, spec 9.5)."""
    return lr * (1.0 - epoch / (epochs * eta))


def smallest_area(kind: str, low: float, high: float, iteration: int, iterations: int, milestone: float) -> float:
    """Return the smallest area share of a random crop in one iteration (CDA, spec 9.2): from `high` down to `low` at
    `milestone * iterations`, `low` from there on; kind cosine, linear, step (high until then) or constant (low)."""
    progress = iteration / (milestone * iterations)
    if kind == "constant" or progress >= 1:
        return low
    share = {"cosine": 0.5 * (1.0 + math.cos(math.pi * progress)), "linear": 1.0 - progress, "step": 1.0}[kind]
    return share * high + (1.0 - share) * low


def constant_lr(lr: float, epoch: float, epochs: float, eta: float) -> float:
    """Return `lr`, whatever the epoch."""
    return lr


def step_lr(lr: float, epoch: float, epochs: float, eta: float) -> float:
    """Return `lr` up to epoch `epochs // 2 + 1`, a tenth of it afterwards (MTT, spec 9.6: after epoch 501 of 1001)."""
    return lr if epoch <= epochs // 2 + 1 else 0.1 * lr


STUDENT_SCHEDULES: dict[str, Callable[[float, float, float, float], float]] = {
    "cosine": smoothed_cosine_lr,
    "cosine_linear": cosine_linear_lr,
    "linear": linear_lr,
    "constant": constant_lr,
    "step": step_lr,
}


def student_lr(kind: str, lr: float, epoch: int, epochs: int, *, eta: float, warmup_epochs: int = 0) -> float:
    """Return the student's learning rate of epoch 0..epochs-1.

    The first `warmup_epochs` climb in equal steps, lr/(w+1) ... lr w/(w+1); the schedule `kind` (a key of
    STUDENT_SCHEDULES) has the epochs after them.
    """
    if epoch < warmup_epochs:
        return lr * (epoch + 1) / (warmup_epochs + 1)
    return STUDENT_SCHEDULES[kind](lr, epoch - warmup_epochs, epochs - warmup_epochs, eta)
