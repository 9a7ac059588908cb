"""Metrics, read as Prometheus reads them: over HTTP from Ray's agent, and compared with what the run must have done."""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter

import pytest
from prometheus_client.parser import text_string_to_metric_families

from cvdd_ray.data.artifacts import Artifacts, StagePlan
from cvdd_ray.data.storage import Store
from cvdd_ray.runner.metrics import METRICS, record
from cvdd_ray.runner.runtime import stage_of

# Runs in a process of its own, with a Ray of its own: every phase is begun by a line on stdin and ends with one on stdout.
WATCHED = """
import json, os, shutil, sys, time
import ray, torch
from conftest import tiny_config
from cvdd_ray.core.experts import ExpertSpec
from cvdd_ray.core.models import save_weights
from cvdd_ray.runner.runtime import RayRuntime
from cvdd_ray.stages import synthesize as module
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.initialize import initialize
from cvdd_ray.stages.pretrain import load_experts, pretrain
from cvdd_ray.stages.prior import prior
from cvdd_ray.stages.relabel import relabel

def phase(**facts):
    print("phase", json.dumps(facts), flush=True)
    sys.stdin.readline()

here, events = sys.argv[1], []
config = tiny_config(synthesize={"jobs_per_group": 2}, runtime={"placement": "spread"})
runtime = RayRuntime(config.runtime, lambda event, facts: events.append((event, facts)))
phase(port=ray.nodes()[0]["MetricsExportPort"])

run = Run(config, here + "/spread", runtime=runtime)
pretrain(run), prior(run), initialize(run, 2), module.synthesize(run, 2), relabel(run, 2)
phase(events=events)

shutil.copytree(here + "/spread", here + "/colocate")
shutil.rmtree(here + "/colocate/synthesize")
runtime._c = tiny_config(runtime={"placement": "colocate"}).runtime
module.synthesize(Run(config, here + "/colocate", runtime=runtime), 2)
phase()

def die_once(item, *, report):
    if not os.path.exists(item):
        open(item, "w").close()
        time.sleep(1)  # that it has started is told in passing
        os._exit(1)
    return b""

list(runtime.map(die_once, {"piece": here + "/died"}))
specs, _ = load_experts(run)
model = specs["shufflenet_v2"].build()
torch.nn.init.constant_(model.linear.weight, 3e38)  # finite, but its logits are not
broken = ExpertSpec("shufflenet_v2", 10, 16, 0.125, save_weights(model))
jobs = module.image_jobs(run, 2, lambda i: (("shufflenet_v2",), (1.0,)))
with run.stage(run.plan("broken", {}, {}), "broken") as work:
    try:
        size = run.config.synthesize.jobs_per_group
        module.distill(run, work, {"broken": jobs}, 2, 3, {**specs, "shufflenet_v2": broken}, size)
    except Exception as error:
        phase(error=type(error).__name__, events=events)
"""
# tiny_config: 2 experts, 10 classes, 2 images per class. A job is one image index (10 images of 3x16x16), a group 2 jobs.
# Each expert's prior takes one group of 3 iterations with itself as voter, synthesize one group of 6 with both.
VIEW, LABELS, TERMS = 10 * 3 * 16 * 16 * 4, 10 * 8, 2 * 4  # bytes per job
PRIOR_STEPS, STEPS = 3, 6


