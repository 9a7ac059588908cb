"""Weight files that do not fit, are damaged, or would run code."""

import io
import json
import os
import pickle
import struct
import warnings
from collections.abc import Callable
from pathlib import Path

import safetensors.torch
import torch
from badinput import CANARY, Bad

from cvdd_ray.core.models import build_seeded

COMMAND = (
    "run digits-demo --out {out} --set runtime.engine=local --set committee.experts=[resnet18,shufflenet_v2]"
    " --set committee.width=0.125"
)


class Program:
    """What a pickle can hold: a call that is made as it is loaded."""

    def __reduce__(self):
        return os.system, (f"touch {CANARY}",)


def state(**options) -> dict[str, torch.Tensor]:
    """Return the state of a resnet18 as the command's committee has it, or of another network."""
    about = {"name": "resnet18", "num_classes": 10, "image_size": 16, "width": 0.125} | options
    return build_seeded(
        about.pop("name"), about.pop("num_classes"), about.pop("image_size"), seed=0, **about
    ).state_dict()


def _weights(name: str, file: str, content: bytes | Callable[[], bytes], says: str, theirs: str = "") -> Bad:
    def prepare(folder: Path) -> None:
        (folder / file).write_bytes(content if isinstance(content, bytes) else content())

    return Bad("weights", name, _command(file), says, prepare, theirs)


def _command(file: str) -> str:
    return f"{COMMAND} --set 'committee.weights={{{{resnet18: \"{file}\"}}}}'"


def _saved(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _safe(tensors: dict[str, torch.Tensor]) -> bytes:
    return safetensors.torch.save(tensors)


def _changed(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], bytes]:
    return lambda: _safe({key: change(value) if key == name else value for key, value in state().items()})


def _without(name: str) -> Callable[[], bytes]:
    return lambda: _safe({key: value for key, value in state().items() if key != name})


def _sparse() -> bytes:
    with warnings.catch_warnings():  # of torch's own
        warnings.simplefilter("ignore")
        return _saved({"a": torch.eye(2).to_sparse()})


def _header(about: dict, size: int = 8) -> bytes:
    text = json.dumps(about).encode()
    return struct.pack("<Q", len(text)) + text + b"\0" * size


HEAD = list(state())[-2]
CANNOT = r"(?<=cannot be read \()[^;]+(?=\);)"
CASES = [
    _weights("a pickle that runs a program", "w.pth", lambda: pickle.dumps(Program()), "could run code"),
    _weights("a torch file that runs a program", "w.pth", lambda: _saved(Program()), "could run code"),
    _weights("a program beside the tensors", "w.pth", lambda: _saved({**state(), "extra": Program()}), "could run code"),
    _weights("an old torch file that runs a program", "w.pt", lambda: _legacy({"a": Program()}), "could run code"),
    _weights("a whole network", "w.pth", lambda: _saved(torch.nn.Linear(2, 2)), "could run code"),
    _weights("zero bytes", "w.pth", b"", "cannot be read", theirs=CANNOT),
    _weights("zero bytes of safetensors", "w.safetensors", b"", "cannot be read", theirs=CANNOT),
    _weights("text", "w.pth", b"weights\n", "damaged or holds"),
    _weights("text named .safetensors", "w.safetensors", b"weights of a network\n", "cannot be read", theirs=CANNOT),
    _weights("a pickle named .safetensors", "w.safetensors", lambda: pickle.dumps(Program()), "cannot be read", theirs=CANNOT),
    _weights("truncated torch file", "w.pth", lambda: _saved(state())[:9000], "cannot be read", theirs=CANNOT),
    _weights("truncated safetensors", "w.safetensors", lambda: _safe(state())[:-1000], "cannot be read", theirs=CANNOT),
    _weights("safetensors without their start", "w.safetensors", lambda: _safe(state())[100:], "cannot be read", theirs=CANNOT),
    _weights("a header of 2^60 bytes", "w.safetensors", struct.pack("<Q", 2**60) + b"{}", "cannot be read", theirs=CANNOT),
    _weights("a tensor beyond the end of the file", "w.safetensors",
             _header({"a": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}}), "cannot be read", theirs=CANNOT),
    _weights("a tensor before its start", "w.safetensors",
             _header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [8, 4]}}), "cannot be read", theirs=CANNOT),
    _weights("an unknown kind of numbers", "w.safetensors",
             _header({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}), "cannot be read", theirs=CANNOT),
    _weights("no tensors", "w.safetensors", lambda: _safe({}), "102 tensors missing"),
    _weights("a list", "w.pth", lambda: _saved([torch.zeros(2)]), "holds no state dict"),
    _weights("one tensor", "w.pth", lambda: _saved(torch.zeros(2)), "holds no state dict"),
    _weights("numbers", "w.pth", lambda: _saved({"a": 1.0}), "holds no state dict"),
    _weights("a sparse tensor", "w.pth", _sparse, "holds no state dict"),
    _weights("a layer missing", "w.safetensors", _without(HEAD), "1 tensors missing"),
    _weights("a layer too many", "w.safetensors", lambda: _safe({**state(), "extra": torch.zeros(2)}), "1 unknown"),
    _weights("another network", "w.safetensors", lambda: _safe(state(name="mobilenet_v2")), "another network"),
    _weights("another width", "w.safetensors", lambda: _safe(state(width=0.25)), "another network, width"),
    _weights("another number of classes", "w.safetensors", lambda: _safe(state(num_classes=7)), "number of classes"),
    _weights("NaN", "w.safetensors", _changed(HEAD, lambda value: value * float("nan")), "NaN or infinite"),
    _weights("infinity", "w.safetensors", _changed(HEAD, lambda value: value + float("inf")), "NaN or infinite"),
    _weights("whole numbers", "w.safetensors", _changed(HEAD, lambda value: value.to(torch.int32)), "int32"),
    _weights("complex numbers", "w.safetensors", _changed(HEAD, lambda value: value.to(torch.complex64)), "complex64"),
    _weights("an unknown ending", "w.bin", b"x", "not a kind of weights"),
    Bad("weights", "a directory", _command("w.pth"), "no such file", lambda folder: (folder / "w.pth").mkdir()),
    Bad("weights", "not there", _command("w.pth"), "no such file"),
    Bad("weights", "torchvision's for small images", _command("torchvision:IMAGENET1K_V1"), "above 64 px"),
    Bad("weights", "an unknown option of S3", _command("s3://bucket/w.pth?speed=9"), "unknown option"),
    Bad("weights", "a web address", _command("https://example.com/w.pth"), "cannot be opened",
        theirs=r"(?<=opened \()[^;]+(?=\);)"),
]  # fmt: skip


def _legacy(value) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()
