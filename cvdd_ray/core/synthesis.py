"""The synthesis loop over one group of jobs (spec section 5).

A job is (image index i, class chunk c): one image per class of the chunk, or images i, i+1 ... of every class, optimised
together, its voters fixed. Jobs of a group advance side by side; jobs that share an expert are stacked in that expert's
ballot, with their own statistics.

Legend: J jobs of the group, B images per job, C channels, H W pixels.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor

from cvdd_ray.core.augment import Views, apply_views, draw_views
from cvdd_ray.core.committee import Ballot, Committee
from cvdd_ray.core.keys import generator, key
from cvdd_ray.core.schedules import recover_lr, smallest_area
from cvdd_ray.core.statistics import densification_gradient
from cvdd_ray.errors import NumericsError

VIEW_BLOCK = 64  # views are drawn this many iterations at a time; part of what the bits depend on


@dataclass(frozen=True)
class Job:
    """Image `image_index` of every class in `labels`, or with `span` so many from it on, class after class; `voters` with
    `weights` (sum 1) guide all of them, in every iteration or, if they take turns, one in each (spec 9.4)."""

    image_index: int
    chunk: int
    labels: tuple[int, ...]
    voters: tuple[str, ...]
    weights: tuple[float, ...]
    span: int = 1
    takes_turns: bool = False

    @property
    def num_images(self) -> int:
        return len(self.labels) * self.span

    @property
    def targets(self) -> tuple[int, ...]:
        """The label of every image, in order."""
        return tuple(label for label in self.labels for _ in range(self.span))

    @property
    def turns(self) -> int:
        """Iterations until all voters have been asked."""
        return len(self.voters) if self.takes_turns else 1

    def asked(self, iteration: int) -> dict[str, float]:
        """Return who votes in an iteration, with what weight."""
        if not self.takes_turns:
            return dict(zip(self.voters, self.weights, strict=True))
        return {self.voters[iteration % len(self.voters)]: 1.0}


@dataclass(frozen=True)
class SynthesisSettings:
    """Plain numbers of the loop (`densification` and its temperature: core/statistics.py); `roll` in pixels,
    `low_C`/`high_C` the pixel range in normalised space."""

    seed: int
    iterations: int
    lr: float
    betas: tuple[float, float]
    augment: bool
    flip: bool
    crop_scale: tuple[float, float]
    roll: int
    low_C: tuple[float, ...]
    high_C: tuple[float, ...]
    checkpoint_every: int = 500
    crop_schedule: str = "constant"
    crop_milestone: float = 1.0
    roll_both_ways: bool = False
    pad: int | None = None
    """Crop by moving up to so many pixels, zeros around, instead of a random resized crop."""
    densification: float = 0.0
    densification_temperature: float = 4.0
    has_memory: bool = False
    """Whether experts' statistics have a memory (core/statistics.py)."""

    def scale(self, block: int) -> tuple[float | tuple[float, ...], float]:
        """Return the area range of the crops of one block of views; its low end per view where it changes."""
        low, high = self.crop_scale
        if self.crop_schedule == "constant":
            return low, high
        at = range(block * VIEW_BLOCK, (block + 1) * VIEW_BLOCK)
        course = (self.crop_schedule, low, high)
        return tuple(smallest_area(*course, t, self.iterations, self.crop_milestone) for t in at), high


@dataclass
class SynthesisState:
    """Everything an unfinished group needs to go on: images_JBCHW, both Adam moments, the number of finished
    iterations, `trace`: rows (iteration, job index in the group, expert, cross-entropy, BN term), and the memory_JS of every
    expert that has one."""

    images_JBCHW: Tensor
    first_moment_JBCHW: Tensor
    second_moment_JBCHW: Tensor
    iteration: int = 0
    trace: list[tuple[int, int, str, float, float]] = field(default_factory=list)
    memory: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def start(cls, images_JBCHW: Tensor) -> "SynthesisState":
        return cls(images_JBCHW.clone(), torch.zeros_like(images_JBCHW), torch.zeros_like(images_JBCHW))


@lru_cache(maxsize=256)
def _view_block(
    seed: int, image_index: int, chunk: int, block: int, size: int, augment: bool, flip: bool, roll: int,
    roll_both_ways: bool, low: float | tuple[float, ...], high: float,
    pad: int | None,
) -> Views:  # fmt: skip
    place = generator(seed, "synthesis-view", image_index, chunk, block)
    scale = (torch.tensor(low, dtype=torch.float64) if isinstance(low, tuple) else low, high)
    return draw_views(
        VIEW_BLOCK,
        size,
        place,
        crop=augment,
        flip=flip and augment,
        roll=roll,
        scale=scale,
        roll_both_ways=roll_both_ways,
        pad=pad,
    )


