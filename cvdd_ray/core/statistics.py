"""Matching of more statistics than BatchNorm's, with memory (G-VBSM, EDC; spec 9.4, 9.5), and what else belongs to it: the
statistics of a training set, and the term that keeps images of a class apart.

A *site* is a Conv2d or BatchNorm2d, in named_modules() order. A BatchNorm has two statistics of its input, mean and biased
variance per channel; a convolution has these and mean and variance of each tile of its map. All statistics of a network lie
side by side in one vector.

Legend: G groups, B images per group, N = G*B, C channels, H W pixels, K classes, L parts (vectors of one kind of a site),
S statistics of all parts.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.nn import functional as F

from cvdd_ray.core.augment import resample_matrix
from cvdd_ray.core.batchnorm import GroupMoments, LayerNorms, MatchingBatchNorm, with_batchnorm_replaced
from cvdd_ray.core.committee import Ballot, Vote
from cvdd_ray.core.keys import from_key
from cvdd_ray.core.precision import Precision, lowered, not_lowered, tensor_cores, widened

POOLED = 32  # side in pixels at which images of a class are compared


@dataclass(frozen=True)
class Matching:
    """How statistics are matched: tiles of `patch_size` pixels; `momentum` of their moving average; share of a convolution's
    terms that are left out (`drop_rate`); share of the class-conditional term in the whole (`class_share`)."""

    patch_size: int
    momentum: float
    drop_rate: float
    class_share: float


@dataclass(frozen=True)
class Targets:
    """What is matched: mean_S of the training set, and mean_KS of every class's images by themselves, if they are used."""

    all_S: Tensor
    class_KS: Tensor | None = None


def write_targets(targets: Targets) -> bytes:
    """Return targets as safetensors bytes."""
    by_class = {} if targets.class_KS is None else {"class": targets.class_KS}
    return save({"all": targets.all_S, **by_class})


def read_targets(data: bytes) -> Targets:
    """Return the targets of `write_targets`."""
    tensors = load(data)
    return Targets(tensors["all"], tensors.get("class"))


@dataclass(frozen=True)
class Part:
    """One vector of statistics of a site: `mean`, `var`, `patch_mean` or `patch_var`, of `size` numbers."""

    site: str
    kind: str
    size: int
    is_convolution: bool


@lru_cache(maxsize=64)
def _stretch(size: int, to: int) -> Tensor:
    """Return the matrix (to, size) that resizes `size` pixels bilinearly."""
    return resample_matrix(torch.tensor([0]), torch.tensor([size]), size, to)[0]


def patch_moments(x_NCHW: Tensor, num_groups: int, patch_size: int) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance (G, tiles) over images, channels and pixels of every tile; maps are resized bilinearly
    up to the next multiple of `patch_size` pixels first.  Source: spec 9.4."""
    height, width = x_NCHW.shape[-2:]
    rows, columns = -(-height // patch_size), -(-width // patch_size)
    if (rows * patch_size, columns * patch_size) != (height, width):
        down, across = _stretch(height, rows * patch_size), _stretch(width, columns * patch_size)
        x_NCHW = down.to(x_NCHW.device) @ x_NCHW @ across.to(x_NCHW.device).T
    tiles = x_NCHW.reshape(num_groups, -1, rows, patch_size, columns, patch_size)
    mean = tiles.mean((1, 3, 5), keepdim=True)
    var = (tiles - mean).square().mean((1, 3, 5))
    return mean.reshape(num_groups, -1), var.reshape(num_groups, -1)


class Recorder:
    """A frozen copy of a network in eval mode whose forward pass also returns the statistics of every group.

    `parts` says what they are; it is known after the first pass.
    """

    def __init__(self, model: nn.Module, patch_size: int):
        self._tape: dict[int, tuple[Tensor, Tensor]] = {}
        self._patches: dict[int, tuple[Tensor, ...]] = {}
        self._groups, self._patch_size = [1], patch_size
        self._model = with_batchnorm_replaced(
            model, lambda layer, index: MatchingBatchNorm(layer, index, self._tape, self._groups)
        )
        kinds = (nn.Conv2d, MatchingBatchNorm)
        self._sites = [(path, site) for path, site in self._model.named_modules() if isinstance(site, kinds)]
        for number, (_, site) in enumerate(self._sites):
            if isinstance(site, nn.Conv2d):
                site.register_forward_pre_hook(lambda _, given, number=number: self._note(number, given[0]))
        self.parts: tuple[Part, ...] = ()

    def __call__(self, images_NCHW: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
        """Return logits_NK and statistics_GS of `num_groups` equal, consecutive groups."""
        self._groups[0] = num_groups
        logits_NK = self._model(images_NCHW)
        found, parts = [], []
        for number, (path, site) in enumerate(self._sites):
            is_convolution = isinstance(site, nn.Conv2d)
            noted = self._patches.get(number) if is_convolution else self._tape.get(site.index)
            for kind, values in zip(("mean", "var", "patch_mean", "patch_var"), noted or (), strict=False):
                found.append(values)
                parts.append(Part(path, kind, values.shape[1], is_convolution))
        self._tape.clear()
        self._patches.clear()
        self.parts = tuple(parts)
        return logits_NK, torch.cat(found, 1)

    def running(self) -> Tensor:
        """Return (S,) with BatchNorm's running statistics in their places, NaN in others; after a first pass."""
        sites, values = dict(self._sites), []
        for part in self.parts:
            known = {} if part.is_convolution else {
                "mean": sites[part.site].running_mean, "var": sites[part.site].running_var
            }  # fmt: skip
            values.append(known.get(part.kind, torch.full((part.size,), torch.nan)))
        return torch.cat([value.cpu() for value in values])

    def _note(self, number: int, x_NCHW: Tensor) -> None:
        with not_lowered(x_NCHW.device):
            channels = GroupMoments.apply(x_NCHW, self._groups[0])
            tiles = patch_moments(widened(x_NCHW), self._groups[0], self._patch_size)
        self._patches[number] = (*channels, *tiles)


