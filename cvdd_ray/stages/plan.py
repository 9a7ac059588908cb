"""plan: how large a run is and, if a speed is given, how long it takes on so many GPUs. Nothing is run or read but settings
(and a listing of the data where nothing else says how many images there are)."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from cvdd_ray.config import RunConfig
from cvdd_ray.core.experts import work_device
from cvdd_ray.core.models import require_batchnorm
from cvdd_ray.data.outlines import outline
from cvdd_ray.errors import ConfigError
from cvdd_ray.recipes import with_settings
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.plancounts import count_stages
from cvdd_ray.stages.planwork import Phase, StageCount, Storage, expert
from cvdd_ray.stages.prior import check_given
from cvdd_ray.stages.speeds import UTILIZATION, Speed, assumed_speed, known_gpu, measured_speed
from cvdd_ray.stages.votes import needs_priors, picks_by_prior

ONE_FLOP_PER_S = Speed(1.0, "")  # loads in FLOPs, where no speed is known


@dataclass(frozen=True)
class StagePlan:
    """One stage on the planned machines.

    `units` are the pieces that can be worked on side by side (groups, label files, students), `useful_gpus` the most that
    have work. `balance` is the share of the GPUs' time that would be work if all units cost the same, `busy` what it is with
    their costs, dealt out in turn. `gpu_hours` is that work, `wall_hours` what the GPU with most of it takes; None without a
    speed.

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
class Plan:
    """A run on `nodes` with `gpus_per_node` GPUs each; `notes` say what was assumed and what to look out for."""

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
    train_images: int | None = None, test_images: int | None = None,
) -> Plan:  # fmt: skip
    """Return how large the run of `config` is on `nodes` * `gpus_per_node` GPUs, stage by stage.

    Times need a speed: measured on this machine (`calibrate`), given (`flops_per_s`, sustained by one GPU), or `utilization`
    (0.35 unless given) of the published peak of `gpu`; without one there are none. `num_classes`, `train_images` and
    `test_images` are for data that the table of data sets does not know and that does not lie at `data.path`.
    Raises ConfigError for settings that a run would refuse, too, and for an unknown GPU.
    """
    for name, given in (("nodes", nodes), ("gpus-per-node", gpus_per_node)):
        if given < 1:
            raise ConfigError(f"--{name} {given}: give at least 1")
    speed = _stated_speed(gpu, utilization, flops_per_s, calibrate)
    if calibrate and work_device().type == "cpu":  # cores stand in for GPUs, and no task takes a part of one
        config = with_settings(config, {"runtime.gpus_per_actor": 0})
    real = outline(config.data, num_classes=num_classes, train_images=train_images, test_images=test_images)
    run = Run(config, "planned", real=real)
    for name in config.committee.experts:
        require_batchnorm(expert(run, name).build(), name)
    if needs_priors(config) and config.prior.method == "given":
        check_given(run)
    counted = count_stages(run)
    if calibrate:
        calls = {name: (expert(run, name), *call) for name, call in largest_calls(counted).items()}
        speed = measured_speed(calls, config.runtime.threads_per_actor)
    gpus = nodes * gpus_per_node
    stages = tuple(_planned(stage, gpus, gpus_per_node, speed) for stage in counted)
    return Plan(
        dataset=run.info.name, num_classes=run.info.num_classes, image_size=run.info.image_size,
        train_images=len(real.train), holdout_images=len(real.holdout), test_images=len(real.test),
        placement=config.runtime.placement, nodes=nodes, gpus_per_node=gpus_per_node, gpu=gpu, speed=speed,
        stages=stages, notes=tuple(_notes(config, stages, gpus, gpu)),
    )  # fmt: skip


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
        if not flops_per_s > 0:
            raise ConfigError(f"--flops-per-s {flops_per_s:g}: give what one GPU sustains, e.g. 2e13")
        return Speed(flops_per_s, f"given: {flops_per_s / 1e12:g} TFLOP/s sustained by one GPU")
    if not assumed:
        return None
    share = UTILIZATION if utilization is None else utilization
    if not 0 < share <= 1:
        raise ConfigError(f"--utilization {share:g}: give a share of the peak above 0 and up to 1, e.g. 0.35")
    return assumed_speed(gpu, share)


