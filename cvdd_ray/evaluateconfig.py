"""The section `evaluate` of a configuration: how students are trained and what is beside ours in the table (spec section 7)."""

from typing import Annotated, ClassVar, Literal

from pydantic import AfterValidator, model_validator

from cvdd_ray.fields import Beta, Count, Names, NonNegative, Positive, PositiveFloat, Section, Width, unrepeated


class Phase(Section):
    """Training settings that change from an epoch on; None: as before."""

    from_epoch: Positive
    """First epoch (0-based) that has the new settings."""
    lr: PositiveFloat | None = None
    """AdamW learning rate."""
    weight_decay: NonNegative | None = None
    """AdamW weight decay."""
    eta: PositiveFloat | None = None
    """Stretch of the schedule."""
    temperature: PositiveFloat | None = None
    """Temperature of the KL divergence."""

    def changes(self) -> dict[str, float]:
        """Return what changes, by name."""
        return self.model_dump(exclude={"from_epoch"}, exclude_none=True)

    @model_validator(mode="after")
    def _check(self):
        if not self.changes():
            raise ValueError(
                f"changes nothing from epoch {self.from_epoch} on; name one of {', '.join(MUTABLE_SETTINGS)}"
            )
        return self


MUTABLE_SETTINGS = tuple(name for name in Phase.model_fields if name != "from_epoch")  # may change in mid-training


Baseline = Literal[
    "random_hard", "random_soft", "start_soft", "eval_labels", "distilled_hard", "distilled_plain", "random_plain", "real_hard"
]  # fmt: skip


class EvaluateConfig(Section):
    LATER: ClassVar[tuple[str, ...]] = ("loss", "label_weight", "ema", "optimizer", "precision", "labels", "learned_lr")

    students: Names = ("resnet18",)
    """Networks trained from scratch on the distilled set."""
    width: Width | None = None
    """Channel multiplier of the students; None: the committee's."""
    epochs: Positive | None = None
    """Passes over the distilled set; None: relabel.epochs."""
    optimizer: Literal["adamw", "sgd"] = "adamw"
    """AdamW, or SGD with momentum .9."""
    lr: PositiveFloat = 1e-3
    """Learning rate."""
    learned_lr: bool = False
    """Take the learning rate that was learned with the images (synthesize.method `trajectories`) instead of `lr`."""
    weight_decay: NonNegative = 0.01
    """Weight decay: AdamW's on weights with more than one dimension and 0 elsewhere, SGD's on all parameters."""
    eta: PositiveFloat = 1.0
    """Stretch of the schedule, stepped per epoch; cosine: lr(e) = lr/2 (1 + cos(pi e / (E eta)))."""
    schedule: Literal["cosine", "cosine_linear", "linear", "constant", "step"] = "cosine"
    """Course of the learning rate; `cosine_linear`: the cosine for 5/6 of the epochs, then a line to 0; `linear`: lr(e) =
    lr (1 - e / (E eta)); `constant` knows no eta, steps are `phases`; `step`, which knows none either, goes down to a tenth
    after the middle, from epoch E // 2 + 2 on (MTT)."""
    warmup_epochs: Count = 0
    """Epochs of linear climb before the schedule, which then has the rest of the epochs."""
    phases: tuple[Phase, ...] = ()
    """Settings that change during the training, in rising order: the schedule a population-based sweep has found."""
    temperature: PositiveFloat = 20.0
    """Temperature of the KL divergence (no T squared factor)."""
    loss: Literal["kl", "mse_gt"] = "kl"
    """KL divergence from the soft labels, or mean squared error of logits + label_weight * cross-entropy with the label of the
    image, that before CutMix (G-VBSM, EDC)."""
    label_weight: NonNegative = 0.0
    """Weight of the cross-entropy in `mse_gt`."""
    ema: Beta = 0.0
    """Decay of a moving average of a student's parameters, which is tested in its place (EDC: 0.99); BatchNorm's running
    statistics stay the student's own. 0: none."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of a student's forward pass in training: full, or bfloat16 autocast with float32 weights, for GPUs; losses
    and tests are float32."""
    labels: Literal["soft", "hard"] = "soft"
    """Labels of our row: soft ones of the stage `relabel`, or the images' classes (MTT), the row `distilled_hard`; then nothing
    is relabelled, and no row has soft labels."""
    seeds: Positive = 3
    """Students per row of the table; mean and standard deviation are over them."""
    first_seed: Count = 0
    """Number of the first student: others are other students (a sweep's final test takes fresh ones)."""
    test_every: Positive = 10
    """Epochs between test evaluations; the last epoch is always tested."""
    workers: Positive = 1
    """Processes that train one student together, with a GPU each where there are GPUs: the micro-batches of a batch are
    dealt to them, so at most batch_size / bn_group. Same student up to the last bits of sums; needs Ray."""
    checkpoint_minutes: NonNegative = 5.0
    """Minutes between checkpoints of a student in training, written at the end of an epoch; 0: after every epoch."""
    baselines: Annotated[tuple[Baseline, ...], AfterValidator(unrepeated)] = (
        "random_hard",
        "random_soft",
        "start_soft",
        "eval_labels",
    )
    """Rows beside ours at equal IPC: random real images with hard labels, the same with our soft labels, the starting
    images with our soft labels, our images with eval-mode labels. More: our images with hard labels (`distilled_hard`); ours
    and random ones with soft labels of whole images, without augmentation (`..._plain`); students trained as section
    `pretrain` says on all real images with hard labels, the ceiling (`real_hard`)."""

    @model_validator(mode="after")
    def _check(self):
        if self.schedule in ("constant", "step") and self.eta != 1:
            raise ValueError(f"eta {self.eta:g} has no effect with schedule {self.schedule!r}; leave it at 1")
        if self.learned_lr and self.lr != type(self).model_fields["lr"].default:
            raise ValueError(f"lr {self.lr:g} has no effect with learned_lr; leave one of the two out")
        if self.labels == "hard":
            self._check_hard_labels()
        lowest = min([self.eta, *(phase.eta for phase in self.phases if phase.eta is not None)])
        if self.schedule == "linear" and lowest < 1:
            raise ValueError(f"eta {lowest:g} would take schedule 'linear' below 0; use at least 1")
        if self.warmup_epochs and self.epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be fewer than the {self.epochs} epochs")
        if self.label_weight and self.loss == "kl":
            raise ValueError("label_weight has no effect with loss 'kl'; set loss=mse_gt or leave it out")
        warm = self.temperature != type(self).model_fields["temperature"].default
        if self.loss == "mse_gt" and (warm or any(phase.temperature for phase in self.phases)):
            raise ValueError("temperature has no effect with loss 'mse_gt', which compares logits; leave it out")
        starts = [phase.from_epoch for phase in self.phases]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases must begin at rising epochs, got {starts}")
        return self

    def _check_hard_labels(self) -> None:
        allowed = ("random_hard", "real_hard")
        if other := [name for name in self.baselines if name not in allowed]:
            raise ValueError(
                f"baselines has {other[0]}, but with labels 'hard' there are no soft labels, and our own row is distilled_hard; "
                f"use some of {', '.join(allowed)}"
            )
        if self.loss != "kl":
            raise ValueError(f"loss {self.loss!r} has no effect with labels 'hard'; leave it out")
