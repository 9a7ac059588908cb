"""The section `relabel` of a configuration: who labels which views, and which labels are stored in which form."""

from typing import ClassVar, Literal

from pydantic import model_validator

from cvdd_ray.fields import AreaRange, Names, Positive, PositiveFloat, Section


class RelabelConfig(Section):
    STORAGE: ClassVar[tuple[str, ...]] = ("stored_epochs", "precision", "top_k", "tail", "online")
    """Which labels are stored, and how."""
    LATER: ClassVar[tuple[str, ...]] = (*STORAGE, "rescale")

    teachers: Names | None = None
    """Experts that write the soft labels; None: the whole committee."""
    weighting: Literal["prior", "equal"] = "prior"
    """Teacher weights: softmax(prior / temperature), or 1/K."""
    temperature: PositiveFloat = 10.0
    """Softmax temperature over priors in percent."""
    rescale: bool = False
    """Bring every teacher's logits of a batch to the mean of the teachers' Frobenius norms before they are added (G-VBSM)."""
    batchnorm: Literal["batch", "eval"] = "batch"
    """`batch`: BSSL, every BatchNorm uses its group's own statistics; `eval`: running statistics."""
    scope: Literal["bn", "full"] = "bn"
    """`bn`: BatchNorm alone leaves eval mode; `full`: dropout as well (parity with the published code at 224 px)."""
    epochs: Positive = 300
    """Epochs a student can be trained with these labels; evaluate cannot train longer."""
    stored_epochs: Positive | None = None
    """Label and store only so many epochs, fewer than `epochs`: epoch e of a student is stored epoch e mod stored_epochs
    again, whole batches with their views, since a label belongs to its batch. Learning rate, tests and length of an epoch
    are as without it. Bytes and teachers' work shrink by stored_epochs / epochs. There is no share of the batches of an
    epoch to keep instead: at equal bytes a student would see the same number of labelled batches, but not every image equally
    often. None: every epoch has labels of its own."""
    precision: Literal["float16", "int8"] = "float16"
    """Numbers in which logits are stored. `int8`: 255 levels from the lowest to the highest of an image's stored logits, with
    a float16 scale and offset per image."""
    top_k: Positive | None = None
    """Store only so many logits of an image, its largest, each with its class; None: all. Logits and no probabilities, since
    the students' temperature is chosen later."""
    tail: Literal["drop", "spread"] = "drop"
    """What becomes of the classes that `top_k` leaves out. `drop`: probability 0, the k are renormalised; `spread`: each has
    the mean of their logits, one more number per image. At a high temperature most of the teachers' probability is theirs."""
    online: bool = False
    """Store no labels: every student asks the teachers itself, batch by batch, with the same views and BatchNorm groups, and
    gets their logits unrounded. Every student then does the teachers' work again."""
    batch_size: Positive = 16
    """Images per batch (CutMix partners come from the same batch); a smaller set is one batch."""
    bn_group: Positive | None = None
    """Images per BatchNorm group in labelling and micro-batch of the student; None: batch_size // 2."""
    cutmix: bool = True
    """CutMix with Beta(1,1) on every batch."""
    crop_scale: AreaRange = (0.08, 1.0)
    """Area range of the random resized crop."""

    def resolved_batch_size(self, num_images: int) -> int:
        """Images per batch of a set of `num_images`: CIFAR-10 at IPC 1 is one batch of 10, as published."""
        return min(self.batch_size, num_images)

    def resolved_bn_group(self, num_images: int) -> int:
        """Images per BatchNorm group of a set of `num_images`."""
        batch = self.resolved_batch_size(num_images)
        return min(self.bn_group or max(2, batch // 2), batch)

    @property
    def labelled_epochs(self) -> int:
        """Epochs of views that the teachers label."""
        return self.stored_epochs or self.epochs

    @model_validator(mode="after")
    def _check(self):
        if self.stored_epochs is not None and self.stored_epochs >= self.epochs:
            raise ValueError(
                f"stored_epochs {self.stored_epochs} has no effect with {self.epochs} epochs; use fewer, or leave it out"
            )
        if self.rescale and self.teachers is not None and len(self.teachers) == 1:
            raise ValueError("rescale has no effect with one teacher; leave it out")
        if self.tail != "drop" and self.top_k is None:
            raise ValueError(f"tail {self.tail!r} has no effect without top_k; set top_k or leave it out")
        idle = [name for name in self.STORAGE if name not in self.unused() and name != "online"]
        if self.online and idle:
            raise ValueError(f"{idle[0]} has no effect with online labels, which are not stored; leave it out")
        if self.scope == "full" and self.batchnorm == "eval":
            raise ValueError("scope 'full' has no effect with batchnorm 'eval'")
        if self.bn_group and self.bn_group > self.batch_size:
            raise ValueError(f"bn_group {self.bn_group} is larger than batch_size {self.batch_size}")
        if self.batchnorm == "batch" and min(self.bn_group or 2, self.batch_size) < 2:
            raise ValueError("batchnorm 'batch' needs bn_group and batch_size of at least 2 images to have statistics")
        return self
