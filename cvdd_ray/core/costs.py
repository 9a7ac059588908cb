"""What calls of a network cost, counted without running them: everything happens on torch's meta device, at real sizes.

FLOPs are those of convolutions and matrix products, two per multiply-add; elementwise work (BatchNorm, ReLU, optimisers) is
not counted. Bytes are of tensors that are alive at the same time; what allocators and convolution libraries take besides is
not in them.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from cvdd_ray.core.augment import Views, apply_views
from cvdd_ray.core.batchnorm import MatchingBatchNorm, with_batchnorm_replaced
from cvdd_ray.core.committee import Ballot, Voter
from cvdd_ray.core.models import build_model
from cvdd_ray.core.statistics import Matching, MatchingVoter, Recorder, Targets
from cvdd_ray.core.trajectories import FlatNetwork, Step, matching_gradients

META = torch.device("meta")


@dataclass(frozen=True)
class Network:
    """What decides the layers of a network: its name, number of classes, input side in pixels, channel multiplier; and `tile`,
    the side in pixels of the tiles whose statistics a vote matches, None where it matches BatchNorm's alone."""

    name: str
    num_classes: int
    image_size: int
    width: float = 1.0
    tile: int | None = None

    def build(self) -> nn.Module:
        """Return it in eval mode without weights, on the meta device.  Raises ConfigError as `build_model`."""
        with torch.random.fork_rng(devices=[]):
            try:
                with META:
                    return self._built()
            except NotImplementedError:  # RegNet's factory computes with tensors
                return self._built().to(META)

    def _built(self) -> nn.Module:
        return build_model(self.name, self.num_classes, self.image_size, width=self.width).eval()

    def images(self, *shape: int) -> Tensor:
        return torch.empty(*shape, 3, self.image_size, self.image_size, device=META)


@dataclass(frozen=True)
class Cost:
    """Of one call: FLOPs, and the most bytes of tensors alive at one time, without the weights."""

    flops: int
    peak_bytes: int


class _LiveBytes(TorchDispatchMode):
    """Adds up the memory of the tensors that operations return, as long as they live."""

    def __init__(self):
        super().__init__()
        self.peak = self._live = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._born(leaf.untyped_storage())
        return result

    def _born(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata not in self._seen:
            self._seen.add(storage._cdata)
            self._live += storage.nbytes()
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._died, storage._cdata, storage.nbytes()).atexit = False

    def _died(self, place: int, num_bytes: int) -> None:
        self._seen.discard(place)
        self._live -= num_bytes


def _convolution_backward(gradient_shape, x_shape, weight_shape, *settings, **_) -> int:
    """Both gradients cost what the forward pass costs. Torch's own formula takes the channels of all groups for the
    weights of a grouped convolution: 20 times too much for MobileNetV2."""
    for_input, for_weight, _ = settings[-1]
    return (for_input + for_weight) * conv_flop_count(x_shape, weight_shape, gradient_shape)


def flop_counter() -> FlopCounterMode:
    """Return a context that counts FLOPs; `get_total_flops()` has the sum."""
    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution_backward: _convolution_backward})


def measured(call: Callable[[], object]) -> Cost:
    """Return what a call costs that makes its own inputs."""
    with flop_counter() as counter, _LiveBytes() as memory:
        call()
    return Cost(counter.get_total_flops(), memory.peak)


@lru_cache(maxsize=256)
def vote_cost(network: Network, num_groups: int, group_images: int) -> Cost:
    """Return the cost of an expert's vote on `num_groups` groups of images: forward, BatchNorm matching, and the gradient
    with respect to the images, without that of the frozen weights."""
    voter: Voter | MatchingVoter = Voter(network.build(), bn_weight=1.0, first_bn_multiplier=1.0)
    extras: tuple[Tensor, ...] = ()
    if network.tile is not None:
        targets = Targets(torch.zeros(num_statistics(network), device=META))
        matching = Matching(network.tile, 0.0, 0.0, 0.0)
        voter = MatchingVoter(network.build(), targets, matching=matching, weight=1.0, first_multiplier=1.0)
        extras = torch.zeros(num_groups, 0, device=META), torch.zeros(num_groups, dtype=torch.long)

    def vote() -> None:
        labels_GB = torch.zeros(num_groups, group_images, dtype=torch.long, device=META)
        voter.vote(Ballot(network.images(num_groups, group_images), labels_GB, *extras))

    return measured(vote)


