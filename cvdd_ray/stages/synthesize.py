"""synthesize (recover): experts vote on every image, pair by pair (spec section 5), or trajectories are matched (9.6)."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cvdd_ray.config import RunConfig
from cvdd_ray.core.statistics import Matching
from cvdd_ray.core.synthesis import Job, SynthesisSettings
from cvdd_ray.data.artifacts import Written
from cvdd_ray.data.datasets import pixel_bounds
from cvdd_ray.data.shards import assemble_shard, per_shard, shard_files
from cvdd_ray.fields import Section
from cvdd_ray.stages.calibrate import group_size, job_groups
from cvdd_ray.stages.context import Run, StageWork
from cvdd_ray.stages.grouptask import GroupTask, NoiseStarts, StoredStarts, VoterSettings
from cvdd_ray.stages.initialize import START
from cvdd_ray.stages.matching import RATE, matched
from cvdd_ray.stages.pretrain import load_experts
from cvdd_ray.stages.statistics import with_statistics
from cvdd_ray.stages.trajectories import trajectories
from cvdd_ray.stages.votes import load_priors, vote_of_image

DISTILLED, TRACE = "distilled", "trace.json"


def synthesize(run: Run, ipc: int) -> None:
    """Make `synthesize/ipc<n>`: distilled.arrow, or shards of it (images, voters, weights, final losses), and trace.json (loss
    curves).

    Raises ArtifactError when experts, priors or starting images are missing, ConfigError for an impossible vote or network.
    """
    c = run.config
    settings, inputs, make = {"committee": _by_votes, "trajectories": _by_trajectories}[c.synthesize.method](run, ipc)
    settings = {
        "ipc": ipc,
        "data.flip": c.data.flip,
        "initialize.method": c.initialize.method,
        **settings,
    }
    plan = run.plan(f"synthesize/ipc{ipc}", settings, inputs)
    with run.stage(plan, f"synthesize ipc {ipc}") as work:
        if work is None:
            return
        files, content, trace, facts = make(work)
        files = {**files, TRACE: json.dumps(trace).encode()}
        work.commit(files, images=ipc * len(run.classes), content={DISTILLED: content}, **facts)


Made = tuple[dict[str, Written], str, list, dict[str, Any]]
"""Files to commit, content hash of the images, trace, facts of the manifest."""


def _by_votes(run: Run, ipc: int) -> tuple[dict, dict, Callable[[StageWork], Made]]:
    """Return the settings and inputs that images by votes of the committee depend on, and what makes them."""
    specs, hashes = load_experts(run)
    priors, prior_hash = load_priors(run)
    initialized = run.require(f"initialize/ipc{ipc}", "initialize")
    specs, statistics = with_statistics(run, specs, hashes)
    jobs = image_jobs(run, ipc, lambda i: vote_of_image(run, priors, ipc, i))
    size = group_size(run, f"ipc{ipc}", [jobs], specs, lambda: voter_settings(run))

    def make(work: StageWork) -> Made:
        iterations = run.config.synthesize.iterations
        found = distill(run, work, {DISTILLED: jobs}, ipc, iterations, specs, size)[DISTILLED]
        return *found, {"voters": sorted({"+".join(job.voters) for job in jobs})}

    settings = {"synthesize": resolved_synthesis(run, size), "voting": run.config.voting.counted()}
    return settings, {**hashes, **statistics, "prior": prior_hash, "initialize": initialized.content}, make


def _by_trajectories(run: Run, ipc: int) -> tuple[dict, dict, Callable[[StageWork], Made]]:
    """Return the settings and inputs that images by matched trajectories depend on, and what makes them."""
    initialized = run.require(f"initialize/ipc{ipc}", "initialize")
    made = trajectories(run)
    about = {"kind": "distilled", "config": recorded_config(run.config, run.config.synthesize.planned_jobs_per_group)}

    def make(work: StageWork) -> Made:
        *found, rate = matched(run, work, ipc, DISTILLED, starting_images(run, ipc), made, about)
        return *found, {"voters": [], RATE: rate}

    c = run.config
    known = c.synthesize.model_dump(include=c.synthesize.OF_TRAJECTORIES - {"checkpoint_every"})
    inputs = {made.stage: made.content, "initialize": initialized.content}
    return {"synthesize": known, "committee.width": c.committee.width}, inputs, make


def resolved_synthesis(run: Run, jobs_per_group: int) -> dict:
    """Return the synthesis settings that decide the result, with the dataset's values where none are given."""
    s = run.config.synthesize
    resolved = {
        "roll": run.info.roll if s.roll is None else s.roll,
        "class_chunk": s.class_chunk or run.info.class_chunk,
        "jobs_per_group": jobs_per_group,
    }
    return {**s.counted(exclude={"checkpoint_every"}), **resolved}


