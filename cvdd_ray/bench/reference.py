"""The plain reference: the method in the manner of its published code, one thing after the other.

Experts vote one after the other on one job at a time, forward hooks take the BatchNorm statistics; views are cut image by
image with PIL; every batch has a label file of its own. Written for the benchmark alone, as a reader of the paper would
write it down; it computes what the package computes, see tests/bench.

Legend: B images of a batch, C channels, H W pixels, N images, K classes.
"""

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tvf

from cvdd_ray.config import RunConfig
from cvdd_ray.core.augment import Views
from cvdd_ray.core.softlabels import BatchPlan, group_sizes
from cvdd_ray.errors import ConfigError


class StatisticsHook:
    """How far the statistics of a BatchNorm layer's input are from the running ones, after every forward pass."""

    def __init__(self, layer: nn.BatchNorm2d):
        self.distance = torch.zeros(())
        self._handle = layer.register_forward_hook(self._hear)

    def _hear(self, layer: nn.BatchNorm2d, given: tuple[Tensor], _output: Tensor) -> None:
        x_BCHW = given[0]
        mean_C = x_BCHW.mean([0, 2, 3])
        var_C = x_BCHW.permute(1, 0, 2, 3).contiguous().reshape(x_BCHW.shape[1], -1).var(1, unbiased=False)
        self.distance = torch.norm(layer.running_var - var_C, 2) + torch.norm(layer.running_mean - mean_C, 2)

    def close(self) -> None:
        self._handle.remove()


def require_known(c: RunConfig, work: str) -> None:
    """Raise ConfigError for settings of a kind of work (any but these: synthesis) that this reference does not know: those of
    other methods."""
    s = c.synthesize
    other = {
        "pretrain": {},
        "relabel": {"relabel.rescale": c.relabel.rescale},
        "evaluate": {
            "evaluate.loss": c.evaluate.loss != "kl", "evaluate.ema": c.evaluate.ema > 0,
            "evaluate.optimizer": c.evaluate.optimizer != "adamw", "evaluate.labels": c.evaluate.labels != "soft",
            "evaluate.precision": c.evaluate.precision != "float32",
        },
    }  # fmt: skip
    synthesis = {
        "synthesize.method": s.method != "committee", "synthesize.matching": s.matching.convolutions,
        "synthesize.class_together": s.class_together, "synthesize.crop": s.crop == "pad", "voting.turns": c.voting.turns,
        "synthesize.precision": s.precision != "float32",
    }  # fmt: skip
    unknown = [name for name, used in other.get(work, synthesis).items() if used]
    if unknown:
        raise ConfigError(f"bench {work}: the plain reference knows no {unknown[0]}; leave it out, or name other work")


def distill_job(
    experts: Sequence[nn.Module], weights: Sequence[float], images_BCHW: Tensor, labels_B: Tensor, *, iterations: int,
    lr: float, betas: tuple[float, float], bn_weight: float, first_bn_multiplier: float, roll: int,
    low_C: Sequence[float], high_C: Sequence[float], augment: bool, flip: bool, crop_scale: tuple[float, float],
) -> Tensor:  # fmt: skip
    """Return the distilled images (B, C, H, W), normalised float32, of one job, on which `experts` with `weights` vote; the
    settings are those of SynthesisSettings, `roll` in pixels. Draws from torch's own generator.  Source: spec 5.1-5.4."""
    size, device = images_BCHW.shape[-1], images_BCHW.device
    inputs = images_BCHW.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([inputs], lr=lr, betas=betas, eps=1e-8)
    crop = v2.Compose([v2.RandomResizedCrop(size, crop_scale, antialias=True)] + [v2.RandomHorizontalFlip()] * flip)
    hooks = [
        [StatisticsHook(layer) for layer in expert.modules() if isinstance(layer, nn.BatchNorm2d)] for expert in experts
    ]
    for iteration in range(iterations):
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * iteration / iterations)) / 2
        shift = [int(torch.randint(0, roll + 1, ())) for _ in range(2)]
        views_BCHW = torch.roll(crop(inputs) if augment else inputs, shift, (2, 3))
        optimizer.zero_grad()
        loss = torch.zeros((), device=device)
        for expert, weight, layers in zip(experts, weights, hooks, strict=True):
            cross_entropy = F.cross_entropy(expert(views_BCHW), labels_B)
            distances = [hook.distance * (first_bn_multiplier if k == 0 else 1.0) for k, hook in enumerate(layers)]
            loss = loss + weight * (cross_entropy + bn_weight * sum(distances))
        loss.backward()
        optimizer.step()
        for channel in range(inputs.shape[1]):
            inputs.data[:, channel] = inputs.data[:, channel].clamp(low_C[channel], high_C[channel])
    for layers in hooks:
        for hook in layers:
            hook.close()
    return inputs.detach()


