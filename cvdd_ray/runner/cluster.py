"""Starting or joining Ray, and dividing it among experts."""

import logging
import math
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import ray
from ray._private import ray_constants
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cvdd_ray.config import RuntimeConfig
from cvdd_ray.errors import ConfigError

# Results of up to 2 MiB travel inside the call: about 3 times faster than through the object store.
INLINE_BYTES = 2 << 20
FREE = 0.9  # of a shared cluster's cores are taken at most
PROBE_GPUS, PROBE_S = 0.01, 120.0  # a worker process that imports torch for the first time takes a while
ASK_S = 1.0
PATIENCE_S = 10.0  # a lost node that Ray or the autoscaler starts again at once is not given up


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
        with _at_loopback():
            ray.init(
                address="local",
                num_cpus=c.num_cpus,
                object_store_memory=c.object_store_mb << 20,
                include_dashboard=False,
                _system_config={"max_direct_call_object_size": INLINE_BYTES},
                **common,
            )
        return True
    except (ConnectionError, ValueError, RuntimeError, RayError) as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        if private:
            raise ConfigError(f"runtime: Ray did not start ({first}); or set runtime.engine=local") from None
        raise ConfigError(
            f"runtime.address: no Ray cluster at {c.address!r} ({first}); start one with `ray start --head`, give its "
            f"token if it has one (RAY_AUTH_MODE=token with RAY_AUTH_TOKEN or ~/.ray/auth_token), or leave --address out to "
            f"use this machine"
        ) from None


