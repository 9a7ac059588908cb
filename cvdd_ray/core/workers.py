"""Several workers train one student: who takes which micro-batch, and how their parts become the result of one process.

The micro-batches of a batch (BatchNorm groups, BSSL) are dealt out in turn. Gradients are added up before every optimiser
step, running statistics after every epoch. Not DistributedDataParallel: it divides by the number of workers where the loss
has its own weights, and waits for a backward pass of every worker, which a short last batch does not have.

Legend: W workers, M micro-batches.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Workers:
    """This process among the `world_size` workers of torch.distributed's default process group."""

    rank: int = 0
    world_size: int = 1

    def own(self, num_pieces: int) -> range:
        """Return this worker's share of pieces dealt out in turn: piece k goes to worker k mod W."""
        return range(self.rank, num_pieces, self.world_size)

    def all_reduce(self, tensors: Sequence[Tensor]) -> None:
        """Replace every tensor by its sum over the workers, the same bits on each; one message per dtype.

        All workers must call it with tensors of the same shapes, on devices that the process group knows.
        """
        if self.world_size == 1:
            return
        for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
            alike = [tensor for tensor in tensors if tensor.dtype == dtype]
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            dist.all_reduce(flat)
            for tensor, summed in zip(alike, flat.split([tensor.numel() for tensor in alike]), strict=True):
                tensor.copy_(summed.view(tensor.shape))

    def require_equal(self, number: int, what: str, device: torch.device) -> None:
        """Raise RuntimeError unless all workers have the same number."""
        total = torch.tensor(number, device=device)
        self.all_reduce([total])
        if int(total) != self.world_size * number:
            raise RuntimeError(f"worker {self.rank} of {self.world_size} has {what} {number}, others have not")


ALONE = Workers()


class RunningStatistics:
    """Running statistics of a student's BatchNorm layers over one epoch, as if one process had seen every micro-batch.

    One process updates s <- (1 - m) s + m v in turn (m momentum, v a micro-batch's statistics), so that after M of them
    s = (1 - m)^M s_0 + sum_k m (1 - m)^(M - k) v_k: a sum with one term per micro-batch. Every worker therefore lets its
    layers update on its own micro-batches and shrinks what they hold by 1 - m for each micro-batch of another worker; the
    first worker starts at s_0, the others at 0, and the sum over workers is s, up to rounding. Nothing reads running
    statistics while the student trains, so once an epoch is enough.
    """

    def __init__(self, student: nn.Module, workers: Workers):
        layers = [layer for layer in student.modules() if isinstance(layer, _BatchNorm) and layer.track_running_stats]
        self._shares = [
            (buffer, 1.0 - layer.momentum) for layer in layers for buffer in (layer.running_mean, layer.running_var)
        ]
        self._counts = [layer.num_batches_tracked for layer in layers]
        self._workers, self._seen = workers, 0
        if workers.rank > 0:
            for buffer in (*self._counts, *(buffer for buffer, _ in self._shares)):
                buffer.zero_()

    def before(self, number: int, count: int = 1) -> None:
        """Make up for the micro-batches between this worker's last one and its next `count`, from number `number` of the
        epoch on."""
        self._shrink(number - self._seen)
        self._seen = number + count

    def finish(self, num_micro_batches: int) -> None:
        """Give every worker the statistics after the epoch's last micro-batch."""
        self._shrink(num_micro_batches - self._seen)
        self._workers.all_reduce([*(buffer for buffer, _ in self._shares), *self._counts])

    def _shrink(self, num_others: int) -> None:
        if num_others and self._shares:
            buffers, shares = zip(*self._shares, strict=True)
            torch._foreach_mul_(buffers, [share**num_others for share in shares])
