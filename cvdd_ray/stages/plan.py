"""plan: how large a run is and, if a speed is given, how long it takes on so many GPUs. Nothing is run or read but settings
(and a listing of the data where nothing else says how many images there are)."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cvdd_ray.config import RunConfig
from cvdd_ray.core.experts import work_device
from cvdd_ray.core.models import require_batchnorm
from cvdd_ray.data.outlines import outline
from cvdd_ray.errors import ConfigError, require_within
from cvdd_ray.recipes import with_settings
from cvdd_ray.stages.calibrate import job_groups
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.groupwork import fits
from cvdd_ray.stages.plancounts import count_stages, planned_jobs
from cvdd_ray.stages.planwork import OTHER, StageCount, Storage, expert, planned_groups
from cvdd_ray.stages.prior import check_given
from cvdd_ray.stages.simulation import (
    Group,
    Played,
    Wire,
    ceiling,
    expert_actors,
    group_seconds,
    play_colocated,
    play_spread,
    play_tasks,
)
from cvdd_ray.stages.speeds import UTILIZATION, Speed, assumed_speed, known_gpu, measured_speed
from cvdd_ray.stages.votes import needs_priors, picks_by_prior

ONE_FLOP_PER_S = Speed(1.0, "")  # times in FLOPs, where no speed is known
SIMULATED_GPUS = tuple(2**k for k in range(9))
BUSY = 0.95  # what is busy enough
MEASURED_LATER = (
    "synthesize.jobs_per_group is auto, measured when synthesis begins: groups of {} jobs are counted instead"
)
MIN_CHUNK = 5  # classes that are optimised together at least, where smaller chunks are looked for


@dataclass(frozen=True)
class StagePlan:
    """One stage on the planned machines.

    `units` are the pieces that can be worked on side by side (groups, label files, students; with placement `spread` expert
    actors), `useful_gpus` the most that have work. `balance` is the share of the GPUs' time that would be work if all units
    cost the same, `busy` what it is when they are handed out as a run does (stages/simulation.py). `gpu_hours` is that
    work, `wall_hours` the time until the last is finished; None without a speed.

    Bytes of memory: in the driver (with placement `spread`: and the coordinator), in the object store of a node, in one
    worker process, on the fullest node (its object store and workers), on the fullest GPU. They are what the stage's data
    takes, beside Python, torch and Ray themselves. `wire_bytes_per_iteration`: what travels in one iteration of a group with
    placement `spread`, on average.
    """

    stage: str
    counts: Mapping[str, int]
    flops: int
    units: int
    useful_gpus: int
    balance: float
    busy: float
    gpu_hours: float | None
    wall_hours: float | None
    storage: Storage
    driver_bytes: int
    store_bytes: int
    worker_bytes: int
    node_bytes: int
    gpu_bytes: int
    wire_bytes_per_iteration: int | None


@dataclass(frozen=True)
class Simulated:
    """The synthesis of one stage on so many GPUs, by placement: the share of their time that is work, and hours until it is
    finished (None without a speed; messages then weigh nothing)."""

    stage: str
    gpus: int
    busy: Mapping[str, float]
    wall_hours: Mapping[str, float] | None


@dataclass(frozen=True)
class Plan:
    """A run on `nodes` with `gpus_per_node` GPUs each; `notes` say what was assumed and what to look out for; `simulated` is
    for other numbers of GPUs, where that was asked for."""

    dataset: str
    num_classes: int
    image_size: int
    train_images: int
    holdout_images: int
    test_images: int
    placement: str
    nodes: int
    gpus_per_node: int
    gpu: str | None
    speed: Speed | None
    stages: tuple[StagePlan, ...]
    notes: tuple[str, ...]
    simulated: tuple[Simulated, ...] = ()

    @property
    def gpus(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def flops(self) -> int:
        return sum(stage.flops for stage in self.stages)

    @property
    def files(self) -> int:
        """Files of the finished run, its config.yaml included."""
        return 1 + sum(stage.storage.files for stage in self.stages)

    @property
    def bytes(self) -> int:
        return sum(stage.storage.bytes for stage in self.stages)

    @property
    def gpu_hours(self) -> float | None:
        """Hours of work; all GPUs together are there for gpus * wall_hours."""
        return sum(stage.gpu_hours for stage in self.stages) if self.speed else None

    @property
    def wall_hours(self) -> float | None:
        return sum(stage.wall_hours for stage in self.stages) if self.speed else None

    def stage(self, name: str) -> StagePlan:
        """Return the stage with this folder."""
        return next(stage for stage in self.stages if stage.stage == name)

    def plain(self) -> dict[str, Any]:
        """Return everything as plain values, as `cvdd plan --json` prints it."""
        totals = {name: getattr(self, name) for name in ("gpus", "flops", "files", "bytes", "gpu_hours", "wall_hours")}
        return {**asdict(self), "totals": totals}


def plan(
    config: RunConfig, *, nodes: int = 1, gpus_per_node: int = 1, gpu: str | None = None, utilization: float | None = None,
    flops_per_s: float | None = None, calibrate: bool = False, num_classes: int | None = None,
    train_images: int | None = None, test_images: int | None = None, simulate: bool = False, wire: Wire | None = None,
) -> Plan:  # fmt: skip
    """Return how large the run of `config` is on `nodes` * `gpus_per_node` GPUs, stage by stage.

    Times need a speed: measured on this machine (`calibrate`), given (`flops_per_s`, sustained by one GPU), or `utilization`
    (0.35 unless given) of the published peak of `gpu`; without one there are none. `num_classes`, `train_images` and
    `test_images` are for data that the table of data sets does not know and that does not lie at `data.path`. `simulate`
    adds how busy 1 to 256 GPUs would be in synthesis, for both placements; `wire` says what messages take.
    Raises ConfigError for settings that a run would refuse, too, and for an unknown GPU.
    """
    require_within("--nodes", nodes, 1, 10_000)
    require_within("--gpus-per-node", gpus_per_node, 1, 100)
    speed = _stated_speed(gpu, utilization, flops_per_s, calibrate)
    if calibrate and work_device().type == "cpu":  # cores stand in for GPUs, and no task takes a part of one
        config = with_settings(config, {"runtime.gpus_per_actor": 0})
    is_measured_later, size = config.synthesize.jobs_per_group == "auto", config.synthesize.planned_jobs_per_group
    config = with_settings(config, {"synthesize.jobs_per_group": size})
    real = outline(config.data, num_classes=num_classes, train_images=train_images, test_images=test_images)
    run = Run(config, "planned", real=real)
    matching, voted = config.synthesize.matching.convolutions, config.synthesize.method == "committee"
    for name in config.committee.experts if voted and not matching else ():
        require_batchnorm(expert(run, name).build(), name)
    if calibrate and (matching or not voted):
        raise ConfigError(
            f"--calibrate measures votes that match BatchNorm alone, not synthesize."
            f"{'matching' if matching else 'trajectories'}; give --flops-per-s"
        )
    if needs_priors(config) and config.prior.method == "given":
        check_given(run)
    counted = count_stages(run)
    if config.runtime.placement == "auto":
        placement = _fitting_placement(counted, gpu)
        run = Run(with_settings(config, {"runtime.placement": placement}), "planned", real=real)
        counted = count_stages(run) if placement == "spread" else counted
    if run.config.voting.turns and (simulate or run.config.runtime.placement == "spread"):
        raise ConfigError(
            "voting.turns: plan counts what voters that take turns do with placement 'colocate' alone; set runtime.placement="
            "colocate, and leave --simulate out"
        )
    if calibrate:
        calls = {name: (expert(run, name), *call) for name, call in largest_calls(counted).items()}
        speed = measured_speed(calls, config.runtime.threads_per_actor, config.synthesize.precision)
    runtime, timed = run.config.runtime, speed is not None
    machines = _Machines(
        nodes * gpus_per_node, gpus_per_node, speed or ONE_FLOP_PER_S, wire or Wire(), runtime.groups_in_flight
    )
    stages = tuple(_planned(stage, machines, runtime.placement, timed) for stage in counted)
    return Plan(
        dataset=run.info.name, num_classes=run.info.num_classes, image_size=run.info.image_size,
        train_images=len(real.train), holdout_images=len(real.holdout), test_images=len(real.test),
        placement=runtime.placement, nodes=nodes, gpus_per_node=gpus_per_node, gpu=gpu, speed=speed,
        stages=stages,
        notes=(*([MEASURED_LATER.format(size)] if is_measured_later else []), *_notes(run, counted, stages, machines, gpu)),
        simulated=tuple(_simulated(counted, machines, timed)) if simulate else (),
    )  # fmt: skip


def _fitting_placement(counted: Sequence[StageCount], gpu: str | None) -> str:
    """Return what placement `auto` becomes: `colocate`, unless the GPU is known and does not hold the committee."""
    needed = max((stage.phases[0].on_gpu() for stage in counted if stage.groups), default=0)
    return "colocate" if gpu is None or fits(needed, known_gpu(gpu).memory_bytes) else "spread"


def largest_calls(stages: Sequence[StageCount]) -> dict[str, tuple[int, int]]:
    """Return the groups and images per group of every expert's largest call."""
    calls: dict[str, tuple[int, int]] = {}
    for stage in stages:
        for name, call in stage.largest_calls.items():
            calls[name] = max(calls.get(name, (0, 0)), call, key=math.prod)
    return calls


