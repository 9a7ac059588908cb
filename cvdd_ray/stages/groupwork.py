"""What a group of synthesis jobs asks of the committee, counted: for the policy that hands groups out and for `cvdd plan`."""

from collections.abc import Iterable, Mapping, Sequence

from cvdd_ray.core.costs import Network, view_flops, vote_cost, weight_bytes
from cvdd_ray.core.synthesis import Job
from cvdd_ray.stages.simulation import Group, Question

FLOAT, LABEL = 4, 8  # bytes of a value, and of a label
FITTING = 0.8  # of a GPU's memory; the rest is for what is not counted


def asked_images(jobs: Sequence[Job]) -> dict[str, int]:
    """Return how many images every expert that votes on a group is asked for in one iteration, by name in order."""
    images = dict.fromkeys(sorted({name for job in jobs for name in job.voters}), 0)
    for job in jobs:
        for name in job.voters:
            images[name] += job.num_images
    return images


def group_of(jobs: Sequence[Job], image_flops: Mapping[str, int], image_size: int, iterations: int) -> Group:
    """Return what a group of jobs asks in `iterations` iterations, on average where voters take turns; `image_flops` are those
    of an expert's vote on an image."""
    num_images, per_job = sum(job.num_images for job in jobs), max(job.num_images for job in jobs)
    asks, values, turns = {}, 3 * image_size**2, jobs[0].turns
    for name, images in asked_images(jobs).items():
        out, back = images * (FLOAT * values + LABEL), images * FLOAT * values + 2 * FLOAT * (images // per_job)
        asks[name] = Question(images * image_flops[name] // turns, out // turns, back // turns)
    return Group(iterations, num_images * values, asks, 2 * view_flops(image_size) * num_images)


def largest_asked(groups: Iterable[Sequence[Job]]) -> dict[str, tuple[int, int]]:
    """Return the jobs and images per job of every expert's largest call."""
    largest: dict[str, tuple[int, int]] = {}
    for jobs in groups:
        per_job = max(job.num_images for job in jobs)
        for name, images in asked_images(jobs).items():
            largest[name] = max(largest.get(name, (0, 0)), (images // per_job, per_job))
    return largest


def group_bytes(groups: Iterable[Sequence[Job]], image_size: int) -> tuple[int, int]:
    """Return the bytes of the images of the largest group, and of the views and gradients of one iteration of it, those of
    the most experts that any group asks."""
    groups = list(groups)
    pixels = max(sum(job.num_images for job in jobs) for jobs in groups) * 3 * image_size**2 * FLOAT
    return pixels, 2 * max(len(asked_images(jobs)) for jobs in groups) * pixels


def committee_bytes(groups: Sequence[Sequence[Job]], networks: Mapping[str, Network]) -> int:
    """Return what a GPU holds that has the whole committee and works on one group: all weights; images, moments, gradients
    and what the step makes meanwhile; views and gradients; and the largest pass of an expert."""
    largest = largest_asked(groups)
    pixels, asked = group_bytes(groups, next(iter(networks.values())).image_size)
    held = sum(weight_bytes(networks[name])[0] for name in largest)
    return (
        held + 8 * pixels + asked + max(vote_cost(networks[name], *call).peak_bytes for name, call in largest.items())
    )


def workers_per_gpu(gpus_per_actor: float | None) -> int:
    """Return how many workers with the whole committee share a GPU."""
    return int(1 / gpus_per_actor + 1e-9) if gpus_per_actor and gpus_per_actor < 1 else 1


def fits(needed: int, memory: int) -> bool:
    """Return whether a GPU with so many bytes of memory holds what is needed, and what CUDA and cuDNN take besides."""
    return needed <= FITTING * memory