def pil_view(
    image: Image.Image, plan: BatchPlan, row: int, size: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Return view `row` of a batch (C, H, W), normalised float32, cut out of its image with PIL."""
    top, left, height, width = plan.views.boxes_N4[row].tolist()
    view = tvf.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    if plan.views.flips_N[row]:
        view = tvf.horizontal_flip(view)
    pixels_CHW = tvf.to_dtype(tvf.to_image(view), torch.float32, scale=True)
    return tvf.normalize(pixels_CHW, mean, std)


def pil_batch(
    images: Sequence[Image.Image], plan: BatchPlan, size: int, mean: Sequence[float], std: Sequence[float]
) -> Tensor:
    """Return the views of a batch (B, C, H, W), normalised float32, with CutMix."""
    rows = enumerate(plan.image_index_B.tolist())
    views_BCHW = torch.stack([pil_view(images[index], plan, row, size, mean, std) for row, index in rows])
    top, left, bottom, right = plan.box
    mixed_BCHW = views_BCHW.clone()
    mixed_BCHW[:, :, top:bottom, left:right] = views_BCHW[plan.partner_B][:, :, top:bottom, left:right]
    return mixed_BCHW


def label_batch_file(
    folder: Path, plan: BatchPlan, views_BCHW: Tensor, teachers: Sequence[nn.Module], weights: Sequence[float],
    bn_group: int, *, batchnorm: str,
) -> None:  # fmt: skip
    """Write the soft labels of a batch (`save_label`): teachers one after the other, group after group, their BatchNorm
    layers in train mode if `batchnorm` is "batch" (paper Eq. 9). Changes the teachers' mode and running statistics."""
    for teacher in teachers:
        for layer in teacher.modules():
            if isinstance(layer, nn.BatchNorm2d):
                layer.train(batchnorm == "batch")
    with torch.no_grad():
        groups = views_BCHW.split(group_sizes(len(views_BCHW), bn_group))
        voices = list(zip(teachers, weights, strict=True))
        logits_BK = torch.cat([sum(weight * teacher(group) for teacher, weight in voices) for group in groups])
    save_label(folder, plan, logits_BK)


def save_label(folder: Path, plan: BatchPlan, logits_BK: Tensor) -> None:
    """Write the label of a batch, views and float16 logits, to a file of its own in `folder`."""
    views = [plan.views.boxes_N4, plan.views.flips_N, plan.views.rolls_N2]
    label = [plan.image_index_B, *views, plan.partner_B, list(plan.box), logits_BK.half().cpu()]
    torch.save(label, folder / f"batch_{plan.batch}.tar")


def load_label(folder: Path, batch: int) -> tuple[BatchPlan, Tensor]:
    """Return the (plan, logits_BK in float16) of a batch, as `save_label` wrote them."""
    index_B, boxes_B4, flips_B, rolls_B2, partner_B, box, logits_BK = torch.load(
        folder / f"batch_{batch}.tar", weights_only=True
    )
    return BatchPlan(0, batch, index_B, Views(boxes_B4, flips_B, rolls_B2), partner_B, tuple(box)), logits_BK


def train_epoch(
    student: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, num_batches: int, images: Sequence[Image.Image], *,
    size: int, mean: Sequence[float], std: Sequence[float], bn_group: int, temperature: float, device: torch.device,
) -> None:  # fmt: skip
    """Train a student in place for an epoch on the labels of `folder`, a file per batch; `mean` and `std` of pixels scaled
    to [0, 1].  Source: paper section 3.4, spec section 7."""
    student.train()
    for batch in range(num_batches):
        plan, logits_BK = load_label(folder, batch)
        views_BCHW = pil_batch(images, plan, size, mean, std).to(device)
        sizes = group_sizes(len(logits_BK), bn_group)
        optimizer.zero_grad()
        for views, logits in zip(views_BCHW.split(sizes), logits_BK.float().to(device).split(sizes), strict=True):
            log_q = F.log_softmax(student(views) / temperature, 1)
            loss = F.kl_div(log_q, F.softmax(logits / temperature, 1), reduction="batchmean") / len(sizes)
            loss.backward()
        optimizer.step()


def train_expert_epoch(
    expert: nn.Module, optimizer: torch.optim.Optimizer, images: Sequence[Image.Image], labels_N: Sequence[int], *,
    batch_size: int, crop: str, pad: int, flip: bool, size: int, mean: Sequence[float], std: Sequence[float],
    device: torch.device,
) -> None:  # fmt: skip
    """Train an expert in place for an epoch on real images that PIL augments one by one: crops of the image padded by `pad`
    pixels, or random resized ones.  Source: spec section 2 (squeeze)."""
    cropping = v2.RandomCrop(size, padding=pad) if crop == "pad" else v2.RandomResizedCrop(size, antialias=True)
    steps = [cropping] + [v2.RandomHorizontalFlip()] * flip
    augment = v2.Compose([*steps, v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)])
    expert.train()
    for index_B in torch.randperm(len(images)).split(batch_size):
        views_BCHW = torch.stack([augment(images[index]) for index in index_B.tolist()]).to(device)
        labels_B = torch.tensor([labels_N[index] for index in index_B.tolist()], device=device)
        loss = F.cross_entropy(expert(views_BCHW), labels_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