def _stated_speed(
    gpu: str | None, utilization: float | None, flops_per_s: float | None, calibrate: bool
) -> Speed | None:
    """Return the speed that is given or assumed, if any.  Raises ConfigError for arguments that contradict each other."""
    if calibrate and flops_per_s is not None:
        raise ConfigError("--calibrate and --flops-per-s both say how fast a GPU is; give one of them")
    if gpu is not None:
        known_gpu(gpu)
    assumed = gpu is not None and not calibrate and flops_per_s is None
    if utilization is not None and not assumed:
        raise ConfigError("--utilization is a share of the peak of --gpu; it has no effect with another speed or none")
    if flops_per_s is not None:
        require_within("--flops-per-s", flops_per_s, 1e6, 1e18)
        return Speed(flops_per_s, f"given: {flops_per_s / 1e12:g} TFLOP/s sustained by one GPU")
    if not assumed:
        return None
    share = UTILIZATION if utilization is None else utilization
    if not 0 < share <= 1:
        raise ConfigError(f"--utilization {share:g}: give a share of the peak above 0 and up to 1, e.g. 0.35")
    return assumed_speed(gpu, share)


@dataclass(frozen=True)
class _Machines:
    """What pieces are played through on: GPUs in nodes, their speed, what messages take, and what a run does with them."""

    gpus: int
    gpus_per_node: int
    speed: Speed
    wire: Wire
    in_flight: int

    def synthesis(self, stage: StageCount, placement: str) -> Played:
        per_gpu = stage.phases[0].per_gpu if placement == "colocate" else 1
        if placement == "colocate":
            return play_colocated(stage.groups, self.gpus, self.speed.seconds, OTHER, per_gpu)
        return play_spread(stage.groups, self.gpus, self.speed.seconds, self.in_flight, self.wire)

    def play(self, stage: StageCount, placement: str) -> list[Played]:
        """Return what comes out of every phase of a stage."""
        first = [self.synthesis(stage, placement)] if stage.groups else []
        return first + [
            play_tasks([self.speed.seconds(unit) for unit in phase.units], self.gpus, phase.per_gpu)
            for phase in stage.phases[len(first) :]
        ]


