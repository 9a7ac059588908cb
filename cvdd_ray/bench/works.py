"""What is compared: for every kind of work our way and the reference's, as functions that build a Round in a process.

Images, labels and weights are drawn at random (bench/unreal.py). Both sides compute in float32.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from cvdd_ray.bench import reference
from cvdd_ray.bench.machine import Machine
from cvdd_ray.bench.sides import Comparison, Round, compare
from cvdd_ray.bench.unreal import as_pil, random_expert, random_network, random_pixels, unreal_run
from cvdd_ray.config import RunConfig
from cvdd_ray.core.committee import LocalCommittee, Voter
from cvdd_ray.core.costs import Network, vote_cost
from cvdd_ray.core.experts import work_device
from cvdd_ray.core.softlabels import batch_starts
from cvdd_ray.core.students import StudentSettings, StudentTraining, adamw_groups
from cvdd_ray.core.synthesis import Job, SynthesisSettings, SynthesisState, distill_group
from cvdd_ray.core.training import PretrainSettings, pretrain_expert
from cvdd_ray.data.datasets import DatasetInfo, network_inputs
from cvdd_ray.data.labels import SoftLabels, label_batch, write_label_file
from cvdd_ray.errors import ConfigError, require_within
from cvdd_ray.stages.calibrate import job_groups
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.evaluate import student_settings
from cvdd_ray.stages.grouptask import VoterSettings
from cvdd_ray.stages.planwork import expert, student
from cvdd_ray.stages.real import train_batches
from cvdd_ray.stages.relabel import Labeller, ViewSettings, teacher_names
from cvdd_ray.stages.synthesize import image_jobs, synthesis_settings
from cvdd_ray.stages.votes import vote_of_image

PRIOR = 50.0  # of every expert
ITERATIONS = 2  # of synthesis in a round
SQUEEZE_IMAGES = 512  # of one round of pretraining


# --- synthesis -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SynthesisWork:
    """Groups of jobs of one class chunk, one for every image index, and the numbers of the loop."""

    experts: Mapping[str, Network]
    groups: tuple[tuple[Job, ...], ...]
    settings: SynthesisSettings
    voter: VoterSettings
    size: int

    @property
    def jobs(self) -> list[Job]:
        return [job for group in self.groups for job in group]

    @property
    def flops_per_unit(self) -> float:
        """FLOPs of an image and iteration: what its voters take."""
        votes = [(name, len(job.labels)) for job in self.jobs for name in job.voters]
        flops = sum(vote_cost(self.experts[name], 1, images).flops for name, images in votes)
        return flops / sum(len(job.labels) for job in self.jobs)

    @property
    def plain(self) -> dict[str, float]:
        """What a voter of either side needs besides weights."""
        return {"bn_weight": self.voter.bn_weight, "first_bn_multiplier": self.voter.first_bn_multiplier}

    def start_of(self, job: Job) -> torch.Tensor:
        draw = torch.Generator().manual_seed(job.image_index)
        return torch.randn((len(job.labels), 3, self.size, self.size), generator=draw).to(work_device())

    def units(self) -> int:
        return self.settings.iterations * sum(len(job.labels) for job in self.jobs)


def our_synthesis(work: SynthesisWork) -> Round:
    settings = {**work.plain, "compile": work.voter.compile}
    voters = {name: Voter(random_network(network), **settings) for name, network in work.experts.items()}
    committee = LocalCommittee(voters)

    def round_() -> int:
        for group in work.groups:
            start = SynthesisState.start(torch.stack([work.start_of(job) for job in group]))
            distill_group(committee, group, start, work.settings)
        return work.units()

    return round_


def plain_synthesis(work: SynthesisWork) -> Round:
    experts = {name: random_network(network).requires_grad_(False) for name, network in work.experts.items()}
    s = work.settings

    def round_() -> int:
        for job in work.jobs:
            reference.distill_job(
                [experts[name] for name in job.voters], job.weights, work.start_of(job),
                torch.tensor(job.labels, device=work_device()), iterations=s.iterations, lr=s.lr, betas=s.betas,
                roll=s.roll, low_C=s.low_C, high_C=s.high_C, augment=s.augment, flip=s.flip, crop_scale=s.crop_scale,
                **work.plain,
            )  # fmt: skip
        return work.units()

    return round_


def synthesis_work(run: Run, ipc: int, iterations: int) -> SynthesisWork:
    """Return the jobs of the first class chunk at `ipc`, with `iterations` instead of the recipe's."""
    c = run.config
    priors = dict.fromkeys(c.committee.experts, PRIOR)
    jobs = [job for job in image_jobs(run, ipc, lambda i: vote_of_image(run, priors, ipc, i)) if job.chunk == 0]
    used = sorted({name for job in jobs for name in job.voters})
    return SynthesisWork(
        {name: expert(run, name) for name in used},
        tuple(job_groups(jobs, c.synthesize.planned_jobs_per_group)),
        synthesis_settings(run, iterations),
        VoterSettings(c.synthesize.bn_weight, c.synthesize.first_bn_multiplier, compile=c.synthesize.compile),
        run.info.image_size,
    )


