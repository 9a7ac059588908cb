"""Networks for images of 8 to 64 pixels (spec 2.1): stride-1 stems, no max-pool, no dropout, global pooling.

Shapes: B images, C input channels (3), D feature channels, H W pixels, K classes. A factory takes
(num_classes, image_size, width) and returns a `SmallNet`; `width` multiplies every channel count, as the slim width
for CPU demos, and 1.0 is the published network. Initialisation is torch's own per layer.
"""

import math

import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.models.shufflenetv2 import InvertedResidual as TorchvisionShuffleBlock

from cvdd_ray.errors import ConfigError


def scaled(channels: int, width: float, multiple: int = 8) -> int:
    """`channels * width`, rounded half up to a multiple of `multiple` and at least one multiple."""
    if width == 1:
        return channels
    return multiple * max(1, math.floor(channels * width / multiple + 0.5))


class SmallNet(nn.Module):
    """images_BCHW (normalised) -> logits_BK: `features` gives maps_BDHW, `pool` reduces H W, `linear` classifies."""

    def __init__(self, features: nn.Module, num_features: int, num_classes: int, pool: nn.Module | None = None):
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1) if pool is None else pool
        self.linear = nn.Linear(num_features, num_classes)

    def forward(self, images_BCHW: torch.Tensor) -> torch.Tensor:
        maps_BDHW = self.features(images_BCHW)
        return self.linear(torch.flatten(self.pool(maps_BDHW), 1))


def _conv_bn(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> list[nn.Module]:
    """Bias-free convolution that keeps H W at stride 1, then BatchNorm2d."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


def resnet(
    num_classes: int,
    image_size: int,
    width: float,
    *,
    block: type[BasicBlock] | type[Bottleneck],
    depths: tuple[int, int, int, int],
    base_width: int = 64,
) -> SmallNet:
    """ResNet with a 3x3 stride-1 stem; stages of 64, 128, 256, 512 planes at strides 1, 2, 2, 2. Source: spec 2.1."""
    channels = scaled(64, width)
    layers: list[nn.Module] = [*_conv_bn(3, channels, 3), nn.ReLU(inplace=True)]
    for planes, depth, stage_stride in zip((64, 128, 256, 512), depths, (1, 2, 2, 2), strict=True):
        planes = scaled(planes, width)
        outputs = planes * block.expansion
        for index in range(depth):
            stride = stage_stride if index == 0 else 1
            changed = stride != 1 or channels != outputs
            shortcut = nn.Sequential(*_conv_bn(channels, outputs, 1, stride)) if changed else None
            layers.append(block(channels, planes, stride, shortcut, base_width=base_width))
            channels = outputs
    return SmallNet(nn.Sequential(*layers), channels, num_classes)


class PreActBlock(nn.Module):
    """Wide-ResNet block: BN-ReLU-3x3 twice; the 1x1 shortcut, where the shape changes, starts after the first ReLU."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        changed = stride != 1 or inputs != outputs
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if changed else None

    def forward(self, x_BDHW: torch.Tensor) -> torch.Tensor:
        active_BDHW = torch.relu(self.bn1(x_BDHW))
        new_BDHW = self.conv2(torch.relu(self.bn2(self.conv1(active_BDHW))))
        return new_BDHW + (x_BDHW if self.shortcut is None else self.shortcut(active_BDHW))


def wide_resnet16_2(num_classes: int, image_size: int, width: float) -> SmallNet:
    """WRN-16-2: stem 16, three stages of two pre-activation blocks with 32, 64, 128 channels. Source: spec 9.4."""
    channels = scaled(16, width)
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for outputs, stride in ((32, 1), (64, 2), (128, 2)):
        outputs = scaled(outputs, width)
        layers += [PreActBlock(channels, outputs, stride), PreActBlock(outputs, outputs, 1)]
        channels = outputs
    layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return SmallNet(nn.Sequential(*layers), channels, num_classes)


class DenseLayer(nn.Module):
    """BN-ReLU-1x1 (4 * growth), BN-ReLU-3x3 (growth); the new maps come before the old ones (spec 2.1)."""

    def __init__(self, inputs: int, growth: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, 4 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(4 * growth)
        self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)

    def forward(self, old_BDHW: torch.Tensor) -> torch.Tensor:
        new_BDHW = self.conv1(torch.relu_(self.bn1(old_BDHW)))
        new_BDHW = self.conv2(torch.relu_(self.bn2(new_BDHW)))
        return torch.cat([new_BDHW, old_BDHW], dim=1)


def densenet(num_classes: int, image_size: int, width: float, *, depths: tuple[int, int, int, int]) -> SmallNet:
    """DenseNet-BC with growth 32, a bare 3x3 stem and halving transitions; `width` scales the growth. Source: spec 2.1.

    The growth is rounded to a multiple of 4, at least 4.
    """
    growth = scaled(32, width, multiple=4)
    channels = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(3, channels, 3, padding=1, bias=False)]
    for stage, depth in enumerate(depths):
        if stage > 0:
            halve = nn.Conv2d(channels, channels // 2, 1, bias=False)
            layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True), halve, nn.AvgPool2d(2)]
            channels //= 2
        for _ in range(depth):
            layers.append(DenseLayer(channels, growth))
            channels += growth
    layers += [nn.BatchNorm2d(channels), nn.ReLU(inplace=True)]
    return SmallNet(nn.Sequential(*layers), channels, num_classes)


