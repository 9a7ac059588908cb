"""Training an expert on real images (squeeze), and accuracy.

Legend: N images, B images of a batch, C channels, K classes, S pixels.
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvdd_ray.core.augment import Views, apply_views, draw_boxes
from cvdd_ray.core.keys import generator
from cvdd_ray.core.workers import ALONE, Workers
from cvdd_ray.errors import NumericsError


def padded_crops(images_BCSS: Tensor, pad: int, draw: torch.Generator, *, flip: bool) -> Tensor:
    """Return random S x S crops of the zero-padded images, mirrored with probability 1/2 if `flip` (spec section 2)."""
    batch, _, size, _ = images_BCSS.shape
    device = images_BCSS.device
    padded = F.pad(images_BCSS, (pad,) * 4)
    offset_B2 = torch.randint(2 * pad + 1, (batch, 2), generator=draw)
    side_S = torch.arange(size)
    rows_BS = (offset_B2[:, :1] + side_S).to(device)
    columns_BS = offset_B2[:, 1:] + side_S
    if flip:
        mirrored_B = torch.rand(batch, generator=draw) < 0.5
        columns_BS = torch.where(mirrored_B[:, None], columns_BS.flip(1), columns_BS)
    index_B = torch.arange(batch, device=device)[:, None, None]
    crops_BSSC = padded.permute(0, 2, 3, 1)[index_B, rows_BS[:, :, None], columns_BS.to(device)[:, None, :]]
    return crops_BSSC.permute(0, 3, 1, 2).contiguous()


def resized_crops(images_BCSS: Tensor, draw: torch.Generator, *, flip: bool) -> Tensor:
    """Return random resized crops of the images, mirrored with probability 1/2 if `flip`."""
    batch, _, size, _ = images_BCSS.shape
    boxes_B4 = draw_boxes(batch, size, size, draw)
    flips_B = torch.rand(batch, generator=draw) < 0.5 if flip else torch.zeros(batch, dtype=torch.bool)
    return apply_views(images_BCSS, Views(boxes_B4, flips_B, torch.zeros(batch, 2, dtype=torch.long)), size)


@dataclass(frozen=True)
class PretrainSettings:
    """Numbers of the squeeze (spec section 2): epochs, Adam with coupled L2 or SGD, cosine T_max in epochs (None: a constant
    learning rate)."""

    epochs: int
    optimizer: str
    lr: float
    weight_decay: float
    cosine_epochs: int | None
    precision: str = "float32"
    warmup_epochs: int = 0


def _schedule(optimizer: torch.optim.Optimizer, s: PretrainSettings) -> torch.optim.lr_scheduler.LRScheduler:
    """Return the course of the learning rate: lr/(w+1) ... lr w/(w+1) in the w epochs of the climb, then a cosine; or a constant
    one."""
    if s.cosine_epochs is None:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=s.cosine_epochs - s.warmup_epochs)
    if not s.warmup_epochs:
        return cosine
    climb = torch.optim.lr_scheduler.LinearLR(optimizer, 1 / (s.warmup_epochs + 1), 1.0, s.warmup_epochs)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [climb, cosine], [s.warmup_epochs])


def pretrain_expert(
    model: nn.Module,
    epoch_batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    settings: PretrainSettings,
    on_epoch: Callable[[int, float, float], None] = lambda epoch, loss, accuracy: None,
) -> None:
    """Train `model` in place with hard-label cross-entropy; `epoch_batches(epoch)` yields (images_BCSS, labels_B).

    The schedule steps once per epoch; the last epoch's weights are the result. `on_epoch` gets (epoch, mean loss, train
    accuracy in percent).  Raises NumericsError when the loss stops being finite.  Source: spec section 2.
    """
    s = settings
    if s.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=s.lr, weight_decay=s.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=s.lr, momentum=0.9, weight_decay=s.weight_decay)
    scheduler = _schedule(optimizer, s)
    model.train().to(memory_format=torch.channels_last)
    for epoch in range(s.epochs):
        loss_sum, correct, seen = 0.0, 0, 0
        for images_BCSS, labels_B in epoch_batches(epoch):
            images_BCSS = images_BCSS.contiguous(memory_format=torch.channels_last)
            with torch.autocast(images_BCSS.device.type, torch.bfloat16, enabled=s.precision == "bfloat16"):
                logits_BK = model(images_BCSS)
            loss = F.cross_entropy(logits_BK.float(), labels_B)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            loss_sum += float(loss.detach()) * len(labels_B)
            correct += int((logits_BK.argmax(1) == labels_B).sum())
            seen += len(labels_B)
        scheduler.step()
        if not math.isfinite(loss_sum):
            raise NumericsError(f"pretraining diverged in epoch {epoch + 1}: the loss is not finite; lower pretrain.lr")
        on_epoch(epoch, loss_sum / seen, 100.0 * correct / seen)
    model.eval().to(memory_format=torch.contiguous_format)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], workers: Workers = ALONE) -> float:
    """Return the top-1 accuracy in percent over (images_BCSS, labels_B), in eval mode; the mode is restored. Of several
    workers each gives its own batches, and all get the accuracy over all of them."""
    was_training = model.training
    model.eval()
    correct = seen = 0
    for images_BCSS, labels_B in batches:
        images_BCSS = images_BCSS.contiguous(memory_format=torch.channels_last)
        correct += int((model(images_BCSS).argmax(1) == labels_B).sum())
        seen += len(labels_B)
    model.train(was_training)
    counts = torch.tensor([correct, seen], device=next(model.parameters()).device)
    workers.all_reduce([counts])
    correct, seen = counts.tolist()
    return 100.0 * correct / seen


def shuffled_batches(num_images: int, batch_size: int, seed: int, epoch: int) -> tuple[list[Tensor], torch.Generator]:
    """Return the index batches of one pretraining epoch and the generator for its augmentation. A last batch of one
    image is left out: it has no batch statistics."""
    draw = generator(seed, "pretrain", epoch)
    batches = list(torch.randperm(num_images, generator=draw).split(batch_size))
    if len(batches) > 1 and len(batches[-1]) == 1:
        batches.pop()
    return batches, draw
