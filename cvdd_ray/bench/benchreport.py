"""A benchmark for a reader: tables for a terminal, or plain values."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cvdd_ray.bench.machine import Machine
from cvdd_ray.bench.works import Result

ABOUT = (
    "ratio: the reference's time over ours, median of the rounds and their range. Both sides run in turn, each in a process of "
    "its own; the reference is a plain loop in the manner of the published code (bench/reference.py). peak: FLOPs of "
    "convolutions and matrix products over the machine's best matrix product and convolution."
)


def rich_bench(machine: Machine, results: Mapping[str, Result]) -> list:
    """Return what a terminal shows."""
    head = (
        f"{machine.device}, torch {machine.torch}, {machine.threads} thread{'s' if machine.threads > 1 else ''} per process; "
        f"float32 peak: matrix product {machine.matmul_flops_per_s / 1e9:.0f}, convolution "
        f"{machine.conv_flops_per_s / 1e9:.0f} GFLOP/s"
    )
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, title in enumerate(
        ["work", "per", "ours ms", "reference ms", "ratio", "range", "peak", "first round s", "memory MiB", "reference"]
    ):
        table.add_column(title, justify="left" if number < 2 else "right", overflow="fold")
    for name, result in results.items():
        c = result.measured
        shares = [f"{share:.0%}" for share in result.shares_of_peak(machine)]
        table.add_row(
            name, c.unit, f"{1000 * c.ours.median_s:.3g}", f"{1000 * c.reference.median_s:.3g}", f"{c.ratio:.2f}",
            f"{min(c.ratios):.2f}-{max(c.ratios):.2f}", " / ".join(shares) or "-", f"{c.ours.first_s:.1f}",
            f"{c.ours.peak_mib:,}", f"{c.reference.peak_mib:,}",
        )  # fmt: skip
    return [Text(head), "", table, "", Text(ABOUT)]


def plain_bench(machine: Machine, results: Mapping[str, Result]) -> dict[str, Any]:
    """Return everything as plain values, as `cvdd bench --json` prints it."""
    works = {}
    for name, result in results.items():
        c = result.measured
        works[name] = {
            **asdict(c), "ratios": c.ratios, "ratio": c.ratio, "memory_ratio": c.memory_ratio,
            "flops_per_unit": result.flops_per_unit, "shares_of_peak": result.shares_of_peak(machine),
        }  # fmt: skip
    return {"machine": asdict(machine), "works": works}
