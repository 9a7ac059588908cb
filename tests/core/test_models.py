"""The zoo against the spec's measured table, and weights files: good ones go in whole, bad ones not at all."""

import pathlib
import re
import urllib.error

import pytest
import safetensors.torch
import torch
import torchvision
from torch import nn

from cvdd_ray.core import models
from cvdd_ray.core.models import (
    MODELS,
    batchnorm_layers,
    build_model,
    build_seeded,
    load_weights,
    require_batchnorm,
    save_weights,
    weights_from_bytes,
)
from cvdd_ray.core.small_models import DenseLayer, InvertedResidual, ShuffleBlock, interleaved, scaled
from cvdd_ray.errors import ConfigError, DataError

SMALL = sorted(name for name, entry in MODELS.items() if entry.small)
META_UNFIT = ("regnet_x_8gf",)  # torchvision's factory computes its widths with tensors


def on_meta(name, num_classes, image_size, **kwargs):
    with torch.device("meta"):
        return build_model(name, num_classes, image_size, **kwargs)


def num_params(model):
    return sum(parameter.numel() for parameter in model.parameters())


def slim(seed=0, num_classes=3, name="shufflenet_v2"):
    return build_seeded(name, num_classes, 16, width=0.25, seed=seed)


def same_weights(one, other):
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(key == key2 and torch.equal(tensor, tensor2) for (key, tensor), (key2, tensor2) in pairs)


# --- architecture --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "params", "num_bn", "bn_channels"),
    [  # spec 2.1, C=100
        ("resnet18", 11_220_132, 20, 4800),
        ("resnet50", 23_705_252, 53, 26560),
        ("resnet101", 42_697_380, 104, 52672),
        ("densenet121", 7_048_548, 120, 41760),
        ("mobilenet_v2", 2_412_212, 57, 17544),
        ("shufflenet_v2", 444_292, 56, 3976),
    ],
)
def test_small_networks_have_the_counts_of_the_spec(name, params, num_bn, bn_channels):
    model = on_meta(name, 100, 32)
    layers = batchnorm_layers(model)
    assert num_params(model) == params
    assert (len(layers), sum(layer.num_features for _, layer in layers)) == (num_bn, bn_channels)
    assert not any(isinstance(layer, (nn.Dropout, nn.MaxPool2d)) for layer in model.modules())


@pytest.mark.parametrize(
    ("name", "params", "num_bn"),
    [  # spec 2.2, C=1000
        ("resnet18", 11_689_512, 20),
        ("resnet50", 25_557_032, 53),
        ("densenet121", 7_978_856, 121),
        ("mobilenet_v2", 3_504_872, 52),
        ("shufflenet_v2", 2_278_604, 56),
    ],
)
def test_224_networks_have_the_counts_of_the_spec(name, params, num_bn):
    model = on_meta(name, 1000, 224)
    assert (num_params(model), len(batchnorm_layers(model))) == (params, num_bn)


@pytest.mark.parametrize(
    ("name", "num_classes", "params"),
    [
        ("convnet3", 10, (27 + 1 + 2) * 128 + 2 * (9 * 128 + 1 + 2) * 128 + (128 * 4 * 4 + 1) * 10),
        ("convnet1", 10, (27 + 1 + 2) * 128 + (128 * 16 * 16 + 1) * 10),
        ("convnet2", 10, (27 + 1 + 2) * 128 + (9 * 128 + 1 + 2) * 128 + (128 * 8 * 8 + 1) * 10),
        ("convnet3_w32", 10, (27 + 1 + 2) * 32 + 2 * (9 * 32 + 1 + 2) * 32 + (32 * 4 * 4 + 1) * 10),
        ("convnet4", 10, (27 + 1 + 2) * 128 + 3 * (9 * 128 + 1 + 2) * 128 + (128 * 2 * 2 + 1) * 10),
        ("wide_resnet16_2", 10, 691_674),  # the 0.69M of the knowledge-distillation papers
    ],
)
def test_students_of_other_papers_have_their_usual_counts(name, num_classes, params):
    assert num_params(on_meta(name, num_classes, 32)) == params


@pytest.mark.parametrize(
    ("name", "millions"),
    [  # paper, Table 4, C=1000
        ("resnet18", 11.7),
        ("resnet50", 25.6),
        ("resnet101", 44.5),
        ("regnet_x_8gf", 39.6),
        ("mobilenet_v2", 3.5),  # the table's 3.4 is rounded down
        ("shufflenet_v2_x0_5", 1.4),
        ("efficientnet_b0", 5.3),
        ("wide_resnet50_2", 68.9),
        ("densenet121", 8.0),
        ("densenet169", 14.1),  # the table's 14.2 is rounded up
        ("densenet201", 20.0),
    ],
)
def test_every_student_of_table_4_exists_at_224(name, millions):
    model = build_model(name, 1000, 224) if name in META_UNFIT else on_meta(name, 1000, 224)
    assert round(num_params(model) / 1e6, 1) == millions