@contextmanager
def _at_loopback() -> Iterator[None]:
    """Let the servers of a Ray that is started inside listen on 127.0.0.1 alone, as Ray does by itself on macOS. On Linux it
    takes even `_node_ip_address="127.0.0.1"` for this machine's address in the network."""
    usual = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = usual


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
    the largest part of a node's cores of which enough fit; nothing in a private cluster, where idle experts would keep
    later tasks from running. In a placement group: an equal part of a bundle.
    Raises ConfigError when `gpus_per_actor` asks for more than fits.
    """
    if bundles := worker_bundles():
        sharing = math.ceil(num_actors / len(bundles))
        return Share(*(math.floor(1000 * bundles[0].get(kind, 0.0) / sharing) / 1000 for kind in ("CPU", "GPU")))
    gpus = places_with("GPU")
    if gpus and c.gpus_per_actor != 0:
        num_gpus = c.gpus_per_actor or 1.0 / math.ceil(num_actors / sum(gpus))
        if _fitting("GPU", gpus, num_gpus) < num_actors:
            raise ConfigError(
                f"runtime.gpus_per_actor: {num_gpus:g} GPU for each of {num_actors} actors does not fit on "
                f"{sum(gpus):g} GPUs; lower it, use 0 for CPU, or leave it out"
            )
        return Share(0.0, num_gpus)
    if c.gpus_per_actor:
        raise ConfigError(f"runtime.gpus_per_actor: {c.gpus_per_actor:g} asked for, the cluster has no GPU; use 0")
    if c.address is None:
        return Share(0.0, 0.0)
    free = [FREE * amount for amount in places_with("CPU")]
    shares = {float(c.threads_per_actor), *(amount / k for amount in free for k in range(1, num_actors + 1))}
    shares = {math.floor(1000 * share) / 1000 for share in shares if share <= c.threads_per_actor}
    fitting = (share for share in shares if _fitting("CPU", free, share) >= num_actors)
    return Share(max(fitting, default=float(c.threads_per_actor)), 0.0)  # without a core: until nodes come


def worker_places(c: RuntimeConfig) -> int:
    """Return how many long-lived actors can work at the same time: one per GPU or, with `gpus_per_actor`, as many as fit;
    without GPUs one per `threads_per_actor` cores; in a placement group one per bundle."""
    if bundles := worker_bundles():
        return len(bundles)
    gpus = places_with("GPU")
    if gpus and c.gpus_per_actor != 0:
        return _fitting("GPU", gpus, c.gpus_per_actor or 1.0)
    return int(sum(places_with("CPU")) / c.threads_per_actor)


def room(share: Share) -> int:
    """Return for how many actors with this share the living nodes have room; 0 for those that ask for nothing, and in a
    placement group, which does not grow."""
    if worker_bundles() is not None:
        return 0
    if share.num_gpus:
        return _fitting("GPU", places_with("GPU"), share.num_gpus)
    free = [FREE * amount for amount in places_with("CPU")]
    return _fitting("CPU", free, share.num_cpus) if share.num_cpus else 0


def gpu_memory() -> int:
    """Return the bytes of memory of the smallest GPU: of any node, or of this process's placement group.

    Raises ConfigError when a node does not say.
    """
    probe = ray.remote(num_cpus=0, num_gpus=PROBE_GPUS, max_retries=3)(_visible_memory)
    if worker_bundles() is not None:
        asked = [probe.remote()]
    else:
        nodes = [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("GPU")]
        asked = [
            probe.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node, soft=False)).remote()
            for node in nodes
        ]
    try:
        return min(ray.get(asked, timeout=PROBE_S))
    except RayError as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"runtime.placement=auto: a node did not say how much memory its GPUs have ({first}); set placement to "
            f"colocate or spread"
        ) from None


def _visible_memory() -> int:
    import torch

    return min(torch.cuda.get_device_properties(k).total_memory for k in range(torch.cuda.device_count()))


def outgrown(
    c: RuntimeConfig,
    share: Share,
    num_actors: int,
    fewest: int | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Callable[[], bool]:
    """Return a question to be asked again and again: have `num_actors` with this share lacked places for PATIENCE_S,
    because nodes have left, where smaller shares of what is left, or `fewest` actors, would fit?

    Shares that the user has set, and those of placement groups, wait for nodes to come back when not even `fewest` fit.
    """
    kind, each = ("GPU", share.num_gpus) if share.num_gpus else ("CPU", share.num_cpus)
    lacking_since, asked = math.inf, -math.inf
    fewest, fixed = fewest or num_actors, bool(kind == "GPU" and c.gpus_per_actor)

    def lack_places() -> bool:
        nonlocal lacking_since, asked
        now = clock()
        if now - asked >= ASK_S:
            asked, places = now, places_with(kind)
            fit = _fitting(kind, places, each)
            lacking = bool(places) and fit < num_actors and (not fixed or fit >= fewest)
            lacking_since = min(lacking_since, now) if lacking else math.inf
        return now - lacking_since >= PATIENCE_S

    if not each or worker_bundles():
        return lambda: False
    return lack_places


def task_share(c: RuntimeConfig) -> Share:
    """Return what one task asks for: its threads (at most the largest place's cores), and a quarter of a GPU or the
    configured part if there are any."""
    num_gpus = c.gpus_per_task if places_with("GPU") else 0.0
    return Share(min(float(c.threads_per_actor), max(places_with("CPU"), default=1.0)), num_gpus)


def student_share(c: RuntimeConfig, num_workers: int) -> tuple[Share, int]:
    """Return what each of the workers of one student or expert asks for, and how many such can be trained at once.

    With GPUs: one each, since NCCL takes one process per GPU. Without: their threads, or fewer cores where there are not
    enough. A cluster that was joined may grow, so more may be asked of it than it has.
    Raises ConfigError when a private cluster has fewer GPUs than workers, and in a trial of a sweep, which has no room.
    """
    if worker_bundles() is not None:
        raise ConfigError(
            f"pretrain.workers: got {num_workers}, but a trial trains an expert in one process; make the experts with "
            f"`cvdd pretrain` and take them over with --reuse, or set pretrain.workers=1"
        )
    gpus = [] if c.gpus_per_actor == 0 else places_with("GPU")
    if gpus:
        places = sum(int(amount) for amount in gpus)
        if places < num_workers and c.address is None:
            raise ConfigError(
                f"workers (of pretrain or evaluate): {num_workers} take one GPU each, this machine has {places}; use at most "
                f"{places}"
            )
        return Share(0.0, 1.0), max(1, places // num_workers)
    cpus, most = places_with("CPU"), float(c.threads_per_actor)
    parts = [most, *(math.floor(1000 * amount / n) / 1000 for amount in cpus for n in range(1, num_workers + 1))]
    fitting = (part for part in parts if part <= most and _fitting("CPU", cpus, part) >= num_workers)
    num_cpus = max(fitting, default=most)
    return Share(num_cpus, 0.0), max(1, _fitting("CPU", cpus, num_cpus) // num_workers)


def _fitting(kind: str, places: Iterable[float], share: float) -> int:
    """Return how many shares of a resource fit on places with so much of it; a part of a GPU never spans two cards."""
    if kind == "GPU" and share <= 1:
        return sum(int(amount) * int(1.0 / share + 1e-9) for amount in places)
    return sum(int(amount / share + 1e-9) for amount in places)