def _planned(stage: StageCount, machines: _Machines, placement: str, with_times: bool) -> StagePlan:
    gpus, phases = machines.gpus, list(stage.phases)
    units = [len(phase.units) for phase in phases]
    useful = [-(-len(phase.units) // phase.per_gpu) for phase in phases]
    if stage.groups and placement == "spread":
        actors = sum(expert_actors(stage.groups, gpus).values())
        units[0], useful[0] = actors, sum(len(group.asks) for group in stage.groups.values())
        phases[0] = replace(phases[0], per_gpu=-(-actors // gpus))
    played = machines.play(stage, placement)
    work, wall, most = sum(one.work_s for one in played), sum(one.wall_s for one in played), max(units, default=0)
    workers = [min(n, phase.per_gpu * machines.gpus_per_node) for n, phase in zip(units, phases, strict=True)]
    return StagePlan(
        stage=stage.stage, counts=stage.counts, units=most,
        flops=sum(sum(unit.values()) for phase in phases for unit in phase.units),
        useful_gpus=max(useful, default=0),
        balance=most / (gpus * -(-most // gpus)) if most else 0.0,
        busy=work / (gpus * wall) if wall else 0.0,
        gpu_hours=work / 3600 if with_times else None,
        wall_hours=wall / 3600 if with_times else None,
        storage=stage.storage,
        driver_bytes=stage.driver_bytes,
        store_bytes=stage.store_bytes,
        worker_bytes=max((phase.worker_bytes for phase in phases), default=0),
        node_bytes=stage.store_bytes + max(
            (number * phase.worker_bytes for number, phase in zip(workers, phases, strict=True)), default=0
        ),
        gpu_bytes=max((phase.on_gpu() for phase in phases), default=0),
        wire_bytes_per_iteration=stage.wire_bytes_per_iteration,
    )  # fmt: skip


def _simulated(counted: Sequence[StageCount], machines: _Machines, with_times: bool) -> Iterator[Simulated]:
    for stage in counted:
        for gpus in SIMULATED_GPUS if stage.groups else ():
            there = replace(machines, gpus=gpus)
            played = {placement: there.synthesis(stage, placement) for placement in ("colocate", "spread")}
            yield Simulated(
                stage=stage.stage, gpus=gpus, busy={name: one.busy(gpus) for name, one in played.items()},
                wall_hours={name: one.wall_s / 3600 for name, one in played.items()} if with_times else None,
            )  # fmt: skip


def _coarse(run: Run, stage: StageCount, machines: _Machines) -> str | None:
    """Return what keeps colocated workers from being busy, and what would change it; None when they are busy enough."""
    gpus, ipc = machines.gpus, int(stage.stage.rpartition("ipc")[2])
    per_gpu, iterations = stage.phases[0].per_gpu, run.config.synthesize.iterations

    def busy(groups: Mapping[str, Group], on: int) -> float:
        return play_colocated(groups, on, machines.speed.seconds, OTHER, per_gpu).busy(on)

    def finer(settings: Mapping[str, int]) -> dict[str, Group]:
        other = Run(with_settings(run.config, settings), "planned", real=run.real)
        cut = job_groups(planned_jobs(other, ipc), other.config.synthesize.jobs_per_group)
        return planned_groups(run, cut, stage.largest_calls, iterations)

    reached = busy(stage.groups, gpus)
    if reached >= BUSY:
        return None
    took_s = list(group_seconds(stage.groups, machines.speed.seconds, OTHER).values())
    fewer = next(on for on in range(gpus - 1, 0, -1) if on == 1 or busy(stage.groups, on) >= BUSY)
    chunk = run.config.synthesize.class_chunk or run.info.class_chunk
    alone, levers = {"synthesize.jobs_per_group": 1}, []
    if run.config.synthesize.jobs_per_group > 1:
        levers.append((alone, "synthesize.jobs_per_group=1 (last bits differ)"))
    for size in (size for k in range(1, 8) if (size := -(-chunk // 2**k)) >= MIN_CHUNK):
        one = "" if run.config.synthesize.jobs_per_group == 1 else ", synthesize.jobs_per_group=1"
        text = f"synthesize.class_chunk={size}{one} (other images: {size} are optimised together instead of {chunk})"
        levers.append(({**alone, "synthesize.class_chunk": size}, text))
    lever = next((text for settings, text in levers if busy(finer(settings), gpus) >= BUSY), None)
    return (
        f"{stage.stage}: GPUs are busy {reached:.0%} of the time, since its {len(took_s)} groups cannot be dealt out to "
        f"{gpus} GPUs with more than {ceiling(took_s, gpus * per_gpu):.0%}; {BUSY:.0%} are reached on up to {fewer} GPU"
        f"{'s' if fewer > 1 else ''}{f', or with {lever}' if lever else ''}"
    )


def _notes(run: Run, counted: Sequence[StageCount], stages: Sequence[StagePlan], machines: _Machines, gpu: str | None):
    """Yield what a reader should know before trusting or changing the numbers."""
    config, gpus, precision = run.config, machines.gpus, run.config.synthesize.precision
    if config.synthesize.compile:
        yield "votes are counted and timed as they are without synthesize.compile"
    for setting, workers in (
        ("pretrain.workers", config.pretrain.workers),
        ("evaluate.workers", config.evaluate.workers),
    ):
        if workers > 1:
            yield f"{setting}={workers}: what {workers} GPUs train together is timed as if one of them did it alone"
    if precision != "float32" and machines.speed.source.startswith("ASSUMED"):
        yield (
            f"the assumed speed is of float32, synthesize.precision is {precision}: votes are faster than that by what only "
            f"--calibrate on such a GPU can say"
        )
    memory = known_gpu(gpu).memory_bytes if gpu else math.inf
    for stage in stages:
        if stage.gpu_bytes > memory:
            yield (
                f"{stage.stage} needs {stage.gpu_bytes / 1e9:.0f} GB on a GPU, {gpu} has {memory / 1e9:.0f} GB; fewer "
                f"processes share a GPU with runtime.gpus_per_actor=1, and synthesis takes less with smaller "
                f"synthesize.jobs_per_group or class_chunk (which changes the images)"
            )
    if config.runtime.placement == "spread":
        for stage in stages:
            if stage.wire_bytes_per_iteration and gpus > stage.useful_gpus:
                yield f"{stage.stage}: placement 'spread' has questions for {stage.useful_gpus} GPUs at most"
    elif config.synthesize.method == "trajectories":
        yield "a set by trajectories is one piece of work: it takes one GPU, or a part of one, however many there are"
    elif config.synthesize.iterations:
        for stage in counted:
            if stage.groups and stage.stage.startswith("synthesize") and (note := _coarse(run, stage, machines)):
                yield note
    if config.runtime.gpus_per_task < 1 and any(
        stage.units > stage.useful_gpus and gpus > stage.useful_gpus for stage in stages
    ):
        yield (
            f"a task takes {config.runtime.gpus_per_task:g} of a GPU, so that few tasks fill few GPUs; "
            f"runtime.gpus_per_actor=1 gives every task one of its own"
        )
    if needs_priors(config) and config.prior.method == "distill" and picks_by_prior(config):
        yield "voters are picked by priors that are not known yet; the first of the committee stand in for them"
