"""The part `matching` of synthesis: which statistics of the networks are matched, and how (spec 9.4, 9.5)."""

from pydantic import model_validator

from cvdd_ray.fields import Beta, Fraction, Positive, Section


class MatchingConfig(Section):
    convolutions: bool = False
    """Match the statistics of every convolution's input, too: mean and variance per channel and per tile of its map, against
    those of a pass over the augmented train split (stage `statistics`)."""
    patch_size: Positive | None = None
    """Side of a tile in pixels; None: 4 up to 64 px, 16 above."""
    momentum: Beta = 0.0
    """Share of the old value in the moving average of the images' statistics, which starts at 0."""
    drop_rate: Beta = 0.0
    """Probability that a convolution is left out of one vote."""
    class_share: Fraction = 0.0
    """Share of the term whose targets are the statistics of the batch's classes alone (EDC: 0.5)."""
    batch_size: Positive = 64
    """Images per batch of the pass over the train split."""

    @model_validator(mode="after")
    def _check(self):
        changed = [name for name, field in type(self).model_fields.items() if getattr(self, name) != field.default]
        if changed and not self.convolutions:
            raise ValueError(f"{changed[0]} has no effect without convolutions; set convolutions=true or leave it out")
        return self

    def tile(self, image_size: int) -> int:
        """Side of a tile in pixels for images of this size."""
        return self.patch_size or (4 if image_size <= 64 else 16)
