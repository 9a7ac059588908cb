"""Sets in one file or many: the same images and labels, content hashes that can be made apart, files that can be trusted."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import write_image_set

from cvdd_ray import load_distilled
from cvdd_ray.data import shards
from cvdd_ray.data.artifacts import Artifacts, StagePlan, Written, sha256
from cvdd_ray.data.imagesets import ImageSet, image_table, read_image_set
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pipeline import STAGES

CLASSES = ("a", "b", "c", "d")
IPC, SIDE = 5, 6
PIXELS = np.random.default_rng(0).integers(0, 256, (IPC, 4, 3, SIDE, SIDE), dtype=np.uint8)


def test_names_sort_and_match_no_others():
    names = [shards.shard_name("start", k, 11) for k in range(11)]
    assert names[10] == "start-00010-of-00011.arrow"
    others = ["start2.arrow", "restart.arrow", "start.arrow.tmp", "start-1-of-2.arrow", "manifest.json"]
    assert shards.shard_files([*reversed(names), *others], "start") == names
    assert shards.shard_files(["random.arrow", "start.arrow"], "start") == [shards.shard_name("start", 0, 1)]


@pytest.mark.parametrize(
    ("num", "size", "runs"), [(5, 2, [(0, 2), (2, 4), (4, 5)]), (4, 4, [(0, 4)]), (1, 9, [(0, 1)])]
)
def test_cuts_cover_everything_once(num, size, runs):
    assert [(run.start, run.stop) for run in shards.cuts(num, size)] == runs


def test_what_fits_into_a_shard():
    real = 1000 * 3 * 224**2  # one image index of ImageNet-1K
    assert shards.per_shard(real) == 1
    assert shards.per_shard(10 * 3 * 32**2) > 1000  # CIFAR-10
    assert shards.per_shard(10 * shards.SHARD_BYTES) == 1  # at least one whole index


@pytest.fixture
def pieces(tmp_path):
    """Two runs of two classes, every index in a record batch of its own, as workers leave them."""
    store, where = Store(str(tmp_path)), {}
    for first in (0, 2):
        labels = np.array([first, first + 1])
        tables = [
            image_table(
                ImageSet(PIXELS[i, first : first + 2], labels, (), {"image_index": pa.array([i, i], pa.int32())})
            )
            for i in reversed(range(IPC))  # in whatever order
        ]
        shards.write_piece(store, f"piece{first}", tables)
        where |= {i: [*where.get(i, []), (f"piece{first}", IPC - 1 - i)] for i in range(IPC)}
    return store, where


def assembled(store, where, folder="out"):
    tasks = shards.shard_tasks(folder, "set", IPC, 4 * 3 * SIDE**2)
    about = {"ipc": IPC}
    receipts = {n: shards.assemble_shard(task, store, CLASSES, about, where, None) for n, task in tasks.items()}
    return shards.written_set(tasks, receipts)


@pytest.mark.parametrize(("limit", "files"), [(10**9, 1), (2 * 432, 3), (1, 5)])
def test_assembled_sets_hold_the_same_rows_in_the_same_order(pieces, monkeypatch, limit, files):
    monkeypatch.setattr(shards, "SHARD_BYTES", limit)
    store, where = pieces
    written, content = assembled(store, where)
    assert list(written) == [shards.shard_name("set", k, files) for k in range(files)]
    for file in written.values():
        assert file.sha256 == sha256(store.read(file.name))
    artifacts = Artifacts(store)
    manifest = artifacts.commit(StagePlan("stage", {}, {}, CLASSES, 0), written, wall_s=0.0, facts={})
    whole = shards.load_images(artifacts, manifest, "set")
    assert np.array_equal(whole.images_NCHW, PIXELS.reshape(-1, 3, SIDE, SIDE))
    assert whole.labels_N.tolist() == [0, 1, 2, 3] * IPC
    assert whole.columns["image_index"].to_pylist() == np.repeat(range(IPC), 4).tolist()
    assert whole.content() == content
    upto = shards.load_images(artifacts, manifest, "set", 3)
    assert len(upto) == {1: 20, 3: 16, 5: 12}[files]


def test_the_content_of_one_file_is_that_of_the_images(pieces):
    images = ImageSet(PIXELS.reshape(-1, 3, SIDE, SIDE), np.tile(range(4), IPC), CLASSES)
    assert assembled(*pieces)[1] == images.content() == read_image_set(write_image_set(images), "x").content()


def test_the_content_of_shards_changes_with_every_pixel_label_and_cut(pieces, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 2 * 432)
    content = assembled(*pieces)[1]
    whole = ImageSet(PIXELS.reshape(-1, 3, SIDE, SIDE), np.tile(range(4), IPC), CLASSES, shards=(8, 8, 4))
    assert whole.content() == content
    other = PIXELS.copy()
    other[4, 3, 2, 5, 5] ^= 1
    changed = [
        ImageSet(other.reshape(-1, 3, SIDE, SIDE), whole.labels_N, CLASSES, shards=(8, 8, 4)),
        ImageSet(whole.images_NCHW, whole.labels_N[::-1].copy(), CLASSES, shards=(8, 8, 4)),
        ImageSet(whole.images_NCHW, whole.labels_N, CLASSES, shards=(8, 4, 8)),
        ImageSet(whole.images_NCHW, whole.labels_N, CLASSES),
    ]
    assert len({content, *(one.content() for one in changed)}) == 5


def test_fewer_files_leave_none_of_the_old_ones(tmp_path):
    artifacts = Artifacts(Store(str(tmp_path)), overwrite=True)
    old = {shards.shard_name("labels", k, 3): b"old" for k in range(3)}
    artifacts.commit(StagePlan("relabel", {"epochs": 3}, {}, CLASSES, 0), old, wall_s=0, facts={})
    artifacts.commit(StagePlan("relabel", {"epochs": 1}, {}, CLASSES, 0), {"labels.arrow": b"new"}, wall_s=0, facts={})
    assert artifacts.store.names("relabel") == ["relabel/labels.arrow", "relabel/manifest.json"]


def test_a_file_that_was_written_before_is_taken_over_and_its_absence_noticed(tmp_path):
    artifacts = Artifacts(Store(str(tmp_path)))
    plan = StagePlan("stage", {}, {}, CLASSES, 0)
    artifacts.store.write(f"{artifacts.partial(plan)}/x", b"content")
    manifest = artifacts.commit(
        plan, {"final": Written(f"{artifacts.partial(plan)}/x", sha256(b"content"))}, wall_s=0, facts={}
    )
    assert artifacts.read(manifest, "final") == b"content"
    assert artifacts.store.names("stage") == ["stage/final", "stage/manifest.json"]
    with pytest.raises(ArtifactError, match="gone is not there"):
        artifacts.commit(StagePlan("other", {}, {}, CLASSES, 0), {"f": Written("gone", "0")}, wall_s=0, facts={})
    assert artifacts.manifest("other") is None


def test_a_stream_that_ends_with_an_error_leaves_nothing(tmp_path):
    store = Store(str(tmp_path))

    def interrupted():
        with store.writer("a/b") as stream:
            stream.write(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not list((tmp_path / "a").iterdir())
    with store.writer("a/b") as stream:
        stream.write(b"one")
        stream.write(memoryview(b"two"))
        assert not store.exists("a/b")
    assert store.read("a/b") == b"onetwo"
    assert stream.sha256() == sha256(b"onetwo")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    from conftest import tiny_config

    run = Run(tiny_config(evaluate={"seeds": 1}), str(tmp_path_factory.mktemp("whole")))
    for stage in STAGES.values():
        stage(run)
    return run


def test_a_run_in_shards_is_the_run_in_one_piece(whole, tmp_path, monkeypatch):
    """Pixels, labels and accuracies to the last digit; only the files differ."""
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    cut = Run(whole.config, str(tmp_path))
    for stage in STAGES.values():
        stage(cut)
    assert list(cut.artifacts.manifest("relabel/ipc2/distilled").files) == [
        "labels-00000-of-00002.arrow", "labels-00001-of-00002.arrow",
    ]  # fmt: skip
    assert len(shards.shard_files(cut.artifacts.manifest("synthesize/ipc2").files, "distilled")) == 2
    one, many = (load_distilled(run.store.root) for run in (whole, cut))
    assert np.array_equal(one.images.images_NCHW, many.images.images_NCHW)
    assert one.images.columns["voters"].equals(many.images.columns["voters"])
    assert many.labels.num_epochs == one.labels.num_epochs == 2
    for epoch in (1, 0):
        for (views, logits), (views2, logits2) in zip(one.soft_batches(epoch), many.soft_batches(epoch), strict=True):
            assert torch.equal(views, views2)
            assert torch.equal(logits, logits2)
    tables = [json.loads(run.store.read("evaluate/ipc2/results.json"))["table"] for run in (whole, cut)]
    assert tables[0] == tables[1]
    with pytest.raises(ArtifactError, match=r"epoch 2 has no soft labels, the file holds 0\.\.1"):
        many.labels.epoch(2)


def test_an_altered_shard_is_noticed(whole, tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "SHARD_BYTES", 1)
    cut = Run(whole.config, str(tmp_path))
    for stage in STAGES.values():
        stage(cut)
    name = "relabel/ipc2/distilled/labels-00001-of-00002.arrow"
    data = bytearray(cut.store.read(name))
    data[len(data) // 2] ^= 1
    cut.store.write(name, bytes(data))
    with pytest.raises(ArtifactError, match=r"labels-00001-of-00002\.arrow does not have the sha256"):
        load_distilled(str(tmp_path))
