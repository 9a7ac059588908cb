"""Starting or joining Ray, and dividing it among experts."""

import logging
import math
import os
import socket
from dataclasses import dataclass

import ray

from cvdd_ray.config import RuntimeConfig
from cvdd_ray.errors import ConfigError

# Results of up to 2 MiB travel inside the call: about 3 times faster than through the object store.
INLINE_BYTES = 2 << 20


@dataclass(frozen=True)
class Share:
    """What one actor or task asks of Ray: CPU cores and GPUs, both may be fractions."""

    num_cpus: float
    num_gpus: float


def connect(c: RuntimeConfig) -> bool:
    """Start a private Ray on this machine, or join the cluster at `runtime.address`; return whether this process now
    owns a connection that it should close (a Ray that the caller has already initialised is used as it is).

    Raises ConfigError when the address does not answer or Ray does not start.
    """
    if ray.is_initialized():
        return False
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")  # work that asks for no GPU sees none
    common = {"logging_level": logging.ERROR, "log_to_driver": False}
    private = c.address is None
    try:
        if not private:
            _require_answer(c.address)
            ray.init(address=c.address, **common)
            return True
        ray.init(
            address="local",
            num_cpus=c.num_cpus,
            object_store_memory=c.object_store_mb << 20,
            include_dashboard=False,
            _node_ip_address="127.0.0.1",
            _system_config={"max_direct_call_object_size": INLINE_BYTES},
            **common,
        )
        return True
    except (ConnectionError, ValueError, RuntimeError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        if private:
            raise ConfigError(f"runtime: Ray did not start ({first}); or set runtime.engine=local") from None
        raise ConfigError(
            f"runtime.address: no Ray cluster at {c.address!r} ({first}); start one with `ray start --head`, or leave "
            f"--address out to use this machine"
        ) from None


def disconnect(owned: bool) -> None:
    """Let go of a connection that `connect` has made."""
    if owned:
        ray.shutdown()


def _require_answer(address: str) -> None:
    """Raise ConnectionError at once when nothing listens at host:port; Ray itself would try for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(error.strerror or "it does not answer") from None


def worker_bundles() -> list[dict[str, float]] | None:
    """Return the places for actors and tasks of the placement group this process runs in; None outside of one.

    A trial of a sweep runs in one: the first bundle is its own, unless it asked for nothing (Tune then leaves it out).
    """
    group = ray.util.get_current_placement_group()
    if group is None:
        return None
    own = 1 if ray.get_runtime_context().get_assigned_resources() else 0
    return list(group.bundle_specs[own:])


def places_with(resource: str) -> list[float]:
    """Return how much of a resource each place of this process's work has: living nodes, or bundles of its placement
    group; places without it are left out."""
    bundles = worker_bundles()
    if bundles is None:
        bundles = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [amount for amount in (place.get(resource, 0.0) for place in bundles) if amount]


def expert_share(c: RuntimeConfig, num_actors: int) -> Share:
    """Return what each of `num_actors` long-lived actors asks for, so that all of them can be placed at once.

    With GPUs: at most one each, else the largest fraction of which enough fit on the cards. Without: their threads, or
    an equal part of the cores; nothing in a private cluster, where idle experts would keep later tasks from running. In
    a placement group: an equal part of a bundle.
    Raises ConfigError when `gpus_per_actor` asks for more than fits.
    """
    if bundles := worker_bundles():
        sharing = math.ceil(num_actors / len(bundles))
        return Share(*(math.floor(1000 * bundles[0].get(kind, 0.0) / sharing) / 1000 for kind in ("CPU", "GPU")))
    gpus = places_with("GPU")
    if gpus and c.gpus_per_actor != 0:
        num_gpus = c.gpus_per_actor or 1.0 / math.ceil(num_actors / sum(gpus))
        if sum(_fitting(amount, num_gpus) for amount in gpus) < num_actors:
            raise ConfigError(
                f"runtime.gpus_per_actor: {num_gpus:g} GPU for each of {num_actors} actors does not fit on "
                f"{sum(gpus):g} GPUs; lower it, use 0 for CPU, or leave it out"
            )
        return Share(0.0, num_gpus)
    if c.gpus_per_actor:
        raise ConfigError(f"runtime.gpus_per_actor: {c.gpus_per_actor:g} asked for, the cluster has no GPU; use 0")
    if c.address is None:
        return Share(0.0, 0.0)
    cpus = places_with("CPU")
    fraction = math.floor(1000 * 0.9 * sum(cpus) / num_actors) / 1000
    return Share(min(float(c.threads_per_actor), fraction, max(cpus)), 0.0)


def task_share(c: RuntimeConfig) -> Share:
    """Return what one task asks for: its threads (at most the largest place's cores), and a quarter of a GPU or the
    configured part if there are any."""
    num_gpus = c.gpus_per_task if places_with("GPU") else 0.0
    return Share(min(float(c.threads_per_actor), max(places_with("CPU"), default=1.0)), num_gpus)


def _fitting(amount: float, share: float) -> int:
    """Return how many shares fit on a node with `amount` whole GPUs; a fraction never spans two cards."""
    if share > 1:
        return int(amount // share)
    return int(amount) * int(1.0 / share + 1e-9)
