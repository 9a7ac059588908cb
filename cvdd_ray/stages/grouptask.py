"""One group of synthesis jobs as a unit of work that any process can take up, checkpoint and finish.

Only small things pass through the driver: a task names its starting images, a result names what was written.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import torch

from cvdd_ray.core.committee import Committee
from cvdd_ray.core.keys import key
from cvdd_ray.core.patches import noise_image
from cvdd_ray.core.precision import Precision
from cvdd_ray.core.statistics import Matching
from cvdd_ray.core.synthesis import Job, SynthesisSettings, SynthesisState, distill_group, final_losses
from cvdd_ray.data.datasets import DatasetInfo, denormalize, normalize
from cvdd_ray.data.imagesets import ImageSet, encode_jpeg75, encode_png, image_table, read_image_set
from cvdd_ray.data.shards import write_piece
from cvdd_ray.data.states import read_state, write_state
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError

PARITY_JPEG = "jpeg75_trunc"
REPORT_S = 0.5  # between two reports of a group
COMPILE_S = 3600.0  # allowed for compiling an iteration's votes
MEMORY = "memory/"  # of an expert's statistics, in a checkpoint


@dataclass(frozen=True)
class VoterSettings:
    """What a voter needs besides its weights: r_bn, the multiplier of the first layer's term, how more statistics than
    BatchNorm's are matched, if they are, in which arithmetic it votes, and whether votes are compiled."""

    bn_weight: float
    first_bn_multiplier: float
    matching: Matching | None = None
    precision: Precision = "float32"
    compile: bool = False

    def patience_s(self, hung_s: float) -> float:
        """Return how long an answer may take before its worker is taken to hang: longer where it may have to be compiled."""
        return hung_s + COMPILE_S if self.compile else hung_s


