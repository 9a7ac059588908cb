"""What the stages of a finished run have taken: seconds as they were measured, FLOPs and bytes counted from the artifacts.

FLOPs are those of `core/costs.py`, for the experts that really voted and the tests that were really made; `cvdd plan` counts
the same before a run.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass

from cvdd_ray.core.costs import Network, image_flops, matching_cost, view_flops
from cvdd_ray.data.artifacts import Manifest
from cvdd_ray.data.labels import ONLINE
from cvdd_ray.stages.arms import OURS, TRAINING_SETS
from cvdd_ray.stages.ceiling import STAGE as CEILING_STAGE
from cvdd_ray.stages.evaluate import RESULTS
from cvdd_ray.stages.summary import RunReader


@dataclass(frozen=True)
class StageCost:
    """One finished stage: wall time in seconds, FLOPs (None: what it did was not recorded), bytes of its files."""

    stage: str
    wall_s: float
    flops: int | None
    bytes: int


def stage_costs(reader: RunReader) -> list[StageCost]:
    """Return the cost of every finished stage, in the order of the run."""
    order = [*reader.stages(), *reader.manifests]
    there = [stage for stage in dict.fromkeys(order) if stage in reader.manifests]
    sheet = _Sheet(reader)
    return [
        StageCost(stage, reader.manifests[stage].wall_s, sheet.flops(stage), reader.stage_bytes(stage))
        for stage in there
    ]


def times_asked(iterations: int, num_voters: int, turns: bool) -> list[int]:
    """Return in how many iterations each voter of an image votes: in all of them, or by turns (spec 9.4)."""
    return [len(range(k, iterations, num_voters)) if turns else iterations for k in range(num_voters)]


class _Sheet:
    """Counts the FLOPs of stages; what a stage's manifest does not say (it is older, or of another method) is None."""

    def __init__(self, reader: RunReader):
        self._reader = reader
        self._width = reader.config.committee.width if reader.config else None

    def flops(self, stage: str) -> int | None:
        count: Callable[[Manifest], int] | None = {
            "pretrain": self._pretrain, "prior": self._prior, "initialize": self._initialize,
            "statistics": self._statistics, "trajectories": self._trajectories, "synthesize": self._synthesize,
            "relabel": self._relabel, "evaluate": self._evaluate, "calibrate": lambda made: made.facts["flops"],
        }.get(stage.split("/")[0])  # fmt: skip
        if self._width is None or count is None:
            return None
        try:
            return (self._ceiling if stage == CEILING_STAGE else count)(self._reader.manifests[stage])
        except KeyError:
            return None

    def _network(self, made: Manifest, name: str, width: float | None = None):
        """Return the FLOPs per image of a network; experts have the committee's width."""
        return image_flops(self._named(made, name, self._width if width is None else width))

    def _named(self, made: Manifest, name: str, width: float) -> Network:
        return Network(name, len(made.identity["classes"]), made.identity["settings"]["dataset"]["image_size"], width)

    def _trajectories(self, made: Manifest) -> int:
        t = made.identity["settings"]["trajectories"]
        return t["experts"] * t["epochs"] * made.facts["train_images"] * self._network(made, t["network"]).training

    def _view(self, made: Manifest) -> int:
        return view_flops(made.identity["settings"]["dataset"]["image_size"])

    def _pretrain(self, made: Manifest) -> int:
        settings, network = made.identity["settings"], self._network(made, made.stage.split("/")[1])
        trained = settings["pretrain"]["epochs"] * made.facts["train_images"] if settings["pretrain"] else 0
        return trained * network.training + made.facts["holdout_images"] * network.forward

    def _prior(self, made: Manifest) -> int:
        settings = made.identity["settings"]
        if settings["prior"]["method"] == "given":
            return 0
        c, view = settings["prior"], self._view(made)
        experts = [name.split("/")[1] for name in made.identity["inputs"] if name.startswith("pretrain/")]
        student, num_images = (
            self._network(made, c["student"], settings["width"]), c["ipc"] * len(made.identity["classes"])
        )  # fmt: skip
        tested = made.facts["tests"] * made.facts["holdout_images"] * student.forward
        total = 0
        for name in experts:
            expert = self._network(made, name)
            total += c["iterations"] * num_images * (expert.vote + 2 * view)
            total += c["seeds"] * (c["epochs"] * num_images * (2 * view + expert.forward + student.training) + tested)
        return total

    def _initialize(self, made: Manifest) -> int:
        c = made.identity["settings"]["initialize"]
        if c["method"] != "patches":
            return 0
        return made.facts["scored_images"] * c["num_crops"] * self._network(made, c["observer"]).forward

    def _statistics(self, made: Manifest) -> int:
        """The train split through every expert, twice where classes have statistics of their own."""
        total, passes = 0, 1 + made.identity["settings"]["by_class"]
        for stage in (name for name in made.identity["inputs"] if name.startswith("pretrain/")):
            images = self._reader.manifests[stage].facts["train_images"]
            total += passes * images * self._network(made, stage.split("/")[1]).forward
        return total

    def _synthesize(self, made: Manifest) -> int:
        c = made.identity["settings"]["synthesize"]
        iterations = c["iterations"]
        if t := c.get("trajectories"):
            images = made.facts["images"]
            batch = min(t["step_images"] or images, images)
            return iterations * t["steps"] * matching_cost(self._named(made, t["network"], self._width), batch).flops
        votes = [voters for _, voters, _ in self._reader.votes(made.stage)]
        turns = self._reader.config.voting.turns
        calls = sum(
            asked * self._network(made, name).vote
            for voters in votes
            for name, asked in zip(voters, times_asked(iterations, len(voters), turns), strict=True)
        )
        return calls + iterations * len(votes) * 2 * self._view(made)

    def _labelling(self, made: Manifest) -> int:
        """Return the FLOPs of labelling one image once."""
        teachers = made.identity["settings"]["relabel"]["teachers"]
        return sum(self._network(made, name).forward for name in teachers) + self._view(made)

    def _relabel(self, made: Manifest) -> int:
        if ONLINE in made.files:
            return 0
        c, ipc = made.identity["settings"]["relabel"], int(made.stage.split("/")[1].removeprefix("ipc"))
        epochs = c.get("stored_epochs") or c["epochs"]
        return epochs * ipc * len(made.identity["classes"]) * self._labelling(made)

    def _evaluate(self, made: Manifest) -> int:
        c, ipc = made.identity["settings"]["evaluate"], int(made.stage.removeprefix("evaluate/ipc"))
        labels = self._reader.manifests.get(f"relabel/ipc{ipc}/{OURS}")
        online = self._labelling(labels) if labels and ONLINE in labels.files else 0
        num_images, total = ipc * len(made.identity["classes"]), 0
        for run in json.loads(self._reader.file(made.stage, RESULTS))["runs"]:
            student = self._network(made, run["student"], c["width"])
            asked = online if TRAINING_SETS[run["arm"]].label_set else 0
            total += c["epochs"] * num_images * (student.training + self._view(made) + asked)
            total += len(run["curve"]) * made.facts["test_images"] * student.forward
        return total

    def _ceiling(self, made: Manifest) -> int:
        settings, total = made.identity["settings"], 0
        for run in json.loads(self._reader.file(made.stage, RESULTS))["runs"]:
            student = self._network(made, run["student"], settings["evaluate"]["width"])
            total += settings["pretrain"]["epochs"] * made.facts["train_images"] * student.training
            total += len(run["curve"]) * made.facts["test_images"] * student.forward
        return total
