"""A function of tensors as one compiled graph, gradients taken inside included."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx

from cvdd_ray.errors import ConfigError

Function = Callable[..., tuple[Tensor, ...]]


def is_traced() -> bool:
    """Return whether operations are being written down for a graph."""
    return get_proxy_mode() is not None


def compiled(function: Function, *inputs: Tensor) -> Function:
    """Return `function` compiled by torch's inductor for inputs of these shapes and types; takes seconds to minutes.

    The function may take gradients, but must do the same operations whatever its inputs' values. What it uses besides its
    inputs (weights) is kept as it is now.  Raises ConfigError where it cannot be compiled.
    """
    try:
        traced = make_fx(lambda *given: function(*given))(*inputs)  # which cannot read the arguments of a method
        graph = torch.compile(traced, fullgraph=True, dynamic=False)
        call = torch.no_grad()(graph)
        call(*inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        said = (str(error).strip().splitlines() or [""])[0][:200]
        raise ConfigError(
            f"synthesize.compile: a vote cannot be compiled here ({type(error).__name__}: {said}); it takes a C++ compiler (g++ "
            f"or clang++), on a GPU Triton; install it, or set synthesize.compile=false"
        ) from error
    return call
