"""Seeded, class-balanced choices as pure functions of (seed, purpose, class).

Shapes: N images, K classes. A purpose keeps the random streams of different choices apart.
"""

import numpy as np

HOLDOUT, MAX_PER_CLASS, MAX_TEST, DIGITS_TEST = range(4)


def shuffled(labels: np.ndarray, label: int, seed: int, purpose: int) -> np.ndarray:
    """Indices of one class in random order: a pure function of its arguments."""
    key = np.array([seed, purpose << 32 | label], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).permutation(np.flatnonzero(labels == label))


def pick(labels: np.ndarray, per_class: np.ndarray, seed: int, purpose: int) -> np.ndarray:
    """Sorted indices of `per_class[c]` random images of every class c."""
    picked = [shuffled(labels, label, seed, purpose)[:count] for label, count in enumerate(per_class)]
    return np.sort(np.concatenate(picked))


def shares(counts: np.ndarray, share: float) -> np.ndarray:
    """share * counts, rounded half up."""
    return np.floor(share * counts + 0.5).astype(np.int64)


def holdout_counts(counts: np.ndarray, share: float) -> np.ndarray:
    """Images of every class that are held out: the share of it, at least one, at least one left."""
    return np.clip(shares(counts, share), 1, counts - 1)


def scaled_down(counts: np.ndarray, total: int | None) -> np.ndarray:
    """Counts per class in the same proportions that add up to at most `total` (largest remainders first)."""
    if total is None or total >= counts.sum():
        return counts
    exact = counts * total / counts.sum()
    scaled = np.floor(exact).astype(np.int64)
    scaled[np.argsort(scaled - exact, kind="stable")[: total - scaled.sum()]] += 1
    return scaled
