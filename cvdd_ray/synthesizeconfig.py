"""The section `synthesize` of a configuration: how images are distilled (spec sections 5 and 9)."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from cvdd_ray.fields import (
    AreaRange,
    Beta,
    Count,
    NonNegative,
    Number,
    Positive,
    PositiveFloat,
    PositiveOrAuto,
    Section,
)
from cvdd_ray.matchingconfig import MatchingConfig
from cvdd_ray.trajectoryconfig import TrajectoryConfig

CropSchedule = Literal["constant", "cosine", "linear", "step"]


class SynthesizeConfig(Section):
    LATER: ClassVar[tuple[str, ...]] = (
        "crop_schedule", "crop_milestone", "roll_both_ways", "crop", "pad", "class_together", "densification",
        "densification_temperature", "matching", "precision", "compile", "method",
        "trajectories",
    )  # fmt: skip
    OF_TRAJECTORIES: ClassVar[set[str]] = {
        "method", "trajectories", "iterations", "lr", "checkpoint_every", "image_format",
    }  # fmt: skip
    """Settings that method `trajectories` knows."""

    iterations: Count = 4000
    """Adam steps per image; 0: the starting images are the result (RDED)."""
    lr: PositiveFloat = 0.25
    """Initial learning rate on the pixels (normalised space), cosine to 0; with method `trajectories` SGD's, constant."""
    betas: tuple[Beta, Beta] = (0.5, 0.9)
    """Adam's beta1, beta2."""
    bn_weight: NonNegative = 0.01
    """r_bn: weight of the BatchNorm-matching term."""
    first_bn_multiplier: NonNegative = 10.0
    """Multiplier of the first BatchNorm layer's term."""
    augment: bool = True
    """Random resized crop and flip of every view; the roll is always on."""
    crop_scale: AreaRange = (0.08, 1.0)
    """Area range of the random resized crop."""
    crop_schedule: CropSchedule = "constant"
    """Course of the smallest area (CDA): from the largest one down to it, as a `cosine` or a `linear` line, or at the largest
    and then at once (`step`); `constant` is always the smallest."""
    crop_milestone: Annotated[Number, Field(gt=0, le=1)] = 1.0
    """Share of the iterations in which it gets there."""
    roll: Count | None = None
    """Largest circular shift in pixels, drawn from 0..roll; None: the dataset table's (4, at 224 px 32)."""
    roll_both_ways: bool = False
    """Draw shifts from -roll..roll instead (SRe2L on Tiny-ImageNet)."""
    class_chunk: Positive | None = None
    """Classes optimised together, one image each; None: the dataset table's."""
    jobs_per_group: PositiveOrAuto = 5
    """Jobs (image index, class chunk) advanced together: jobs that share an expert are stacked in one call. `auto`: the
    number that is fastest where synthesis begins, measured once per set of jobs and kept (stage `calibrate`)."""
    checkpoint_every: Positive = 500
    """Iterations between checkpoints of an unfinished group."""
    image_format: Literal["png", "jpeg75_trunc"] = "png"
    """Lossless PNG, or the published code's truncation and JPEG quality 75 (parity flag)."""
    crop: Literal["random_resized", "pad"] = "random_resized"
    """What `augment` crops: a random resized crop, or the image moved by up to `pad` pixels with zeros around."""
    pad: Count = 4
    """Largest shift of crop `pad` in pixels."""
    class_together: bool = False
    """All images of a class are optimised together, class by class, with those of the chunk's other classes (G-VBSM),
    instead of one image of every class. They must have the same voters."""
    densification: NonNegative = 0.0
    """Weight of a term that keeps the images of a class apart: KL(softmax(l / temperature) || softmax(l)) of the eigenvalues
    l of their products. Needs class_together; nothing at IPC 1."""
    densification_temperature: PositiveFloat = 4.0
    """Temperature of that term."""
    matching: MatchingConfig = MatchingConfig()
    """Which statistics bn_weight weighs; first_bn_multiplier is the first one's, convolutions included."""
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    """Arithmetic of the experts' votes: full, TF32 (matrix products and convolutions of a GPU; refused on a CPU), or bfloat16
    autocast of the forward pass. Images, Adam, gradients, losses and matched statistics are float32 in all three."""
    compile: bool = False
    """Compile every expert's vote with torch's inductor, once per process and number of jobs in a call, which takes minutes
    and a C++ compiler (on GPUs Triton). Last bits are then the compiler's, too."""
    method: Literal["committee", "trajectories"] = "committee"
    """What guides the images: votes of the committee, or trainings on real images that steps on the synthetic ones are to
    lead along (MTT), all images of the set together. Of this section that knows iterations, lr, checkpoint_every,
    image_format and `trajectories` alone."""
    trajectories: TrajectoryConfig = TrajectoryConfig()
    """The trainings that are matched, and the steps, of method `trajectories`."""

    @property
    def planned_jobs_per_group(self) -> int:
        """Jobs per group, or the default where they are yet to be measured."""
        return (
            type(self).model_fields["jobs_per_group"].default if self.jobs_per_group == "auto" else self.jobs_per_group
        )

    @model_validator(mode="after")
    def _check(self):
        self._check_method()
        if self.crop_schedule == "constant" and self.crop_milestone != 1:
            raise ValueError("crop_milestone has no effect with crop_schedule 'constant'; leave it out")
        shifts, scale = self.crop == "pad", type(self).model_fields["crop_scale"].default
        if shifts and (not self.augment or self.crop_scale != scale or self.crop_schedule != "constant"):
            raise ValueError(
                "crop 'pad' needs augment, and knows no crop_scale and crop_schedule; leave one of them out"
            )
        if not shifts and self.pad != type(self).model_fields["pad"].default:
            raise ValueError(f"pad {self.pad} has no effect with crop {self.crop!r}; set crop=pad or leave it out")
        if self.compile and self.matching.convolutions:
            raise ValueError(
                "compile knows votes that match BatchNorm alone, not matching.convolutions; drop one of the two"
            )
        if self.densification and not self.class_together:
            raise ValueError(
                "densification has no effect without class_together, which puts images of a class together"
            )
        if self.densification_temperature != 4.0 and not self.densification:
            raise ValueError("densification_temperature has no effect without densification")
        if self.crop_schedule != "constant" and not self.augment:
            raise ValueError(f"crop_schedule {self.crop_schedule!r} has no effect without augment; leave it out")
        return self

    def _check_method(self) -> None:
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if self.method == "committee":
            if "trajectories" in changed:
                raise ValueError("trajectories has no effect with method 'committee'; set method=trajectories")
            return
        if not self.iterations:
            raise ValueError("method 'trajectories' needs iterations of at least 1")
        if idle := [name for name in changed if name not in self.OF_TRAJECTORIES]:
            raise ValueError(f"{idle[0]} has no effect with method 'trajectories'; leave it out")
