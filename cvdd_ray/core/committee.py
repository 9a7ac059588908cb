"""The seam: the algorithm asks a Committee for votes on views; where the experts live is the committee's affair.

Legend: G groups (jobs stacked in one call), B images per group, C channels, H W pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cvdd_ray.core.batchnorm import MatchingBatchNorm, StatisticsDistance, with_batchnorm_replaced
from cvdd_ray.core.compiling import Function, compiled
from cvdd_ray.core.precision import Precision, lowered, tensor_cores, widened


@dataclass(frozen=True)
class Ballot:
    """What one expert is asked: views_GBCHW (float32, normalised, detached) and labels_GB (int64).

    Where statistics have a memory (core/statistics.py): it, as the expert's last vote gave it, memory_GS (S is 0 before
    the first), and a random key of each group (keys_G, int64).
    """

    views_GBCHW: Tensor
    labels_GB: Tensor
    memory_GS: Tensor | None = None
    keys_G: Tensor | None = None


@dataclass(frozen=True)
class Vote:
    """One expert's answer: the gradient of CE + r_bn*R with respect to every view, both terms per group, and the memory of
    statistics where there is one."""

    gradient_GBCHW: Tensor
    cross_entropy_G: Tensor
    bn_term_G: Tensor
    memory_GS: Tensor | None = None


def parts(message: Ballot | Vote) -> list[Tensor]:
    """Return the tensors of a ballot or a vote in order, without those that are not there."""
    return [part for part in vars(message).values() if part is not None]


class Committee(Protocol):
    """Anything that answers ballots; `ballots` maps expert names to what each is asked."""

    def vote(self, ballots: Mapping[str, Ballot]) -> dict[str, Vote]: ...


class Voter:
    """A frozen expert in eval mode that votes.

    The loss of group g is CE_g + bn_weight * R_g, with CE the mean over the group's B images and
    R = sum over BatchNorm layers l of m_l (|running_var - var| + |running_mean - mean|), L2 norms over channels, biased
    variance of the layer's input over (B, H, W), m_0 = first_bn_multiplier and m_l = 1 otherwise. Other precisions than
    float32: core/precision.py. With `compile` the first vote of every shape compiles it (core/compiling.py), and results
    are the same up to rounding.  Source: spec 5.2.
    """

    def __init__(
        self, model: nn.Module, *, bn_weight: float, first_bn_multiplier: float, precision: Precision = "float32",
        compile: bool = False,
    ):  # fmt: skip
        self._tape: dict[int, tuple[Tensor, Tensor]] = {}
        self._groups = [1]
        self._model = with_batchnorm_replaced(
            model, lambda layer, index: MatchingBatchNorm(layer, index, self._tape, self._groups)
        )
        self._layers = [layer for layer in self._model.modules() if isinstance(layer, MatchingBatchNorm)]
        self._distances: dict[tuple[int, ...], StatisticsDistance] = {}  # by the layers that a forward pass has called
        self._bn_weight, self._first_bn_multiplier, self._precision = bn_weight, first_bn_multiplier, precision
        self._compile, self._compiled = compile, {}

    def vote(self, ballot: Ballot) -> Vote:
        """Return gradient (G, B, C, H, W), cross-entropy (G,) and BN term (G,), on the ballot's device."""
        with tensor_cores(self._precision):
            views_GBCHW, labels_GB = ballot.views_GBCHW.detach(), ballot.labels_GB
            ask = self._for_shape(views_GBCHW, labels_GB) if self._compile else self._ask
            return Vote(*ask(views_GBCHW, labels_GB))

    def _for_shape(self, views_GBCHW: Tensor, labels_GB: Tensor) -> Function:
        """Return `_ask` compiled for ballots of this shape."""
        shape = views_GBCHW.shape
        if shape not in self._compiled:
            self._compiled[shape] = compiled(self._ask, views_GBCHW, labels_GB)
        return self._compiled[shape]

    def _ask(self, views_GBCHW: Tensor, labels_GB: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradient, cross-entropy and BN term."""
        num_groups = len(views_GBCHW)
        views_GBCHW = views_GBCHW.detach().requires_grad_(True)
        self._groups[0] = num_groups
        self._tape.clear()
        with lowered(self._precision, views_GBCHW.device):
            logits_NK = self._model(views_GBCHW.flatten(0, 1))
        loss_N = F.cross_entropy(widened(logits_NK), labels_GB.flatten(), reduction="none")
        cross_entropy_G = loss_N.view(num_groups, -1).mean(1)
        bn_term_G = self._bn_term(cross_entropy_G)
        (gradient_GBCHW,) = torch.autograd.grad((cross_entropy_G + self._bn_weight * bn_term_G).sum(), views_GBCHW)
        self._tape.clear()
        return gradient_GBCHW.contiguous(), cross_entropy_G.detach(), bn_term_G.detach()

    def _bn_term(self, like_G: Tensor) -> Tensor:
        """Return R_G over the layers that were called."""
        if not self._tape:
            return torch.zeros_like(like_G)
        called = tuple(sorted(self._tape))
        if called not in self._distances:
            running = [(self._layers[l].running_mean, self._layers[l].running_var) for l in called]
            multipliers = [self._first_bn_multiplier if l == 0 else 1.0 for l in called]
            self._distances[called] = StatisticsDistance(running, multipliers)
        return self._distances[called]([self._tape[l] for l in called])


class LocalCommittee:
    """Experts in this process, asked one after the other: the reference, and what a colocated worker uses."""

    def __init__(self, voters: Mapping[str, Voter]):
        self._voters = dict(voters)

    def vote(self, ballots: Mapping[str, Ballot]) -> dict[str, Vote]:
        return {name: self._voters[name].vote(ballot) for name, ballot in ballots.items()}
