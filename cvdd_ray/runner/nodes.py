"""A joined cluster before work starts: who is there, who is waited for, and whether all see the run's directory."""

import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util import placement_group, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cvdd_ray.config import RuntimeConfig
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError, CvddError
from cvdd_ray.runner.cluster import places_with

POLL_S = 1.0
PROBE_S = 120.0  # a worker process that imports torch for the first time on a busy node takes a while


def gather(c: RuntimeConfig, store: Store, say: Callable[[str], None]) -> None:
    """Wait for the nodes and GPUs that `runtime` asks of a joined cluster, say what it is, and check that every node
    sees the store. A private cluster is one machine: nothing to do.

    Raises ConfigError when they do not come in `wait_s`, or when the store is not shared.
    """
    if c.address is None:
        return
    wait(c, say)
    say(f"cluster: {describe(living())}")
    check_shared(store)


def living() -> list[dict[str, Any]]:
    """Return Ray's entries of the nodes that are alive."""
    return [node for node in ray.nodes() if node["Alive"]]


def describe(nodes: list[dict[str, Any]]) -> str:
    """Return `3 nodes, 24 CPUs, 2 GPUs (A10G)`."""
    resources = [node["Resources"] for node in nodes]
    cpus, gpus = (sum(each.get(kind, 0.0) for each in resources) for kind in ("CPU", "GPU"))
    kinds = sorted(
        {name.partition(":")[2] for each in resources for name in each if name.startswith("accelerator_type:")}
    )
    return ", ".join((_count(len(nodes), "node"), _count(cpus, "CPU"), _count(gpus, "GPU"))) + (
        f" ({', '.join(kinds)})" if gpus and kinds else ""
    )


def wait(c: RuntimeConfig, say: Callable[[str], None]) -> None:
    """Wait until `wait_for_nodes` nodes are alive and `wait_for_gpus` GPUs are free, and name the nodes that join.

    GPUs are asked for by a placement group: an autoscaler starts machines for it, and it ends with this process, so that a
    killed driver leaves no standing order behind. Where nothing could work (a head without CPUs whose workers start from
    zero) one GPU is asked for; waiting work brings the others.
    Raises ConfigError after `wait_s`.
    """
    num_nodes = c.wait_for_nodes or 1
    num_gpus = c.wait_for_gpus or (0 if places_with("CPU") or places_with("GPU") else 1)
    asked = placement_group([{"GPU": 1}] * num_gpus, strategy="SPREAD") if num_gpus else None
    known = {node["NodeID"] for node in living()}
    deadline = time.monotonic() + c.wait_s
    waiting = False
    try:
        while True:
            enough = len(living()) >= num_nodes and (asked is None or asked.wait(POLL_S))
            for node in living():
                if node["NodeID"] not in known:
                    known.add(node["NodeID"])
                    say(f"joined: {node['NodeManagerAddress']} ({describe([node]).partition(', ')[2]})")
            if enough:
                return
            if time.monotonic() > deadline:
                raise ConfigError(_missing(c, num_nodes, num_gpus))
            if not waiting:
                wanted = [_count(num, what) for num, what in ((c.wait_for_nodes, "node"), (num_gpus, "GPU")) if num]
                say(f"waiting up to {c.wait_s:g} s for {' and '.join(wanted)}; there: {describe(living())}")
                waiting = True
            time.sleep(POLL_S)
    finally:
        if asked is not None:
            remove_placement_group(asked)


def _missing(c: RuntimeConfig, num_nodes: int, num_gpus: int) -> str:
    there = living()
    if len(there) < num_nodes:
        lack = f"runtime.wait_for_nodes: {len(there)} of {num_nodes} nodes are there after {c.wait_s:g} s"
    else:
        lack = (
            f"runtime.wait_for_gpus: not {_count(num_gpus, 'free GPU')} after {c.wait_s:g} s (there: {describe(there)})"
        )
    return f"{lack}; `ray status` says what keeps them away, --wait-s waits longer, a smaller number asks for less"


def check_shared(store: Store) -> None:
    """Check that every node sees what this process writes to the store, and this process what every node writes.

    Raises ConfigError with the first node that does not.
    """
    nodes = living()
    if len(nodes) < 2:
        return
    place = store.display("").rstrip("/")
    new = store.is_local and not Path(store.root).exists()
    folder = f"probe-{secrets.token_hex(8)}"
    try:
        store.write(f"{folder}/driver", b"")
        if faults := _faults(store, folder, nodes):
            address, fault = faults[0]
            more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
            raise ConfigError(
                f"--out {place}: node {address}{more} {fault}; with {len(nodes)} nodes give a directory that all of them "
                f"share or an s3://bucket/prefix that all of them may use"
            )
    except (OSError, ArtifactError) as error:
        raise ConfigError(f"--out {place}: cannot be written ({_first_line(error)})") from None
    finally:
        with suppress(OSError, CvddError):  # what went wrong before says more
            store.delete_folder(folder)
            if new:
                Path(store.root).rmdir()


def _faults(store: Store, folder: str, nodes: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """Return (address, what is wrong) of the nodes that do not share the store; nodes that die meanwhile are left out."""
    refs = {}
    for node in nodes:
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        remote = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=there)(_answer)
        refs[remote.remote(store, folder, node["NodeID"])] = node
    ray.wait(list(refs), num_returns=len(refs), timeout=PROBE_S)
    faults: dict[str, str] = {}
    for ref, node in refs.items():
        try:
            if not ray.get(ref, timeout=0):
                faults[node["NodeID"]] = "does not see what this one writes there"
        except GetTimeoutError:
            faults[node["NodeID"]] = f"has not got through to it in {PROBE_S:g} s"
        except RayError as error:
            faults[node["NodeID"]] = f"cannot use it ({_first_line(error)})"
    answers = set(store.names(folder))
    for node in nodes:
        if f"{folder}/{node['NodeID']}" not in answers:
            faults.setdefault(node["NodeID"], "writes there what this one does not see")
    alive = {node["NodeID"] for node in living()}
    return [
        (node["NodeManagerAddress"], faults[id_])
        for node in nodes
        if (id_ := node["NodeID"]) in faults and id_ in alive
    ]


def _answer(store: Store, folder: str, name: str) -> bool:
    """On a node: look for the driver's file and leave one beside it; nothing is written where the driver's is not seen."""
    if not store.exists(f"{folder}/driver"):
        return False
    store.write(f"{folder}/{name}", b"")
    return True


def _first_line(error: BaseException) -> str:
    while isinstance(error, RayTaskError) and isinstance(error.cause, Exception):
        error = error.cause
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _count(number: float, what: str) -> str:
    return f"{number:g} {what}{'' if number == 1 else 's'}"
