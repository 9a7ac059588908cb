"""The zoo: networks by name for small images (spec 2.1) and for 224 px (spec 2.2), and their weights.

Every network maps images_BCHW (normalised; B images, C=3, H W pixels) to logits_BK (K classes).
Weights enter a network only after names, shapes and values were checked, so nothing is ever half loaded.
"""

import http.client
import io
import math
import pickle
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import safetensors.torch
import torch
import torchvision.models as tv
from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from cvdd_ray.core import patch_models, small_models
from cvdd_ray.errors import ConfigError, DataError

SMALL_MAX_PX = 64
"""Largest image side in pixels that gets a small-image network."""
SMALL_MIN_PX = 8
"""Smallest image side in pixels: three halvings leave a 1x1 map."""


@dataclass(frozen=True)
class ModelEntry:
    """One name of the zoo; a factory is None where the network does not exist at that size."""

    small: Callable[[int, int, float], small_models.SmallNet] | None = None
    """(num_classes, image_size, width) -> network for image sides of 8 to 64 pixels."""
    large: Callable[..., nn.Module] | None = None
    """torchvision's factory, for image sides above 64 pixels."""
    takes_size: bool = False
    """Whether the large factory must be told the image side."""


_resnet50_small = partial(small_models.resnet, block=Bottleneck, depths=(3, 4, 6, 3))

MODELS: dict[str, ModelEntry] = {
    "resnet18": ModelEntry(partial(small_models.resnet, block=BasicBlock, depths=(2, 2, 2, 2)), tv.resnet18),
    "resnet50": ModelEntry(_resnet50_small, tv.resnet50),
    "resnet101": ModelEntry(partial(small_models.resnet, block=Bottleneck, depths=(3, 4, 23, 3)), tv.resnet101),
    "densenet121": ModelEntry(partial(small_models.densenet, depths=(6, 12, 24, 16)), tv.densenet121),
    "densenet169": ModelEntry(partial(small_models.densenet, depths=(6, 12, 32, 32)), tv.densenet169),
    "densenet201": ModelEntry(partial(small_models.densenet, depths=(6, 12, 48, 32)), tv.densenet201),
    "mobilenet_v2": ModelEntry(small_models.mobilenet_v2, tv.mobilenet_v2),
    "shufflenet_v2": ModelEntry(small_models.shufflenet_v2, tv.shufflenet_v2_x1_0),
    "shufflenet_v2_x0_5": ModelEntry(None, tv.shufflenet_v2_x0_5),
    "regnet_x_8gf": ModelEntry(None, tv.regnet_x_8gf),
    "efficientnet_b0": ModelEntry(None, tv.efficientnet_b0),
    "wide_resnet50_2": ModelEntry(partial(_resnet50_small, base_width=128), tv.wide_resnet50_2),
    "wide_resnet16_2": ModelEntry(small_models.wide_resnet16_2, None),
    "vit_tiny": ModelEntry(patch_models.vit_tiny, patch_models.vit_tiny_large, takes_size=True),
    "convnext_tiny": ModelEntry(patch_models.convnext_tiny, tv.convnext_tiny),
    "mobilenet_v2_x0_5": ModelEntry(small_models.mobilenet_v2_x0_5, None),
    "convnet1": ModelEntry(partial(small_models.convnet, depth=1), None),
    "convnet2": ModelEntry(partial(small_models.convnet, depth=2), None),
    "convnet3": ModelEntry(partial(small_models.convnet, depth=3), None),
    "convnet3_w32": ModelEntry(partial(small_models.convnet, depth=3, channels=32), None),
    "convnet4": ModelEntry(partial(small_models.convnet, depth=4), None),
    "alexnet": ModelEntry(None, tv.alexnet),
}


def build_model(name: str, num_classes: int, image_size: int, *, width: float = 1.0) -> nn.Module:
    """A freshly initialised network: images_BCHW of `image_size` pixels -> logits_BK with K = `num_classes`.

    Up to 64 px the small-image networks, above that torchvision's with a last layer of `num_classes`. `width` is the
    slim width for CPU demos: it multiplies the channels of the small networks (rounded to a multiple of 8, at least 8;
    DenseNet's growth to a multiple of 4, at least 4). Initial weights come from torch's global random generator, see
    `build_seeded`.

    Raises: ConfigError for an unknown name, a name without a network of that size, a size below 8 px, fewer than two
    classes, or a width that is not positive or not 1 above 64 px.
    Source: spec 2.1 (small), 2.2 (224), 9.4 (ConvNet, WRN-16-2), 9.5 (other ConvNets, AlexNet).
    """
    is_small = image_size <= SMALL_MAX_PX
    span = f"images up to {SMALL_MAX_PX} px" if is_small else f"images above {SMALL_MAX_PX} px"
    entry = MODELS.get(name, ModelEntry())
    factory = entry.small if is_small else entry.large
    if factory is None:
        known = sorted(key for key, other in MODELS.items() if (other.small if is_small else other.large))
        problem = f"network {name!r} does not exist for {span}" if name in MODELS else f"unknown network {name!r}"
        raise ConfigError(f"{problem}; for {span} choose one of {', '.join(known)}")
    if image_size < SMALL_MIN_PX:
        raise ConfigError(f"image_size is {image_size}; the networks need at least {SMALL_MIN_PX} px")
    if num_classes < 2:
        raise ConfigError(f"num_classes is {num_classes}; a classifier needs at least 2")
    if not (math.isfinite(width) and width > 0):
        raise ConfigError(f"width is {width}; it must be a positive number, 1 is the published network")
    if is_small:
        return factory(num_classes, image_size, width)
    if width != 1:
        raise ConfigError(
            f"width is {width} for {name} at {image_size} px; torchvision networks and their weights have a fixed "
            f"width, so set width=1 or use images up to {SMALL_MAX_PX} px"
        )
    size = {"image_size": image_size} if entry.takes_size else {}
    model = factory(weights=None, num_classes=num_classes, **size)
    for module in model.modules():
        if type(module) is small_models.TorchvisionShuffleBlock:
            module.__class__ = small_models.ShuffleBlock  # the same parameters; a shuffle that keeps the memory layout
    return model


