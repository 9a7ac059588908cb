"""What the machine is, and the most that one process gets out of it."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F

from cvdd_ray.core.experts import prepare_torch

SIDE = 2048  # of the matrices, in numbers
SHAPE = (16, 64, 56, 56)  # of the convolution's input: images, channels, pixels


@dataclass(frozen=True)
class Machine:
    """Device and torch version; FLOP/s (float32) of a large matrix product and of a 3 x 3 convolution, one process with
    `threads` torch threads."""

    device: str
    torch: str
    threads: int
    matmul_flops_per_s: float
    conv_flops_per_s: float


def this_machine(threads: int) -> Machine:
    """Measure the peaks; takes a few seconds on a CPU core."""
    device = prepare_torch(threads)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    matrix = torch.ones(SIDE, SIDE, device=device)
    images, kernel = torch.ones(SHAPE, device=device), torch.ones(SHAPE[1], SHAPE[1], 3, 3, device=device)
    matmul = 2 * SIDE**3 / _fastest_s(lambda: matrix @ matrix, device)
    conv = 2 * 9 * SHAPE[1] * images.numel() / _fastest_s(lambda: F.conv2d(images, kernel, padding=1), device)
    return Machine(name, torch.__version__, threads, matmul, conv)


def _fastest_s(call: Callable[[], object], device: torch.device, times: int = 5) -> float:
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - began)
    return min(taken)


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{models[0]} x {len(models)}" if models else platform.processor() or platform.machine()
