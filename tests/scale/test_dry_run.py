"""A thousand classes through every stage, with small shards: what is made, and that nothing whole goes through the driver."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
from scale import dry_run

from cvdd_ray import load_distilled
from cvdd_ray.data.artifacts import Artifacts, Store
from cvdd_ray.data.shards import shard_files

NUMBERS = ["--size=66", "--ipc=2", "--per-class=9", "--listed=0", "--iterations=1", "--epochs=2"]


@pytest.fixture(scope="module")
def dry(tmp_path_factory):
    """The run and its figures; in a process of its own, whose memory is the driver's."""
    root = tmp_path_factory.mktemp("dry")
    subprocess.run([sys.executable, dry_run.__file__, f"--folder={root}", *NUMBERS], check=True)
    return SimpleNamespace(store=Store(root / "run"), **json.loads((root / "dry_run.json").read_text()))


def test_jobs_and_shards_are_those_of_the_real_run(dry):
    """10 chunks of 100 classes per image index, one file per index; a real IPC 10 run has five times as many."""
    artifacts = Artifacts(dry.store)
    distilled = artifacts.manifest("synthesize/ipc2")
    assert shard_files(distilled.files, "distilled") == [f"distilled-{i:05d}-of-00002.arrow" for i in range(2)]
    assert distilled.facts["images"] == 2000
    started = artifacts.manifest("initialize/ipc2")
    assert [len(shard_files(started.files, base)) for base in ("start", "random")] == [2, 2]
    trace = json.loads(dry.store.read("synthesize/ipc2/trace.json"))
    assert {(row[1], row[2]) for row in trace} == {(index, chunk) for index in range(2) for chunk in range(10)}
    assert {row[3] for row in trace} == set(dry_run.EXPERTS)


def test_the_set_opens_as_one(dry):
    dataset = load_distilled(dry.store.root)
    assert len(dataset) == 2000
    assert dataset.images.labels_N.tolist() == [*range(1000), *range(1000)]
    assert dataset.images.columns["image_index"].to_pylist() == [0] * 1000 + [1] * 1000
    seen = [len(views) for views, _ in dataset.soft_batches(1)]
    assert sum(seen) == 2000


def test_files_and_memory_are_bounded(dry):
    """At most a handful of files per stage (one per image index, not per image), and a driver without the set."""
    assert dry.files["initialize"] == 5
    assert dry.files["synthesize"] == 4
    assert dry.files["relabel"] == 2
    assert dry.peaks["driver"] < 1000
