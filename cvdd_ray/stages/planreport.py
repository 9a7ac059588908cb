"""A plan as tables for a terminal."""

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from cvdd_ray.stages.plan import Plan, StagePlan

NO_SPEED = (
    "no times without a speed: --gpu TYPE (a share of its published peak), --flops-per-s X (what yours sustains), or "
    "--calibrate (measured on this machine)"
)
NOT_COUNTED = (
    "FLOPs are those of convolutions and matrix products. Not in the times: reading and decoding images, storage, start-up. "
    "Messages are, with placement spread (colocate has none), as measured on one machine's object store."
)
MEMORY = (
    "Memory is what the data takes, beside Python, torch and Ray themselves; on the GPU without what cuDNN takes to work. "
    "Image sets are estimated from PNG sizes of earlier runs (real 0.75, distilled 1.0 bytes per pixel value)."
)


def rich_plan(plan: Plan) -> list:
    """Return what a terminal shows of a plan."""
    lines = [
        f"{plan.dataset}: {plan.num_classes:,} classes, {plan.image_size} px; {plan.train_images:,} train, "
        f"{plan.holdout_images:,} hold-out, {plan.test_images:,} test images",
        f"on {plan.nodes} x {plan.gpus_per_node} GPU{'s' if plan.gpus > 1 else ''}{f' ({plan.gpu})' if plan.gpu else ''}, "
        f"placement {plan.placement}",
        f"speed: {plan.speed.source}" if plan.speed else NO_SPEED,
    ]
    wire = [
        f"{stage.stage}: {size(stage.wire_bytes_per_iteration)} travel per iteration of a group with placement spread "
        f"(float32 views out, gradients back), nothing with colocate"
        for stage in plan.stages
        if stage.wire_bytes_per_iteration
    ]
    below = [*wire, NOT_COUNTED, MEMORY, *(f"note: {note}" for note in plan.notes)]
    simulated = [simulation_table(plan), ""] if plan.simulated else []
    return [*map(Text, lines), "", work_table(plan), "", storage_table(plan), "", *simulated, *map(Text, below)]


def work_table(plan: Plan) -> Table:
    """Return what every stage does and, with a speed, how long it takes."""
    columns = ["stage", "what", "units", "FLOPs", "GPUs used", "balance", "busy"]
    if plan.speed:
        columns += ["GPU h", "wall h"]
    table = _table(columns, texts=2)
    for stage in plan.stages:
        idle = not stage.flops
        cells = [
            stage.stage, _what(stage), f"{stage.units:,}", "" if idle else flops(stage.flops),
            "" if idle else f"{min(stage.useful_gpus, plan.gpus)}", "" if idle else f"{stage.balance:.0%}",
            "" if idle else f"{stage.busy:.0%}",
        ]  # fmt: skip
        if plan.speed:
            cells += [hours(stage.gpu_hours), hours(stage.wall_hours)]
        table.add_row(*cells)
    table.add_section()
    totals = ["all", "", "", flops(plan.flops), "", "", ""]
    table.add_row(*totals, *([hours(plan.gpu_hours), hours(plan.wall_hours)] if plan.speed else []), style="bold")
    return table


def simulation_table(plan: Plan) -> Table:
    """Return how busy so many GPUs would be in synthesis, by placement, and with a speed how long it takes."""
    columns = [f"{what} {name}" for name in plan.simulated[0].busy for what in ("busy", *(["h"] if plan.speed else []))]
    table = _table(["synthesis of", "GPUs", *columns], texts=1)
    for one in plan.simulated:
        cells = []
        for name, share in one.busy.items():
            cells += [f"{share:.1%}", *([hours(one.wall_hours[name])] if one.wall_hours else [])]
        table.add_row(one.stage, f"{one.gpus}", *cells, end_section=one.gpus == plan.simulated[-1].gpus)
    return table


def storage_table(plan: Plan) -> Table:
    """Return what every stage writes and holds in memory."""
    table = _table(
        ["stage", "files", "bytes", "partial files", "bytes", "driver", "object store", "worker", "node", "GPU"], texts=1
    )  # fmt: skip
    for stage in plan.stages:
        s = stage.storage
        written = size(s.partial_bytes)
        if s.checkpoints:
            written += f" + {s.checkpoints} x {size(s.checkpoint_bytes)}"
        memory = (stage.driver_bytes, stage.store_bytes, stage.worker_bytes, stage.node_bytes, stage.gpu_bytes)
        table.add_row(
            stage.stage,
            f"{s.files:,}",
            size(s.bytes),
            f"{s.partial_files:,}",
            written,
            *(size(part) for part in memory),
        )
    table.add_section()
    table.add_row("all", f"{plan.files:,}", size(plan.bytes), style="bold")
    return table


def _table(columns: list[str], texts: int) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    for number, title in enumerate(columns):
        table.add_column(title, justify="left" if number < texts else "right", overflow="fold")
    return table


def _what(stage: StagePlan) -> str:
    return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in stage.counts.items())


def size(num_bytes: int) -> str:
    """Return bytes for a reader: 0, 812 kB, 1.5 GB."""
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.3g} {name}"
    return f"{num_bytes} B" if num_bytes else "0"


def flops(count: int) -> str:
    """Return FLOPs for a reader, e.g. 5.98e17."""
    return f"{count:.3g}".replace("e+", "e")


def hours(value: float | None) -> str:
    """Return hours for a reader; short times with more digits."""
    return "" if value is None else f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"