def test_224_networks_get_a_last_layer_of_num_classes():
    model = on_meta("mobilenet_v2", 10, 224)
    assert [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)] == [10]


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101", "densenet121", "mobilenet_v2", "shufflenet_v2"])
def test_last_map_is_an_eighth_of_the_image(name):
    model = on_meta(name, 10, 32, width=0.25)
    for image_size, map_size in ((8, 1), (16, 2), (32, 4), (64, 8)):
        images = torch.empty(2, 3, image_size, image_size, device="meta")
        assert model.features(images).shape[2:] == (map_size, map_size)
        assert model(images).shape == (2, 10)


def order_of_use(model, image_size):
    """Names of the convs and BatchNorms in the order in which a forward pass reaches them."""
    used = []
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Conv2d, nn.BatchNorm2d)):
            layer.register_forward_pre_hook(lambda _layer, _inputs, name=name: used.append(name))
    model(torch.empty(2, 3, image_size, image_size, device="meta"))
    return used


@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101", "mobilenet_v2", "shufflenet_v2"])
def test_first_batchnorm_is_the_stem_s(name):
    model = on_meta(name, 10, 32)
    first, layer = batchnorm_layers(model)[0]
    stem = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    assert (stem.in_channels, stem.kernel_size, stem.stride, stem.padding) == (3, (3, 3), (1, 1), (1, 1))
    assert layer.num_features == stem.out_channels
    assert order_of_use(model, 32)[1] == first


def test_first_batchnorm_of_densenet_is_the_first_dense_layer_s():
    model = on_meta("densenet121", 10, 32)
    first, layer = batchnorm_layers(model)[0]
    dense = next(module for module in model.modules() if isinstance(module, DenseLayer))
    assert layer is dense.bn1
    assert order_of_use(model, 32)[1] == first


def test_batchnorm_layers_are_in_modules_order():
    model = on_meta("resnet50", 10, 32)
    expected = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    layers = batchnorm_layers(model)
    assert all(layer is other for (_, layer), other in zip(layers, expected, strict=True))
    assert all(model.get_submodule(name) is layer for name, layer in layers)


def test_every_stride_1_block_of_mobilenet_adds_its_input():
    model = build_model("mobilenet_v2", 10, 16).eval()  # full width: slim channels partly coincide
    blocks = [module for module in model.modules() if isinstance(module, InvertedResidual)]
    halving = projected = 0
    for block in blocks:
        x = torch.rand(1, block.body[0].in_channels, 4, 4)
        nn.init.zeros_(block.body[-1].weight)  # silence the body; what is left is the residual
        y = block(x)
        if y.shape[-1] == 2:
            halving += 1
            assert y.abs().max() == 0
        else:
            assert y.abs().max() > 0
            projected += y.shape != x.shape or not torch.equal(y, x)
    assert (len(blocks), halving, projected) == (17, 3, 4)


def test_mobilenet_uses_relu_without_the_cap_at_6():
    assert not any(isinstance(module, nn.ReLU6) for module in on_meta("mobilenet_v2", 10, 32).modules())


def test_dense_layer_puts_new_maps_before_old_ones():
    layer = next(m for m in build_model("densenet121", 10, 16, width=0.25).modules() if isinstance(m, DenseLayer))
    old = torch.randn(2, 16, 4, 4)
    out = layer(old)
    assert out.shape == (2, 16 + 8, 4, 4)
    assert torch.equal(out[:, 8:], old)


