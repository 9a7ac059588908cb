"""The sections `runtime` and `storage` of a configuration: what works, and where results go."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cvdd_ray.fields import NonNegative, Positive, PositiveFloat, Section, Whole


class RuntimeConfig(Section):
    engine: Literal["ray", "local"] = "ray"
    """`ray`: experts are actors; `local`: everything in this process (the reference)."""
    address: str | None = None
    """Existing Ray cluster to join, e.g. `auto`; None: a private one on this machine."""
    wait_for_nodes: Positive | None = None
    """Nodes that a joined cluster must have before work starts; None: those that are there."""
    wait_for_gpus: Positive | None = None
    """GPUs that must be free before work starts; an autoscaling cluster is asked for them. None: one if nothing could work."""
    wait_s: PositiveFloat = 900.0
    """How long to wait for nodes and GPUs, in seconds."""
    placement: Literal["auto", "spread", "colocate"] = "auto"
    """`spread`: experts are actors, asked by coordinators; `colocate`: each worker holds them all; `auto`: that if GPUs can."""
    num_cpus: Positive | None = None
    """CPU cores of a private cluster; None: all of this machine."""
    object_store_mb: Annotated[Whole, Field(ge=75)] = 512
    """Object store of a private cluster in MiB."""
    gpus_per_actor: NonNegative | None = None
    """GPU share of each expert or worker; None: GPUs / experts when there are GPUs, at most 1; 0 keeps them on CPU."""
    threads_per_actor: Positive = 1
    """Torch threads of every actor and task."""
    groups_in_flight: Positive = 2
    """Job groups that a coordinator drives at once; there are as many coordinators as keep the experts busy."""
    wire: Literal["ray", "torch"] = "ray"
    """How coordinators ask experts that are actors (`spread`): `ray`: calls; `torch`: connections of torch.distributed (gloo)
    that stay open, over ports of the system's choice."""
    hung_s: PositiveFloat = 600.0
    """Seconds after which an expert that has not answered, or a worker whose group has reported nothing, is taken to hang
    and is started again."""
    log_format: Literal["plain", "json"] = "plain"
    """What the command writes to stderr: lines for people, or one JSON object per event (stages, progress, pieces of
    work, checkpoints, failures) for programs."""

    @model_validator(mode="after")
    def _check(self):
        if self.engine == "local" and self.address:
            raise ValueError("address has no effect with engine 'local'; drop one of the two")
        if self.address is None and (self.wait_for_nodes or self.wait_for_gpus):
            raise ValueError("wait_for_nodes and wait_for_gpus have no effect without an address (e.g. auto)")
        if self.wire != "ray" and (self.engine == "local" or self.placement == "colocate"):
            where = "engine 'local'" if self.engine == "local" else "placement 'colocate'"
            raise ValueError(
                f"wire {self.wire!r} has no effect with {where}, where nobody is asked over a wire; leave it out"
            )
        return self

    @property
    def gpus_per_task(self) -> float:
        """GPU share of a task (an expert's training, label epochs, a student) where there are GPUs."""
        return 0.25 if self.gpus_per_actor is None else min(1.0, self.gpus_per_actor)


class StorageConfig(Section):
    out: str | None = None
    """Directory (or s3:// URI) of the run; None: runs/<recipe>."""