def build_seeded(name: str, num_classes: int, image_size: int, *, width: float = 1.0, seed: int) -> nn.Module:
    """`build_model` on the CPU with initial weights that depend on `seed` alone; no global generator is touched.

    Raises: ConfigError as `build_model`. Source: own.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would reseed the accelerators, too
        return build_model(name, num_classes, image_size, width=width)


def batchnorm_layers(model: nn.Module) -> list[tuple[str, nn.BatchNorm2d]]:
    """(name, layer) of every BatchNorm2d in `modules()` order; the first one carries the x10. Source: spec 5.2."""
    return [(name, layer) for name, layer in model.named_modules() if isinstance(layer, nn.BatchNorm2d)]


def require_batchnorm(model: nn.Module, name: str) -> None:
    """Refuse a network without BatchNorm2d as a voter: there are no running statistics to match.

    Raises: ConfigError. Source: spec 5.2.
    """
    if not batchnorm_layers(model):
        raise ConfigError(
            f"{name} cannot vote: it has no BatchNorm2d, so there are no statistics to match; use it as a student and "
            f"choose voters with BatchNorm such as resnet18"
        )


def load_weights(model: nn.Module, source: str, *, name: str, content: bytes | None = None) -> None:
    """Fill `model` (built under `name`) from `source`; on any error the model is left as it was.

    `source` is `torchvision:IMAGENET1K_V1` (or _V2; 1000 classes, above 64 px; read from $TORCH_HOME/hub/checkpoints,
    downloaded when it is not there), or a `.safetensors`, `.pth` or `.pt` file with a state dict, plain or under
    "state_dict" or "model", with or without the "module." prefix. Pickles are read as tensors only; no code runs. With
    `content`, the bytes of a file that is not on this disk, `source` only says what file that was.

    Raises: ConfigError for an unknown name; DataError for any other source, a missing or damaged file, a pickle with
    objects other than tensors, names or shapes that do not fit, or values that are not finite.
    Source: spec 2 (torchvision weights of the ImageNet-1K committee).
    """
    if name not in MODELS:
        raise ConfigError(f"unknown network {name!r}; known are {', '.join(sorted(MODELS))}")
    given = f"weights {source!r} for {name}"
    if source.startswith("torchvision:"):
        path = _torchvision_file(model, source.removeprefix("torchvision:"), name=name, given=given)
        given += f" ({path})"
    else:
        path = Path(source).expanduser()
    if path.suffix not in (".safetensors", ".pth", ".pt"):
        raise DataError(
            f"{given}: not a kind of weights known here; give torchvision:IMAGENET1K_V1 (1000 classes, above "
            f"{SMALL_MAX_PX} px) or a .safetensors, .pth or .pt file"
        )
    if content is None and not path.is_file():
        raise DataError(f"{given}: there is no such file; correct the path, or leave the entry out to pretrain {name}")
    _fill(model, _read(path, content, given=given), given=given)


def save_weights(model: nn.Module) -> bytes:
    """The state dict (parameters and buffers, on the CPU) as safetensors bytes; equal weights give equal bytes."""
    state = {key: tensor.detach().cpu().contiguous() for key, tensor in model.state_dict().items()}
    return safetensors.torch.save(state)


def weights_from_bytes(model: nn.Module, data: bytes) -> None:
    """Fill `model` from the bytes of `save_weights`; on any error the model is left as it was.

    Raises: DataError if the bytes are damaged or belong to another network, width or number of classes.
    """
    given = f"weights of {len(data)} bytes"
    try:
        state = safetensors.torch.load(data)
    except Exception as error:  # whatever the damage, it is the bytes that are wrong
        raise DataError(f"{given}: not safetensors ({_first_line(error)}); save them again") from error
    _fill(model, state, given=given)


def _torchvision_file(model: nn.Module, label: str, *, name: str, given: str) -> Path:
    """Path of a torchvision weights file in torch's cache, fetched (and hash-checked) when it is not there."""
    factory = MODELS[name].large
    if MODELS[name].takes_size:
        raise DataError(f"{given}: torchvision has none of this network; give a .safetensors or .pth file")
    if isinstance(model, small_models.SmallNet) or factory is None:
        raise DataError(
            f"{given}: torchvision's weights fit only its networks for images above {SMALL_MAX_PX} px, not the small "
            f"ones; pretrain {name} or give a .safetensors or .pth file"
        )
    num_classes = [layer for layer in model.modules() if isinstance(layer, nn.Linear)][-1].out_features
    if num_classes != 1000:
        raise DataError(
            f"{given}: torchvision's weights have 1000 classes, this network has {num_classes}; pretrain {name} or "
            f"give a .safetensors or .pth file"
        )
    known = {member.name: member for member in tv.get_model_weights(factory)}
    if label not in known:
        choices = ", ".join(f"torchvision:{key}" for key in known)
        raise DataError(f"{given}: torchvision has no such weights; choose one of {choices}")
    url = known[label].url
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if path.is_file():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        hash_prefix = path.stem.rsplit("-", 1)[-1]  # torchvision ends the file's name with the start of its sha256
        torch.hub.download_url_to_file(url, str(path), hash_prefix, progress=False)
    except (OSError, RuntimeError, http.client.HTTPException) as error:
        raise DataError(
            f"{given}: {path.name} is not in {path.parent} and could not be downloaded ({_first_line(error)}); fetch "
            f"{url} on a machine with network and place it there ($TORCH_HOME/hub/checkpoints)"
        ) from error
    return path


