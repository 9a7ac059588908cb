"""What can be watched while a run is going: the table of metrics, recorded where the work is done.

Ray's agent on every node serves them in Prometheus' text format, as `ray_<name>`, counters as `ray_<name>_total`, with
node, worker and JobId (one per run that joins a cluster) as labels. A gauge that is not set again within two of Ray's
report intervals (10 s each) is dropped, so a value never outlives what it describes.
"""

from functools import lru_cache
from typing import NamedTuple

import ray
from ray.util.metrics import Counter, Gauge, Histogram

JOB = "JobId"  # Ray's own name for it
STEP_BOUNDS_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)


class Row(NamedTuple):
    """One metric: its type, the unit of its values, the labels it is split by, and what it says."""

    kind: type
    unit: str
    tags: tuple[str, ...]
    meaning: str


METRICS = {
    "cvdd_work_done": Row(Counter, "pieces", ("stage", "unit"), "Finished pieces of a stage: jobs, students ..."),
    "cvdd_work_left": Row(Gauge, "pieces", ("stage", "unit"), "Unfinished pieces of the stage that is running"),
    "cvdd_iterations": Row(Counter, "job iterations", (), "Synthesis iterations, each job counted"),
    "cvdd_expert_step_seconds": Row(Histogram, "seconds", ("expert",), "Time of one vote of an expert"),
    "cvdd_expert_busy_seconds": Row(Counter, "seconds", ("expert",), "Time an expert spent voting"),
    "cvdd_expert_idle_share": Row(
        Gauge, "share", ("expert",), "Share of the last seconds without a vote; `all`: of a worker that holds the committee"
    ),
    "cvdd_coordinator_seconds": Row(
        Counter, "seconds", ("doing",), "Time of job groups: `waiting` for votes, `stepping` (views, sums, checkpoints)"
    ),
    "cvdd_wire_bytes": Row(
        Counter, "bytes", ("direction", "expert"), "Arrays between coordinators and experts: `views` out, `gradients` back"
    ),
    "cvdd_checkpoints": Row(Counter, "checkpoints", (), "Checkpoints of job groups that were written"),
    "cvdd_checkpoint_seconds": Row(Counter, "seconds", (), "Time it took to write them"),
    "cvdd_failures": Row(
        Counter, "failures", ("kind",), "What was started again (`actor_restarted` ...), or the kind of an error"
    ),
}  # fmt: skip


def record(name: str, value: float, **tags: str) -> None:
    """Add to a counter, set a gauge or observe a value; nothing happens in a process without Ray.

    Costs 6 microseconds. Raises KeyError for a metric that is not in the table, ValueError for other tags than its own.
    """
    kind, _, names, _ = METRICS[name]
    if set(tags) != set(names):
        raise ValueError(f"metric {name} is split by {list(names)}, got {sorted(tags)}")
    if not ray.is_initialized():
        return
    tags[JOB] = ray.get_runtime_context().get_job_id()
    metric = _metric(name)
    if kind is Gauge:
        metric.set(value, tags)
    elif kind is Histogram:
        metric.observe(value, tags)
    elif value > 0:  # Ray refuses to add nothing
        metric.inc(value, tags)


@lru_cache
def _metric(name: str) -> Counter | Gauge | Histogram:
    kind, unit, tags, meaning = METRICS[name]
    bounds = {"boundaries": list(STEP_BOUNDS_S)} if kind is Histogram else {}
    return kind(name, f"{meaning} ({unit}).", tag_keys=(*tags, JOB), **bounds)