@pytest.mark.parametrize("name", SMALL)
def test_small_networks_train_at_16_px_slim(name):
    model = slim(name=name)
    logits = model(torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    nn.functional.cross_entropy(logits, torch.tensor([0, 2])).backward()
    assert logits.shape == (2, 3)
    assert logits.isfinite().all()
    assert all(parameter.grad is not None for parameter in model.parameters())
    convs = [module for module in model.modules() if isinstance(module, nn.Conv2d)]
    assert all(conv.out_channels % 4 == 0 for conv in convs)


def test_scaled_channels_by_hand():
    assert [scaled(channels, 0.25) for channels in (24, 48, 96, 16, 64)] == [8, 16, 24, 8, 16]
    assert [scaled(channels, 0.5) for channels in (24, 48, 1280)] == [16, 24, 640]
    assert [scaled(32, width, multiple=4) for width in (0.01, 0.25, 0.3, 0.5)] == [4, 8, 8, 16]
    assert scaled(30, 1.0) == 30  # the published network is never rounded


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "kwargs", "message"),
    [
        (("resnet19", 10, 32), {}, r"unknown network 'resnet19'.*up to 64 px choose.*mobilenet_v2"),
        (("vit", 10, 224), {}, r"unknown network 'vit'.*above 64 px choose.*regnet_x_8gf"),
        (("regnet_x_8gf", 10, 32), {}, r"'regnet_x_8gf' does not exist for images up to 64 px"),
        (("convnet3", 10, 224), {}, r"'convnet3' does not exist for images above 64 px"),
        (("resnet18", 10, 224), {"width": 0.5}, r"width is 0.5.*fixed width"),
        (("resnet18", 10, 32), {"width": 0.0}, r"width is 0.0"),
        (("resnet18", 10, 32), {"width": float("nan")}, r"width is nan"),
        (("resnet18", 10, 4), {}, r"image_size is 4"),
        (("resnet18", 1, 32), {}, r"num_classes is 1"),
        (("convnet4", 10, 8), {}, r"at least 16 px, got image_size=8"),
    ],
)
def test_impossible_networks_are_refused(args, kwargs, message):
    with pytest.raises(ConfigError, match=message) as caught:
        build_model(*args, **kwargs)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", SMALL)
def test_only_networks_with_batchnorm_can_vote(name):
    model = on_meta(name, 10, 16, width=0.25)
    if name.startswith(("convnet", "convnext", "vit")):
        with pytest.raises(ConfigError, match=rf"{name} cannot vote.*BatchNorm2d"):
            require_batchnorm(model, name)
    else:
        require_batchnorm(model, name)


# --- seeded initialisation ---------------------------------------------------------------------------------------


def test_build_seeded_depends_on_the_seed_alone():
    torch.manual_seed(7)
    before = torch.get_rng_state()
    one = slim(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    assert same_weights(one, slim(seed=1))
    assert not same_weights(one, slim(seed=2))


# --- weights -------------------------------------------------------------------------------------------------------


def test_bytes_round_trip():
    model, other = slim(seed=1), slim(seed=2)
    model(torch.randn(4, 3, 16, 16))  # moves the running statistics, which must travel as well
    weights_from_bytes(other, save_weights(model))
    assert same_weights(model, other)
    assert save_weights(model) == save_weights(other)
    with pytest.raises(DataError, match="not safetensors"):
        weights_from_bytes(other, save_weights(model)[:-1])
    with pytest.raises(DataError, match=r"linear.weight.*\[3, 256\].*\[4, 256\]"):
        weights_from_bytes(slim(num_classes=4), save_weights(model))


@pytest.mark.parametrize("form", ["safetensors", "plain", "state_dict", "model", "module", "no_counters"])
def test_weights_files_of_every_accepted_form(form, tmp_path):
    model, other = slim(seed=1), slim(seed=2)
    state = model.state_dict()
    path = tmp_path / ("w.safetensors" if form == "safetensors" else "w.pth")
    if form == "safetensors":
        path.write_bytes(save_weights(model))
    elif form == "module":
        torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}, "epoch": 3}, path)
    elif form == "no_counters":
        torch.save({key: value for key, value in state.items() if "num_batches" not in key}, path)
    else:
        torch.save(state if form == "plain" else {form: state}, path)
    load_weights(other, str(path), name="shufflenet_v2")
    assert same_weights(model, other)


def write_bad(kind, path, state):
    """Write a bad weights file of the given kind; `state` is a fitting state dict."""
    key = "features.0.weight"
    if kind == "nan":
        state[key] = state[key].clone()
        state[key][0, 0, 0, 0] = torch.nan
    elif kind == "overflow":  # finite in the file, infinite in the network
        state[key] = torch.full(state[key].shape, 1e300, dtype=torch.float64)
    elif kind == "shape":
        state["linear.bias"] = torch.zeros(5)
    elif kind == "integer":
        state[key] = state[key].to(torch.int64)
    elif kind == "missing_key":
        del state["linear.bias"]
    elif kind == "extra_key":
        state["extra"] = torch.zeros(1)
    elif kind == "not_tensors":
        state = {"state_dict": dict.fromkeys(state, 1.0)}
    elif kind == "list":
        state = list(state.values())
    elif kind == "sparse":
        state["linear.bias"] = state["linear.bias"].to_sparse()
    if kind == "garbage":
        path.write_bytes(b"no weights")
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "truncated":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:-200])
    else:
        torch.save(state, path)


@pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants")
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", r"'features.0.weight' has NaN"),
        ("overflow", r"'features.0.weight' has NaN or infinite"),
        ("shape", r"'linear.bias' is \[5\].*needs \[3\].*another network, width or number of classes"),
        ("integer", r"'features.0.weight' is .*int64.*needs"),
        ("missing_key", r"1 tensors missing.*lacks 'linear.bias'"),
        ("extra_key", r"1 unknown.*'extra'"),
        ("not_tensors", "holds no state dict"),
        ("list", "holds no state dict"),
        ("sparse", "holds no state dict"),
        ("garbage", r"damaged|cannot be read"),
        ("empty", r"damaged|cannot be read"),
        ("truncated", r"damaged|cannot be read"),
    ],
)
def test_bad_weights_are_refused_and_nothing_is_loaded(kind, message, tmp_path):
    model, untouched = slim(seed=2), slim(seed=2)
    path = tmp_path / "bad.pth"
    write_bad(kind, path, slim(seed=1).state_dict())
    with pytest.raises(DataError, match=message) as caught:
        load_weights(model, str(path), name="shufflenet_v2")
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert same_weights(model, untouched)


def test_bad_safetensors_file_is_refused(tmp_path):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(b"\x00" * 5)
    with pytest.raises(DataError, match="cannot be read"):
        load_weights(slim(), str(path), name="shufflenet_v2")
    safetensors.torch.save_file({"linear.bias": torch.zeros(3)}, path)
    with pytest.raises(DataError, match="tensors missing"):
        load_weights(slim(), str(path), name="shufflenet_v2")


@pytest.mark.parametrize("source", ["weights.bin", "IMAGENET1K_V1", "", "s3:weights"])
def test_unknown_kinds_of_sources_are_refused(source):
    with pytest.raises(DataError, match=r"torchvision:IMAGENET1K_V1 .*\.safetensors, \.pth or \.pt"):
        load_weights(slim(), source, name="shufflenet_v2")


@pytest.mark.parametrize("suffix", [".pth", ".pt", ".safetensors"])
def test_a_missing_file_is_named(suffix, tmp_path):
    with pytest.raises(DataError, match=rf"none\{suffix}.*no such file"):
        load_weights(slim(), str(tmp_path / f"none{suffix}"), name="shufflenet_v2")


class Malicious:
    """Unpickling an instance would create the marker file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return pathlib.Path.touch, (self.marker,)


def test_a_pickle_with_code_is_refused_and_not_executed(tmp_path):
    marker, path = tmp_path / "marker", tmp_path / "evil.pth"
    torch.save({"state_dict": slim().state_dict(), "extra": Malicious(marker)}, path)
    with pytest.raises(DataError, match="could run code"):
        load_weights(slim(), str(path), name="shufflenet_v2")
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the control: an unguarded load does run it
    assert marker.exists()


# --- torchvision weights -------------------------------------------------------------------------------------------


@pytest.fixture
def offline_cache(monkeypatch, tmp_path):
    """Torch's checkpoint directory (empty) on a machine without network."""

    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(torch.hub, "urlopen", no_network, raising=False)
    return tmp_path / "hub" / "checkpoints"


def test_offline_message_says_which_file_goes_where(offline_cache):
    model = on_meta("shufflenet_v2", 1000, 224)
    with pytest.raises(DataError) as caught:
        load_weights(model, "torchvision:IMAGENET1K_V1", name="shufflenet_v2")
    message = str(caught.value)
    assert "shufflenetv2_x1-5666bf0f80.pth" in message
    assert str(offline_cache) in message
    assert "$TORCH_HOME/hub/checkpoints" in message
    assert "no network" in message
    assert "\n" not in message
    assert not list(offline_cache.iterdir())


def test_cached_torchvision_weights_load_without_network(offline_cache):
    donor, model = (build_seeded("shufflenet_v2", 1000, 224, seed=seed) for seed in (1, 2))
    offline_cache.mkdir(parents=True)
    torch.save(donor.state_dict(), offline_cache / "shufflenetv2_x1-5666bf0f80.pth")
    load_weights(model, "torchvision:IMAGENET1K_V1", name="shufflenet_v2")
    assert same_weights(donor, model)


