"""synthesize (recover): experts vote on every image, pair by pair (spec section 5)."""

import json
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import torch

from cvdd_ray.core.keys import key
from cvdd_ray.core.synthesis import Job, SynthesisSettings, final_losses
from cvdd_ray.data.datasets import denormalize, normalize, pixel_bounds
from cvdd_ray.data.imagesets import ImageSet, encode_jpeg75, write_image_set
from cvdd_ray.stages.context import Run, StageWork
from cvdd_ray.stages.grouptask import GroupTask, VoterSettings, decode_state
from cvdd_ray.stages.initialize import START, image_set, load_image_set, noise_images
from cvdd_ray.stages.pretrain import load_experts
from cvdd_ray.stages.votes import load_priors, vote_of_image

DISTILLED, TRACE = "distilled.arrow", "trace.json"


def synthesize(run: Run, ipc: int) -> None:
    """Make `synthesize/ipc<n>`: distilled.arrow (images, voters, weights, final losses) and trace.json (loss curves).

    Raises ArtifactError when experts, priors or starting images are missing, ConfigError for an impossible vote.
    """
    c = run.config
    specs, hashes = load_experts(run)
    priors, prior_hash = load_priors(run)
    initialized = run.require(f"initialize/ipc{ipc}", "initialize")
    settings = {
        "ipc": ipc,
        "synthesize": resolved_synthesis(run),
        "voting": c.voting.model_dump(),
        "data.flip": c.data.flip,
        "initialize.method": c.initialize.method,
    }
    inputs = {**hashes, "prior": prior_hash, "initialize": initialized.content}
    plan = run.plan(f"synthesize/ipc{ipc}", settings, inputs)
    with run.stage(plan, f"synthesize ipc {ipc}") as work:
        if work is None:
            return
        jobs = image_jobs(run, ipc, lambda i: vote_of_image(run, priors, ipc, i))
        images, trace = distill(run, work, {"": jobs}, ipc, c.synthesize.iterations, specs)[""]
        encoded = [encode_jpeg75(image) for image in images.images_NCHW] if is_jpeg(run) else None
        files = {DISTILLED: write_image_set(images, encoded), TRACE: json.dumps(trace).encode()}
        work.commit(files, images=len(images), voters=sorted({"+".join(job.voters) for job in jobs}))


def resolved_synthesis(run: Run) -> dict:
    """Return the synthesis settings that decide the result, with the dataset's values where none are given."""
    s = run.config.synthesize
    resolved = {
        "roll": run.info.roll if s.roll is None else s.roll,
        "class_chunk": s.class_chunk or run.info.class_chunk,
    }
    return {**s.model_dump(exclude={"checkpoint_every"}), **resolved}


def image_jobs(run: Run, ipc: int, vote: Callable[[int], tuple[Sequence[str], Sequence[float]]]) -> list[Job]:
    """Return the jobs of a set: every image index times every chunk of classes, chunk by chunk."""
    num_classes = len(run.classes)
    size = run.config.synthesize.class_chunk or run.info.class_chunk
    votes = [vote(i) for i in range(ipc)]
    return [
        Job(i, chunk, tuple(range(first, min(first + size, num_classes))), tuple(votes[i][0]), tuple(votes[i][1]))
        for chunk, first in enumerate(range(0, num_classes, size))
        for i in range(ipc)
    ]


def job_groups(jobs: Sequence[Job], jobs_per_group: int) -> list[tuple[Job, ...]]:
    """Cut jobs into groups of one chunk each; the cut depends on config and job ids alone, never on timing."""
    groups = []
    for chunk in sorted({job.chunk for job in jobs}):
        members = [job for job in jobs if job.chunk == chunk]
        groups += [tuple(members[k : k + jobs_per_group]) for k in range(0, len(members), jobs_per_group)]
    return groups


def synthesis_settings(run: Run, iterations: int) -> SynthesisSettings:
    """Return the loop's numbers for this run."""
    s, info = run.config.synthesize, run.info
    low, high = pixel_bounds(info)
    return SynthesisSettings(
        seed=run.config.seed, iterations=iterations, lr=s.lr, betas=s.betas, augment=s.augment, flip=run.config.data.flip,
        crop_scale=s.crop_scale, roll=info.roll if s.roll is None else s.roll, low_C=tuple(low.tolist()),
        high_C=tuple(high.tolist()), checkpoint_every=s.checkpoint_every,
    )  # fmt: skip


