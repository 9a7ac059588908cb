"""BatchNorm as this method needs it: statistics of what comes in (for matching) and statistics of each small group (BSSL).

Both replace `nn.BatchNorm2d` inside a frozen network and never touch its buffers.

Legend: G groups, B images per group, N = G*B, C channels, H W pixels, L layers, S channels of all layers.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from cvdd_ray.core.compiling import is_traced
from cvdd_ray.core.precision import widened


def group_moments(x_NCHW: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Return mean_GC and biased var_GC of every group's channels, as exact as two passes over the pixels are.

    Channels-last on a CPU, torch's own kernel takes each group in turn, which is about twice to five times as fast there.
    Elsewhere moments of single images, which lie together in memory, are joined to those of groups (the variance of a group
    is the mean of its images' variances plus the variance of their means): a handful of kernels for any number of groups.
    torch.var_mean over (0, 2, 3) is several times slower than either. Of bfloat16 maps the sums are float32.
    In a graph to be compiled they are said as they are, since a compiler fuses them with their neighbours.
    """
    x_NCHW = widened(x_NCHW)
    if is_traced():
        x_GBCHW = x_NCHW.unflatten(0, (num_groups, -1))
        mean_GC = x_GBCHW.mean((1, 3, 4))
        return mean_GC, (x_GBCHW - mean_GC[:, None, :, None, None]).square().mean((1, 3, 4))
    if x_NCHW.device.type == "cpu" and x_NCHW.is_contiguous(memory_format=torch.channels_last):
        groups = x_NCHW.split(len(x_NCHW) // num_groups)
        mean_GC, var_GC = zip(*(torch.batch_norm_update_stats(group, None, None, 0.0) for group in groups), strict=True)
        return torch.stack(mean_GC), torch.stack(var_GC)
    x_NCP = x_NCHW.flatten(2)
    mean_NC = x_NCP.mean(2)
    within_NC = (x_NCP - mean_NC[:, :, None]).square_().mean(2)
    mean_GBC = mean_NC.unflatten(0, (num_groups, -1))
    mean_GC = mean_GBC.mean(1)
    between_GBC = (mean_GBC - mean_GC[:, None]).square_()
    return mean_GC, (within_NC.unflatten(0, (num_groups, -1)) + between_GBC).mean(1)


class _AffineWithMoments(torch.autograd.Function):
    """y = x*scale + shift together with the group moments of x; one backward adds both gradients. Of bfloat16 maps scale,
    shift, moments and the sum of gradients are float32, y and the gradient that goes on bfloat16."""

    @staticmethod
    def forward(ctx, x_NCHW, scale_C, shift_C, num_groups):
        mean_GC, var_GC = group_moments(x_NCHW, num_groups)
        y_NCHW = torch.addcmul(shift_C[:, None, None], widened(x_NCHW), scale_C[:, None, None]).to(x_NCHW.dtype)
        ctx.save_for_backward(x_NCHW, scale_C, mean_GC)
        return y_NCHW, mean_GC, var_GC

    @staticmethod
    def backward(ctx, dy_NCHW, dmean_GC, dvar_GC):
        x_NCHW, scale_C, mean_GC = ctx.saved_tensors
        dx = _moments_gradient(x_NCHW, mean_GC, dmean_GC, dvar_GC)
        return dx.addcmul_(widened(dy_NCHW), scale_C[:, None, None]).to(x_NCHW.dtype), None, None, None


class GroupMoments(torch.autograd.Function):
    """`group_moments` of (x_NCHW, num_groups) with a gradient."""

    @staticmethod
    def forward(ctx, x_NCHW, num_groups):
        mean_GC, var_GC = group_moments(x_NCHW, num_groups)
        ctx.save_for_backward(x_NCHW, mean_GC)
        return mean_GC, var_GC

    @staticmethod
    def backward(ctx, dmean_GC, dvar_GC):
        x_NCHW, mean_GC = ctx.saved_tensors
        return _moments_gradient(x_NCHW, mean_GC, dmean_GC, dvar_GC).to(x_NCHW.dtype), None


def _moments_gradient(x_NCHW: Tensor, mean_GC: Tensor, dmean_GC: Tensor, dvar_GC: Tensor) -> Tensor:
    """Return what gradients of the group moments of x are as a gradient of x."""
    num_groups = len(mean_GC)
    values_per_channel = x_NCHW.numel() // (num_groups * x_NCHW.shape[1])
    slope_GC = dvar_GC * (2.0 / values_per_channel)
    offset_GC = dmean_GC / values_per_channel - slope_GC * mean_GC
    grouped = widened(x_NCHW).unflatten(0, (num_groups, -1))
    return torch.addcmul(offset_GC[:, None, :, None, None], grouped, slope_GC[:, None, :, None, None]).flatten(0, 1)


class MatchingBatchNorm(nn.Module):
    """Eval-mode BatchNorm that records the group moments of its input on a shared tape.

    `tape[index]` is (mean_GC, var_GC) after a forward pass; `groups[0]` is the number of groups stacked in the batch.
    """

    def __init__(self, source: nn.BatchNorm2d, index: int, tape: list, groups: list[int]):
        super().__init__()
        scale_C = torch.rsqrt(source.running_var + source.eps)
        if source.affine:
            scale_C = scale_C * source.weight.detach()
        shift_C = -source.running_mean * scale_C
        if source.affine:
            shift_C = shift_C + source.bias.detach()
        for name, value in (("scale_C", scale_C), ("shift_C", shift_C), ("running_mean", source.running_mean),
                            ("running_var", source.running_var)):  # fmt: skip
            self.register_buffer(name, value.detach().clone())
        self.index, self.tape, self.groups = index, tape, groups

    def forward(self, x_NCHW: Tensor) -> Tensor:
        y_NCHW, mean_GC, var_GC = _AffineWithMoments.apply(x_NCHW, self.scale_C, self.shift_C, self.groups[0])
        self.tape[self.index] = mean_GC, var_GC
        return y_NCHW


class _LayerNorms(torch.autograd.Function):
    """Norms over each layer's stretch of channels: difference_GS -> norms_GL; where a norm is 0, so is its gradient."""

    @staticmethod
    def forward(ctx, difference_GS, place_LC, layer_S):
        squares = nn.functional.pad(difference_GS.square(), (0, 1))  # the last column fills shorter layers up
        norms_GL = squares[:, place_LC].sum(2).sqrt()
        ctx.save_for_backward(difference_GS, norms_GL, layer_S)
        return norms_GL

    @staticmethod
    def backward(ctx, dnorms_GL):
        difference_GS, norms_GL, layer_S = ctx.saved_tensors
        share_GL = torch.where(norms_GL > 0, dnorms_GL / norms_GL, 0.0)
        return difference_GS * share_GL[:, layer_S], None, None


class LayerNorms:
    """L2 norms over stretches of `sizes` channels that lie side by side; where a norm is 0, so is its gradient."""

    def __init__(self, sizes: Sequence[int], device: torch.device):
        starts = [sum(sizes[:index]) for index in range(len(sizes))]
        place_LC = torch.full((len(sizes), max(sizes)), sum(sizes))
        for index, (start, size) in enumerate(zip(starts, sizes, strict=True)):
            place_LC[index, :size] = torch.arange(start, start + size)
        self._place_LC = place_LC.to(device)
        self._layer_S = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes)).to(device)

    def __call__(self, difference_GS: Tensor) -> Tensor:
        """Return norms_GL."""
        return _LayerNorms.apply(difference_GS, self._place_LC, self._layer_S)

    def spread(self, values_GL: Tensor) -> Tensor:
        """Return (G, S): the value of its stretch for every channel."""
        return values_GL[:, self._layer_S]