def image_jobs(run: Run, ipc: int, vote: Callable[[int], tuple[Sequence[str], Sequence[float]]]) -> list[Job]:
    """Return the jobs of a set: every image index (or all together) times every chunk of classes, chunk by chunk."""
    num_classes, s = len(run.classes), run.config.synthesize
    size = s.class_chunk or run.info.class_chunk
    span = ipc if s.class_together else 1
    votes = {i: vote(i) for i in range(0, ipc, span)}
    chunks = [tuple(range(first, min(first + size, num_classes))) for first in range(0, num_classes, size)]
    return [
        Job(i, chunk, labels, tuple(voters), tuple(weights), span, run.config.voting.turns and len(voters) > 1)
        for chunk, labels in enumerate(chunks)
        for i, (voters, weights) in votes.items()
    ]


def synthesis_settings(run: Run, iterations: int) -> SynthesisSettings:
    """Return the loop's numbers for this run."""
    s, info = run.config.synthesize, run.info
    low, high = pixel_bounds(info)
    return SynthesisSettings(
        seed=run.config.seed, iterations=iterations, lr=s.lr, betas=s.betas, augment=s.augment, flip=run.config.data.flip,
        crop_scale=s.crop_scale, roll=info.roll if s.roll is None else s.roll, low_C=tuple(low.tolist()),
        high_C=tuple(high.tolist()), checkpoint_every=s.checkpoint_every, crop_schedule=s.crop_schedule,
        crop_milestone=s.crop_milestone, roll_both_ways=s.roll_both_ways,
        pad=s.pad if s.crop == "pad" else None, densification=s.densification,
        densification_temperature=s.densification_temperature, has_memory=s.matching.convolutions,
    )  # fmt: skip


def voter_settings(run: Run) -> VoterSettings:
    """Return what voters need besides their weights and statistics."""
    s = run.config.synthesize
    m = s.matching
    tile = m.tile(run.info.image_size)
    matching = Matching(tile, m.momentum, m.drop_rate, m.class_share) if m.convolutions else None
    return VoterSettings(s.bn_weight, s.first_bn_multiplier, matching, s.precision, s.compile)


def distill(
    run: Run, work: StageWork, sets: Mapping[str, Sequence[Job]], ipc: int, iterations: int, specs, jobs_per_group: int, *,
    doing: str = "",
) -> dict[str, tuple[dict[str, Written], str, list]]:  # fmt: skip
    """Distil several sets of jobs at once (one for synthesize, one per expert for prior) in groups; return for each the files to
    commit, the content hash of the images and the trace: rows (iteration, image index, chunk, expert, cross-entropy, BN
    term)."""
    settings, starts = synthesis_settings(run, iterations), starting_images(run, ipc)
    groups = {
        f"{base}-group{g:05d}": (base, group)
        for base, jobs in sets.items()
        for g, group in enumerate(job_groups(jobs, jobs_per_group))
    }
    tasks = {
        title: GroupTask(
            group,
            starts,
            settings,
            run.info,
            run.config.synthesize.image_format,
            work.checkpoint(title),
            work.piece(title),
        )
        for title, (_, group) in groups.items()
    }
    receipts = work.distill(tasks, specs, voter_settings(run), doing=doing)
    about = {"kind": "distilled", "config": recorded_config(run.config, jobs_per_group)}
    result = {}
    for base in sets:
        own = {title: group for title, (owner, group) in groups.items() if owner == base}
        found = sorted(
            (index, chunk, (work.piece(title), batch))
            for title, group in own.items()
            for batch, (index, chunk) in enumerate((j.image_index + k, j.chunk) for j in group for k in range(j.span))
        )
        where = {i: [place for index, _, place in found if index == i] for i in range(ipc)}
        trace = [tuple(row) for title in own for row in json.loads(receipts[title])["trace"]]
        result[base] = (*work.image_set(base, ipc, assemble_shard, (where,), about), trace)
    return result


def recorded_config(c: RunConfig, jobs_per_group: int) -> dict:
    """Return the configuration as files of images record it: with the size of groups that were made, without where it ran and
    where things lie, so that they have equal bytes everywhere, and without settings that came later and are not used."""
    exclude: dict = {name: section.unused() for name, section in c if isinstance(section, Section)}
    exclude["relabel"] -= set(c.relabel.STORAGE)  # these were always recorded
    exclude["data"] |= {"path"}
    exclude["committee"] |= {"weights"}
    recorded = c.model_dump(mode="json", exclude={**exclude, "runtime": True, "storage": True})
    recorded["synthesize"]["jobs_per_group"] = jobs_per_group
    return recorded


def starting_images(run: Run, ipc: int) -> StoredStarts | NoiseStarts:
    """Return where the starting images of every job come from; stored ones are verified here, once.

    Raises ArtifactError when they are missing or altered.
    """
    if run.config.initialize.method == "noise":
        return NoiseStarts(run.config.seed, run.info.image_size)
    manifest = run.require(f"initialize/ipc{ipc}", "initialize")
    files = [run.artifacts.verify(manifest, name) for name in shard_files(manifest.files, START)]
    return StoredStarts(tuple(files), per_shard(run.info.index_bytes), len(run.classes), run.info)
