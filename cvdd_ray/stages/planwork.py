"""What synthesis and students take, as several stages have them, and in which terms stages are counted.

Memory is what the data of a stage takes, beside Python, torch and Ray themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cvdd_ray.core.costs import Network, forward_cost, num_statistics, training_cost, vote_cost, weight_bytes
from cvdd_ray.core.softlabels import batch_starts
from cvdd_ray.core.synthesis import Job, is_traced
from cvdd_ray.data.shards import shard_tasks
from cvdd_ray.stages.calibrate import job_groups
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.evaluate import student_settings
from cvdd_ray.stages.groupwork import (
    FLOAT,
    asked_images,
    committee_bytes,
    group_bytes,
    group_of,
    largest_asked,
    workers_per_gpu,
)
from cvdd_ray.stages.real import SMALL, TEST_BATCH
from cvdd_ray.stages.simulation import Group

PNG_OF_REAL, PNG_OF_DISTILLED = 0.75, 1.0  # PNG bytes per pixel byte: CIFAR-10 and digits runs had .67-.79 and .93-1.07
ROW_BYTES = 250  # of an image in Arrow besides its pixels: PNG's own, path, label, voters, losses
TRACE_ROW_BYTES = 70  # JSON
LISTING_BYTES = 150  # of a real image that is read on demand: path, label, fingerprint (114 in memory, 61 on the wire)
PLACE_BYTES = 250  # of an image to score, as Python objects

OTHER = "views"  # what is computed by no network
OWN = 1  # the manifest


@dataclass(frozen=True)
class Phase:
    """Work that is spread over GPUs: what every unit costs, as FLOPs by network and `OTHER` for views; a unit is never
    divided. `per_gpu` processes share a GPU; each takes `worker_bytes` on its host and, unit by unit, `gpu_bytes` on
    its GPU (the same for all if it is one number), without GPUs both on the host."""

    units: Sequence[Mapping[str, int]]
    per_gpu: int = 1
    worker_bytes: int = 0
    gpu_bytes: int | Sequence[int] = 0

    def on_gpu(self) -> int:
        """Return the bytes that the processes which share a GPU take on it at most."""
        each = [self.gpu_bytes] * len(self.units) if isinstance(self.gpu_bytes, int) else self.gpu_bytes
        return sum(sorted(each)[-self.per_gpu :])


@dataclass(frozen=True)
class Storage:
    """Files and bytes of a finished stage; the most there are in `partial/` before that (shards are there already, as links
    on a local disk); bytes of one checkpoint, and how many are written in all."""

    files: int
    bytes: int
    partial_files: int = 0
    partial_bytes: int = 0
    checkpoint_bytes: int = 0
    checkpoints: int = 0


@dataclass(frozen=True)
class StageCount:
    """One stage: its folder, what it does (by name), its work, what it writes, and the bytes it holds in the driver (with
    placement `spread`: and the coordinator) and in the object store of every node.

    Where experts vote: the bytes that travel in one iteration of a group with placement `spread`, on average; the jobs and
    images per job of every expert's largest call; the groups, which are the units of the first phase.
    """

    stage: str
    counts: Mapping[str, int]
    phases: tuple[Phase, ...]
    storage: Storage
    driver_bytes: int = 0
    store_bytes: int = 0
    wire_bytes_per_iteration: int | None = None
    largest_calls: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    groups: Mapping[str, Group] = field(default_factory=dict)


def expert(run: Run, name: str) -> Network:
    m = run.config.synthesize.matching
    tile = m.tile(run.info.image_size) if m.convolutions else None
    return Network(name, run.info.num_classes, run.info.image_size, run.config.committee.width, tile)


def student(run: Run, name: str) -> Network:
    return Network(name, run.info.num_classes, run.info.image_size, run.width)


def split_bytes(run: Run, *splits) -> int:
    """Return what splits of real images take: their pixels up to 64 px, above that a listing."""
    per_image = run.info.image_bytes + 8 if run.info.image_size <= SMALL else LISTING_BYTES
    return per_image * sum(len(split) for split in splits)


def driver_bytes(run: Run) -> int:
    """Return what the real images take in the driver."""
    return split_bytes(run, run.real.train, run.real.holdout, run.real.test)


def set_bytes(run: Run, ipc: int) -> int:
    """Return the pixels of a set of images as uint8."""
    return ipc * run.info.index_bytes


def tasks_per_gpu(run: Run) -> int:
    """Return how many tasks share a GPU."""
    share = run.config.runtime.gpus_per_task
    return int(1 / share + 1e-9) if share else 1


@dataclass(frozen=True)
class StudentCount:
    """One student: FLOPs without those of views, optimiser steps, tests, bytes on the host and on the GPU besides the images
    it learns from."""

    flops: int
    steps: int
    tests: int
    worker: int
    gpu: int


def count_student(run: Run, name: str, num_images: int, epochs: int, num_tested: int) -> StudentCount:
    """Return a student's training on `num_images` images and its tests on `num_tested`."""
    info, network = run.info, student(run, name)
    s = student_settings(run, epochs, num_images)
    micro = max(2, s.bn_group)
    step, testing = training_cost(network, micro), forward_cost(network)
    tests = sum(s.is_tested(epoch) for epoch in range(epochs))
    stored, trained = weight_bytes(network)
    return StudentCount(
        epochs * num_images * step.flops // micro + tests * num_tested * testing.flops,
        epochs * len(batch_starts(num_images, s.batch_size)),
        tests,
        6 * num_images * info.num_classes + 2 * TEST_BATCH * FLOAT * info.image_bytes,
        stored
        + (3 if s.ema else 2) * trained
        + max(step.peak_bytes + 3 * s.batch_size * FLOAT * info.image_bytes, testing.peak_bytes * TEST_BATCH),
    )