@torch.no_grad()
def training_statistics(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], patch_size: int, num_classes: int, *, by_class: bool
) -> Targets:
    """Return the statistics of a pass over (images_BCSS, labels_B), on the CPU.

    Those of convolutions are means over batches, weighted by their images, so that a variance is the mean of the variances
    within batches; those of BatchNorm are its running statistics. With `by_class` also the mean per class of the statistics
    of single images, BatchNorm's included.  Source: spec 9.4, 9.5.
    """
    recorder, seen = Recorder(model, patch_size), 0
    total_S, class_KS, count_K = 0.0, 0.0, torch.zeros(num_classes, dtype=torch.float64)
    for images_BCSS, labels_B in batches:
        _, of_batch_1S = recorder(images_BCSS, 1)
        total_S = total_S + len(labels_B) * of_batch_1S[0].double().cpu()
        seen += len(labels_B)
        if by_class:
            _, of_image_BS = recorder(images_BCSS, len(labels_B))
            sums_KS = torch.zeros(num_classes, of_image_BS.shape[1], dtype=torch.float64)
            class_KS = class_KS + sums_KS.index_add_(0, labels_B.cpu(), of_image_BS.double().cpu())
            count_K += torch.bincount(labels_B.cpu(), minlength=num_classes)
    running_S = recorder.running()
    all_S = torch.where(running_S.isnan(), (total_S / seen).float(), running_S)
    return Targets(all_S, (class_KS / count_K[:, None]).float() if by_class else None)