@lru_cache(maxsize=256)
def num_statistics(network: Network) -> int:
    """Return how many numbers the statistics of a network with a `tile` are."""
    return Recorder(network.build(), network.tile)(network.images(1), 1)[1].shape[1]


# BatchNorm itself is slow to tell its shapes on the meta device; what takes its place keeps as much in memory.


class _Copy(nn.Module):
    """BatchNorm in eval mode: a second tensor."""

    def forward(self, x_NCHW: Tensor) -> Tensor:
        return x_NCHW.clone()


@lru_cache(maxsize=256)
def forward_cost(network: Network) -> Cost:
    """Return the cost of an image's logits, no gradient taken. In a teacher that takes statistics of BatchNorm groups the
    peak is up to half as high again: deviations from the mean are there for a moment."""
    model = with_batchnorm_replaced(network.build(), lambda layer, index: _Copy())
    return measured(torch.no_grad()(lambda: model(network.images(1))))


@lru_cache(maxsize=256)
def training_cost(network: Network, num_images: int) -> Cost:
    """Return the cost of a forward pass and the gradient of all weights, which stay in memory."""
    model = with_batchnorm_replaced(network.build(), lambda layer, index: MatchingBatchNorm(layer, index, {}, [1]))
    model.train().requires_grad_(True)

    def step() -> None:
        targets_B = torch.zeros(num_images, dtype=torch.long, device=META)
        F.cross_entropy(model(network.images(num_images)), targets_B).backward()

    return measured(step)


@lru_cache(maxsize=256)
def matching_cost(network: Network, num_images: int) -> Cost:
    """Return the cost of one unrolled step of trajectory matching on `num_images` images, there and back; the views are not
    counted."""
    flat = FlatNetwork(network.build().train(), network.name)

    def step() -> None:
        labels_N, theta_P = torch.zeros(num_images, dtype=torch.long, device=META), flat.theta()
        all_N = Step(torch.arange(num_images, device=META), ("", (0.0, 0.0, 0.0)))
        matching_gradients(
            flat.loss,
            network.images(num_images),
            labels_N,
            1.0,
            theta_P,
            theta_P,
            [all_N],
            lambda images, drawn: images.clone(),  # the counter takes no leaves for inputs of modules
        )

    return measured(step)


@dataclass(frozen=True)
class ImageFlops:
    """FLOPs of a network per image: of its logits; of a vote, which takes the gradient of the image as well; of training,
    which takes that of all weights but none of the image."""

    forward: int
    vote: int
    training: int


@lru_cache(maxsize=256)
def image_flops(network: Network) -> ImageFlops:
    """Return the FLOPs of a network per image from one forward pass: a gradient, of what goes in or of weights, costs as much
    as the pass itself, layer by layer."""
    model, first = network.build(), []

    def of_images(layer: nn.Conv2d, _: tuple, y: Tensor) -> None:
        if not first:
            first.append(2 * y.numel() * layer.weight[0].numel())

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(of_images)
    with torch.no_grad(), flop_counter() as counter:
        model(network.images(1))
    forward = counter.get_total_flops()
    return ImageFlops(forward, 2 * forward, 3 * forward - first[0])


@lru_cache(maxsize=64)
def view_flops(size: int) -> int:
    """Return the FLOPs of one view (crop, flip, roll) of one image; the gradient back through it costs the same."""
    whole = Views(torch.tensor([[0, 0, size, size]]), torch.zeros(1, dtype=torch.bool), torch.zeros(1, 2).long())
    return measured(lambda: apply_views(torch.empty(1, 3, size, size, device=META), whole, size)).flops


@lru_cache(maxsize=256)
def weight_bytes(network: Network) -> tuple[int, int]:
    """Return the bytes of a network's weights with buffers, as they are stored, and of those that are trained."""
    model = network.build()
    return (
        sum(tensor.nbytes for tensor in model.state_dict().values()),
        sum(parameter.nbytes for parameter in model.parameters()),
    )
