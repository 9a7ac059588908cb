"""Who votes on an image, and with what weight (paper sections 3.2-3.3, spec 5.5-5.6)."""

import math
from collections.abc import Mapping, Sequence
from itertools import combinations

import torch

from cvdd_ray.core.keys import generator
from cvdd_ray.errors import ConfigError


def prior_weights(priors: Sequence[float], temperature: float) -> tuple[float, ...]:
    """Return softmax(prior / temperature) for priors in percent; adding a constant to all changes nothing."""
    highest = max(priors)
    exponentials = [math.exp((prior - highest) / temperature) for prior in priors]
    total = sum(exponentials)
    return tuple(value / total for value in exponentials)


def voters_of_image(
    experts: Sequence[str],
    priors: Mapping[str, float],
    *,
    size: int,
    selection: str,
    fixed: Sequence[str] | None,
    ipc: int,
    image_index: int,
    seed: int,
) -> tuple[str, ...]:
    """Return the experts that vote on image `image_index` of every class, in committee order.

    `auto` follows the published settings 3-5: at IPC 1 the fixed pair (or the highest priors), up to as many images as
    there are combinations the i-th combination, beyond that a draw per index that depends on (seed, index) alone.
    Raises ConfigError for a size or a fixed voter that the committee does not have.  Source: spec 5.6, decision 9.
    """
    if size > len(experts):
        raise ConfigError(
            f"voting.size: got {size}, but the committee has {len(experts)} experts: {', '.join(experts)}"
        )
    choices = list(combinations(experts, size))
    if selection == "auto":
        if ipc == 1:
            selection = "fixed" if fixed else "top"
        else:
            selection = "enumerate" if ipc <= len(choices) else "random"
    if selection == "fixed":
        unknown = sorted(set(fixed) - set(experts))
        if unknown:
            raise ConfigError(f"voting.fixed: {unknown} not in the committee; its experts are {', '.join(experts)}")
        return tuple(name for name in experts if name in fixed)
    if selection == "top":
        best = sorted(experts, key=lambda name: -priors[name])[:size]
        return tuple(name for name in experts if name in best)
    if selection == "enumerate":
        return choices[image_index % len(choices)]
    drawn = torch.randint(len(choices), (), generator=generator(seed, "voters", image_index))
    return choices[int(drawn)]


def voter_weights(
    voters: Sequence[str],
    priors: Mapping[str, float],
    *,
    weighting: str,
    temperature: float,
    image_index: int,
    seed: int,
) -> tuple[float, ...]:
    """Return the voters' weights (sum 1); `random` draws uniforms once per image index.  Source: spec 5.5."""
    if weighting == "prior":
        return prior_weights([priors[name] for name in voters], temperature)
    if weighting == "equal":
        return (1.0 / len(voters),) * len(voters)
    uniforms = torch.rand(len(voters), generator=generator(seed, "voter-weights", image_index), dtype=torch.float64)
    return tuple((uniforms / uniforms.sum()).tolist())