def test_a_download_is_checked_against_the_hash_in_its_name(offline_cache, monkeypatch):
    asked = []

    def tampered(url, dst, hash_prefix=None, progress=True):
        asked.append((url, dst, hash_prefix))
        raise RuntimeError('invalid hash value (expected "5666bf0f80", got "0000")')

    monkeypatch.setattr(torch.hub, "download_url_to_file", tampered)
    with pytest.raises(DataError, match="invalid hash"):
        load_weights(on_meta("shufflenet_v2", 1000, 224), "torchvision:IMAGENET1K_V1", name="shufflenet_v2")
    url, dst, hash_prefix = asked[0]
    assert url.endswith("/shufflenetv2_x1-5666bf0f80.pth")
    assert dst == str(offline_cache / "shufflenetv2_x1-5666bf0f80.pth")
    assert hash_prefix == "5666bf0f80"


def test_every_torchvision_file_name_ends_with_a_hash():
    for entry in filter(None, (entry.large for entry in MODELS.values() if not entry.takes_size)):
        for member in models.tv.get_model_weights(entry):
            assert re.search(r"-[0-9a-f]{8,}\.pth$", member.url)


def test_densenet_files_with_the_old_layer_names_load(tmp_path):
    donor, model = (build_seeded("densenet121", 1000, 224, seed=seed) for seed in (1, 2))
    old = re.compile(r"(denselayer\d+\.(?:norm|conv))([12])\.")
    state = {old.sub(r"\1.\2.", key): value for key, value in donor.state_dict().items()}
    assert "features.denseblock1.denselayer1.norm.1.weight" in state
    path = tmp_path / "densenet121.pth"
    torch.save(state, path)
    load_weights(model, str(path), name="densenet121")
    assert same_weights(donor, model)


@pytest.mark.parametrize(
    ("args", "source", "message"),
    [
        (("resnet18", 1000, 64), "torchvision:IMAGENET1K_V1", r"above 64 px"),
        (("convnet3", 1000, 64), "torchvision:IMAGENET1K_V1", r"above 64 px"),
        (("resnet18", 10, 224), "torchvision:IMAGENET1K_V1", r"1000 classes, this network has 10"),
        (("resnet18", 1000, 224), "torchvision:IMAGENET1K_V2", r"choose one of torchvision:IMAGENET1K_V1"),
        (("resnet50", 1000, 224), "torchvision:DEFAULT", r"torchvision:IMAGENET1K_V1, torchvision:IMAGENET1K_V2"),
    ],
)
def test_torchvision_weights_that_cannot_fit_are_refused(args, source, message, offline_cache):
    with pytest.raises(DataError, match=message):
        load_weights(on_meta(*args), source, name=args[0])


def test_load_weights_refuses_an_unknown_network():
    with pytest.raises(ConfigError, match="unknown network 'resnet19'"):
        load_weights(slim(), "torchvision:IMAGENET1K_V1", name="resnet19")


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_a_shuffle_takes_channels_in_turn_and_keeps_the_layout(layout):
    even, odd = (torch.arange(24.0).view(2, 3, 2, 2) + start for start in (0, 100))
    even, odd = even.contiguous(memory_format=layout), odd.contiguous(memory_format=layout)
    mixed = interleaved(even, odd)
    assert torch.equal(mixed[:, 0::2], even)
    assert torch.equal(mixed[:, 1::2], odd)
    assert mixed.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_the_224_pixel_shufflenet_is_torchvisions(layout):
    ours, theirs = (
        build_model("shufflenet_v2", 3, 224).train(),
        torchvision.models.shufflenet_v2_x1_0(num_classes=3).train(),
    )
    theirs.load_state_dict(ours.state_dict())
    assert any(isinstance(block, ShuffleBlock) for block in ours.modules())
    assert not any(isinstance(block, ShuffleBlock) for block in theirs.modules())
    # BatchNorm in train mode keeps the maps, and so the differences, of order one
    x = torch.randn(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.allclose(ours.to(memory_format=layout)(x.contiguous(memory_format=layout)), theirs(x), atol=1e-4)


@pytest.mark.parametrize(("name", "params"), [("vit_tiny", 5_717_416), ("convnext_tiny", 28_589_128)])
def test_students_of_patches_are_the_published_ones(name, params):
    """At 224 px; small ones keep the layers and take every size."""
    assert num_params(on_meta(name, 1000, 224)) == params
    small = on_meta(name, 10, 32)
    assert sum(p.ndim > 1 for p in small.parameters()) == sum(p.ndim > 1 for p in on_meta(name, 10, 224).parameters())
    for size in (8, 28, 64):
        assert build_seeded(name, 3, size, width=0.125, seed=1)(torch.zeros(2, 3, size, size)).shape == (2, 3)


def test_a_vit_has_no_weights_of_torchvision():
    with pytest.raises(DataError, match="torchvision has none of this network"):
        load_weights(on_meta("vit_tiny", 1000, 224), "torchvision:IMAGENET1K_V1", name="vit_tiny")
