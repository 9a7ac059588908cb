"""A stage's stream on Ray Data: reading on any core of the cluster runs ahead of the workers, which stay on their devices.

Ray Data holds back the readers when the workers are behind, so a set of any size passes through a bounded part of the
object store.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import ray
import ray.data

from cvdd_ray.config import RuntimeConfig
from cvdd_ray.core.experts import prepare_torch
from cvdd_ray.runner.cluster import places_with, task_share

ITEM, TOTAL, ROWS = "_item", "_total", "_rows"


def stream(
    c: RuntimeConfig, read: Callable, worker: type, items: Mapping[str, Any], shared: tuple
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, rows) of every item as they finish, see `Runtime.stream`; the order of an item's rows is not kept."""
    _quiet()
    shared_refs = [ray.put(value) for value in shared]
    cpus, share = sum(places_with("CPU")), task_share(c)
    reading = min(share.num_cpus, cpus / 2)
    working = reading / 2  # less than reading on purpose: steps that ask for the same are fused, and would take turns
    most = max(1, int(sum(places_with("GPU")) / share.num_gpus if share.num_gpus else cpus / (reading + working)))
    dataset = (
        ray.data.from_items([{ITEM: name} for name in items], override_num_blocks=len(items))
        .map_batches(
            _read,
            fn_args=(read, ray.put(dict(items)), shared_refs, c.threads_per_actor),
            batch_size=1,
            num_cpus=reading,
        )
        .map_batches(
            _Worker,
            fn_constructor_args=(worker, shared_refs, c.threads_per_actor),
            batch_size=None,
            num_cpus=working,
            num_gpus=share.num_gpus,
            compute=ray.data.ActorPoolStrategy(min_size=1, max_size=min(most, len(items))),
        )
    )
    found: dict[str, list[np.ndarray]] = {}
    for batch in dataset.iter_batches(batch_size=None):
        for name in dict.fromkeys(batch[ITEM].tolist()):
            own = batch[ITEM] == name
            found.setdefault(name, []).append((batch[ROWS][own], int(batch[TOTAL][own].max())))
            rows = np.concatenate([part for part, _ in found[name]])
            if len(rows) == max(total for _, total in found[name]):
                yield name, rows
                del found[name]


def _read(batch: dict[str, np.ndarray], read: Callable, items: Any, shared_refs: list, threads: int):
    """Yield the blocks of one item, every row with the item's name; rows of the last block know how many there are."""
    prepare_torch(threads)
    (name,) = batch[ITEM].tolist()
    everything = items if isinstance(items, dict) else ray.get(items)
    blocks, total = read(everything[name], *ray.get(shared_refs)), 0
    block = next(blocks)
    while block is not None:
        following = next(blocks, None)
        length = len(next(iter(block.values())))
        total += length
        known = total if following is None else 0
        yield {ITEM: np.array([name] * length), TOTAL: np.full(length, known), **block}
        block = following


class _Worker:
    """A stage's worker as an actor of Ray Data."""

    def __init__(self, worker: type, shared_refs: list, threads: int):
        prepare_torch(threads)
        self._worker = worker(*ray.get(shared_refs))

    def __call__(self, block: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        about = {name: block.pop(name) for name in (ITEM, TOTAL)}
        return {**about, ROWS: self._worker(block)}


def _quiet() -> None:
    """Leave the screen to the run's own progress."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what fails is raised