class StatisticsDistance:
    """R of every group: over layers l the sum of m_l (|running_var - var| + |running_mean - mean|), L2 norms over channels.

    `running` holds (mean_C, var_C) per layer and `multipliers` m_l. All layers are taken at once, channels side by side
    (S in all): a few operations instead of dozens per layer, which small batches spend much of their time on.
    Source: spec 5.2.
    """

    def __init__(self, running: Sequence[tuple[Tensor, Tensor]], multipliers: Sequence[float]):
        self._norms = LayerNorms([len(mean_C) for mean_C, _ in running], running[0][0].device)
        self._mean_S, self._var_S = (torch.cat(parts) for parts in zip(*running, strict=True))
        self._multiplier_L = torch.tensor(multipliers, dtype=self._mean_S.dtype).to(self._mean_S.device)

    def __call__(self, moments: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
        """Return R_G of (mean_GC, var_GC) per layer."""
        mean_GS, var_GS = (torch.cat(parts, 1) for parts in zip(*moments, strict=True))
        norms_GL = self._norms(self._var_S - var_GS) + self._norms(self._mean_S - mean_GS)
        return (norms_GL * self._multiplier_L).sum(1)


class GroupBatchNorm(nn.Module):
    """BatchNorm that normalises every group of the batch with that group's own statistics (BSSL, paper Eq. 9).

    `groups[0]` is the number of equal, consecutive groups in the batch. Running statistics are neither used nor changed.
    """

    def __init__(self, source: nn.BatchNorm2d, groups: list[int]):
        super().__init__()
        self.weight = None if source.weight is None else source.weight.detach().clone()
        self.bias = None if source.bias is None else source.bias.detach().clone()
        self.eps, self.groups = source.eps, groups

    def forward(self, x_NCHW: Tensor) -> Tensor:
        mean_GC, var_GC = group_moments(x_NCHW, self.groups[0])
        scale_GC = torch.rsqrt(var_GC + self.eps)
        if self.weight is not None:
            scale_GC = scale_GC * self.weight
        shift_GC = -mean_GC * scale_GC
        if self.bias is not None:
            shift_GC = shift_GC + self.bias
        grouped = x_NCHW.unflatten(0, (self.groups[0], -1))
        scaled = torch.addcmul(shift_GC[:, None, :, None, None], grouped, scale_GC[:, None, :, None, None])
        return scaled.flatten(0, 1)

    def _apply(self, fn, recurse=True):  # the affine pair follows .to(device) without being a parameter or a buffer
        super()._apply(fn, recurse)
        self.weight = None if self.weight is None else fn(self.weight)
        self.bias = None if self.bias is None else fn(self.bias)
        return self


def with_batchnorm_replaced(model: nn.Module, replacement: Callable[[nn.BatchNorm2d, int], nn.Module]) -> nn.Module:
    """Return a frozen eval-mode copy of `model` whose l-th BatchNorm2d, in modules() order, is `replacement(bn, l)`.

    On a CPU the copy works channels-last, whatever the layout of the images it is given: its float32 convolutions take a
    fifth to a third less time there. On other devices, which were not measured, it keeps torch's own layout.
    """
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    layers = [(path, module) for path, module in twin.named_modules() if isinstance(module, nn.BatchNorm2d)]
    for index, (path, layer) in enumerate(layers):
        parent_path, _, child = path.rpartition(".")
        setattr(twin.get_submodule(parent_path), child, replacement(layer, index))
    if all(parameter.device.type == "cpu" for parameter in twin.parameters()):
        twin.to(memory_format=torch.channels_last)
        twin.register_forward_pre_hook(_channels_last)
    return twin


def _channels_last(_model: nn.Module, given: tuple[Tensor]) -> Tensor:
    return given[0].contiguous(memory_format=torch.channels_last)
