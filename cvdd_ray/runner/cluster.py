"""Starting or joining Ray, and dividing it among experts."""

import logging
import os
from dataclasses import dataclass

from cvdd_ray.config import RuntimeConfig
from cvdd_ray.errors import ConfigError

# Results of up to 2 MiB travel inside the call: about 3 times faster than through the object store.
INLINE_BYTES = 2 << 20


@dataclass(frozen=True)
class Share:
    """What one actor or task asks of Ray: CPU cores and GPUs, both may be fractions."""

    num_cpus: float
    num_gpus: float


def connect(c: RuntimeConfig) -> None:
    """Start a private Ray on this machine, or join the cluster at `runtime.address`.

    Raises ConfigError when the address does not answer, or the machine gives Ray less than it was asked for.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    private = c.address is None
    if private:
        # A private cluster listens on loopback only and ends with this process; a token would outlive it in HOME.
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    import ray

    common = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        if not private:
            ray.init(address=c.address, **common)
            return
        ray.init(
            address="local",
            num_cpus=c.num_cpus or len(os.sched_getaffinity(0)),
            object_store_memory=c.object_store_mb << 20,
            include_dashboard=False,
            _system_config={"max_direct_call_object_size": INLINE_BYTES},
            **common,
        )
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        if private:
            raise ConfigError(f"runtime: Ray did not start ({first}); or set runtime.engine=local") from None
        raise ConfigError(
            f"runtime.address: no Ray cluster at {c.address!r} ({first}); start one with `ray start --head`, or leave "
            f"--address out to use this machine"
        ) from None


def expert_share(c: RuntimeConfig, num_actors: int) -> Share:
    """Return what each of `num_actors` long-lived actors asks for: an equal part of the GPUs, at most one each; and no
    core, since between stages they idle and would keep tasks from running (a spread strategy places them)."""
    import ray

    have = ray.cluster_resources()
    gpus = have.get("GPU", 0.0) if c.gpus_per_actor is None else c.gpus_per_actor * num_actors
    num_gpus = 0.0
    if gpus:
        num_gpus = c.gpus_per_actor if c.gpus_per_actor is not None else min(1.0, _part(gpus, num_actors))
    if num_gpus * num_actors > have.get("GPU", 0.0) + 1e-6:
        raise ConfigError(
            f"runtime.gpus_per_actor: {num_gpus} for each of {num_actors} actors is more than the cluster's "
            f"{have.get('GPU', 0.0):g} GPUs; lower it, use 0 for CPU, or leave it out"
        )
    return Share(0.0, num_gpus)


def task_share(c: RuntimeConfig) -> Share:
    """Return what one task asks for: its threads, and a whole GPU or the configured part of one if there are any."""
    import ray

    have = ray.cluster_resources()
    num_gpus = 0.0
    if have.get("GPU", 0.0):
        num_gpus = 0.25 if c.gpus_per_actor is None else min(1.0, c.gpus_per_actor)
    return Share(float(min(c.threads_per_actor, have.get("CPU", 1.0))), num_gpus)


def _part(total: float, num: int) -> float:
    return max(int(total / num * 1000) / 1000, 0.001)
