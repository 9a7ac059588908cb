"""The one description of a run: frozen, typed, every default in one place (sources: spec sections 1-8)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cvdd_ray.evaluateconfig import EvaluateConfig
from cvdd_ray.fields import (
    Count,
    Names,
    NonNegative,
    Number,
    Positive,
    PositiveFloat,
    Section,
    Whole,
    Width,
)
from cvdd_ray.labelconfig import RelabelConfig
from cvdd_ray.runtimeconfig import RuntimeConfig, StorageConfig
from cvdd_ray.synthesizeconfig import SynthesizeConfig

MAX_SIDE = 2048  # pixels; networks are made for at most 224 or so
Color = tuple[PositiveFloat, PositiveFloat, PositiveFloat]


class DataConfig(Section):
    LATER: ClassVar[tuple[str, ...]] = ("mean", "std")

    source: Literal["digits", "cifar10", "cifar100", "imagenette", "imagenet", "folder", "parquet", "webdataset"] = (
        "digits"
    )
    """Where the real images come from. `folder`: path/train/CLASS/*.png; `parquet`: Hub-style files; `webdataset`: tar files
    train-*.tar and test-*.tar (or val-*.tar) of KEY.jpg with KEY.cls or KEY.json, class names in classes.txt."""
    path: str | None = None
    """Directory of the data (torchvision root, image folder, Parquet or tar files), or s3:// URI, except for CIFAR. Not used
    by `digits`."""
    dataset: str | None = None
    """Row of the dataset table (mean, std, size, roll) for `folder`, `parquet` and `webdataset`; None: ImageNet statistics."""
    image_size: Annotated[Whole, Field(ge=1, le=MAX_SIDE)] | None = None
    """Side of the square input in pixels; None: the dataset table's."""
    mean: Color | None = None
    """Mean of R, G, B for pixels in 0..1, for normalisation; None: the dataset table's."""
    std: Color | None = None
    """Standard deviation of R, G, B; None: the dataset table's."""
    classes: Names | None = None
    """Expected class names in label order; None: taken from the source. A different list or order is an error."""
    holdout: Annotated[Number, Field(gt=0, lt=1)] = 0.1
    """Share of train kept for priors and sweeps, class by class, so that nothing is selected on test."""
    max_per_class: Positive | None = None
    """Use at most this many train images per class (seeded choice, before the hold-out is taken); None: all."""
    max_test: Positive | None = None
    """Use at most this many test images (seeded choice); None: all."""
    flip: bool = True
    """Whether a mirrored image keeps its label: allows horizontal flips in pretraining, synthesis and relabelling."""
    on_bad_image: Literal["error", "skip"] = "error"
    """What to do with an unreadable image file: stop and name it, or leave it out and count it."""
    download: bool = False
    """Let torchvision download CIFAR or Imagenette when `path` does not hold it."""


class CommitteeConfig(Section):
    experts: Names = ("resnet18", "resnet50", "shufflenet_v2", "mobilenet_v2", "densenet121")
    """Backbones of the committee, in voting order."""
    width: Width = 1.0
    """Channel multiplier of every expert at 32/64 px; 1 is the paper's network, below 1 the slim ones for CPU runs."""
    weights: dict[str, str] = Field({})
    """Given weights per expert: a `.safetensors`/`.pth` file (or its s3:// URI), or `torchvision:IMAGENET1K_V1`. Others are
    pretrained."""

    @model_validator(mode="after")
    def _check(self):
        unknown = sorted(set(self.weights) - set(self.experts))
        if unknown:
            raise ValueError(f"weights given for {unknown}, which are not among experts {list(self.experts)}")
        return self


class PretrainConfig(Section):
    LATER: ClassVar[tuple[str, ...]] = ("warmup_epochs", "schedule", "workers", "checkpoint_minutes")

    epochs: Positive = 200
    """Passes over the train split (without hold-out)."""
    batch_size: Positive = 512
    """Images per optimiser step."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """Adam with coupled L2, or SGD with momentum .9 (spec section 2)."""
    lr: PositiveFloat = 1e-3
    """Peak learning rate."""
    weight_decay: NonNegative = 1e-4
    """Coupled L2 coefficient."""
    cosine_epochs: Positive | None = None
    """T_max of the cosine schedule in epochs; None: `epochs` (the published ImageNette script uses 100 of 300)."""
    warmup_epochs: Count = 0
    """Epochs of linear climb before the cosine, which then has so many fewer."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Course of the learning rate (constant: G-VBSM on CIFAR)."""
    crop: Literal["pad", "random_resized"] = "pad"
    """Train augmentation: random crop after zero-padding by `pad` pixels, or random resized crop."""
    pad: Count = 4
    """Padding of the random crop in pixels."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of the forward pass: full, or bfloat16 autocast with float32 weights (about twice as fast)."""
    workers: Positive = 1
    """Processes that train one expert together through Ray Train, with a GPU each where there are any; each normalises its
    part of a batch by itself."""
    checkpoint_minutes: NonNegative = 5.0
    """Minutes between checkpoints of an unfinished expert (0: after every epoch)."""

    @model_validator(mode="after")
    def _check(self):
        if self.batch_size < 2 * self.workers:
            raise ValueError(
                f"workers {self.workers} would leave each fewer than 2 of batch_size {self.batch_size} images, which BatchNorm "
                f"needs; use fewer workers or larger batches"
            )
        if self.schedule == "constant" and (self.cosine_epochs or self.warmup_epochs):
            raise ValueError("cosine_epochs and warmup_epochs have no effect with schedule 'constant'; leave them out")
        if self.warmup_epochs >= (self.cosine_epochs or self.epochs):
            raise ValueError(
                f"warmup_epochs {self.warmup_epochs} must be fewer than the {self.cosine_epochs or self.epochs} epochs"
            )
        return self


class PriorConfig(Section):
    LATER: ClassVar[tuple[str, ...]] = ("lr", "eta")

    method: Literal["distill", "given"] = "distill"
    """`distill`: hold-out accuracy of a student trained on data distilled from one expert alone (the definition,
    paper section 3.3); `given`: the numbers in `values`."""
    values: dict[str, Number] = Field({})
    """Given prior per expert in percent, e.g. the paper's Table 19."""
    ipc: Positive = 10
    """Images per class distilled from each expert alone."""
    iterations: Positive | None = None
    """Synthesis iterations for the prior; None: `synthesize.iterations`."""
    epochs: Positive | None = None
    """Post-evaluation epochs for the prior; None: `evaluate.epochs`."""
    lr: PositiveFloat | None = None
    """AdamW learning rate of the student that measures it; None: `evaluate.lr`."""
    eta: PositiveFloat | None = None
    """Stretch of its schedule; None: `evaluate.eta`."""
    student: str = "resnet18"
    """Student that measures the prior."""
    seeds: Positive = 1
    """Students per expert; their mean is the prior."""

    @model_validator(mode="after")
    def _check(self):
        if self.method == "distill" and self.values:
            raise ValueError("values are only used with method 'given'; set prior.method=given or drop them")
        if self.method == "given" and (self.lr or self.eta):
            raise ValueError("lr and eta have no effect with method 'given', which trains no student; leave them out")
        return self


class VotingConfig(Section):
    LATER: ClassVar[tuple[str, ...]] = ("turns",)

    size: Positive = 2
    """Experts that vote on one image (N of the paper)."""
    selection: Literal["auto", "fixed", "top", "enumerate", "random"] = "auto"
    """Who votes on image index i. `enumerate`: the i-th combination; `random`: seeded draw per index; `top`: highest
    priors; `fixed`: the list in `fixed`. `auto` (spec 5.6): IPC 1 takes `fixed` if given, else `top`; IPC up to the
    number of combinations enumerates; larger IPC draws."""
    fixed: Names | None = None
    """The voters used by `fixed`, and by `auto` at IPC 1."""
    weighting: Literal["prior", "equal", "random"] = "prior"
    """Vote weights: softmax(prior / temperature), 1/N, or random drawn once per image index."""
    temperature: PositiveFloat = 5.0
    """Softmax temperature over priors in percent."""
    turns: bool = False
    """Voters of an image take turns, one in every iteration with all the weight (G-VBSM), instead of voting together."""

    @model_validator(mode="after")
    def _check(self):
        if self.selection == "fixed" and not self.fixed:
            raise ValueError("selection 'fixed' needs the list `fixed`")
        if self.fixed and len(self.fixed) != self.size:
            raise ValueError(f"fixed names {len(self.fixed)} experts, but size is {self.size}")
        if self.fixed and self.selection not in ("fixed", "auto"):
            raise ValueError(f"fixed has no effect with selection {self.selection!r}")
        if self.turns and (self.size == 1 or self.weighting != "equal"):
            raise ValueError("turns needs size of at least 2 and weighting 'equal', since one votes at a time")
        return self


class InitializeConfig(Section):
    LATER: ClassVar[tuple[str, ...]] = ("pool",)

    method: Literal["patches", "real", "k_center", "herding", "noise"] = "patches"
    """Starting images: RDED patches of real images, whole real images (a random choice, or by the observer's features, class
    by class: greedy k-centre, herding), or N(0,1) in normalised space."""
    difficulty: Literal["easy", "medium", "hard"] = "medium"
    """Rank window of the scored patches: lowest, middle or highest observer loss (spec section 4)."""
    factor: Positive | None = None
    """Patches per side of one starting image; None: 1 up to 64 px, 2 above."""
    num_crops: Positive = 5
    """Random crops scored per real image."""
    images_per_class: Positive = 300
    """Real images per class that are scored, or chosen from by features."""
    observer: str | None = None
    """Expert that scores the patches, or whose features count; None: the first of the committee."""
    pool: Positive | None = None
    """Choose patches as for so many images per class, of which a smaller IPC takes the first: sets of different IPC are then
    nested (decision 27). None: as for the IPC itself."""

    @model_validator(mode="after")
    def _check(self):
        if self.pool and self.method != "patches":
            raise ValueError(f"pool has no effect with method {self.method!r}; leave it out")
        return self


class RunConfig(Section):
    """A whole run. Results depend on everything but `runtime` and `storage` (to the bit: also on threads_per_actor)."""

    seed: Count = 0
    """Every random choice is a pure function of this number and its place (image, iteration, epoch ...)."""
    ipc: tuple[Positive, ...] = (10,)
    """Images per class; each value is distilled and evaluated on its own."""
    data: DataConfig = DataConfig()
    committee: CommitteeConfig = CommitteeConfig()
    pretrain: PretrainConfig = PretrainConfig()
    prior: PriorConfig = PriorConfig()
    voting: VotingConfig = VotingConfig()
    initialize: InitializeConfig = InitializeConfig()
    synthesize: SynthesizeConfig = SynthesizeConfig()
    relabel: RelabelConfig = RelabelConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    storage: StorageConfig = StorageConfig()

    @model_validator(mode="after")
    def _check(self):
        if not self.ipc or len(set(self.ipc)) != len(self.ipc):
            raise ValueError(f"ipc must be one or more different numbers, got {list(self.ipc)}, e.g. [1, 10]")
        if self.relabel.batchnorm == "eval" and "eval_labels" in self.evaluate.baselines:
            raise ValueError(
                "evaluate.baselines has eval_labels, but relabel.batchnorm is already eval; drop one of the two"
            )
        plain = [name for name in self.evaluate.baselines if name.endswith("_plain")]
        if plain and not (self.relabel.cutmix or self.data.flip or self.relabel.crop_scale != (1, 1)):
            raise ValueError(
                f"evaluate.baselines has {plain[0]}, but nothing is augmented with relabel.cutmix and data.flip false and "
                f"relabel.crop_scale [1, 1]; drop it"
            )
        if self.evaluate.loss == "mse_gt" and self.relabel.top_k:
            raise ValueError(
                "evaluate.loss mse_gt compares every logit, relabel.top_k leaves some out; drop one of the two"
            )
        if self.evaluate.epochs is not None and self.evaluate.epochs > self.relabel.epochs:
            raise ValueError(
                f"evaluate.epochs {self.evaluate.epochs} is more than relabel.epochs {self.relabel.epochs}; "
                f"every epoch needs labels, its own or those of one of relabel.stored_epochs"
            )
        if self.evaluate.warmup_epochs >= self.student_epochs:
            raise ValueError(
                f"evaluate.warmup_epochs {self.evaluate.warmup_epochs} must be fewer than the {self.student_epochs} epochs"
            )
        late = [phase.from_epoch for phase in self.evaluate.phases if phase.from_epoch >= self.student_epochs]
        if late:
            raise ValueError(
                f"evaluate.phases: from_epoch {late[0]} is past the last of {self.student_epochs} epochs and has no effect; "
                f"leave the phase out"
            )
        v = self.voting
        if (
            self.synthesize.class_together
            and v.selection not in ("fixed", "top")
            and v.size < len(self.committee.experts)
        ):
            raise ValueError(
                f"synthesize.class_together optimises all images of a class with the same voters, but voting.selection "
                f"{v.selection!r} picks them image by image; use 'fixed' or 'top', or voting.size={len(self.committee.experts)}"
            )
        self._check_trajectories()
        for name, workers in (("pretrain", self.pretrain.workers), ("evaluate", self.evaluate.workers)):
            if workers > 1 and self.runtime.engine == "local":
                raise ValueError(
                    f"{name}.workers {workers} needs several processes, runtime.engine 'local' is one; use engine 'ray', or "
                    f"workers 1"
                )
        if self.synthesize.precision == "tf32" and self.runtime.gpus_per_actor == 0:
            raise ValueError(
                "synthesize.precision 'tf32' is arithmetic of GPUs, but runtime.gpus_per_actor 0 keeps experts on CPU; use "
                "float32, or leave gpus_per_actor out"
            )
        return self

    def _check_trajectories(self) -> None:
        """Raise ValueError for settings that contradict the way images are made, or the labels of our row."""
        if self.synthesize.method == "committee":
            if self.evaluate.learned_lr:
                raise ValueError(
                    "evaluate.learned_lr: synthesize.method 'committee' learns no learning rate; leave it out, or use "
                    "'trajectories'"
                )
            return
        if self.voting != VotingConfig():
            raise ValueError(
                "voting has no effect with synthesize.method 'trajectories', which has no votes; leave it out"
            )
        several = len(self.relabel.teachers or self.committee.experts) > 1
        if self.labels_are_soft and several and self.relabel.weighting == "prior" and self.prior.method == "distill":
            raise ValueError(
                "relabel.weighting 'prior' needs priors, which are measured by distilling with votes and not with "
                "synthesize.method 'trajectories'; use relabel.weighting=equal or prior.method=given"
            )

    @property
    def labels_are_soft(self) -> bool:
        """Whether our students learn from soft labels, so that there are teachers."""
        return self.evaluate.labels == "soft"

    @property
    def needs_experts(self) -> bool:
        """Whether anything asks the committee: for votes, labels, or which real images to start from."""
        observed = self.initialize.method not in ("real", "noise")
        return self.synthesize.method == "committee" or self.labels_are_soft or observed

    @property
    def student_epochs(self) -> int:
        """Epochs of every student's training."""
        return self.evaluate.epochs or self.relabel.epochs