def distill(
    run: Run, work: StageWork, sets: Mapping[str, Sequence[Job]], ipc: int, iterations: int, specs, *, doing: str = ""
) -> dict[str, tuple[ImageSet, list]]:
    """Distil several sets of jobs at once (one for synthesize, one per expert for prior); return for each the image set
    and its trace: rows (iteration, image index, chunk, expert, cross-entropy, BN term)."""
    start_IKCSS = starting_images(run, ipc)
    settings = synthesis_settings(run, iterations)
    groups = {
        f"{name or 'set'}-group{g:05d}": (name, group)
        for name, jobs in sets.items()
        for g, group in enumerate(job_groups(jobs, run.config.synthesize.jobs_per_group))
    }
    tasks = {
        title: GroupTask(
            group,
            np.stack([start_IKCSS[job.image_index, list(job.labels)].numpy() for job in group]),
            settings,
            work.checkpoint(title),
        )
        for title, (_, group) in groups.items()
    }
    voter = VoterSettings(run.config.synthesize.bn_weight, run.config.synthesize.first_bn_multiplier)
    states = work.distill(tasks, specs, voter, doing=doing)
    return {
        name: assemble(run, ipc, [(group, decode_state(states[t])) for t, (owner, group) in groups.items() if owner == name])
        for name in sets
    }  # fmt: skip


def starting_images(run: Run, ipc: int) -> torch.Tensor:
    """Return the starting images (image index, class, C, S, S), normalised float32."""
    num_classes = len(run.classes)
    if run.config.initialize.method == "noise":
        noise = [noise_images(run.config.seed, ipc, label, run.info) for label in range(num_classes)]
        return torch.stack(noise, 1)
    stored = load_image_set(run, f"initialize/ipc{ipc}", START, "initialize")
    return normalize(torch.from_numpy(stored.images_NCHW), run.info).unflatten(0, (ipc, num_classes))


def assemble(run: Run, ipc: int, finished) -> tuple[ImageSet, list]:
    """Return the image set and trace of finished groups [(jobs, state)], rows by image index and then class."""
    num_classes, side = len(run.classes), run.info.image_size
    pixels = np.zeros((ipc, num_classes, 3, side, side), np.uint8)
    about: dict[str, np.ndarray] = {
        name: np.empty((ipc, num_classes), object)
        for name in ("chunk", "voters", "voter_weights", "job_seed", "cross_entropy", "bn_term")
    }
    trace = []
    for jobs, state in finished:
        cross_entropy, bn_term = final_losses(state, jobs)
        trace += [(t, jobs[j].image_index, jobs[j].chunk, name, ce, bn) for t, j, name, ce, bn in state.trace]
        for j, job in enumerate(jobs):
            pixels[job.image_index, list(job.labels)] = quantize(run, state.images_JBCHW[j]).numpy()
            job_seed = key(run.config.seed, "synthesis-view", job.image_index, job.chunk, 0)  # of its first views
            values = (job.chunk, list(job.voters), list(job.weights), job_seed, cross_entropy[j], bn_term[j])
            for label in job.labels:
                for name, value in zip(about, values, strict=True):
                    about[name][job.image_index, label] = value
    types = (pa.int32(), pa.list_(pa.string()), pa.list_(pa.float32()), pa.int64(), pa.float32(), pa.float32())
    columns = {name: pa.array(about[name].ravel().tolist(), kind) for name, kind in zip(about, types, strict=True)}
    config = run.config.model_dump(mode="json", exclude={"runtime", "storage"})
    return image_set(run, pixels, {"kind": "distilled", "config": config}, columns), trace


def quantize(run: Run, images_BCSS: torch.Tensor) -> torch.Tensor:
    """Return uint8 pixels: rounded for PNG, truncated for the parity JPEG (spec 5.7)."""
    if not is_jpeg(run):
        return denormalize(images_BCSS, run.info)
    mean, std = (torch.tensor(values)[:, None, None] for values in (run.info.mean, run.info.std))
    return ((images_BCSS * std + mean).clamp(0, 1) * 255).to(torch.uint8)


def is_jpeg(run: Run) -> bool:
    return run.config.synthesize.image_format == "jpeg75_trunc"