class MatchingVoter:
    """A frozen expert that votes as `committee.Voter` does, with more statistics in its term and a memory of them.

    R = sum over the parts l of all sites of m_l |target_l - a_l|, L2 norms; a is the moving average a_t = momentum a_(t-1) +
    (1 - momentum) s_t of the views' statistics, which starts at 0, with the gradient of s_t; m_l is `first_multiplier` for
    the parts of the first site and 1 for others. A convolution is left out with probability `drop_rate`: its terms are 0 and
    its average stays. With `class_share` c it is (1 - c) R + c R', where R' has the mean of the class-conditional
    statistics of the group's labels for targets.

    The average comes with the ballot and goes back with the vote, so that the voter keeps nothing.  Source: spec 9.4, 9.5.
    """

    def __init__(
        self, model: nn.Module, targets: Targets, *, matching: Matching, weight: float, first_multiplier: float,
        precision: Precision = "float32",
    ):  # fmt: skip
        self._recorder, self._targets, self._matching = Recorder(model, matching.patch_size), targets, matching
        self._weight, self._first_multiplier, self._precision = weight, first_multiplier, precision
        self._norms: LayerNorms | None = None

    def vote(self, ballot: Ballot) -> Vote:
        """Return gradient (G, B, C, H, W), cross-entropy (G,), term (G,) and averages (G, S), on the ballot's device."""
        with tensor_cores(self._precision):
            return self._vote(ballot)

    def _vote(self, ballot: Ballot) -> Vote:
        num_groups = len(ballot.views_GBCHW)
        views_GBCHW = ballot.views_GBCHW.detach().requires_grad_(True)
        with lowered(self._precision, views_GBCHW.device):
            logits_NK, now_GS = self._recorder(views_GBCHW.flatten(0, 1), num_groups)
        loss_N = F.cross_entropy(widened(logits_NK), ballot.labels_GB.flatten(), reduction="none")
        cross_entropy_G = loss_N.view(num_groups, -1).mean(1)
        term_G, memory_GS = self._term(now_GS, ballot)
        (gradient_GBCHW,) = torch.autograd.grad((cross_entropy_G + self._weight * term_G).sum(), views_GBCHW)
        return Vote(gradient_GBCHW.contiguous(), cross_entropy_G.detach(), term_G.detach(), memory_GS)

    def _term(self, now_GS: Tensor, ballot: Ballot) -> tuple[Tensor, Tensor]:
        m, parts, device = self._matching, self._recorder.parts, now_GS.device
        if self._norms is None:
            self._norms = LayerNorms([part.size for part in parts], device)
        kept_GL = self._kept(parts, ballot.keys_G).to(device)
        before_GS = ballot.memory_GS if ballot.memory_GS.shape[1] else torch.zeros_like(now_GS)
        mixed_GS = m.momentum * before_GS + (1.0 - m.momentum) * now_GS.detach()
        memory_GS = torch.where(self._norms.spread(kept_GL), mixed_GS, before_GS)
        average_GS = memory_GS + now_GS - now_GS.detach()
        norms_GL = self._norms(self._targets.all_S.to(device) - average_GS)
        if m.class_share:
            class_GS = self._targets.class_KS.to(device)[ballot.labels_GB].mean(1)
            norms_GL = (1.0 - m.class_share) * norms_GL + m.class_share * self._norms(class_GS - average_GS)
        multipliers = [self._first_multiplier if part.site == parts[0].site else 1.0 for part in parts]
        return (norms_GL * kept_GL * torch.tensor(multipliers, device=device)).sum(1), memory_GS

    def _kept(self, parts: Sequence[Part], keys_G: Tensor) -> Tensor:
        """Return bool (G, L): whether a part is matched this time; the parts of a convolution share one draw."""
        sites = list(dict.fromkeys(part.site for part in parts))
        rows = []
        for key in keys_G.tolist():
            drawn = dict(zip(sites, torch.rand(len(sites), generator=from_key(key)).tolist(), strict=True))
            rows.append([not (part.is_convolution and drawn[part.site] < self._matching.drop_rate) for part in parts])
        return torch.tensor(rows)


def densification(images_ABCHW: Tensor, temperature: float) -> Tensor:
    """Return the sum over classes A of KL(softmax(l / temperature) || softmax(l)), the first without gradient, where l are
    the B eigenvalues of the products of a class's images, pooled to 32 px.  Source: spec 9.4.

    1.3928 for four equal images with eigenvalues 8, 0, 0, 0 at temperature 4; 0 for equal eigenvalues, as of one image.
    """
    if images_ABCHW.shape[-1] != POOLED:
        images_ABCHW = F.adaptive_avg_pool2d(images_ABCHW.flatten(0, 1), POOLED).unflatten(0, images_ABCHW.shape[:2])
    x_ABD = images_ABCHW.flatten(2)
    eigenvalues_AB = torch.linalg.eigvalsh(x_ABD @ x_ABD.transpose(1, 2))
    wanted_AB = F.softmax(eigenvalues_AB.detach() / temperature, 1)
    return F.kl_div(F.log_softmax(eigenvalues_AB, 1), wanted_AB, reduction="sum")


def densification_gradient(views_JBCHW: Tensor, classes_of_J: int, temperature: float) -> Tensor:
    """Return the gradient of every job's `densification` with respect to its views, class after class."""
    views = views_JBCHW.detach().requires_grad_(True)
    by_class = views.unflatten(1, (classes_of_J, -1)).flatten(0, 1)
    (gradient,) = torch.autograd.grad(densification(by_class, temperature), views)
    return gradient
