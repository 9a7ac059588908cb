"""Post-evaluation: a student trained from scratch on a labelled set, epoch by epoch (paper section 3.4, spec section 7).

Legend: N images of the set, B images of a batch, M micro-batches of a batch, C channels, K classes, S pixels.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvdd_ray.core.keys import key
from cvdd_ray.core.microbatches import micro_batches_per_call, own_statistics
from cvdd_ray.core.precision import Precision, lowered, widened
from cvdd_ray.core.resuming import copied, load_training_state, training_state
from cvdd_ray.core.schedules import student_lr
from cvdd_ray.core.softlabels import BatchPlan, batch_views, group_sizes
from cvdd_ray.core.workers import ALONE, RunningStatistics, Workers


def kd_loss(student_BK: Tensor, teacher_BK: Tensor, temperature: float) -> Tensor:
    """Return KL(softmax(teacher/T) || softmax(student/T)), summed over classes, mean over the batch, no T squared
    factor; its gradient is (q - p) / (T B). A class with p = 0 adds nothing to the loss and q / (T B) to the gradient; its
    logit must be finite (`labelcodes.DROPPED`).  Source: spec section 7."""
    log_q = F.log_softmax(student_BK / temperature, 1)
    log_p = F.log_softmax(teacher_BK / temperature, 1)
    return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)


def mse_gt_loss(student_BK: Tensor, teacher_BK: Tensor, labels_B: Tensor, label_weight: float) -> Tensor:
    """Return the mean squared difference of logits plus `label_weight` times the cross-entropy with hard labels, those of
    images before CutMix.  Source: spec 9.4, 9.5."""
    return F.mse_loss(student_BK, teacher_BK) + label_weight * F.cross_entropy(student_BK, labels_B)


def micro_losses(
    logits_M: Sequence[Tensor],
    targets_M: Sequence[Tensor],
    temperature: float | None,
    labels_M: Sequence[Tensor] | None = None,
    label_weight: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Return the mean loss of each micro-batch, and of how many images in all the largest logit is the label's.

    Targets are logits_BK of the teachers (with labels besides: `mse_gt_loss`), or labels_B with temperature None
    (cross-entropy)."""
    pairs = list(zip(logits_M, targets_M, strict=True))
    if labels_M is not None:
        losses = [mse_gt_loss(*pair, labels, label_weight) for pair, labels in zip(pairs, labels_M, strict=True)]
        wanted = torch.cat([theirs.argmax(1) for theirs in targets_M])
    elif temperature is None:
        losses, wanted = [F.cross_entropy(logits, labels) for logits, labels in pairs], torch.cat(tuple(targets_M))
    else:
        losses = [kd_loss(logits, theirs, temperature) for logits, theirs in pairs]
        wanted = torch.cat([theirs.argmax(1) for theirs in targets_M])
    return torch.stack(losses), (torch.cat(tuple(logits_M)).argmax(1) == wanted).sum()


def adamw_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return AdamW's parameter groups: decay on parameters named `weight` with more than one dimension, none elsewhere."""
    decayed, free = [], []
    for name, parameter in model.named_parameters():
        (decayed if "weight" in name and parameter.ndim > 1 else free).append(parameter)
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]


@dataclass(frozen=True)
class StudentSettings:
    """Numbers of the post-evaluation (spec section 7). `temperature` None: hard labels and cross-entropy. `label_weight`: that
    of `mse_gt_loss`, None for the KL divergence. `ema`: decay of the average of parameters that is tested, 0: none.
    `phases`: (first epoch, changed numbers) in rising order, for settings that change during the training."""

    epochs: int
    batch_size: int
    bn_group: int
    lr: float
    weight_decay: float
    eta: float
    temperature: float | None
    test_every: int
    schedule: str = "cosine"
    warmup_epochs: int = 0
    phases: tuple[tuple[int, Mapping[str, float]], ...] = ()
    label_weight: float | None = None
    ema: float = 0.0
    optimizer: str = "adamw"
    precision: Precision = "float32"

    def at(self, epoch: int) -> "StudentSettings":
        """Return the numbers that hold in one epoch; hard labels know no temperature, in no phase."""
        changes: dict[str, float] = {}
        for first, changed in self.phases:
            if first <= epoch:
                changes |= changed
        if self.temperature is None:
            changes.pop("temperature", None)
        return replace(self, phases=(), **changes)

    def lr_at(self, epoch: int) -> float:
        """Return the learning rate of one epoch; it steps once per epoch (decision 8)."""
        now = self.at(epoch)
        return student_lr(
            now.schedule, now.lr, epoch, now.epochs, eta=now.eta, warmup_epochs=now.warmup_epochs
        )  # fmt: skip

    def is_tested(self, epoch: int) -> bool:
        """Return whether the accuracy is taken after this epoch: every `test_every` epochs and after the last."""
        return epoch % self.test_every == 0 or epoch == self.epochs - 1


