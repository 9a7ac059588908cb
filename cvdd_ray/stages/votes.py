"""Priors and votes of a run, as several stages need them."""

import json
from collections.abc import Mapping

from cvdd_ray.config import RunConfig
from cvdd_ray.core.voting import voter_weights, voters_of_image
from cvdd_ray.data.artifacts import sha256
from cvdd_ray.stages.context import Run

PRIORS = "priors.json"


def needs_priors(c: RunConfig) -> bool:
    """Return whether any weight or voter choice of this run depends on the priors."""
    is_voted = c.synthesize.method == "committee"
    votes = is_voted and c.voting.weighting == "prior" and c.voting.size > 1
    weighs_teachers = c.relabel.weighting == "prior" and len(c.relabel.teachers or c.committee.experts) > 1
    return votes or picks_by_prior(c) or (weighs_teachers and (is_voted or c.labels_are_soft))


def picks_by_prior(c: RunConfig) -> bool:
    """Return whether the priors decide who votes on some image."""
    if c.synthesize.method != "committee":
        return False
    return c.voting.selection == "top" or (c.voting.selection == "auto" and 1 in c.ipc and not c.voting.fixed)


def load_priors(run: Run) -> tuple[dict[str, float], str]:
    """Return the prior of every expert in percent and a hash of the numbers; zeros where nothing depends on them.

    Given and measured priors that are equal lead to the same artifacts.  Raises ArtifactError when the stage `prior` has
    not run.
    """
    if not needs_priors(run.config):
        return dict.fromkeys(run.config.committee.experts, 0.0), "not used"
    priors = read_priors(run)
    return priors, priors_hash(priors)


def read_priors(run: Run) -> dict[str, float]:
    """Return what the stage `prior` found, in percent.  Raises ArtifactError when it has not run."""
    return json.loads(run.artifacts.read(run.require("prior", "prior"), PRIORS))["priors"]


def priors_hash(priors: Mapping[str, float]) -> str:
    """Return the hash of priors as later stages depend on them: the numbers, not how they came about."""
    return sha256(json.dumps(dict(sorted(priors.items()))).encode())


def vote_of_image(
    run: Run, priors: Mapping[str, float], ipc: int, image_index: int
) -> tuple[tuple[str, ...], tuple[float, ...]]:
    """Return (voters, weights) of one image index, as the voting settings say."""
    v, seed = run.config.voting, run.config.seed
    voters = voters_of_image(
        run.config.committee.experts, priors, size=v.size, selection=v.selection, fixed=v.fixed, ipc=ipc,
        image_index=image_index, seed=seed,
    )  # fmt: skip
    weights = voter_weights(
        voters, priors, weighting=v.weighting, temperature=v.temperature, image_index=image_index, seed=seed
    )
    return voters, weights
