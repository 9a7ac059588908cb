"""How fast a GPU gets through a run's FLOPs: measured here, given, or a share of a published peak. Never guessed."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from cvdd_ray.core.committee import Ballot, Voter
from cvdd_ray.core.costs import Network, vote_cost
from cvdd_ray.core.experts import prepare_torch
from cvdd_ray.core.models import build_seeded
from cvdd_ray.core.precision import Precision, require_tf32_device
from cvdd_ray.errors import ConfigError

UTILIZATION = 0.35
TRIAL_IMAGES = 2  # that tell how many images a measurement can afford
BUDGET_S = 30.0  # of a whole calibration, about


@dataclass(frozen=True)
class Gpu:
    """A GPU model: peak dense FLOP/s in float32 outside of tensor cores, which is what synthesis computes in unless
    `synthesize.precision` says otherwise (core/experts.py turns TF32 off), and bytes of memory."""

    flops_per_s: float
    memory_bytes: int


def _gpu(tflops: float, gigabytes: int) -> Gpu:
    return Gpu(tflops * 1e12, gigabytes * 10**9)


# NVIDIA's data sheets and architecture white papers, row "FP32" ("peak FP32", not "TF32 tensor core").
GPUS: dict[str, Gpu] = {
    "t4": _gpu(8.1, 16),  # T4 data sheet
    "v100": _gpu(15.7, 16),  # V100 data sheet, SXM2
    "rtx3090": _gpu(35.6, 24),  # GA102 white paper
    "a10": _gpu(31.2, 24),  # A10 data sheet
    "a100": _gpu(19.5, 40),  # A100 data sheet
    "a100-80gb": _gpu(19.5, 80),
    "rtx4090": _gpu(82.6, 24),  # Ada white paper
    "l4": _gpu(30.3, 24),  # L4 data sheet
    "l40s": _gpu(91.6, 48),  # L40S data sheet
    "h100-pcie": _gpu(51.2, 80),  # H100 white paper
    "h100": _gpu(66.9, 80),  # H100 white paper, SXM5
    "h200": _gpu(66.9, 141),  # H200 data sheet, the same chip
}


@dataclass(frozen=True)
class Speed:
    """Sustained FLOP/s of one GPU (or of what stands in its place), where the number comes from, and what single networks
    reach where that was measured."""

    flops_per_s: float
    source: str
    of_network: Mapping[str, float] = field(default_factory=dict)

    def seconds(self, work: Mapping[str, int]) -> float:
        """Return how long one GPU takes for FLOPs by network."""
        return sum(flops / self.of_network.get(name, self.flops_per_s) for name, flops in work.items())


def known_gpu(name: str) -> Gpu:
    """Return a GPU model.  Raises ConfigError that lists those known."""
    if name not in GPUS:
        raise ConfigError(
            f"--gpu {name!r} is unknown; known are {', '.join(GPUS)}; or give what yours sustains with --flops-per-s, or "
            f"measure with --calibrate"
        )
    return GPUS[name]


def assumed_speed(gpu: str, utilization: float) -> Speed:
    """Return the speed of a GPU model that sustains a share of its peak.  Raises ConfigError for one that is unknown."""
    peak = known_gpu(gpu).flops_per_s
    return Speed(
        peak * utilization,
        f"ASSUMED, not measured: {utilization:.1%} of the {peak / 1e12:.1f} TFLOP/s (float32) that {gpu} has at its peak",
    )


def measured_speed(
    calls: Mapping[str, tuple[Network, int, int]], threads: int, precision: Precision = "float32"
) -> Speed:
    """Measure votes on this machine's device: experts by name with the groups and images per group of their largest call.
    Raises ConfigError for tf32 on a CPU.

    Random weights; on a device that would take too long the call has fewer images.  What an expert reaches in votes is taken
    for all of its network's work; for other work what all reach together.
    """
    device = prepare_torch(threads)
    require_tf32_device(precision, device)
    flops = seconds = 0.0
    of_network, said = {}, []
    for name, (network, num_groups, group_images) in calls.items():
        model = build_seeded(name, network.num_classes, network.image_size, width=network.width, seed=0).to(device)
        voter = Voter(model, bn_weight=0.01, first_bn_multiplier=10.0, precision=precision)
        _vote_s(voter, network, 1, TRIAL_IMAGES, device)
        per_image_s = _vote_s(voter, network, 1, TRIAL_IMAGES, device) / TRIAL_IMAGES
        affordable = BUDGET_S / (2 * len(calls) * per_image_s)
        if affordable < num_groups * group_images:
            num_groups, group_images = 1, int(max(TRIAL_IMAGES, min(group_images, affordable)))
        took_s = min(_vote_s(voter, network, num_groups, group_images, device) for _ in range(2))
        cost = vote_cost(network, num_groups, group_images)
        of_network[name] = cost.flops / took_s
        flops, seconds = (
            flops + cost.flops / (num_groups * group_images),
            seconds + took_s / (num_groups * group_images),
        )
        said.append(f"{name} {of_network[name] / 1e9:.3g} GFLOP/s with {num_groups * group_images} images")
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    if device.type == "cpu":
        said.append(f"in the place of a GPU stands a worker with threads_per_actor={threads}")
    return Speed(flops / seconds, f"votes measured here on {where}: {', '.join(said)}", of_network)


def _vote_s(voter: Voter, network: Network, num_groups: int, group_images: int, device: torch.device) -> float:
    shape = (num_groups, group_images, 3, network.image_size, network.image_size)
    draw = torch.Generator(device).manual_seed(0)
    ballot = Ballot(
        torch.randn(shape, device=device, generator=draw),
        torch.zeros(num_groups, group_images, dtype=torch.long, device=device),
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    voter.vote(ballot)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
