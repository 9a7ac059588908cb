"""Learning rates as functions of the step."""

import math


def recover_lr(lr: float, iteration: int, iterations: int) -> float:
    """Return the pixel learning rate of one synthesis iteration, set before the step (spec 5.4)."""
    return 0.5 * lr * (1.0 + math.cos(math.pi * iteration / iterations))


def smoothed_cosine_lr(lr: float, epoch: int, epochs: int, eta: float) -> float:
    """Return the student's learning rate of one epoch: a cosine stretched by eta (paper Fig. 2, spec section 7)."""
    return 0.5 * lr * (1.0 + math.cos(math.pi * epoch / (epochs * eta)))