class InvertedResidual(nn.Module):
    """1x1 expand, 3x3 depthwise, 1x1 project with ReLU; every stride-1 block adds its input (1x1+BN if D changes)."""

    def __init__(self, inputs: int, outputs: int, expansion: int, stride: int):
        super().__init__()
        hidden = inputs * expansion
        self.body = nn.Sequential(
            *_conv_bn(inputs, hidden, 1),
            nn.ReLU(inplace=True),
            *_conv_bn(hidden, hidden, 3, stride, groups=hidden),
            nn.ReLU(inplace=True),
            *_conv_bn(hidden, outputs, 1),
        )
        self.shortcut: nn.Module | None = None
        if stride == 1:
            self.shortcut = nn.Identity() if inputs == outputs else nn.Sequential(*_conv_bn(inputs, outputs, 1))

    def forward(self, x_BDHW: torch.Tensor) -> torch.Tensor:
        y_BDHW = self.body(x_BDHW)
        return y_BDHW if self.shortcut is None else y_BDHW + self.shortcut(x_BDHW)


_MOBILENET_STAGES = (  # expansion, channels, blocks, stride of the first block
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def mobilenet_v2(num_classes: int, image_size: int, width: float) -> SmallNet:
    """MobileNetV2 with stride 1 in the stem and the 24-channel stage, ReLU, no dropout. Source: spec 2.1."""
    channels = scaled(32, width)
    layers: list[nn.Module] = [*_conv_bn(3, channels, 3), nn.ReLU(inplace=True)]
    for expansion, outputs, blocks, stage_stride in _MOBILENET_STAGES:
        outputs = scaled(outputs, width)
        for index in range(blocks):
            layers.append(InvertedResidual(channels, outputs, expansion, stage_stride if index == 0 else 1))
            channels = outputs
    num_features = scaled(1280, width)
    layers += [*_conv_bn(channels, num_features, 1), nn.ReLU(inplace=True)]
    return SmallNet(nn.Sequential(*layers), num_features, num_classes)


def mobilenet_v2_x0_5(num_classes: int, image_size: int, width: float) -> SmallNet:
    """MobileNetV2 of half the width. Source: spec 9.4."""
    return mobilenet_v2(num_classes, image_size, width / 2)


class ShuffleBlock(TorchvisionShuffleBlock):
    """torchvision's block with a channel shuffle that keeps the memory layout, so that convolutions are not given another
    one than they were chosen for."""

    def forward(self, x_BDHW: torch.Tensor) -> torch.Tensor:
        if self.stride == 1:
            kept_BDHW, new_BDHW = x_BDHW.chunk(2, dim=1)
        else:
            kept_BDHW, new_BDHW = self.branch1(x_BDHW), x_BDHW
        return interleaved(kept_BDHW, self.branch2(new_BDHW))


def interleaved(even_BDHW: torch.Tensor, odd_BDHW: torch.Tensor) -> torch.Tensor:
    """Return (B, 2D, H, W) with channels taken in turn from both, laid out in memory as `odd_BDHW` is."""
    if odd_BDHW.is_contiguous(memory_format=torch.channels_last):
        pairs = torch.stack([even_BDHW.permute(0, 2, 3, 1), odd_BDHW.permute(0, 2, 3, 1)], dim=4)
        return pairs.flatten(3).permute(0, 3, 1, 2)
    return torch.stack([even_BDHW, odd_BDHW], dim=2).flatten(1, 2)


def shufflenet_v2(num_classes: int, image_size: int, width: float) -> SmallNet:
    """ShuffleNetV2 at the 0.5x channels of the paper's small-image code, stride-1 stem, no max-pool. Source: spec 2.1.

    Slim channel counts are multiples of 8, so the two branches always halve evenly.
    """
    channels = scaled(24, width)
    layers: list[nn.Module] = [*_conv_bn(3, channels, 3), nn.ReLU(inplace=True)]
    for outputs, basic_blocks in ((48, 3), (96, 7), (192, 3)):
        outputs = scaled(outputs, width)
        layers.append(ShuffleBlock(channels, outputs, stride=2))
        layers += [ShuffleBlock(outputs, outputs, stride=1) for _ in range(basic_blocks)]
        channels = outputs
    num_features = scaled(1024, width)
    layers += [*_conv_bn(channels, num_features, 1), nn.ReLU(inplace=True)]
    return SmallNet(nn.Sequential(*layers), num_features, num_classes)


def convnet(num_classes: int, image_size: int, width: float, *, depth: int, channels: int = 128) -> SmallNet:
    """The field's ConvNet: `depth` times 3x3 conv, InstanceNorm, ReLU, 2x2 average pool; then flatten and linear.

    It has no BatchNorm, so it votes only where the statistics of convolutions are matched. The flat head ties it to
    `image_size`, which must be at least 2**depth pixels: 8 for depth 3, 16 for depth 4.

    Raises: ConfigError if the image is too small for the depth. Source: spec 9.4, 9.6.
    """
    map_size = image_size >> depth
    if map_size < 1:
        raise ConfigError(
            f"convnet{depth} halves the image {depth} times and needs at least {2**depth} px, got image_size="
            f"{image_size}; take convnet3 or a larger image"
        )
    inputs, outputs = 3, scaled(channels, width)
    layers: list[nn.Module] = []
    for _ in range(depth):
        norm = nn.InstanceNorm2d(outputs, affine=True)
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), norm, nn.ReLU(inplace=True), nn.AvgPool2d(2)]
        inputs = outputs
    return SmallNet(nn.Sequential(*layers), outputs * map_size**2, num_classes, pool=nn.Identity())
