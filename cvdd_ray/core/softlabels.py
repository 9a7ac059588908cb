"""Batch-specific soft labels (paper section 3.4, spec section 6): which views an epoch has, and what teachers say of them.

Legend: N images of the set, B images of a batch, K classes, S pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from cvdd_ray.core.augment import Views, apply_views, cutmix, draw_cutmix_box, draw_views
from cvdd_ray.core.batchnorm import GroupBatchNorm, with_batchnorm_replaced
from cvdd_ray.core.keys import generator

MAX_IMAGES = 512  # in one call of a teacher
MAX_IMAGES_ON_CPU = 64  # more take longer each, since less of them stays in the caches, and more memory


@dataclass(frozen=True)
class BatchPlan:
    """One batch of one epoch, by integers alone: which images, which views, which CutMix partners and box."""

    epoch: int
    batch: int
    image_index_B: Tensor
    views: Views
    partner_B: Tensor
    box: tuple[int, int, int, int]


def epoch_plans(
    seed: int, epoch: int, num_images: int, size: int, *, batch_size: int, flip: bool, use_cutmix: bool, crop_scale
) -> list[BatchPlan]:
    """Return the batches of one epoch: a permutation of the images, cut into batches, with a view per image and one
    CutMix box and permutation per batch.  Source: spec 6.1; decision 39 (seeded)."""
    draw = generator(seed, "relabel", epoch)
    order_N = torch.randperm(num_images, generator=draw)
    views = draw_views(num_images, size, draw, crop=True, flip=flip, roll=0, scale=crop_scale)
    starts = batch_starts(num_images, batch_size)
    plans = []
    for batch, (start, stop) in enumerate(zip(starts, [*starts[1:], num_images], strict=True)):
        partner_B = torch.randperm(stop - start, generator=draw)
        box = draw_cutmix_box(size, draw) if use_cutmix else (0, 0, 0, 0)
        cut = Views(views.boxes_N4[start:stop], views.flips_N[start:stop], views.rolls_N2[start:stop])
        plans.append(BatchPlan(epoch, batch, order_N[start:stop], cut, partner_B, box))
    return plans


def batch_starts(num_images: int, batch_size: int) -> list[int]:
    """Return where the batches of an epoch begin. A remainder of one image joins the batch before it, since one image has
    no batch statistics."""
    starts = list(range(0, num_images, batch_size))
    if len(starts) > 1 and num_images - starts[-1] == 1:
        starts.pop()
    return starts


def batch_views(images_NCHW: Tensor, plan: BatchPlan, rows_R: Tensor | None = None) -> Tensor:
    """Return the batch (B, C, S, S) that teachers label and students see: the same tensor in both stages. With `rows_R`
    only these rows of it (R, C, S, S), made of the views that they and their CutMix partners need."""
    device = images_NCHW.device
    if rows_R is None:
        chosen = images_NCHW[plan.image_index_B.to(device)]
        views_BCSS = apply_views(chosen, plan.views, images_NCHW.shape[-1])
        return cutmix(views_BCSS, plan.partner_B.to(device), plan.box)
    wanted = torch.cat([rows_R, plan.partner_B[rows_R]])
    needed_N, place_2R = wanted.unique(return_inverse=True)
    own_R, partner_R = place_2R.chunk(2)
    cut = Views(plan.views.boxes_N4[needed_N], plan.views.flips_N[needed_N], plan.views.rolls_N2[needed_N])
    views_NCSS = apply_views(images_NCHW[plan.image_index_B[needed_N].to(device)], cut, images_NCHW.shape[-1])
    partner_N = torch.arange(len(needed_N)).index_put((own_R,), partner_R)
    return cutmix(views_NCSS, partner_N.to(device), plan.box)[own_R.to(device)]


def group_sizes(batch: int, bn_group: int) -> list[int]:
    """Return the sizes of the BatchNorm groups of a batch: bn_group each, the rest in a smaller last one; a rest of one
    image joins the group before it."""
    sizes = [bn_group] * (batch // bn_group)
    rest = batch % bn_group
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


def batches_together(batch_size: int, bn_group: int, max_images: int = MAX_IMAGES) -> int:
    """Return how many batches `committee_logits` may be given at once instead of all: it then makes the same calls."""
    per_call = max(1, max_images // bn_group)
    per_batch = max(1, batch_size // bn_group)
    return per_call // math.gcd(per_call, per_batch)


class Teacher:
    """A frozen expert that writes logits; in `batch` mode every BatchNorm uses its group's own statistics (BSSL).

    `scope="full"` puts dropout and its like in train mode too, as the published code does (parity; its labels are then random).
    """

    def __init__(self, model: nn.Module, *, batchnorm: str, scope: str = "bn"):
        self._groups = [1]
        if batchnorm == "batch":
            self._model = with_batchnorm_replaced(model, lambda layer, index: GroupBatchNorm(layer, self._groups))
        else:
            self._model = with_batchnorm_replaced(model, lambda layer, index: layer)
        if scope == "full":
            self._model.train()  # its BatchNorm has been replaced, so this wakes dropout and stochastic depth

    @torch.no_grad()
    def logits(self, views_NCHW: Tensor, num_groups: int = 1) -> Tensor:
        """Return logits_NK of a batch that holds `num_groups` equal, consecutive BatchNorm groups."""
        self._groups[0] = num_groups
        return self._model(views_NCHW)


def rescaled_logits(
    teachers: Sequence[Teacher], weights: Sequence[float], batches: Sequence[Tensor], bn_group: int, max_images: int
) -> list[Tensor]:
    """Return the weighted sum of the teachers' logits as `committee_logits`, each teacher's logits of a batch brought to the
    mean of all teachers' Frobenius norms first.  Source: spec 9.4 (ImageNet-1K)."""
    each_T = [committee_logits([teacher], [1.0], batches, bn_group, max_images) for teacher in teachers]
    summed = []
    for logits_T in zip(*each_T, strict=True):
        norm_T = torch.stack([logits.norm() for logits in logits_T])
        scale_T = norm_T.mean() / norm_T
        summed.append(sum(w * s * logits for w, s, logits in zip(weights, scale_T, logits_T, strict=True)))
    return summed


def committee_logits(
    teachers: Sequence[Teacher],
    weights: Sequence[float],
    batches: Sequence[Tensor],
    bn_group: int,
    max_images: int = MAX_IMAGES,
) -> list[Tensor]:
    """Return the weighted sum of the teachers' logits (fp32, (B, K) each) for every batch.

    Full groups of all batches are stacked into calls of at most `max_images` images; the statistics stay per group.
    Source: spec 6.1 step 4; averaging logits is a weighted geometric mean of the softened distributions (spec 6.2).
    """
    groups = [group for batch in batches for group in batch.split(group_sizes(len(batch), bn_group))]
    logits: list[Tensor | None] = [None] * len(groups)
    per_call = max(1, max_images // bn_group)
    full = [g for g, group in enumerate(groups) if len(group) == bn_group]
    for start in range(0, len(full), per_call):
        chosen = full[start : start + per_call]
        stacked = torch.cat([groups[g] for g in chosen])
        total = sum(w * t.logits(stacked, len(chosen)) for t, w in zip(teachers, weights, strict=True))
        for g, part in zip(chosen, total.split(bn_group), strict=True):
            logits[g] = part
    for g, group in enumerate(groups):
        if logits[g] is None:
            logits[g] = sum(w * t.logits(group) for t, w in zip(teachers, weights, strict=True))
    flat = torch.cat(logits)
    return list(flat.split([len(batch) for batch in batches]))