def job_views(jobs: tuple[Job, ...], settings: SynthesisSettings, size: int, iteration: int) -> Views:
    """Return the J views of one iteration, each a pure function of (seed, image index, chunk, iteration).

    One crop, flip and roll serves all images of a job and all of its voters.  Source: spec 5.3, gotcha 10.
    """
    block, row = divmod(iteration, VIEW_BLOCK)
    s, scale = settings, settings.scale(block)
    blocks = [
        _view_block(
            s.seed, job.image_index, job.chunk, block, size, s.augment, s.flip, s.roll, s.roll_both_ways, *scale, s.pad
        )
        for job in jobs
    ]
    return Views(
        torch.stack([views.boxes_N4[row] for views in blocks]),
        torch.stack([views.flips_N[row] for views in blocks]),
        torch.stack([views.rolls_N2[row] for views in blocks]),
    )


def is_traced(iteration: int, iterations: int, turns: int = 1) -> bool:
    """Return whether the losses of this iteration are remembered: about once per percent (a whole round where voters take
    turns), and those of the last one."""
    every = max(1, iterations // (100 * turns))
    return iteration // turns % every == 0 or iteration >= iterations - turns


class _Turn:
    """Who is asked about which jobs in one iteration of a round, with which weights."""

    def __init__(self, jobs: tuple[Job, ...], iteration: int, device: torch.device):
        asked = [job.asked(iteration) for job in jobs]
        self.experts = sorted({name for weights in asked for name in weights})
        self.jobs_of = {name: [j for j, weights in enumerate(asked) if name in weights] for name in self.experts}
        self.weights_of = {
            name: torch.tensor([asked[j][name] for j in self.jobs_of[name]], device=device) for name in self.experts
        }


def distill_group(
    committee: Committee,
    jobs: tuple[Job, ...],
    state: SynthesisState,
    settings: SynthesisSettings,
    *,
    on_progress: Callable[[SynthesisState], None] = lambda state: None,
    on_checkpoint: Callable[[SynthesisState], None] = lambda state: None,
) -> SynthesisState:
    """Advance a group to its last iteration and return its state; images stay inside the pixel range after every step.

    `state` is the start (SynthesisState.start) or a checkpoint; both lead to the same bits. `on_progress` is called
    after every iteration, `on_checkpoint` every `checkpoint_every`.  Raises NumericsError at the first loss or gradient
    that is not finite, before the optimiser step.  Source: spec 5.1-5.4; the weighted sum of the experts' gradients
    pushed back through the view once equals the gradient of the joint loss.
    """
    images = state.images_JBCHW.clone().requires_grad_(True)
    size = images.shape[-1]
    device = images.device
    optimizer = torch.optim.Adam([images], lr=settings.lr, betas=settings.betas, eps=1e-8)
    if state.iteration:
        optimizer.state[images] = {
            "step": torch.tensor(float(state.iteration)),
            "exp_avg": state.first_moment_JBCHW.clone(),
            "exp_avg_sq": state.second_moment_JBCHW.clone(),
        }
    labels_JB = torch.tensor([job.targets for job in jobs], device=device)
    low = torch.tensor(settings.low_C, device=device)[:, None, None]
    high = torch.tensor(settings.high_C, device=device)[:, None, None]
    round_ = math.lcm(*(job.turns for job in jobs))
    turns = [_Turn(jobs, iteration, device) for iteration in range(round_)]
    trace, memory = list(state.trace), dict(state.memory)

    for iteration in range(state.iteration, settings.iterations):
        turn = turns[iteration % round_]
        views = apply_views(images, job_views(jobs, settings, size, iteration), size)
        sent = views.detach()
        ballots = {
            name: Ballot(sent[own], labels_JB[own], *_remembered(jobs, own, name, memory, settings, iteration))
            for name, own in turn.jobs_of.items()
        }
        votes = committee.vote(ballots)
        gradient = torch.zeros_like(sent)
        for name in turn.experts:  # a fixed order, whatever order the answers came in
            weighted = turn.weights_of[name][:, None, None, None, None] * votes[name].gradient_GBCHW
            gradient[turn.jobs_of[name]] += weighted
            _remember(memory, name, turn.jobs_of[name], votes[name].memory_GS, len(jobs))
        _require_finite(gradient, votes, jobs, turn.jobs_of, iteration)
        if settings.densification:
            apart = densification_gradient(sent, len(jobs[0].labels), settings.densification_temperature)
            gradient += settings.densification * apart
        (images.grad,) = torch.autograd.grad(views, images, gradient)
        optimizer.param_groups[0]["lr"] = recover_lr(settings.lr, iteration, settings.iterations)
        optimizer.step()
        with torch.no_grad():
            images.clamp_(low, high)
        if is_traced(iteration, settings.iterations, round_):
            for name in turn.experts:
                terms = zip(turn.jobs_of[name], votes[name].cross_entropy_G.tolist(), votes[name].bn_term_G.tolist(),
                            strict=True)  # fmt: skip
                trace.extend((iteration, j, name, ce, bn) for j, ce, bn in terms)
        moments = optimizer.state[images]
        state = SynthesisState(
            images.detach(), moments["exp_avg"], moments["exp_avg_sq"], iteration + 1, trace, dict(memory)
        )
        on_progress(state)
        if state.iteration % settings.checkpoint_every == 0 and state.iteration < settings.iterations:
            on_checkpoint(state)
    return state


def _remembered(jobs, own, name, memory, settings, iteration) -> tuple[Tensor, Tensor] | tuple[()]:
    """Return what an expert's last votes on its jobs gave it to remember, and the random key of each job now."""
    if not settings.has_memory:
        return ()
    place = [(jobs[j].image_index, jobs[j].chunk, iteration) for j in own]
    keys_G = torch.tensor([key(settings.seed, "statistics", name, *at) for at in place])
    return memory[name][own] if name in memory else torch.zeros(len(own), 0), keys_G


def _remember(memory: dict[str, Tensor], name: str, own, memory_GS: Tensor | None, num_jobs: int) -> None:
    """Keep what a vote gives to remember; rows of jobs the expert was never asked about are 0."""
    if memory_GS is not None:
        rows = memory[name].clone() if name in memory else memory_GS.new_zeros(num_jobs, memory_GS.shape[1])
        rows[own] = memory_GS
        memory[name] = rows


def final_losses(state: SynthesisState, jobs: tuple[Job, ...]) -> tuple[list[float], list[float]]:
    """Return each job's weighted cross-entropy and weighted BN term of the last iteration; not a number without one."""
    cross_entropy, bn_term = [math.nan] * len(jobs), [math.nan] * len(jobs)
    if not state.iteration:
        return cross_entropy, bn_term
    last = {(j, name): (ce, bn) for t, j, name, ce, bn in state.trace if t == state.iteration - 1}
    for j, job in enumerate(jobs):
        asked = job.asked(state.iteration - 1)
        cross_entropy[j] = sum(w * last[j, name][0] for name, w in asked.items())
        bn_term[j] = sum(w * last[j, name][1] for name, w in asked.items())
    return cross_entropy, bn_term


def _require_finite(gradient, votes, jobs, jobs_of, iteration) -> None:
    """Raise NumericsError for the first loss or gradient that is not finite, naming job, iteration and expert."""
    terms = torch.cat([torch.cat([vote.cross_entropy_G, vote.bn_term_G]) for vote in votes.values()])
    if bool(torch.isfinite(gradient).all() & torch.isfinite(terms).all()):
        return
    for name, vote in votes.items():
        finite_G = torch.isfinite(vote.gradient_GBCHW).flatten(1).all(1)
        finite_G = finite_G & torch.isfinite(vote.cross_entropy_G) & torch.isfinite(vote.bn_term_G)
        for position, finite in enumerate(finite_G.tolist()):
            if not finite:
                job = jobs[jobs_of[name][position]]
                raise NumericsError(
                    f"image index {job.image_index}, class chunk {job.chunk}, iteration {iteration}: expert {name} "
                    f"returned a loss or gradient that is not finite; check its weights, or lower synthesize.lr"
                )
    j = int((~torch.isfinite(gradient).flatten(1).all(1)).nonzero()[0])
    raise NumericsError(
        f"image index {jobs[j].image_index}, class chunk {jobs[j].chunk}, iteration {iteration}: every vote is finite, "
        f"but their weighted sum is not (weights {list(jobs[j].weights)}); check the priors and voting.temperature"
    )
