"""Students that begin with patches and have no BatchNorm: ViT-tiny and ConvNeXt-tiny, for small images and for 224 px.

At 8 to 64 px they are the same networks on finer patches, so that as many positions are left as small networks have; `width`
multiplies their channels. No dropout and no stochastic depth there; at 224 px torchvision's defaults hold.
Shapes: B images, D feature channels, K classes.
"""

from torch import Tensor, nn
from torchvision.models import VisionTransformer
from torchvision.models.convnext import CNBlockConfig, ConvNeXt, LayerNorm2d

from cvdd_ray.core.small_models import SmallNet, scaled

HEADS, LAYERS, HIDDEN = 3, 12, 192  # of ViT-tiny
LARGE_PATCH = 16  # pixels per side


class Tokens(nn.Module):
    """images_BCHW -> the class token's features_BD."""

    def __init__(self, image_size: int, patch_size: int, hidden: int):
        super().__init__()
        self.transformer = VisionTransformer(image_size, patch_size, LAYERS, HEADS, hidden, 4 * hidden)
        self.transformer.heads = nn.Identity()

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.transformer(images_BCHW)


def vit_tiny(num_classes: int, image_size: int, width: float) -> SmallNet:
    """ViT-tiny (12 layers, 3 heads, 192 channels) on about 8 x 8 patches."""
    patch = next(side for side in range(max(1, image_size // 8), 0, -1) if image_size % side == 0)
    hidden = HEADS * scaled(HIDDEN // HEADS, width)
    return SmallNet(Tokens(image_size, patch, hidden), hidden, num_classes, pool=nn.Identity())


def vit_tiny_large(*, weights: None, num_classes: int, image_size: int) -> VisionTransformer:
    """ViT-tiny on patches of 16 px."""
    return VisionTransformer(image_size, LARGE_PATCH, LAYERS, HEADS, HIDDEN, 4 * HIDDEN, num_classes=num_classes)


def convnext_tiny(num_classes: int, image_size: int, width: float) -> SmallNet:
    """ConvNeXt-tiny (depths 3, 3, 9, 3, channels 96 to 768) whose stem keeps about 32 x 32 positions."""
    channels = [scaled(base, width) for base in (96, 192, 384, 768)]
    outputs = [*channels[1:], None]
    blocks = [CNBlockConfig(*shape) for shape in zip(channels, outputs, (3, 3, 9, 3), strict=True)]
    features = ConvNeXt(blocks, num_classes=num_classes).features
    side = max(1, image_size // 32)
    features[0][0] = nn.Conv2d(3, channels[0], side, side)
    nn.init.trunc_normal_(features[0][0].weight, std=0.02)
    nn.init.zeros_(features[0][0].bias)
    pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), LayerNorm2d(channels[-1], eps=1e-6))
    return SmallNet(features, channels[-1], num_classes, pool=pool)
