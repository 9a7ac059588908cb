"""The state of a network in training and of its optimiser as tensors by name, to be saved and gone on from bit for bit."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MODEL, OPTIMIZER = "model/", "optimizer/"


def training_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return parameters and buffers, and the moments of every parameter by its number; not copied."""
    tensors = {f"{MODEL}{name}": value for name, value in model.state_dict().items()}
    for index, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"{OPTIMIZER}{index}/{name}": value for name, value in moments.items() if value is not None}
    return tensors


def load_training_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Load what `training_state` has returned of the same network and optimiser; other tensors are left alone."""
    model.load_state_dict({n.removeprefix(MODEL): value for n, value in state.items() if n.startswith(MODEL)})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, dict[str, Tensor]] = {}
    for name, value in state.items():
        if name.startswith(OPTIMIZER):
            _, index, moment = name.split("/")
            if value.ndim:  # the fused step takes a moment to lie in memory as its parameter does
                value = torch.empty_like(parameters[int(index)]).copy_(value)
            moments.setdefault(int(index), {})[moment] = value
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies on the CPU."""
    return {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