def in_order(images_SLCHW: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return a job's images (B, C, H, W), class after class, of those of every image index."""
    return torch.stack(list(images_SLCHW), 1).flatten(0, 1)


@dataclass(frozen=True)
class StoredStarts:
    """Starting images that lie in the store: files of consecutive image indices, `indices_per_file` each, rows by index
    and then class."""

    files: tuple[str, ...]
    indices_per_file: int
    num_classes: int
    info: DatasetInfo

    def of_job(self, job: Job, store: Store) -> torch.Tensor:
        """Return the job's starting images (B, C, H, W), normalised float32."""
        return in_order([self._of_index(job.image_index + k, job.labels, store) for k in range(job.span)])

    def _of_index(self, image_index: int, labels: Sequence[int], store: Store) -> torch.Tensor:
        file, index = divmod(image_index, self.indices_per_file)
        rows = slice(index * self.num_classes + labels[0], index * self.num_classes + labels[-1] + 1)
        name = self.files[file]
        return normalize(
            torch.from_numpy(read_image_set(store.read(name), store.display(name), rows).images_NCHW), self.info
        )


@dataclass(frozen=True)
class NoiseStarts:
    """Starting images drawn from N(0, 1) in normalised space."""

    seed: int
    size: int

    def of_job(self, job: Job, store: Store) -> torch.Tensor:
        """Return the job's starting images (B, C, H, W), float32."""
        return in_order([
            torch.stack([noise_image(self.seed, job.image_index + k, label, self.size) for label in job.labels])
            for k in range(job.span)
        ])  # fmt: skip


@dataclass(frozen=True)
class GroupTask:
    """Jobs of one group (consecutive classes each), where their starting images are, where checkpoints go, and where the
    finished images: a piece (data/shards.py) with a record batch per image index of every job, in order. `image_format` as
    in the configuration."""

    jobs: tuple[Job, ...]
    starts: StoredStarts | NoiseStarts
    settings: SynthesisSettings
    info: DatasetInfo
    image_format: str
    checkpoint: str
    piece: str


def encode_state(state: SynthesisState) -> bytes:
    """Return a synthesis state as safetensors bytes."""
    tensors = {
        "images": state.images_JBCHW,
        "first_moment": state.first_moment_JBCHW,
        "second_moment": state.second_moment_JBCHW,
        **{MEMORY + name: rows for name, rows in state.memory.items()},
    }
    return write_state(tensors, {"iteration": state.iteration, "trace": state.trace})


def decode_state(data: bytes) -> SynthesisState:
    """Return the state in safetensors bytes.  Raises ArtifactError when they are damaged."""
    tensors, about = read_state(data, "a synthesis checkpoint is damaged")
    trace = [tuple(row) for row in about["trace"]]
    moments = tensors["first_moment"], tensors["second_moment"]
    memory = {name.removeprefix(MEMORY): rows for name, rows in tensors.items() if name.startswith(MEMORY)}
    return SynthesisState(tensors["images"], *moments, about["iteration"], trace, memory)


def kept_state(task: GroupTask, store: Store, report: Callable[[dict], None]) -> SynthesisState | None:
    """Return the state in a group's checkpoint; None where there is none, and where it is damaged, which is reported."""
    if not store.exists(task.checkpoint):
        return None
    data = store.read(task.checkpoint)
    try:
        return decode_state(data)
    except ArtifactError as error:
        report({"say": f"{store.display(task.checkpoint)}: {error}; the group begins again"})
        return None


class StoppedError(Exception):
    """A group has stopped because it was asked to; its checkpoint is written."""


class Notice:
    """What the groups at work in a process are asked for: a checkpoint now, and to stop after it."""

    def __init__(self):
        self.asked, self.stopping = 0, False

    def keep(self) -> None:
        self.asked += 1

    def stop(self) -> None:
        self.stopping = True
        self.keep()


def run_group(
    committee: Committee, task: GroupTask, store: Store, device: torch.device, report: Callable[[dict], None],
    notice: Notice,
) -> bytes:  # fmt: skip
    """Finish a group, from its checkpoint if there is a sound one, write its piece, and return as JSON the piece's
    `sha256` and the `trace`: rows (iteration, image index, chunk, expert, cross-entropy, BN term).

    `report` gets {"done": share of the iterations, "experts": {name: (cross-entropy, BN term)}} after the first iteration,
    the last, and every REPORT_S between them, and {"say": text} for a checkpoint that is damaged; the group then begins
    again.  Raises StoppedError where the notice asks to stop.
    """
    state = kept_state(task, store, report)
    if state is None:
        state = SynthesisState.start(torch.stack([task.starts.of_job(job, store) for job in task.jobs]))
    state = replace(
        state,
        images_JBCHW=state.images_JBCHW.to(device),
        first_moment_JBCHW=state.first_moment_JBCHW.to(device),
        second_moment_JBCHW=state.second_moment_JBCHW.to(device),
        memory={name: rows.to(device) for name, rows in state.memory.items()},
    )
    iterations = task.settings.iterations
    noticed, reported = 0 if notice.stopping else notice.asked, -math.inf

    def on_progress(state: SynthesisState) -> None:
        nonlocal noticed, reported
        if state.iteration == iterations or time.monotonic() - reported >= REPORT_S:
            reported = time.monotonic()
            latest = {name: (ce, bn) for _, _, name, ce, bn in state.trace[-4 * len(task.jobs) :]}
            report({"done": state.iteration / iterations, "experts": latest})
        if noticed != notice.asked and state.iteration < iterations:
            noticed = notice.asked
            on_checkpoint(state)
            if notice.stopping:
                raise StoppedError

    def on_checkpoint(state: SynthesisState) -> None:
        store.write(task.checkpoint, encode_state(state))

    final = distill_group(
        committee, task.jobs, state, task.settings, on_progress=on_progress, on_checkpoint=on_checkpoint
    )
    written = write_piece(store, task.piece, job_tables(task, final))
    trace = [(t, task.jobs[j].image_index, task.jobs[j].chunk, name, ce, bn) for t, j, name, ce, bn in final.trace]
    return json.dumps({"sha256": written.sha256, "trace": trace}).encode()


def job_tables(task: GroupTask, final: SynthesisState) -> list[pa.Table]:
    """Return the finished images of every job of a group, see `job_images`, with their final losses."""
    losses = final_losses(final, task.jobs)
    tables = []
    for job, images_BCHW, *terms in zip(task.jobs, final.images_JBCHW.cpu(), *losses, strict=True):
        tables += job_images(job, images_BCHW, task.info, task.image_format, task.settings.seed, *terms)
    return tables


def job_images(
    job: Job, images_BCHW: torch.Tensor, info: DatasetInfo, image_format: str, seed: int, cross_entropy: float, bn_term: float
) -> list[pa.Table]:  # fmt: skip
    """Return the finished images of a job, an image index each, with what is known of them: chunk, voters, their weights, the
    seed of the job's first views, final losses."""
    tables, pixels_BCHW = [], quantize(images_BCHW, info, image_format).numpy()
    job_seed = key(seed, "synthesis-view", job.image_index, job.chunk, 0)
    encode = encode_jpeg75 if image_format == PARITY_JPEG else encode_png
    for k in range(job.span):
        known = {
            "image_index": (job.image_index + k, pa.int32()),
            "chunk": (job.chunk, pa.int32()),
            "voters": (list(job.voters), pa.list_(pa.string())),
            "voter_weights": (list(job.weights), pa.list_(pa.float32())),
            "job_seed": (job_seed, pa.int64()),
            "cross_entropy": (cross_entropy, pa.float32()),
            "bn_term": (bn_term, pa.float32()),
        }
        columns = {name: pa.array([value] * len(job.labels), kind) for name, (value, kind) in known.items()}
        own = pixels_BCHW[k :: job.span]
        images = ImageSet(own, np.array(job.labels, np.int64), (), columns)
        tables.append(image_table(images, [encode(image) for image in own]))
    return tables


def quantize(images_BCHW: torch.Tensor, info: DatasetInfo, image_format: str) -> torch.Tensor:
    """Return uint8 pixels: rounded for PNG, truncated for the parity JPEG (spec 5.7)."""
    if image_format != PARITY_JPEG:
        return denormalize(images_BCHW, info)
    mean, std = (torch.tensor(values)[:, None, None] for values in (info.mean, info.std))
    return ((images_BCHW * std + mean).clamp(0, 1) * 255).to(torch.uint8)
