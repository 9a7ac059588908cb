"""Priors and votes of a run, as several stages need them."""

import json
from collections.abc import Mapping

from cvdd_ray.config import RunConfig
from cvdd_ray.core.voting import voter_weights, voters_of_image
from cvdd_ray.stages.context import Run

PRIORS = "priors.json"


def needs_priors(c: RunConfig) -> bool:
    """Return whether any weight or voter choice of this run depends on the priors."""
    votes = c.voting.weighting == "prior" and c.voting.size > 1
    picks = c.voting.selection == "top" or (c.voting.selection == "auto" and 1 in c.ipc and not c.voting.fixed)
    return votes or picks or (c.relabel.weighting == "prior" and len(c.relabel.teachers or c.committee.experts) > 1)


def load_priors(run: Run) -> tuple[dict[str, float], str]:
    """Return the prior of every expert in percent and the artifact's content hash; zeros where nothing depends on them.

    Raises ArtifactError when the stage `prior` has not run.
    """
    if not needs_priors(run.config):
        return dict.fromkeys(run.config.committee.experts, 0.0), "not used"
    manifest = run.require("prior", "prior")
    return json.loads(run.artifacts.read(manifest, PRIORS))["priors"], manifest.content


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