# --- soft labels and students --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LabelWork:
    """One epoch of soft labels of random images, and the student that learns from it."""

    teachers: tuple[Network, ...]
    student: Network
    info: DatasetInfo
    views: ViewSettings
    settings: StudentSettings
    num_images: int

    @property
    def weights(self) -> tuple[float, ...]:
        return (1 / len(self.teachers),) * len(self.teachers)

    @property
    def bn_group(self) -> int:
        return self.views.c.resolved_bn_group(self.num_images)

    def pixels(self) -> np.ndarray:
        return random_pixels(self.num_images, self.info.image_size)


def label_work(run: Run, ipc: int, _iterations: int = 1) -> LabelWork:
    """Return an epoch of labels of the set at `ipc`."""
    c, info = run.config, run.info
    num_images = ipc * info.num_classes
    return LabelWork(
        tuple(expert(run, name) for name in teacher_names(run)),
        student(run, c.evaluate.students[0]),
        info,
        ViewSettings(c.seed, c.data.flip, info.image_size, c.relabel),
        replace(student_settings(run, run.config.student_epochs, num_images), phases=()),
        num_images,
    )


def our_relabel(work: LabelWork) -> Round:
    teachers = [random_expert(network) for network in work.teachers]
    labeller = Labeller(work.pixels(), work.info, teachers, work.weights, work.views)

    def round_() -> int:
        with tempfile.TemporaryFile() as stream:
            write_label_file(stream, [label_batch(labeller.epoch(0))], _about(work))
        return work.num_images

    return round_


def plain_relabel(work: LabelWork) -> Round:
    teachers = [random_network(network) for network in work.teachers]
    images = as_pil(work.pixels())

    def round_() -> int:
        with tempfile.TemporaryDirectory() as folder:
            for plan in work.views.plans(0, work.num_images):
                views = reference.pil_batch(images, plan, work.info.image_size, work.info.mean, work.info.std)
                reference.label_batch_file(
                    Path(folder), plan, views.to(work_device()), teachers, work.weights, work.bn_group,
                    batchnorm=work.views.c.batchnorm,
                )  # fmt: skip
        return work.num_images

    return round_


def _about(work: LabelWork) -> dict:
    return {"images": "random", "num_classes": work.info.num_classes, "epochs": 1}


def _random_rows(work: LabelWork) -> list:
    draw = torch.Generator().manual_seed(0)
    plans = work.views.plans(0, work.num_images)
    return [(plan, torch.randn(len(plan.image_index_B), work.info.num_classes, generator=draw)) for plan in plans]


def our_evaluate(work: LabelWork) -> Round:
    device = work_device()
    with tempfile.NamedTemporaryFile() as file:
        write_label_file(file, [label_batch(_random_rows(work))], _about(work))
        file.flush()
        labels = SoftLabels(pa.memory_map(file.name), file.name, None)  # the mapping outlives the file's name
    images = network_inputs(work.pixels(), work.info, device)
    training = StudentTraining(random_network(work.student), images, work.settings, 0)

    def round_() -> int:
        training.next_epoch = 0
        training.run_epoch((plan, logits.to(device)) for plan, logits in labels.epoch(0))
        return work.num_images

    return round_


def plain_evaluate(work: LabelWork) -> Round:
    folder = tempfile.TemporaryDirectory()  # it lives as long as the round
    for plan, logits in _random_rows(work):
        reference.save_label(Path(folder.name), plan, logits)
    model, images = random_network(work.student), as_pil(work.pixels())
    optimizer = torch.optim.AdamW(adamw_groups(model, work.settings.weight_decay), lr=work.settings.lr)
    num_batches = len(batch_starts(work.num_images, work.settings.batch_size))

    def round_() -> int:
        reference.train_epoch(
            model, optimizer, Path(folder.name), num_batches, images, size=work.info.image_size, mean=work.info.mean,
            std=work.info.std, bn_group=work.settings.bn_group, temperature=work.settings.temperature,
            device=work_device(),
        )  # fmt: skip
        return work.num_images

    return round_


# --- experts -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SqueezeWork:
    """One epoch of an expert on `SQUEEZE_IMAGES` random images."""

    expert: Network
    info: DatasetInfo
    batch_size: int
    crop: str
    pad: int
    flip: bool
    settings: PretrainSettings

    def labels(self) -> np.ndarray:
        return np.arange(SQUEEZE_IMAGES) % self.info.num_classes


def squeeze_work(run: Run, _ipc: int = 1, _iterations: int = 1) -> SqueezeWork:
    """Return an epoch of the first expert."""
    c, info = run.config, run.info
    p, network = c.pretrain, expert(run, c.committee.experts[0])
    settings = PretrainSettings(1, p.optimizer, p.lr, p.weight_decay, 1)
    return SqueezeWork(network, info, p.batch_size, p.crop, p.pad, c.data.flip, settings)


