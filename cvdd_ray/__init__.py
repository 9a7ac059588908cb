"""Dataset distillation by committee voting (CV-DD) on Ray.

config = cvdd_ray.load_config("digits-demo", ["synthesize.iterations=50"])
cvdd_ray.run(config, out="runs/mine")
dataset = cvdd_ray.load_distilled("runs/mine")
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cvdd_ray.api import *

__all__ = [
    "ArtifactError",
    "ConfigError",
    "CvddError",
    "DataError",
    "DistilledDataset",
    "NumericsError",
    "Plan",
    "Run",
    "RunConfig",
    "SweepConfig",
    "check",
    "evaluate",
    "export",
    "initialize",
    "load_config",
    "load_distilled",
    "load_sweep",
    "plan",
    "pretrain",
    "prior",
    "relabel",
    "run",
    "run_all",
    "sweep",
    "synthesize",
    "trainable",
    "write_report",
]


def __getattr__(name: str) -> Any:
    """Load the library when something of it is first asked for: what does without PyTorch starts in a second."""
    if name in __all__:
        return getattr(import_module("cvdd_ray.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
