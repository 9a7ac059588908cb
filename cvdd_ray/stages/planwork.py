"""What synthesis and students take, as several stages have them, and in which terms stages are counted.

Memory is what the data of a stage takes, beside Python, torch and Ray themselves.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cvdd_ray.core.costs import Network, forward_cost, training_cost, view_flops, vote_cost, weight_bytes
from cvdd_ray.core.softlabels import batch_starts
from cvdd_ray.core.synthesis import Job, is_traced
from cvdd_ray.data.shards import shard_tasks
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.evaluate import student_settings
from cvdd_ray.stages.real import SMALL, TEST_BATCH
from cvdd_ray.stages.synthesize import job_groups

FLOAT = 4
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

    Where experts vote: the bytes that travel in one iteration of a group with placement `spread`, on average; the groups and
    images per group of every expert's largest call; whether the experts are spread over the GPUs.
    """

    stage: str
    counts: Mapping[str, int]
    phases: tuple[Phase, ...]
    storage: Storage
    driver_bytes: int = 0
    store_bytes: int = 0
    wire_bytes_per_iteration: int | None = None
    largest_calls: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    spreads_experts: bool = False


def expert(run: Run, name: str) -> Network:
    return Network(name, run.info.num_classes, run.info.image_size, run.config.committee.width)


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
        + 2 * trained
        + max(step.peak_bytes + 3 * s.batch_size * FLOAT * info.image_bytes, testing.peak_bytes * TEST_BATCH),
    )


def count_synthesis(run: Run, sets: Mapping[str, Sequence[Job]], ipc: int, iterations: int) -> StageCount:
    """Return the distillation of sets of jobs; its files are those of the image sets alone."""
    c, info = run.config, run.info
    groups = [group for jobs in sets.values() for group in job_groups(jobs, c.synthesize.jobs_per_group)]
    colocated = c.runtime.placement == "colocate"
    views = 2 * view_flops(info.image_size) * iterations  # and the gradient back through them
    units: list[dict[str, int]] = []
    largest: dict[str, tuple[int, int]] = {}
    calls = wire = votes = 0
    for group in groups:
        images = dict.fromkeys(sorted({name for job in group for name in job.voters}), 0)
        for job in group:
            for name in job.voters:
                images[name] += len(job.labels)
        per_job = max(len(job.labels) for job in group)
        for name, count in images.items():
            largest[name] = max(largest.get(name, (0, 0)), (count // per_job, per_job))
            wire += 2 * count * info.image_bytes * FLOAT + 8 * count + 8 * (count // per_job)
        calls, votes = calls + len(images), votes + sum(images.values())
        flops = {name: count * iterations * vote_flops(run, name, per_job) for name, count in images.items()}
        units.append({**flops, OTHER: views * sum(len(job.labels) for job in group)})
    networks = {name: expert(run, name) for name in largest}
    weights = {name: weight_bytes(network)[0] for name, network in networks.items()}
    peaks = {name: vote_cost(network, *largest[name]).peak_bytes for name, network in networks.items()}
    num_images = sum(len(job.labels) for group in groups for job in group)
    pixels = max(sum(len(job.labels) for job in group) for group in groups) * info.image_bytes * FLOAT
    voting = max(len({name for job in group for name in job.voters}) for group in groups)
    state, saved = (
        8 * pixels,
        3 * pixels,
    )  # images, moments, gradients and what the step makes meanwhile; the first three
    asked = 2 * voting * pixels  # a view out and a gradient back for every expert
    checkpoints = (iterations - 1) // c.synthesize.checkpoint_every
    shards = [len(shard_tasks("x", base, ipc, info.index_bytes)) for base in sets]
    written = image_bytes(num_images, info.image_bytes, PNG_OF_DISTILLED)
    trace_rows = sum(is_traced(t, iterations) for t in range(iterations)) * sum(
        len(j.voters) for g in groups for j in g
    )
    driver = driver_bytes(run) + 4 * TRACE_ROW_BYTES * trace_rows
    held = sum(weights.values())
    if colocated:
        coordinating = in_store = 0
        phase = Phase(units, 1, held + 2 * saved, held + state + asked + max(peaks.values()))
    else:
        in_flight = min(c.runtime.groups_in_flight, len(groups))
        coordinating, in_store = in_flight * (state + 2 * asked), in_flight * asked
        by_expert = [{name: sum(unit.get(name, 0) for unit in units)} for name in largest]
        on_gpu = max(weights[name] + peaks[name] for name in largest)
        phase = Phase(by_expert, 1, max(weights.values()) + 3 * pixels, on_gpu)
    return StageCount(
        "synthesis",
        {
            "jobs": sum(len(jobs) for jobs in sets.values()),
            "groups": len(groups),
            "iterations": iterations * sum(len(jobs) for jobs in sets.values()),
            "expert_calls": iterations * calls,
            "image_views": iterations * num_images,
            "expert_images": iterations * votes,
            "trace_rows": trace_rows,
        },
        (phase,),
        Storage(
            files=sum(shards),
            bytes=written,
            partial_files=2 * len(groups) + files_of_sets(shards),
            partial_bytes=2 * written,
            checkpoint_bytes=saved if checkpoints else 0,
            checkpoints=checkpoints * len(groups),
        ),
        driver + 2 * held + coordinating,
        held + in_store,
        wire // len(groups),
        largest,
        not colocated,
    )


def vote_flops(run: Run, name: str, group_images: int) -> int:
    """Return the FLOPs of an expert's vote per image."""
    return vote_cost(expert(run, name), 1, group_images).flops // group_images


def image_bytes(num_images: int, pixels: int, png: float) -> int:
    """Return about how many bytes a set of images takes in Arrow."""
    return num_images * (round(png * pixels) + ROW_BYTES)


def files_of_sets(shards) -> int:
    """Return the files in `partial/` of image sets with so many shards each: the shards, and a receipt of each of several."""
    return sum(count + (count if count > 1 else 0) for count in shards)
