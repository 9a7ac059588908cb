"""What Ray costs: the arithmetic by hand, and a small measurement."""

import json

import pytest

from cvdd_ray.bench.unreal import unreal_run
from cvdd_ray.bench.works import synthesis_work
from cvdd_ray.errors import ConfigError
from cvdd_ray.recipes import load_config
from cvdd_ray.runner.raybench import Placed, RayCosts, Wire, measure_ray, with_two_voters
from cvdd_ray.runner.raybenchreport import plain_ray, rich_ray

TINY = [
    "committee.experts=[resnet18,mobilenet_v2,shufflenet_v2]", "committee.width=0.1", "voting.size=2", "voting.fixed=null",
    "runtime.num_cpus=2", "runtime.object_store_mb=100", "synthesize.jobs_per_group=1",
]  # fmt: skip


def test_shares_of_the_cores_by_hand():
    one = Wire(10.0, {"a": 6.0, "b": 8.0}, 1.0, 17.0, {"a": 7.0, "b": 9.5}, 500)
    assert one.shares(2) == pytest.approx({"votes": 0.7, "steps": 0.05, "ray": 0.1, "idle": 0.15})
    assert one.waiting() == pytest.approx({"a": 0.3, "b": 0.05})
    assert Placed(10.0, 18.0, 500).idle(2) == pytest.approx(0.1)
    two = Wire(20.0, {"a": 16.0, "b": 16.0}, 1.0, 34.0, {"a": 8.0, "b": 8.0}, 500)
    costs = RayCosts(
        2, 2, 50, {"ray": (one, two), "torch": (one,)}, 100, {"ray": (0.002, 0.004, 0.009), "torch": (0.001,)}
    )
    assert costs.shares()["ray"]["votes"] == pytest.approx((0.75, 0.7, 0.8))
    assert costs.ms()["ray"]["message"] == pytest.approx((4, 2, 9))
    assert costs.ms()["ray"]["image and iteration"] == pytest.approx((30, 20, 40))
    assert costs.ms()["torch"]["message"] == pytest.approx((1, 1, 1))
    assert costs.placed() == {}


def test_a_measurement_adds_up():
    config = load_config("digits-demo", TINY)
    costs = measure_ray(config, ["wire", "scheduler"], ipc=2, rounds=1, iterations=3)
    assert set(costs.wires) == {"ray", "torch"}
    for (wire,) in costs.wires.values():
        assert len(wire.vote_cpu_s) == 2
        assert all(0 < wire.vote_cpu_s[name] <= wire.vote_wall_s[name] < wire.wall_s for name in wire.vote_cpu_s)
        assert 0 < wire.step_cpu_s < wire.total_cpu_s
        assert sum(wire.shares(costs.cores).values()) == pytest.approx(1.0)
    assert costs.message_bytes == 10 * 3 * 16 * 16 * 4
    assert all(len(seconds) == 20 and min(seconds) > 0 for seconds in costs.messages_s.values())
    assert set(costs.placements) == {"colocate", "spread"}
    for (placed,) in costs.placements.values():
        assert placed.units == 2 * 10 * 3
        assert placed.total_cpu_s > 0
        assert placed.idle(costs.cores) < 1
    assert json.dumps(plain_ray(costs))
    assert len(rich_ray(costs)) == 11


def test_what_cannot_be_measured_is_said():
    config = load_config("digits-demo", TINY)
    with pytest.raises(ConfigError, match=r"leave out runtime\.address"):
        measure_ray(load_config("digits-demo", [*TINY, "runtime.address=auto"]), ["wire"])
    single = ["voting.size=1", "voting.fixed=null"]
    with pytest.raises(ConfigError, match="two voters"):
        with_two_voters(synthesis_work(unreal_run(load_config("digits-demo", [*TINY, *single]), None), 1, 1))
    two = with_two_voters(synthesis_work(unreal_run(config, None), 3, 1))
    assert {job.voters for job in two.jobs} == {two.groups[0][0].voters}
