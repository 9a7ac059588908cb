"""One group of synthesis jobs as a unit of work that any process can take up, checkpoint and finish."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from cvdd_ray.core.committee import Committee
from cvdd_ray.core.synthesis import Job, SynthesisSettings, SynthesisState, distill_group
from cvdd_ray.data.states import read_state, write_state
from cvdd_ray.data.storage import Store


@dataclass(frozen=True)
class VoterSettings:
    """What a voter needs besides its weights: r_bn, and the multiplier of the first BatchNorm layer's term."""

    bn_weight: float
    first_bn_multiplier: float


@dataclass(frozen=True)
class GroupTask:
    """Jobs of one group, their starting images (J, B, C, H, W; float32, normalised), and where checkpoints go."""

    jobs: tuple[Job, ...]
    start_JBCHW: np.ndarray
    settings: SynthesisSettings
    checkpoint: str


def encode_state(state: SynthesisState) -> bytes:
    """Return a synthesis state as safetensors bytes."""
    tensors = {
        "images": state.images_JBCHW,
        "first_moment": state.first_moment_JBCHW,
        "second_moment": state.second_moment_JBCHW,
    }
    return write_state(tensors, {"iteration": state.iteration, "trace": state.trace})


def decode_state(data: bytes) -> SynthesisState:
    """Return the state in safetensors bytes.  Raises ArtifactError when they are damaged."""
    tensors, about = read_state(data, "a synthesis checkpoint is damaged; remove the stage's folder `partial`")
    trace = [tuple(row) for row in about["trace"]]
    moments = tensors["first_moment"], tensors["second_moment"]
    return SynthesisState(tensors["images"], *moments, about["iteration"], trace)


def run_group(
    committee: Committee, task: GroupTask, store: Store, device: torch.device, report: Callable[[dict], None]
) -> bytes:
    """Finish a group, from its checkpoint if there is one, and return its final state as bytes.

    `report` gets {"done": share of the iterations, "experts": {name: (cross-entropy, BN term)}} about once per percent.
    """
    if store.exists(task.checkpoint):
        state = decode_state(store.read(task.checkpoint))
    else:
        state = SynthesisState.start(torch.from_numpy(np.array(task.start_JBCHW)))
    state = replace(
        state,
        images_JBCHW=state.images_JBCHW.to(device),
        first_moment_JBCHW=state.first_moment_JBCHW.to(device),
        second_moment_JBCHW=state.second_moment_JBCHW.to(device),
    )
    iterations = task.settings.iterations
    every = max(1, iterations // 100)

    def on_progress(state: SynthesisState) -> None:
        if state.iteration % every == 0 or state.iteration == iterations:
            latest = {name: (ce, bn) for _, _, name, ce, bn in state.trace[-4 * len(task.jobs) :]}
            report({"done": state.iteration / iterations, "experts": latest})

    def on_checkpoint(state: SynthesisState) -> None:
        store.write(task.checkpoint, encode_state(state))

    final = distill_group(
        committee, task.jobs, state, task.settings, on_progress=on_progress, on_checkpoint=on_checkpoint
    )
    nothing = torch.empty(0)  # the moments have done their work
    return encode_state(replace(final, first_moment_JBCHW=nothing, second_moment_JBCHW=nothing))
