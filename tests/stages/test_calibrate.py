"""Group sizes that are measured: what is tried and chosen with made-up speeds, that the number stays, what is refused."""

import json
from collections import Counter

import pytest

from cvdd_ray.config import SynthesizeConfig
from cvdd_ray.core.experts import ExpertSpec
from cvdd_ray.core.models import build_model, save_weights
from cvdd_ray.core.synthesis import Job
from cvdd_ray.errors import ArtifactError, ConfigError
from cvdd_ray.recipes import load_config
from cvdd_ray.stages import calibrate
from cvdd_ray.stages.calibrate import (
    BUDGET_S,
    best_size,
    calls_of,
    candidate_sizes,
    group_size,
    job_groups,
    measure_sizes,
    measured_rates,
)
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.grouptask import VoterSettings
from cvdd_ray.stages.initialize import initialize
from cvdd_ray.stages.plan import plan
from cvdd_ray.stages.pretrain import pretrain
from cvdd_ray.stages.synthesize import synthesize

PAIRS = [("a", "b"), ("a", "c"), ("b", "c")]


def jobs_of(number, chunks=1, voters=PAIRS, turns=False):
    weights = (1.0 / len(voters[0]),) * len(voters[0])
    return [
        Job(i, chunk, (2 * chunk, 2 * chunk + 1), voters[i % len(voters)], weights, takes_turns=turns)
        for chunk in range(chunks)
        for i in range(number)
    ]


def linear(fixed_s, per_job_s):
    """A vote that costs something before the first job."""
    return lambda name, jobs, images: fixed_s + per_job_s * jobs


def anything(groups):
    return True


@pytest.mark.parametrize(
    ("number", "sizes"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (10, [1, 2, 4, 5, 8, 10]), (12, [1, 2, 3, 4, 6, 8, 12])],
)
def test_sizes_are_divisors_and_powers_of_two_up_to_the_jobs_of_a_chunk(number, sizes):
    assert candidate_sizes([jobs_of(number, chunks=3)]) == sizes
    assert candidate_sizes([jobs_of(1), jobs_of(number)]) == sizes


def test_experts_are_asked_for_the_jobs_they_have_a_say_in():
    calls = calls_of(job_groups(jobs_of(5), 3))  # ab ac bc | ab ac
    assert calls == Counter({("a", 2, 2): 2, ("b", 2, 2): 1, ("c", 2, 2): 1, ("b", 1, 2): 1, ("c", 1, 2): 1})
    by_turns = calls_of(job_groups(jobs_of(2, voters=[("a", "b")], turns=True), 2))
    assert by_turns == Counter({("a", 2, 2): 1, ("b", 2, 2): 1})  # one in each iteration of a round


def test_rates_are_images_by_the_time_of_all_votes():
    rates = measured_rates([jobs_of(4, voters=[("a", "b")])], linear(1.0, 0.5), anything)
    assert rates == {1: 8 / (4 * 2 * 1.5), 2: 8 / (2 * 2 * 2.0), 4: 8 / (2 * 3.0)}


def test_each_call_is_measured_once():
    asked = []
    measured_rates([jobs_of(12)], lambda *call: asked.append(call) or 1.0, anything)
    assert len(asked) == len(set(asked)) > 3


def test_the_fastest_is_taken_and_the_smaller_of_equals():
    jobs = [jobs_of(10, voters=[("a", "b")])]
    assert best_size(measured_rates(jobs, linear(1.0, 0.1), anything)) == 10  # stacking saves much
    assert best_size(measured_rates(jobs, linear(0.001, 1.0), anything)) == 1  # next to nothing
    slow_above = {1: 1.0, 2: 1.5, 4: 2.5, 5: 2.6, 8: 9.0, 10: 12.0}  # caches overflow
    assert best_size(measured_rates(jobs, lambda name, n, images: slow_above.get(n, n), anything)) == 5


def test_memory_bounds_the_size_but_one_job_is_always_possible():
    jobs = [jobs_of(10, voters=[("a", "b")])]
    for most in (1, 4, 7):
        rates = measured_rates(jobs, linear(1.0, 0.1), lambda groups, most=most: max(map(len, groups)) <= most)
        assert max(rates) == max(size for size in (1, 2, 4, 5, 8, 10) if size <= most)
    assert list(measured_rates(jobs, linear(1.0, 0.1), lambda groups: False)) == [1]


def test_no_larger_size_is_tried_when_time_is_up():
    now = [0.0]

    def vote_s(name, jobs, images):
        now[0] += 0.3 * BUDGET_S
        return 1.0

    assert list(measured_rates([jobs_of(8, voters=[("a", "b")])], vote_s, anything, lambda: now[0])) == [1, 2]


def real_spec(name="resnet18"):
    return ExpertSpec(name, 10, 16, 0.125, save_weights(build_model(name, 10, 16, width=0.125)))


