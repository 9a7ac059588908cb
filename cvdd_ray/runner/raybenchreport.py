"""What Ray costs, for a reader."""

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cvdd_ray.runner.raybench import RayCosts

PARTS = {"votes": "votes", "steps": "steps between votes", "ray": "Ray and messages", "idle": "idle"}


def rich_ray(costs: RayCosts) -> list:
    """Return what a terminal shows."""
    parts: list = []
    if costs.wire:
        waits = ", ".join(f"{name} {share[0]:.1%}" for name, share in costs.waiting().items())
        table = _table("time of the cores", "share", "range")
        for name, (middle, least, most) in costs.shares().items():
            table.add_row(PARTS[name], f"{middle:.1%}", f"{least:.1%}-{most:.1%}")
        parts += [
            Text(
                f"wire: two expert actors, {costs.in_flight} groups of up to {costs.group_images} images at once, "
                f"{costs.cores} cores; median of {len(costs.wire)} rounds"
            ),
            "", table, "", Text(f"experts without a vote to give: {waits} of the time"), "",
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
        **asdict(costs), "shares": costs.shares(), "waiting": costs.waiting(), "placed": costs.placed(),
    }  # fmt: skip


def _table(*titles: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, title in enumerate(titles):
        table.add_column(title, justify="right" if number else "left")
    return table
