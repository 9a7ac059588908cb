"""Synthesis by trajectories (MTT, spec 9.6): the whole set as one piece of work that can be checkpointed and taken up again."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from cvdd_ray.core.experts import work_device
from cvdd_ray.core.models import build_seeded
from cvdd_ray.core.siamese import operations
from cvdd_ray.core.synthesis import Job
from cvdd_ray.core.trajectories import FlatNetwork, TrajectorySettings, TrajectoryState, match_trajectories
from cvdd_ray.data.artifacts import Manifest, Written
from cvdd_ray.data.datasets import DatasetInfo, pixel_bounds
from cvdd_ray.data.shards import assemble_shard, write_piece
from cvdd_ray.data.states import read_state, write_state
from cvdd_ray.data.storage import Store
from cvdd_ray.data.trajectories import Trajectories, trajectory_files
from cvdd_ray.errors import ArtifactError
from cvdd_ray.stages.context import Run, StageWork
from cvdd_ray.stages.grouptask import NoiseStarts, StoredStarts, job_images

RATE = "student_lr"  # the learned rate, among the facts of the manifest


@dataclass(frozen=True)
class MatchingTask:
    """A whole set: its images as one job without voters, where they start, the files of trajectories with their sha256, the
    network, at which learning rate the steps start, the loop's numbers; where checkpoints go and the finished piece."""

    job: Job
    starts: StoredStarts | NoiseStarts
    trajectories: Mapping[str, str]
    network: str
    width: float
    lr_start: float
    settings: TrajectorySettings
    info: DatasetInfo
    image_format: str
    checkpoint: str
    piece: str


def matched(
    run: Run, work: StageWork, ipc: int, base: str, starts: StoredStarts | NoiseStarts, made: Manifest, about: Mapping
) -> tuple[dict[str, Written], str, list, float]:
    """Distil the set of `ipc` images per class along the trajectories that were `made`; return the files to commit, the
    content hash of the images, the trace (rows (iteration, 0, 0, network, matching loss, learning rate)) and the learned
    rate."""
    c, t = run.config, run.config.synthesize.trajectories
    job = Job(0, 0, tuple(range(len(run.classes))), (), (), ipc)
    title = f"{base}-set"
    task = MatchingTask(
        job, starts, trajectory_files(run.artifacts, made), t.network, c.committee.width, t.lr_start,
        trajectory_settings(run), run.info, c.synthesize.image_format, work.checkpoint(title), work.piece(title),
    )  # fmt: skip

    def piece(name: str, receipt: bytes) -> Written:
        return Written(task.piece, json.loads(receipt)["sha256"])

    doing = f"{c.synthesize.iterations} iterations of {t.steps} steps"
    (receipt,) = work.each(run_matching, {title: task}, (run.store,), doing=doing, written=piece).values()
    found = json.loads(receipt)
    where = {i: [(task.piece, i)] for i in range(ipc)}
    trace = [(iteration, 0, 0, t.network, loss, lr) for iteration, loss, lr in found["trace"]]
    return *work.image_set(base, ipc, assemble_shard, (where,), about), trace, found[RATE]


def trajectory_settings(run: Run) -> TrajectorySettings:
    """Return the loop's numbers for this run."""
    s, t = run.config.synthesize, run.config.synthesize.trajectories
    low, high = pixel_bounds(run.info)
    return TrajectorySettings(
        seed=run.config.seed, iterations=s.iterations, lr=s.lr, lr_of_lr=t.lr_of_lr, momentum=t.momentum,
        num_experts=t.experts, max_start=t.max_start, target_epochs=t.target_epochs, steps=t.steps,
        step_images=t.step_images, operations=operations(run.config.data.flip), low_C=tuple(low.tolist()),
        high_C=tuple(high.tolist()), checkpoint_every=s.checkpoint_every,
    )  # fmt: skip


def run_matching(task: MatchingTask, store: Store, report: Callable[[dict], None]) -> bytes:
    """Finish a set, from its checkpoint if there is a sound one, write its piece, and return as JSON the piece's `sha256`, the
    `trace` and the learned rate."""
    device, info, s = work_device(), task.info, task.settings
    model = build_seeded(
        task.network, info.num_classes, info.image_size, width=task.width, seed=0
    )  # parameters are given
    network = FlatNetwork(model.to(device), task.network)
    state = kept_state(task, store, report)
    if state is None:
        state = TrajectoryState.start(task.starts.of_job(task.job, store), task.lr_start)
    every = max(1, s.iterations // 100)

    def on_progress(state: TrajectoryState) -> None:
        if state.iteration % every == 0 or state.iteration == s.iterations:
            _, loss, _ = state.trace[-1]
            report({"done": state.iteration / s.iterations, "note": f"loss {loss:.3f} learning rate {state.lr:.4g}"})

    final = match_trajectories(
        network.loss, torch.tensor(task.job.targets, device=device), moved_to(state, device), s,
        Trajectories(store, task.trajectories), on_progress=on_progress,
        on_checkpoint=lambda state: store.write(task.checkpoint, encode_state(state)),
    )  # fmt: skip
    tables = job_images(task.job, final.images_NCSS.cpu(), info, task.image_format, s.seed, math.nan, math.nan)
    written = write_piece(store, task.piece, tables)
    return json.dumps({"sha256": written.sha256, "trace": final.trace, RATE: final.lr}).encode()


def moved_to(state: TrajectoryState, device: torch.device) -> TrajectoryState:
    """Return a state on a device."""
    tensors = {name: getattr(state, name).to(device) for name in ("images_NCSS", "velocity_NCSS")}
    return TrajectoryState(**{**vars(state), **tensors})


def encode_state(state: TrajectoryState) -> bytes:
    """Return a state as safetensors bytes."""
    numbers = {name: getattr(state, name) for name in ("lr", "lr_velocity", "iteration", "trace")}
    return write_state({"images": state.images_NCSS, "velocity": state.velocity_NCSS}, numbers)


def kept_state(task: MatchingTask, store: Store, report: Callable[[dict], None]) -> TrajectoryState | None:
    """Return the state in a set's checkpoint; None where there is none, and where it is damaged, which is reported."""
    if not store.exists(task.checkpoint):
        return None
    try:
        tensors, about = read_state(store.read(task.checkpoint), "a synthesis checkpoint is damaged")
    except ArtifactError as error:
        report({"say": f"{store.display(task.checkpoint)}: {error}; the set begins again"})
        return None
    about["trace"] = tuple(tuple(row) for row in about["trace"])
    return TrajectoryState(tensors["images"], tensors["velocity"], **about)
