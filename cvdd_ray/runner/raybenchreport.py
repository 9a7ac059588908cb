"""What Ray costs, for a reader."""

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cvdd_ray.runner.raybench import RayCosts, Spread

PARTS = {"votes": "votes", "steps": "steps between votes", "ray": "Ray and messages", "idle": "idle"}


def rich_ray(costs: RayCosts) -> list:
    """Return what a terminal shows."""
    parts: list = []
    if costs.wires:
        rounds = len(next(iter(costs.wires.values())))
        wires = [column for wire in costs.wires for column in (f"runtime.wire={wire}", "range")]
        table, shares = _table("time of the cores", *wires), costs.shares()
        for name, title in PARTS.items():
            table.add_row(title, *_cells((shares[wire][name] for wire in costs.wires), "{:.1%}"))
        times, ms = _table("ms per", *wires), costs.ms()
        for name in ("message", "image and iteration"):
            times.add_row(name, *_cells((ms[wire][name] for wire in costs.wires), "{:.3g}"))
        waits = [
            f"{wire}: " + ", ".join(f"{name} {share[0]:.1%}" for name, share in waiting.items())
            for wire, waiting in costs.waiting().items()
        ]
        parts += [
            Text(
                f"wire: two expert actors, {costs.in_flight} groups of up to {costs.group_images} images at once, "
                f"{costs.cores} cores; median of {rounds} rounds of each, in turn; a message is "
                f"{costs.message_bytes / 1e6:.3g} MB there and back, one at a time, without the vote"
            ),
            "", table, "", times, "", Text(f"experts without a vote to give, of the time: {'; '.join(waits)}"), "",
        ]  # fmt: skip
    if costs.placements:
        table = _table("placement", "ms per image and iteration", "range", "cores idle", "range")
        for placement, found in costs.placed().items():
            (ms, *ms_range), (idle, *idle_range) = found["ms"], found["idle"]
            table.add_row(
                placement, f"{ms:.3g}", f"{ms_range[0]:.3g}-{ms_range[1]:.3g}", f"{idle:.1%}",
                f"{idle_range[0]:.1%}-{idle_range[1]:.1%}",
            )  # fmt: skip
        parts += [Text(f"scheduler: whole syntheses on {costs.cores} cores, from first to last group"), "", table]
    return parts


def plain_ray(costs: RayCosts) -> dict[str, Any]:
    """Return everything as plain values."""
    return {
        **asdict(costs), "shares": costs.shares(), "waiting": costs.waiting(), "ms": costs.ms(), "placed": costs.placed(),
    }  # fmt: skip


def _cells(spreads: Iterable[Spread], form: str) -> list[str]:
    """Return median and range of each."""
    shown = [[form.format(value) for value in spread] for spread in spreads]
    return [cell for middle, least, most in shown for cell in (middle, f"{least}-{most}")]


def _table(*titles: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left")
    return table
