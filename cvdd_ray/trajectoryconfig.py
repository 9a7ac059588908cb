"""The part `trajectories` of synthesis: whose training is matched, and how much of it (MTT, spec 9.6)."""

from pydantic import model_validator

from cvdd_ray.fields import Beta, NonNegative, Positive, PositiveFloat, Section


class TrajectoryConfig(Section):
    network: str = "convnet3"
    """Network whose training is matched; it must have no BatchNorm. Its channels are those of `committee.width`."""
    experts: Positive = 100
    """Trainings on the real train split whose parameters are kept (stage `trajectories`)."""
    epochs: Positive = 50
    """Epochs of each; parameters are kept at the start and after every epoch."""
    batch_size: Positive = 256
    """Real images per step of an expert."""
    expert_lr: PositiveFloat = 0.01
    """Learning rate of the experts: SGD without momentum and decay."""
    max_start: Positive = 20
    """A piece of trajectory begins after 0..max_start-1 epochs."""
    target_epochs: Positive = 3
    """Epochs from the start of a piece to its end (M)."""
    steps: Positive = 20
    """Steps of SGD on the synthetic images that are to lead from the start of a piece to its end (N)."""
    step_images: Positive | None = None
    """Synthetic images per step; None: all of them."""
    lr_start: PositiveFloat = 0.01
    """Learning rate of these steps at first; it is learned with the images."""
    lr_of_lr: NonNegative = 1e-5
    """Learning rate of the learning rate; 0 keeps it as it is."""
    momentum: Beta = 0.5
    """Momentum of the images and of the learning rate."""

    @model_validator(mode="after")
    def _check(self):
        if self.last_epoch > self.epochs:
            raise ValueError(
                f"max_start {self.max_start} and target_epochs {self.target_epochs} need trajectories of {self.last_epoch} "
                f"epochs, got {self.epochs}; lower one of the two or raise epochs"
            )
        return self

    @property
    def last_epoch(self) -> int:
        """Last epoch whose parameters a piece may end at."""
        return self.max_start - 1 + self.target_epochs
