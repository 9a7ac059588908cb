"""Scores that tell what distillation adds from what soft labels and training settings add (DD-Ranking).

All arguments are fractions: accuracies in 0..1, gains in -1..1.
"""

import math


def hard_label_recovery(real_hard: float, distilled_hard: float) -> float:
    """Return HLR = acc(real, hard labels) - acc(distilled, hard labels): what distilled images lose without soft labels;
    lower is better."""
    return real_hard - distilled_hard


def improvement_over_random(distilled: float, random: float) -> float:
    """Return IOR = acc(distilled, any labels) - acc(random real images, the same labels and training); higher is better."""
    return distilled - random


def normalised(gain: float) -> float:
    """Return (e^gain - e^-1) / (e - e^-1): a gain of -1..1 on a scale of 0..1, on which a gain of 0 is 0.269."""
    return (math.exp(gain) - math.exp(-1)) / (math.exp(1) - math.exp(-1))


def label_robust_score(hlr: float, ior: float, weight: float = 0.5) -> float:
    """Return LRS, `normalised` of weight * IOR - (1 - weight) * HLR: how good the images are whatever the labels."""
    return normalised(weight * ior - (1 - weight) * hlr)


def augmentation_robust_score(augmented: float, plain: float, weight: float = 0.5) -> float:
    """Return ARS, `normalised` of weight * augmented + (1 - weight) * plain: how good the images are whatever the
    augmentation. Both are gains over random real images, with augmentation and without."""
    return normalised(weight * augmented + (1 - weight) * plain)