def our_pretrain(work: SqueezeWork) -> Round:
    model = random_network(work.expert)
    split = random_pixels(SQUEEZE_IMAGES, work.info.image_size), work.labels()

    def batches(epoch: int):
        return train_batches(
            split, work.info, batch_size=work.batch_size, crop=work.crop, pad=work.pad, flip=work.flip, seed=0,
            epoch=epoch, device=work_device(),
        )  # fmt: skip

    def round_() -> int:
        pretrain_expert(model, batches, work.settings)
        return SQUEEZE_IMAGES

    return round_


def plain_pretrain(work: SqueezeWork) -> Round:
    model, images = random_network(work.expert), as_pil(random_pixels(SQUEEZE_IMAGES, work.info.image_size))
    kind = {"adam": torch.optim.Adam, "sgd": lambda *given, **more: torch.optim.SGD(*given, momentum=0.9, **more)}
    optimizer = kind[work.settings.optimizer](
        model.parameters(), lr=work.settings.lr, weight_decay=work.settings.weight_decay
    )

    def round_() -> int:
        reference.train_expert_epoch(
            model, optimizer, images, work.labels().tolist(), batch_size=work.batch_size, crop=work.crop, pad=work.pad,
            flip=work.flip, size=work.info.image_size, mean=work.info.mean, std=work.info.std, device=work_device(),
        )  # fmt: skip
        return SQUEEZE_IMAGES

    return round_


# --- all of them ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kind:
    """A kind of work: what a unit is, what describes it for (run, ipc, iterations), and the two ways of doing it."""

    unit: str
    work: Callable[[Run, int, int], object]
    ours: Callable[..., Round]
    reference: Callable[..., Round]


KINDS = {
    "synthesis": Kind("image and iteration", synthesis_work, our_synthesis, plain_synthesis),
    "relabel": Kind("image and epoch", label_work, our_relabel, plain_relabel),
    "evaluate": Kind("image and epoch", label_work, our_evaluate, plain_evaluate),
    "pretrain": Kind("image", squeeze_work, our_pretrain, plain_pretrain),
}
WITH_RAY = ("wire", "scheduler")  # no comparisons: what Ray costs, and what it leaves idle (runner/raybench.py)


@dataclass(frozen=True)
class Result:
    """What was measured of one kind of work, and the FLOPs of a unit where they are counted (synthesis)."""

    measured: Comparison
    flops_per_unit: float | None

    def shares_of_peak(self, machine: Machine) -> tuple[float, ...]:
        """Return our share of the machine's best matrix product and of its best convolution."""
        if self.flops_per_unit is None:
            return ()
        reached = self.flops_per_unit / self.measured.ours.median_s
        return reached / machine.matmul_flops_per_s, reached / machine.conv_flops_per_s


def bench(
    config: RunConfig, what: Sequence[str] = (), *, ipc: int | None = None, rounds: int = 3,
    iterations: int | None = None, num_classes: int | None = None,
) -> dict[str, Result]:  # fmt: skip
    """Return how long kinds of work (of `KINDS`; all without `what`) take on this machine, ours and the reference's, see
    `compare`; those of `WITH_RAY` are left to `measure_ray`.

    At the configuration's first IPC unless `ipc` says otherwise; a round is all jobs of the first class chunk for
    `iterations` (2 unless given; synthesis), an epoch (relabel, evaluate) or 512 images (pretrain).
    Raises ConfigError for an unknown kind, numbers below 1 or without effect, and as `plan`.
    """
    what = what or tuple(KINDS)
    for name in what:
        if name not in (*KINDS, *WITH_RAY):
            raise ConfigError(f"bench knows no {name!r}; it knows {', '.join((*KINDS, *WITH_RAY))}")
    for option, given in (
        ("--rounds", rounds),
        ("--iterations", iterations),
        ("--ipc", ipc),
        ("--classes", num_classes),
    ):
        require_within(option, given, 1, 1_000_000)
    if iterations is not None and not {"synthesis", *WITH_RAY} & set(what):
        raise ConfigError(
            f"--iterations {iterations} has no effect without synthesis, {' or '.join(WITH_RAY)}; leave it out"
        )
    if ipc is not None and set(what) == {"pretrain"}:
        raise ConfigError(f"--ipc {ipc} has no effect on pretrain alone; leave it out")
    for name in what:
        reference.require_known(config, name)
    run, results = unreal_run(config, num_classes), {}
    for name in (name for name in what if name in KINDS):
        kind = KINDS[name]
        work = kind.work(run, ipc or config.ipc[0], iterations or ITERATIONS)
        sides = {"ours": (kind.ours, [work]), "reference": (kind.reference, [work])}
        measured = compare(kind.unit, sides, rounds=rounds, threads=config.runtime.threads_per_actor)
        results[name] = Result(measured, getattr(work, "flops_per_unit", None))
    return results