def count_synthesis(run: Run, sets: Mapping[str, Sequence[Job]], ipc: int, iterations: int) -> StageCount:
    """Return the distillation of sets of jobs; its files are those of the image sets alone."""
    c, info = run.config, run.info
    cut = [group for jobs in sets.values() for group in job_groups(jobs, c.synthesize.jobs_per_group)]
    networks = {
        name: expert(run, name) for name in sorted({name for jobs in cut for job in jobs for name in job.voters})
    }
    largest, weights = largest_asked(cut), {name: weight_bytes(network)[0] for name, network in networks.items()}
    groups = planned_groups(run, cut, largest, iterations)
    num_images = sum(job.num_images for jobs in cut for job in jobs)
    pixels, asked = group_bytes(cut, info.image_size)
    remembered = sum(num_statistics(network) for network in networks.values() if network.tile)
    memory = max(len(jobs) for jobs in cut) * FLOAT * remembered
    state, saved = 8 * pixels, 3 * pixels  # images, moments, gradients, what the step makes; the first three
    checkpoints = max(iterations - 1, 0) // c.synthesize.checkpoint_every
    shards = [len(shard_tasks("x", base, ipc, info.index_bytes)) for base in sets]
    written = image_bytes(num_images, info.image_bytes, PNG_OF_DISTILLED)
    turns = cut[0][0].turns
    voices = sum(len(job.voters) // turns for jobs in cut for job in jobs)
    trace_rows = sum(is_traced(t, iterations, turns) for t in range(iterations)) * voices
    held = sum(weights.values())
    if c.runtime.placement == "spread":
        in_flight = min(c.runtime.groups_in_flight, len(groups))
        coordinating, in_store = in_flight * (state + 2 * asked), in_flight * asked
        units: list[dict[str, int]] = [group.flops() for group in groups.values()]
        on_gpu = [weights[name] + vote_cost(network, *largest[name]).peak_bytes for name, network in networks.items()]
        phase = Phase(units, 1, max(weights.values()) + 3 * pixels, on_gpu)
    else:
        coordinating = in_store = 0
        units = [{**group.flops(), OTHER: iterations * group.view_flops} for group in groups.values()]
        phase = Phase(
            units, workers_per_gpu(c.runtime.gpus_per_actor), held + 2 * saved, committee_bytes(cut, networks)
        )
    return StageCount(
        "synthesis",
        {
            "jobs": sum(len(jobs) for jobs in sets.values()),
            "groups": len(groups),
            "iterations": iterations * sum(len(jobs) for jobs in sets.values()),
            "expert_calls": iterations * sum(len(group.asks) for group in groups.values()) // turns,
            "image_views": iterations * num_images,
            "expert_images": iterations * sum(sum(asked_images(jobs).values()) for jobs in cut) // turns,
            "trace_rows": trace_rows,
        },
        (phase,),
        Storage(
            files=sum(shards),
            bytes=written,
            partial_files=2 * len(groups) + files_of_sets(shards),
            partial_bytes=2 * written,
            checkpoint_bytes=saved + memory if checkpoints else 0,
            checkpoints=checkpoints * len(groups),
        ),
        driver_bytes(run) + 4 * TRACE_ROW_BYTES * trace_rows + 2 * held + coordinating,
        held + in_store,
        sum(ask.bytes_out + ask.bytes_back for group in groups.values() for ask in group.asks.values()) // len(groups),
        largest,
        groups,
    )


def planned_groups(
    run: Run, cut: Sequence[Sequence[Job]], calls: Mapping[str, tuple[int, int]], iterations: int
) -> dict[str, Group]:
    """Return what groups of jobs ask, by number; the FLOPs of an image are taken from a job of `calls`."""
    flops = {name: vote_cost(expert(run, name), 1, per_job).flops // per_job for name, (_, per_job) in calls.items()}
    size = run.info.image_size
    return {f"group {number}": group_of(jobs, flops, size, iterations) for number, jobs in enumerate(cut)}


def image_bytes(num_images: int, pixels: int, png: float) -> int:
    """Return about how many bytes a set of images takes in Arrow."""
    return num_images * (round(png * pixels) + ROW_BYTES)


def files_of_sets(shards) -> int:
    """Return the files in `partial/` of image sets with so many shards each: the shards, and a receipt of each of several."""
    return sum(count + (count if count > 1 else 0) for count in shards)