def student_optimizer(student: nn.Module, s: StudentSettings) -> torch.optim.Optimizer:
    """Return AdamW with `adamw_groups`, or SGD with momentum .9 and decay of all parameters (spec 9.4). The first group is
    the one with weight decay."""
    if s.optimizer == "sgd":
        return torch.optim.SGD(student.parameters(), lr=s.lr, momentum=0.9, weight_decay=s.weight_decay)
    groups = adamw_groups(student, s.weight_decay)
    return torch.optim.AdamW(groups, lr=s.lr, betas=(0.9, 0.999), eps=1e-8, fused=True)


class StudentTraining:
    """One student in training: the network, its optimiser, and the next epoch (0-based).

    Its state can be saved after any epoch and loaded into a fresh one, which then goes on bit for bit: views come from
    the labels, and what a network draws by itself (dropout) from (seed, epoch, batch, micro-batch). With several
    `workers` each holds the student and trains it on its share of every batch; after every epoch all have the same one,
    which is one worker's up to rounding. Hard labels_N of the images are for `label_weight` alone.
    """

    def __init__(
        self, student: nn.Module, images_NCHW: Tensor, settings: StudentSettings, seed: int, workers: Workers = ALONE,
        labels_N: Tensor | None = None,
    ):  # fmt: skip
        self.student, self.next_epoch = student.to(memory_format=torch.channels_last), 0
        self._images_NCHW, self._s, self._seed, self._workers = images_NCHW, settings, seed, workers
        self._optimizer = student_optimizer(student, settings)
        self._labels_N = labels_N
        self._average = [parameter.detach().clone() for parameter in student.parameters()] if settings.ema else []

    def run_epoch(self, rows: Iterable[tuple[BatchPlan, Tensor]], settings: StudentSettings | None = None):
        """Train one epoch on (plan, targets): logits_BK of the teachers, or labels_B with temperature None; return (mean
        loss, train agreement in percent). `settings` replace those given at the start from this epoch on.

        Each batch is cut into micro-batches of `bn_group` images, so that the student's BatchNorm sees the images the
        teachers' saw; losses are divided by the number of groups of a whole batch (a short batch weighs less), one
        AdamW step per batch.  Source: spec section 7, decisions 5-8.
        """
        self._s = settings or self._s
        s, epoch = self._s.at(self.next_epoch), self.next_epoch
        num_accumulated = len(group_sizes(s.batch_size, s.bn_group))
        for group in self._optimizer.param_groups:
            group["lr"] = self._s.lr_at(epoch)
        self._optimizer.param_groups[0]["weight_decay"] = s.weight_decay
        self.student.train()
        statistics = RunningStatistics(self.student, self._workers)
        device, before = self._images_NCHW.device, 0  # micro-batches of the epoch's earlier batches
        totals = torch.zeros(3, dtype=torch.float64, device=device)  # loss, agreed, images
        per_call = self._micro_batches_per_call(s.bn_group)
        draws = torch.random.fork_rng(devices=[device] if device.type == "cuda" else [])
        with draws, own_statistics(self.student) as sizes_of_call:
            for plan, targets in rows:
                sizes = group_sizes(len(targets), s.bn_group)
                targets_M, own = targets.split(sizes), self._workers.own(len(sizes))
                labels_M = self._labels(plan, sizes, device) if s.label_weight is not None else None
                calls = [own[start : start + per_call] for start in range(0, len(own), per_call)]
                self._optimizer.zero_grad(set_to_none=True)
                for call, views in zip(calls, self._views(plan, sizes, calls), strict=True):
                    statistics.before(before + call[0], len(call))
                    torch.manual_seed(key(self._seed, "student-epoch", epoch, plan.batch, call[0]))
                    sizes_of_call[:] = [sizes[k] for k in call]
                    with lowered(s.precision, device):
                        logits = self.student(views)
                    logits_M = widened(logits).split(sizes_of_call)
                    loss_M, agreed = micro_losses(
                        logits_M, [targets_M[k] for k in call], s.temperature,
                        labels_M and [labels_M[k] for k in call], s.label_weight,
                    )  # fmt: skip
                    (loss_M.sum() / num_accumulated).backward()
                    size_M = torch.tensor(sizes_of_call, device=device)
                    totals += torch.stack([(loss_M.detach() * size_M).sum(), agreed, size_M.sum()])
                before += len(sizes)
                self._add_up_gradients()
                self._optimizer.step()
                if self._average:
                    torch._foreach_lerp_(self._average, list(self.student.parameters()), 1.0 - s.ema)
        statistics.finish(before)
        self._workers.all_reduce([totals])
        loss_sum, agreed, seen = totals.tolist()
        self.next_epoch += 1
        return loss_sum / seen, 100.0 * agreed / seen

    @contextmanager
    def averaged(self) -> Iterator[nn.Module]:
        """Lend the student as it is to be tested: with the moving average for parameters, where there is one (spec 9.5: the
        buffers of BatchNorm stay the student's own)."""
        parameters = list(self.student.parameters()) if self._average else []
        own = [parameter.detach().clone() for parameter in parameters]
        with torch.no_grad():
            for parameter, value in zip(parameters, self._average, strict=True):
                parameter.copy_(value)
        try:
            yield self.student
        finally:
            with torch.no_grad():
                for parameter, value in zip(parameters, own, strict=True):
                    parameter.copy_(value)

    def _labels(self, plan: BatchPlan, sizes: Sequence[int], device: torch.device) -> Sequence[Tensor]:
        return self._labels_N[plan.image_index_B].to(device).split(sizes)

    def _micro_batches_per_call(self, bn_group: int) -> int:
        """Return how many micro-batches a call takes: one where workers divide them, since others' lie between."""
        if self._workers.world_size > 1:
            return 1
        return micro_batches_per_call(self.student, bn_group, self._images_NCHW.shape[-1])

    def _views(self, plan: BatchPlan, sizes: Sequence[int], calls: Sequence[Sequence[int]]) -> Sequence[Tensor]:
        """Return the views of every call of this worker, whose micro-batches are of `sizes` images; no others are made."""
        own = [k for call in calls for k in call]
        if not own:
            return ()
        rows_M = torch.arange(sum(sizes)).split(sizes)
        rows_R = None if len(own) == len(sizes) else torch.cat([rows_M[k] for k in own])
        views_RCSS = batch_views(self._images_NCHW, plan, rows_R).contiguous(memory_format=torch.channels_last)
        return views_RCSS.split([sum(sizes[k] for k in call) for call in calls])

    def _add_up_gradients(self) -> None:
        """Sum what the workers have accumulated; a worker without a micro-batch in a short batch adds nothing."""
        if self._workers.world_size > 1:
            for parameter in self.student.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._workers.all_reduce([parameter.grad for parameter in self.student.parameters()])

    def state(self) -> dict[str, Tensor]:
        """Return everything the next epoch depends on, as tensors by name (copies)."""
        tensors = training_state(self.student, self._optimizer)
        tensors |= {f"average/{index}": value for index, value in enumerate(self._average)}
        return copied({**tensors, "next_epoch": torch.tensor(self.next_epoch)})

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from a `state()` of the same network."""
        load_training_state(self.student, self._optimizer, state)
        for index, average in enumerate(self._average):
            average.copy_(state[f"average/{index}"])
        self.next_epoch = int(state["next_epoch"])


Curve = list[tuple[int, float, float, float]]


def train_student(
    student: nn.Module,
    images_NCHW: Tensor,
    epoch_batches: Callable[[int], Iterable[tuple[BatchPlan, Tensor]]],
    settings: StudentSettings,
    test: Callable[[nn.Module], float],
    on_epoch: Callable[[StudentTraining, Curve], None] = lambda training, curve: None,
    *,
    seed: int = 0,
    workers: Workers = ALONE,
    start: tuple[Mapping[str, Tensor], Curve] | None = None,
    labels_N: Tensor | None = None,
) -> Curve:
    """Train `student` in place and return rows (epoch, mean loss, train agreement in percent, test accuracy in percent).

    `epoch_batches(epoch)` yields what StudentTraining.run_epoch takes. The test accuracy is taken every `test_every`
    epochs and after the last (spec section 7, decision 8). `start`: a state and the rows so far, to go on from.
    """
    training, curve = StudentTraining(student, images_NCHW, settings, seed, workers, labels_N), []
    if start is not None:
        training.load(start[0])
        curve = list(start[1])
    workers.require_equal(training.next_epoch, "next epoch", images_NCHW.device)
    while training.next_epoch < settings.epochs:
        epoch = training.next_epoch
        loss, agreement = training.run_epoch(epoch_batches(epoch))
        if settings.is_tested(epoch):
            with training.averaged() as tested:
                curve.append((epoch, loss, agreement, test(tested)))
        on_epoch(training, curve)
    return curve
