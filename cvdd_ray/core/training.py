"""Training an expert on real images (squeeze), and accuracy.

Legend: N images, B images of a batch, C channels, K classes, S pixels.
"""

import math
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvdd_ray.core.augment import Views, apply_views, draw_boxes
from cvdd_ray.core.keys import generator, key
from cvdd_ray.core.resuming import copied, load_training_state, training_state
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


class ExpertTraining:
    """One network in training on real images: the network, its optimiser and schedule, and the next epoch (0-based).

    Its state can be saved after any epoch and loaded into a fresh one, which then goes on bit for bit: batches come from
    outside, what a network draws by itself (dropout) from (seed, epoch, worker). Several `workers` each take their part of every
    batch, and normalise it with its own BatchNorm statistics; gradients are summed before every step, running statistics
    averaged after every epoch.  Raises NumericsError when the loss stops being finite.  Source: spec section 2.
    """

    def __init__(self, model: nn.Module, settings: PretrainSettings, seed: int = 0, workers: Workers = ALONE):
        s, self.model, self.next_epoch = settings, model, 0
        if s.optimizer == "adam":
            self._optimizer = torch.optim.Adam(model.parameters(), lr=s.lr, weight_decay=s.weight_decay)
        else:
            self._optimizer = torch.optim.SGD(model.parameters(), lr=s.lr, momentum=0.9, weight_decay=s.weight_decay)
        self._scheduler = _schedule(self._optimizer, s)
        self._s, self._seed, self._workers = s, seed, workers
        model.to(memory_format=torch.channels_last)

    def run_epoch(self, batches: Iterable[tuple[Tensor, Tensor]]) -> tuple[float, float]:
        """Train one epoch on (images_BCSS, labels_B), this worker's part of every batch, and return mean loss and train accuracy
        in percent, of all workers. The schedule steps once per epoch."""
        device, epoch = next(self.model.parameters()).device, self.next_epoch
        totals = torch.zeros(3, dtype=torch.float64)  # loss, correct, images
        self.model.train()
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(key(self._seed, "pretrain-epoch", epoch, self._workers.rank))
            for images_BCSS, labels_B in batches:
                totals += self._step(images_BCSS, labels_B)
        self._scheduler.step()
        self._average_running_statistics()
        totals = totals.to(device)
        self._workers.all_reduce([totals])
        loss_sum, correct, seen = totals.tolist()
        if not math.isfinite(loss_sum):
            raise NumericsError(f"pretraining diverged in epoch {epoch + 1}: the loss is not finite; lower pretrain.lr")
        self.next_epoch += 1
        return loss_sum / seen, 100.0 * correct / seen

    def _step(self, images_BCSS: Tensor, labels_B: Tensor) -> Tensor:
        images_BCSS = images_BCSS.contiguous(memory_format=torch.channels_last)
        with torch.autocast(images_BCSS.device.type, torch.bfloat16, enabled=self._s.precision == "bfloat16"):
            logits_BK = self.model(images_BCSS)
        loss = F.cross_entropy(logits_BK.float(), labels_B)
        self._optimizer.zero_grad(set_to_none=True)
        self._share(loss, len(labels_B)).backward()
        if self._workers.world_size > 1:
            self._workers.all_reduce([p.grad for p in self.model.parameters() if p.grad is not None])
        self._optimizer.step()
        correct = int((logits_BK.argmax(1) == labels_B).sum())
        return torch.tensor([float(loss.detach()) * len(labels_B), correct, len(labels_B)], dtype=torch.float64)

    def _share(self, loss: Tensor, num_images: int) -> Tensor:
        """Return this worker's part of the mean loss over the images of all workers."""
        if self._workers.world_size == 1:
            return loss
        total = torch.tensor(num_images, device=loss.device)
        self._workers.all_reduce([total])
        return loss * (num_images / int(total))

    def _average_running_statistics(self) -> None:
        buffers = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        if self._workers.world_size > 1 and buffers:
            self._workers.all_reduce(buffers)
            torch._foreach_div_(buffers, self._workers.world_size)

    def state(self) -> dict[str, Tensor]:
        """Return everything the next epoch depends on, as tensors by name (copies)."""
        tensors = training_state(self.model, self._optimizer)
        return copied({**tensors, "next_epoch": torch.tensor(self.next_epoch)})

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state()` of the same network and settings."""
        load_training_state(self.model, self._optimizer, state)
        with warnings.catch_warnings():  # of a schedule that steps before its optimiser; it has, in another process
            warnings.simplefilter("ignore", UserWarning)
            while self.next_epoch < int(state["next_epoch"]):
                self._scheduler.step()
                self.next_epoch += 1


OnEpoch = Callable[[ExpertTraining, float, float], None]


def pretrain_expert(
    model: nn.Module,
    epoch_batches: Callable[[int], Iterable[tuple[Tensor, Tensor]]],
    settings: PretrainSettings,
    on_epoch: OnEpoch = lambda training, loss, accuracy: None,
    *,
    seed: int = 0,
    workers: Workers = ALONE,
    start: Mapping[str, Tensor] | None = None,
) -> None:
    """Train `model` in place with hard-label cross-entropy; `epoch_batches(epoch)` yields (images_BCSS, labels_B).

    The last epoch's weights are the result. `on_epoch` gets the training after each epoch, its mean loss and train accuracy in
    percent; `start` is a state to go on from.  Raises NumericsError when the loss stops being finite.  Source: spec section 2.
    """
    training = ExpertTraining(model, settings, seed, workers)
    if start is not None:
        training.load(start)
    workers.require_equal(training.next_epoch, "next epoch", next(model.parameters()).device)
    while training.next_epoch < settings.epochs:
        on_epoch(training, *training.run_epoch(epoch_batches(training.next_epoch)))
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


def shuffled_batches(
    num_images: int, batch_size: int, seed: int, epoch: int, workers: Workers = ALONE
) -> tuple[list[Tensor], torch.Generator]:
    """Return the index batches of one pretraining epoch and the generator for its augmentation: of several workers the batches'
    parts of this one, and its own generator. A last batch that would leave a worker with one image is left out: that has no
    batch statistics."""
    draw = generator(seed, "pretrain", epoch)
    batches = list(torch.randperm(num_images, generator=draw).split(batch_size))
    if len(batches) > 1 and len(batches[-1]) < 2 * workers.world_size:
        batches.pop()
    if workers.world_size > 1:
        batches = [batch[workers.rank :: workers.world_size] for batch in batches]
        draw = generator(seed, "pretrain", epoch, workers.rank)
    return batches, draw