class Watched:
    """The watched process, and what its Ray's metrics endpoint says."""

    def __init__(self, folder):
        env = {**os.environ, "RAY_metrics_report_interval_ms": "1000", "PYTHONPATH": os.pathsep.join(["tests", "."])}
        self.process = subprocess.Popen(
            [sys.executable, "-c", WATCHED, str(folder)],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._port = self._phase()["port"]

    def next(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return self._phase()

    def _phase(self) -> dict:
        line = next(line for line in self.process.stdout if line.startswith("phase "))  # Ray, too, writes to stdout
        return json.loads(line.removeprefix("phase "))

    def scrape(self) -> dict[str, Counter]:
        """Return, per sample name, the sum over workers for each set of our own labels."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=30) as answer:
            text = answer.read().decode()
        own = {tag for row in METRICS.values() for tag in row.tags}
        found: dict[str, Counter] = {}
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name.startswith("ray_cvdd_") and "le" not in sample.labels:
                    labels = tuple(value for name, value in sorted(sample.labels.items()) if name in own)
                    found.setdefault(sample.name, Counter())[labels] += sample.value
        return found

    def until(self, expected: dict[str, dict]) -> dict[str, Counter]:
        """Return what is served once `expected` (sample name -> own labels -> value) is; what is not in time is shown."""
        deadline = time.monotonic() + 60
        while True:
            found = self.scrape()
            there = {name: {key: found.get(name, Counter())[key] for key in want} for name, want in expected.items()}
            if there == expected or time.monotonic() > deadline:
                assert there == expected
                return found
            time.sleep(0.5)


@pytest.fixture(scope="module")
def watched(tmp_path_factory):
    this = Watched(tmp_path_factory.mktemp("watched"))
    yield this
    this.process.stdin.close()
    this.process.wait(60)


def test_a_run_is_counted_to_the_last_byte_and_failures_by_kind(watched):
    """One test in three phases: spread, colocated on top of it, failures."""
    events = watched.next()["events"]
    experts = ("resnet18", "shufflenet_v2")
    steps = PRIOR_STEPS + STEPS  # of each expert
    done = {
        ("pretrain", "experts"): 2,
        ("initialize", "pieces"): 3,  # 100 images scored in 2, what was chosen cut in 1
        ("prior", "jobs"): 4,
        ("prior", "students"): 2,
        ("synthesize", "jobs"): 2,
        ("relabel", "label blocks"): 1,
    }
    traffic = {("views", name): 2 * steps * (VIEW + LABELS) for name in experts}
    traffic |= {("gradients", name): 2 * steps * (VIEW + TERMS) for name in experts}
    found = watched.until(
        {
            "ray_cvdd_work_done_total": done,
            "ray_cvdd_iterations_total": {(): 2 * 2 * PRIOR_STEPS + 2 * STEPS},
            "ray_cvdd_expert_step_seconds_count": {(name,): steps for name in experts},
            "ray_cvdd_wire_bytes_total": traffic,
            "ray_cvdd_checkpoints_total": {(): 2 * 1 + 2},  # after iteration 2 of 3, and after 2 and 4 of 6
        }
    )
    assert set(found["ray_cvdd_work_left"].values()) == {0}
    busy, coordinators = found["ray_cvdd_expert_busy_seconds_total"], found["ray_cvdd_coordinator_seconds_total"]
    assert set(busy) == {(name,) for name in experts}
    assert 0 < max(busy.values()) < coordinators[("waiting",)]
    assert coordinators[("stepping",)] > 0
    assert 0 < found["ray_cvdd_checkpoint_seconds_total"][()] < coordinators[("stepping",)]
    assert "ray_cvdd_failures_total" not in found
    kinds = Counter(kind for kind, _ in events)
    assert kinds["checkpoint"] == 4
    assert kinds["group_started"] == 3
    assert kinds["piece_done"] == 2 + 3 + 2 + 2 + 1 + 1
    assert kinds["failure"] == 0

    watched.next()  # colocated: the same votes again, no bytes
    found = watched.until(
        {
            "ray_cvdd_work_done_total": {("synthesize", "jobs"): 4},
            "ray_cvdd_iterations_total": {(): 2 * 2 * PRIOR_STEPS + 2 * 2 * STEPS},
            "ray_cvdd_expert_step_seconds_count": {(name,): steps + STEPS for name in experts},
            "ray_cvdd_wire_bytes_total": traffic,
            "ray_cvdd_checkpoints_total": {(): 6},
        }
    )
    assert all(found["ray_cvdd_expert_busy_seconds_total"][name] > busy[name] for name in busy)

    ended = watched.next()
    assert ended["error"] == "NumericsError"
    watched.until({"ray_cvdd_failures_total": {("task_retried",): 1, ("NumericsError",): 1}})
    failures = [facts for kind, facts in ended["events"] if kind == "failure"]
    assert [(facts["kind"], facts["what"]) for facts in failures] == [
        ("task_retried", "piece"),
        ("NumericsError", "broken-group00000"),
    ]


def test_the_table_is_what_may_be_recorded():
    record("cvdd_iterations", 1)
    with pytest.raises(ValueError, match=r"cvdd_failures is split by \['kind'\], got \['what'\]"):
        record("cvdd_failures", 1, what="x")
    with pytest.raises(KeyError):
        record("cvdd_unheard_of", 1)
    assert all(name.startswith("cvdd_") and not name.endswith("_total") for name in METRICS)


def test_the_stage_of_a_checkpoint(tmp_path):
    plan = StagePlan("synthesize/ipc2", {}, {}, ("cat",), 0)
    for variants in (False, True):  # a run, a sweep
        assert stage_of(Artifacts(Store(tmp_path), variants=variants).partial(plan)) == "synthesize"


def test_the_idle_share_is_what_was_not_spent_voting(monkeypatch):
    from cvdd_ray.runner import measured

    now, put = [100.0], []
    monkeypatch.setattr(measured.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(measured, "record", lambda name, value, **tags: put.append((name, value, tags)))
    idle = measured.IdleShare("resnet18")
    for seconds, wait in ((1.0, 1.0), (1.0, 1.0), (1.0, 3.0)):  # the third vote ends 7 s after the start, busy for 3
        now[0] += wait + seconds - (wait == 3.0)
        idle.worked(seconds)
    assert put == [("cvdd_expert_idle_share", pytest.approx(1 - 3 / 7), {"expert": "resnet18"})]
    now[0] += 20.0
    idle.worked(20.0)  # a vote longer than the window is a window of its own
    assert put[1][1] == 0.0