def loads(phase: Phase, gpus: int, speed: Speed) -> list[float]:
    """Return the seconds of work of every GPU: units are dealt out in turn, as the runtime does; as long as there is room
    for all of them at once, GPU after GPU is filled with `per_gpu` of them."""
    seconds = [0.0] * gpus
    at_once = len(phase.units) <= gpus * phase.per_gpu
    for number, unit in enumerate(phase.units):
        seconds[number // phase.per_gpu if at_once else number % gpus] += speed.seconds(unit)
    return seconds


def _planned(stage: StageCount, gpus: int, gpus_per_node: int, speed: Speed | None) -> StagePlan:
    if stage.spreads_experts:  # as many on a GPU as it takes
        experts, *others = stage.phases
        stage = replace(stage, phases=(replace(experts, per_gpu=-(-len(experts.units) // gpus)), *others))
    each = [loads(phase, gpus, speed or ONE_FLOP_PER_S) for phase in stage.phases]
    work, wall = sum(map(sum, each)), sum(map(max, each))
    units = max((len(phase.units) for phase in stage.phases), default=0)
    return StagePlan(
        stage=stage.stage, counts=stage.counts, units=units,
        flops=sum(sum(unit.values()) for phase in stage.phases for unit in phase.units),
        useful_gpus=max((-(-len(phase.units) // phase.per_gpu) for phase in stage.phases), default=0),
        balance=units / (gpus * -(-units // gpus)) if units else 0.0,
        busy=work / (gpus * wall) if wall else 0.0,
        gpu_hours=work / 3600 if speed else None,
        wall_hours=wall / 3600 if speed else None,
        storage=stage.storage,
        driver_bytes=stage.driver_bytes,
        store_bytes=stage.store_bytes,
        worker_bytes=max((phase.worker_bytes for phase in stage.phases), default=0),
        node_bytes=stage.store_bytes + max(
            (min(len(phase.units), phase.per_gpu * gpus_per_node) * phase.worker_bytes for phase in stage.phases), default=0
        ),
        gpu_bytes=max((phase.on_gpu() for phase in stage.phases), default=0),
        wire_bytes_per_iteration=stage.wire_bytes_per_iteration,
    )  # fmt: skip


def _notes(config: RunConfig, stages: tuple[StagePlan, ...], gpus: int, gpu: str | None):
    """Yield what a reader should know before trusting or changing the numbers."""
    memory = known_gpu(gpu).memory_bytes if gpu else math.inf
    for stage in stages:
        if stage.gpu_bytes > memory:
            yield (
                f"{stage.stage} needs {stage.gpu_bytes / 1e9:.0f} GB on a GPU, {gpu} has {memory / 1e9:.0f} GB; fewer "
                f"processes share a GPU with runtime.gpus_per_actor=1, and synthesis takes less with smaller "
                f"synthesize.jobs_per_group or class_chunk (which changes the images)"
            )
    if config.runtime.placement == "spread" and any(
        stage.wire_bytes_per_iteration and gpus > stage.useful_gpus for stage in stages
    ):
        yield "placement 'spread' uses one GPU per expert at most; runtime.placement=colocate uses one per group of jobs"
    if config.runtime.gpus_per_task < 1 and any(
        stage.units > stage.useful_gpus and gpus > stage.useful_gpus for stage in stages
    ):
        yield (
            f"a task takes {config.runtime.gpus_per_task:g} of a GPU, so that few tasks fill few GPUs; "
            f"runtime.gpus_per_actor=1 gives every task one of its own"
        )
    if needs_priors(config) and config.prior.method == "distill" and picks_by_prior(config):
        yield "voters are picked by priors that are not known yet; the first of the committee stand in for them"