def test_real_votes_are_timed_within_real_memory(monkeypatch):
    jobs = (tuple(jobs_of(2, voters=[("resnet18",)])),)
    args = jobs, {"resnet18": real_spec()}, VoterSettings(0.01, 10.0, compile=True), None, lambda report: None
    about = json.loads(measure_sizes(*args))
    assert about["jobs_per_group"] in (1, 2)
    assert list(about["images_per_s"]) == ["1", "2"]
    assert min(about["images_per_s"].values()) > 0
    assert about["flops"] > 0
    monkeypatch.setattr(calibrate, "CPU_BYTES", 2**20)
    if calibrate.work_device().type == "cpu":
        assert list(json.loads(measure_sizes(*args))["images_per_s"]) == ["1"]


def auto_run(make_config, folder, **more):
    equal = {"weighting": "equal"}  # no priors are needed
    synthesis = {"jobs_per_group": "auto", "iterations": 2, **more}
    return Run(make_config(ipc=[4], voting=equal, relabel=equal, synthesize=synthesis), str(folder))


@pytest.fixture
def speeds(monkeypatch):
    """Votes take what the test says: {jobs: seconds}; a call that is not there must not be measured."""
    said: dict[int, float] = {}

    class Timer:
        def __init__(self, *args):
            self.flops = 7

        def __call__(self, name, num_jobs, num_images):
            return said[num_jobs]

    monkeypatch.setattr(calibrate, "VoteTimer", Timer)
    return said


def test_a_number_is_kept_whatever_speeds_become(make_config, tmp_path, speeds):
    run, jobs = auto_run(make_config, tmp_path), jobs_of(4, voters=[("resnet18",)])

    def size(run, jobs=jobs):
        return group_size(run, "ipc4", [jobs], {"resnet18": real_spec()}, lambda: VoterSettings(0.01, 10.0))

    speeds |= {1: 1.0, 2: 1.1, 4: 9.0}
    assert size(run) == 2
    assert run.artifacts.manifest("calibrate/ipc4").facts == {"jobs_per_group": 2, "flops": 7}
    speeds |= {1: 1.0, 2: 1.9, 4: 1.0}
    assert size(run) == size(auto_run(make_config, tmp_path)) == 2
    with pytest.raises(ArtifactError, match="calibrate/ipc4 was made with"):
        size(run, jobs_of(3, voters=[("resnet18",)]))
    assert size(auto_run(make_config, tmp_path, jobs_per_group=3)) == 3  # given: nothing is measured or read


def test_synthesis_goes_on_with_the_number_it_began_with(make_config, tmp_path, speeds):
    run = auto_run(make_config, tmp_path)
    pretrain(run)
    initialize(run, 4)
    speeds |= {1: 1.0, 2: 1.1, 4: 9.0}
    real, begun = run.runtime.distill, []

    def dies(tasks, *args):
        begun.extend(sorted(len(task.jobs) for task in tasks.values()))
        raise KeyboardInterrupt

    run.runtime.distill = dies
    with pytest.raises(KeyboardInterrupt):
        synthesize(run, 4)
    run.runtime.distill = real
    speeds.clear()  # nothing may be measured any more
    synthesize(run, 4)
    made = run.artifacts.manifest("synthesize/ipc4")
    assert begun == [2, 2]
    assert made.identity["settings"]["synthesize"]["jobs_per_group"] == 2
    other = auto_run(make_config, tmp_path / "other", jobs_per_group=2)
    for stage in ("pretrain/resnet18", "pretrain/shufflenet_v2", "initialize/ipc4"):
        for name in (*run.artifacts.manifest(stage).files, "manifest.json"):
            other.store.take(run.store, f"{stage}/{name}", f"{stage}/{name}")
    synthesize(other, 4)
    assert other.artifacts.manifest("synthesize/ipc4").files == made.files  # as if it had been given


def test_plan_counts_the_default_and_says_so(make_config):
    planned, given = (plan(make_config(synthesize={"jobs_per_group": size})) for size in ("auto", 5))
    assert [note for note in planned.notes if note not in given.notes] == [
        "synthesize.jobs_per_group is auto, measured when synthesis begins: groups of 5 jobs are counted instead"
    ]
    assert planned.stages == given.stages


@pytest.mark.parametrize("value", ["0", "-1", "fast", "2.5", "true", "null", "[5]"])
def test_other_values_are_refused(value):
    said = r"^synthesize\.jobs_per_group: got [^\n]*; needs a whole number of at least 1, or auto$"
    with pytest.raises(ConfigError, match=said):
        load_config("cifar10", [f"synthesize.jobs_per_group={value}"])


def test_the_default_is_as_ever():
    assert SynthesizeConfig().jobs_per_group == SynthesizeConfig(jobs_per_group="auto").planned_jobs_per_group == 5
    assert SynthesizeConfig(jobs_per_group=3).planned_jobs_per_group == 3
