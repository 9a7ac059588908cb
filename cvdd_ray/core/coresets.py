"""Real images that stand for their class, chosen by features (k-centre, herding), and the features.

Legend: N images, D features, B images of a batch, C channels, S pixels.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


@torch.no_grad()
def features(model: nn.Module, images_BCSS: Tensor) -> Tensor:
    """Return what the network's last linear layer is given, (B, D)."""
    found: list[Tensor] = []
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    hook = last.register_forward_pre_hook(lambda _, given: found.append(given[0]))
    try:
        model(images_BCSS)
    finally:
        hook.remove()
    return found[0]


def k_center(features_ND: Tensor, number: int) -> list[int]:
    """Return the images of a greedy k-centre: first the one nearest to the mean, then always the one that is farthest from
    those chosen.  Source: own, as in the field (Sener and Savarese 2018); `number` may not exceed N."""
    start = int((features_ND - features_ND.mean(0)).norm(dim=1).argmin())
    chosen, nearest_N = [start], (features_ND - features_ND[start]).norm(dim=1)
    while len(chosen) < number:
        nearest_N[chosen[-1]] = -1.0  # also where several images have the same features
        chosen.append(int(nearest_N.argmax()))
        nearest_N = torch.minimum(nearest_N, (features_ND - features_ND[chosen[-1]]).norm(dim=1))
    return chosen


def herding(features_ND: Tensor, number: int) -> list[int]:
    """Return images whose mean follows the mean of all: each the one that brings it nearest, none twice.  Source: own, as in
    the field (Welling 2009, iCaRL); `number` may not exceed N."""
    mean_D, sum_D, chosen = features_ND.mean(0), torch.zeros_like(features_ND[0]), []
    for count in range(1, number + 1):
        distance_N = (mean_D - (sum_D + features_ND) / count).norm(dim=1)
        distance_N[chosen] = torch.inf
        chosen.append(int(distance_N.argmin()))
        sum_D = sum_D + features_ND[chosen[-1]]
    return chosen


CORESETS: dict[str, Callable[[Tensor, int], list[int]]] = {"k_center": k_center, "herding": herding}
