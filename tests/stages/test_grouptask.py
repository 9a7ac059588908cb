"""A group of jobs as a unit of work: what it tells while it is at work."""

from types import SimpleNamespace

import pytest
import torch

from cvdd_ray.core.committee import Vote
from cvdd_ray.core.synthesis import Job, SynthesisSettings
from cvdd_ray.data.datasets import DATASETS
from cvdd_ray.data.storage import Store
from cvdd_ray.stages import grouptask
from cvdd_ray.stages.grouptask import GroupTask, NoiseStarts, Notice, run_group


@pytest.mark.parametrize(
    ("iteration_s", "told"),
    [
        (0.25, [1, 3, 5, 7, 9, 10]),  # twice a second
        (0.0, [1, 10]),  # a message costs more than such an iteration
        (60.0, [*range(1, 11)]),
    ],
)
def test_a_group_tells_twice_a_second_how_far_it_is(iteration_s, told, monkeypatch, tmp_path):
    now, reports = [100.0], []
    monkeypatch.setattr(grouptask, "time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow:
        def vote(self, ballots):
            now[0] += iteration_s
            return {
                name: Vote(torch.zeros_like(b.views_GBCHW), torch.full((1,), now[0]), torch.zeros(1))
                for name, b in ballots.items()
            }

    info = DATASETS["cifar10"]
    settings = SynthesisSettings(
        seed=0, iterations=10, lr=0.1, betas=(0.5, 0.9), augment=False, flip=False, crop_scale=(0.5, 1.0), roll=0,
        low_C=(-2.0,) * 3, high_C=(2.0,) * 3,
    )  # fmt: skip
    job = Job(image_index=0, chunk=0, labels=(0, 1), voters=("a",), weights=(1.0,))
    task = GroupTask((job,), NoiseStarts(0, 8), settings, info, "png", "checkpoint", "piece.arrow")
    run_group(Slow(), task, Store(tmp_path), torch.device("cpu"), reports.append, Notice())
    assert [round(report["done"] * 10) for report in reports] == told
    losses = [report["experts"]["a"][0] for report in reports]
    assert losses == pytest.approx([100.0 + iteration * iteration_s for iteration in told])