def _read(path: Path, data: bytes | None, *, given: str) -> dict[str, torch.Tensor]:
    """State dict of a weights file, or of its bytes, on the CPU; raises DataError for anything that is not one."""
    try:
        if path.suffix == ".safetensors":
            return safetensors.torch.load_file(path, device="cpu") if data is None else safetensors.torch.load(data)
        with warnings.catch_warnings():  # of what is refused here
            warnings.simplefilter("ignore")
            content = torch.load(path if data is None else io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise DataError(
            f"{given}: the file is damaged or holds Python objects other than tensors, which are refused because "
            f"loading them could run code; save model.state_dict() alone, best as .safetensors"
        ) from error
    except Exception as error:  # a damaged file can raise anything, and it is always the file that is wrong
        raise DataError(f"{given}: cannot be read ({_first_line(error)}); fetch or save the file again") from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(_is_plain_tensor(item) for item in content.values()):
        raise DataError(
            f'{given}: holds no state dict; save model.state_dict() alone or under the key "state_dict" or "model"'
        )
    if all(str(key).startswith("module.") for key in content):
        content = {key.removeprefix("module."): tensor for key, tensor in content.items()}
    # torchvision's published DenseNets still carry the layer names of their first release: norm.1 is norm1 today
    old_dense = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12])\.")
    return {old_dense.sub(r"\1\2.", str(key)): tensor for key, tensor in content.items()}


def _is_plain_tensor(value: object) -> bool:
    """A dense tensor with values, not a sparse, quantised or storage-less one."""
    if not isinstance(value, torch.Tensor) or value.is_quantized:
        return False
    return value.layout == torch.strided and value.device.type == "cpu"


def _fill(model: nn.Module, state: dict[str, torch.Tensor], *, given: str) -> None:
    """Check names, shapes, kinds and values of `state` against the model, then load all of it."""
    hint = "the file is of another network, width or number of classes"
    needed = model.state_dict()
    # files older than PyTorch 0.4.1, torchvision's ResNets among them, do not have this counter; nothing here reads it
    counters = {key: torch.zeros_like(value) for key, value in needed.items() if key.endswith(".num_batches_tracked")}
    state = counters | state
    missing, unknown = [key for key in needed if key not in state], [key for key in state if key not in needed]
    if missing or unknown:
        examples = [f"{kind} {keys[0]!r}" for kind, keys in (("lacks", missing), ("has the unknown", unknown)) if keys]
        raise DataError(
            f"{given}: {len(missing)} tensors missing, {len(unknown)} unknown (it {' and '.join(examples)}); {hint}"
        )
    for key, want in needed.items():
        tensor = state[key]
        if tensor.shape != want.shape or tensor.is_floating_point() != want.is_floating_point():
            raise DataError(
                f"{given}: tensor {key!r} is {list(tensor.shape)} {tensor.dtype}, the network needs "
                f"{list(want.shape)} {want.dtype}; {hint}"
            )
        if not torch.isfinite(tensor.to(want.dtype)).all():
            raise DataError(f"{given}: tensor {key!r} has NaN or infinite values; train or fetch the weights again")
    model.load_state_dict(state, strict=True)


def _first_line(error: Exception) -> str:
    """The first line of an error's text, or its type if it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
