"""A short chaos run: faults of many kinds at random moments, and images, labels and students that are the undisturbed ones.
The long one is `make chaos`."""

import chaos
import pytest


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    return chaos.calm_run(tmp_path_factory.mktemp("calm"))


@pytest.mark.parametrize(
    ("placement", "kinds"),
    [
        ("spread", ("disk_full", "expert", "device", "driver_interrupted")),
        ("colocate", ("checkpoint", "worker", "mailbox", "task")),
    ],
)
def test_nothing_is_lost_and_nothing_changed(placement, kinds, calm, tmp_path):
    outcome = chaos.disturbed(calm, tmp_path, kinds, seed=1, placement=placement, every_s=0.5)
    assert outcome.complaint is None, outcome.complaint
    assert len(outcome.faults) >= len(kinds) - 1  # the last may find nothing left to disturb
