"""What an expert sees in a set of images: how alike images of a class are, how far their statistics are from its own.

Legend: N images, D features, K classes, C channels, L BatchNorm layers, G groups (batches).
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from cvdd_ray.core.batchnorm import MatchingBatchNorm, with_batchnorm_replaced


@torch.no_grad()
def embeddings(model: nn.Module, batches: Sequence[Tensor]) -> Tensor:
    """Return features_ND of normalised images: what goes into the last linear layer of a network in eval mode."""
    last = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1]
    found: list[Tensor] = []
    hook = last.register_forward_pre_hook(lambda layer, given: found.append(given[0].flatten(1).cpu()))
    try:
        for images_BCSS in batches:
            model(images_BCSS)
    finally:
        hook.remove()
    return torch.cat(found)


def class_similarity(features_ND: Tensor, labels_N: Tensor) -> Tensor:
    """Return similarity_K: of every class the mean cosine similarity over all pairs of two different images; lower is more
    diverse (paper Fig. 4).  NaN for a class with one image."""
    unit_ND = nn.functional.normalize(features_ND.double(), dim=1)
    values = []
    for label in range(int(labels_N.max()) + 1):
        own_MD = unit_ND[labels_N == label]
        pairs = len(own_MD) * (len(own_MD) - 1)
        values.append((float((own_MD @ own_MD.T).sum()) - len(own_MD)) / pairs if pairs else float("nan"))
    return torch.tensor(values)


@torch.no_grad()
def statistics_gaps(model: nn.Module, batches: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return (mean_GL, var_GL): per batch and BatchNorm layer, in modules() order, how far the batch's means and variances are
    from the running ones, as mean absolute difference over channels (paper Figs. 5, 10, 11)."""
    running = [(m.running_mean, m.running_var) for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    tape: list = [None] * len(running)
    twin = with_batchnorm_replaced(model, lambda layer, index: MatchingBatchNorm(layer, index, tape, [1]))
    gaps = []
    for images_BCSS in batches:
        twin(images_BCSS)
        gaps.append(
            [
                [float((found[0] - own).abs().mean()) for found, own in zip(moments, layer, strict=True)]
                for moments, layer in zip(tape, running, strict=True)
            ]
        )
    mean_GL, var_GL = torch.tensor(gaps).unbind(2)
    return mean_GL, var_GL
