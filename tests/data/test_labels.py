"""Soft labels on disk: what the students train on is what the teachers labelled, bit for bit (check 9)."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
import torch
from helpers import Listener, normal, tiny_net, write_image_set, write_labels

from cvdd_ray.config import RunConfig
from cvdd_ray.core.labelcodes import LabelEncoding, decode_logits, encode_logits
from cvdd_ray.core.softlabels import Teacher, batch_views, committee_logits, epoch_plans
from cvdd_ray.core.students import StudentSettings, train_student
from cvdd_ray.data.artifacts import Artifacts, StagePlan, Written, sha256
from cvdd_ray.data.datasets import DatasetInfo, normalize
from cvdd_ray.data.imagesets import ImageSet
from cvdd_ray.data.labels import SoftLabels, encoding_metadata, epoch_bytes, file_bytes, label_batch
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError
from cvdd_ray.labelconfig import RelabelConfig
from cvdd_ray.stages import evaluate, relabel

SIZE, CLASSES, EPOCHS = 12, 4, 3
INFO = DatasetInfo("toy", CLASSES, SIZE, (0.5, 0.4, 0.3), (0.25, 0.2, 0.3), 1, 4)
WEIGHTS = [0.7, 0.3]
TEACHERS = [SimpleNamespace(build=lambda device, seed=seed: tiny_net(seed).to(device)) for seed in (1, 2)]


def pixels(num_images, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (num_images, 3, SIZE, SIZE), dtype=np.uint8)


def views(batch_size=16):
    return relabel.ViewSettings(7, True, SIZE, RelabelConfig(batch_size=batch_size, epochs=EPOCHS))


def as_file(batches, images="abc", num_classes=CLASSES):
    return write_labels(batches, {"images": images, "num_classes": num_classes})


def read(data, images="abc"):
    return SoftLabels(pa.py_buffer(data), "runs/x/labels.arrow", images)


def made_up(epoch, num_images=20, num_classes=CLASSES, batch_size=16):
    plans = epoch_plans(
        0, epoch, num_images, SIZE, batch_size=batch_size, flip=True, use_cutmix=True, crop_scale=(0.08, 1.0)
    )
    return [
        (plan, 20 * normal(epoch * 100 + plan.batch, len(plan.image_index_B), num_classes)) for plan in plans
    ]  # fmt: skip


def assert_same_plan(one, other):
    assert (one.epoch, one.batch, tuple(one.box)) == (other.epoch, other.batch, tuple(other.box))
    for a, b in (
        (one.image_index_B, other.image_index_B),
        (one.partner_B, other.partner_B),
        (one.views.boxes_N4, other.views.boxes_N4),
        (one.views.flips_N, other.views.flips_N),
        (one.views.rolls_N2, other.views.rolls_N2),
    ):
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


# --- replay --------------------------------------------------------------------------------------------------------


@pytest.fixture(
    params=[(20, [16, 4]), (33, [16, 17]), (18, [16, 2]), (32, [16, 16]), (7, [7])], ids=lambda p: str(p[0])
)
def labelled(request, monkeypatch, tmp_path):
    """What the relabel stage wrote to disk, and the tensors its teachers were shown."""
    num_images, sizes = request.param
    shown = []

    def listen(teachers, weights, batches, *numbers):
        shown.append([batch.clone() for batch in batches])
        return committee_logits(teachers, weights, batches, *numbers)

    monkeypatch.setattr(relabel, "committee_logits", listen)
    images = pixels(num_images)
    store, about = Store(str(tmp_path)), {"images": "hash", "num_classes": CLASSES}
    pieces = []
    for name, span in (("first", range(2)), ("second", range(2, 3))):
        digest = relabel.label_epochs(
            (span, name), images, INFO, TEACHERS, WEIGHTS, views(), about, store, lambda report: None
        )
        assert digest.decode() == sha256(store.read(name))
        pieces.append(Written(name, digest.decode()))
    whole = relabel.join_labels(store, "labels.arrow", pieces, about)
    assert whole.sha256 == sha256(store.read("labels.arrow"))
    labels = SoftLabels(store.open("labels.arrow"), "labels", "hash")
    return SimpleNamespace(images=images, sizes=sizes, shown=shown, labels=labels)


def test_students_see_what_teachers_were_shown_bit_for_bit(labelled):
    """Through the file on disk and the student's training loop: crop, flip, CutMix and order."""
    seen = []

    student = Listener(CLASSES, lambda x, net: seen.append(x.clone()))
    settings = StudentSettings(
        epochs=EPOCHS, batch_size=16, bn_group=8, lr=0.1, weight_decay=0.0, eta=1.0, temperature=20.0, test_every=1
    )
    stored = normalize(torch.from_numpy(labelled.images), INFO)
    train_student(student, stored, labelled.labels.epoch, settings, lambda net: 0.0)
    shown = [batch for epoch in labelled.shown for batch in epoch]
    assert [len(batch) for batch in shown] == EPOCHS * labelled.sizes
    assert torch.equal(torch.cat(seen), torch.cat(shown))


def test_teachers_say_again_what_is_stored_within_fp16(labelled):
    stored = normalize(torch.from_numpy(labelled.images), INFO)
    teachers = [Teacher(spec.build("cpu"), batchnorm="batch") for spec in TEACHERS]
    bn_group = views().c.resolved_bn_group(len(stored))
    for epoch in range(EPOCHS):
        for plan, logits in labelled.labels.epoch(epoch):
            (again,) = committee_logits(teachers, WEIGHTS, [batch_views(stored, plan)], bn_group)
            assert logits.dtype == torch.float32
            torch.testing.assert_close(logits, again, rtol=2**-11, atol=1e-5)
            assert float(again.abs().max()) > 0.1


def test_stored_plans_are_those_that_were_drawn(labelled):
    for epoch in range(EPOCHS):
        drawn = views().plans(epoch, len(labelled.images))
        for (plan, _), expected in zip(labelled.labels.epoch(epoch), drawn, strict=True):
            assert_same_plan(plan, expected)


def test_labels_of_an_epoch_do_not_depend_on_the_others():
    images, settings = pixels(20), views()
    whole = list(relabel.labelled_epochs(images, INFO, TEACHERS, WEIGHTS, settings, range(3)))
    (alone,) = relabel.labelled_epochs(images, INFO, TEACHERS, WEIGHTS, settings, range(2, 3))
    for (plan, logits), (plan2, logits2) in zip(whole[2], alone, strict=True):
        assert_same_plan(plan, plan2)
        assert torch.equal(logits, logits2)


# --- the file ------------------------------------------------------------------------------------------------------


def test_rows_come_back_in_order_with_logits_rounded_to_half():
    epochs = [made_up(e) for e in range(3)]
    labels = read(as_file([label_batch(rows) for rows in epochs]))
    assert (labels.num_epochs, labels.num_classes) == (3, CLASSES)
    for epoch in (2, 0, 1, 2):  # in any order, more than once
        for (plan, logits), (plan2, logits2) in zip(epochs[epoch], labels.epoch(epoch), strict=True):
            assert_same_plan(plan, plan2)
            assert torch.equal(logits2, logits.half().float())
            assert not torch.equal(logits2, logits)


def test_plain_pyarrow_opens_it():
    rows = made_up(0)
    file = pa.ipc.open_file(pa.py_buffer(as_file([label_batch(rows), label_batch(made_up(1))])))
    assert file.num_record_batches == 2
    assert file.schema.field("logits").type == pa.list_(pa.float16())  # the size on disk is planned with it
    first = file.get_batch(0).to_pylist()
    assert [len(row["image_index"]) for row in first] == [16, 4]
    for row, (plan, logits) in zip(first, rows, strict=True):
        assert (row["epoch"], row["batch"], row["cutmix_box"]) == (plan.epoch, plan.batch, list(plan.box))
        assert (row["image_index"], row["partner"]) == (plan.image_index_B.tolist(), plan.partner_B.tolist())
        assert (row["crop"], row["flip"]) == (plan.views.boxes_N4.tolist(), plan.views.flips_N.tolist())
        assert row["logits"] == logits.half().flatten().tolist()  # row-major


@pytest.mark.parametrize("piece", [1, 2])
def test_pieces_made_apart_are_the_file_made_in_one_go(piece):
    batches = [label_batch(made_up(e)) for e in range(4)]
    sliced = pa.Table.from_batches(batches).combine_chunks().to_batches()[0]
    length = batches[0].num_rows
    cut = [sliced.slice(e * length, length) for e in range(4)]  # offsets that do not start at zero
    labels = read(as_file(cut[:piece] + batches[piece:]))
    for epoch in range(4):
        for (plan, logits), (plan2, logits2) in zip(made_up(epoch), labels.epoch(epoch), strict=True):
            assert_same_plan(plan, plan2)
            assert torch.equal(logits2, logits.half().float())


def test_large_images_and_sets_fit_the_columns():
    ((plan, logits), *_) = made_up(0, num_images=20)
    plan.views.boxes_N4[0] = torch.tensor([0, 131, 224, 93])
    plan.image_index_B[0] = 49_999
    ((stored, _), *_) = read(as_file([label_batch([(plan, logits)])])).epoch(0)
    assert_same_plan(stored, plan)


def test_labels_of_another_image_set_are_refused():
    data = as_file([label_batch(made_up(0))], images="a" * 64)
    assert read(data, "a" * 64).num_epochs == 1
    assert read(data, None).num_epochs == 1
    with pytest.raises(
        ArtifactError, match=r"labels\.arrow labels image set a{12}, but was asked about b{12}; .*relabel"
    ):
        read(data, "b" * 64)


@pytest.mark.parametrize("epoch", [-1, 2, 300])
def test_an_epoch_without_labels_is_refused(epoch):
    labels = read(as_file([label_batch(made_up(e)) for e in range(2)]))
    with pytest.raises(ArtifactError, match=rf"epoch {epoch} has no soft labels, the file holds 0\.\.1"):
        labels.epoch(epoch)


def stream_without_metadata():
    sink = pa.BufferOutputStream()
    batch = label_batch(made_up(0))
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def test_what_is_not_a_label_file_is_refused():
    whole = as_file([label_batch(made_up(0))])
    image_set = write_image_set(ImageSet(pixels(2), np.array([0, 1]), ("a", "b")))
    foreign = (
        b"", b"text", b"\x00" * 200, image_set, stream_without_metadata(), whole[:-1], whole[: len(whole) // 2],
        write_labels([label_batch(made_up(0))], {"images": "abc"}),
        write_labels([label_batch(made_up(0))], {"images": "abc", "num_classes": "many"}),
    )  # fmt: skip
    for data in foreign:
        with pytest.raises(ArtifactError, match=r"labels\.arrow is not a soft-label file"):
            read(data)


def test_a_student_refuses_labels_of_other_images(tmp_path):
    store = Store(str(tmp_path))
    store.write("relabel/ipc1/distilled/labels.arrow", as_file([label_batch(made_up(0))], images="a" * 64))
    arm = evaluate.Arm(pixels(20), np.arange(20) % CLASSES, "b" * 64, {"relabel/ipc1/distilled/labels.arrow": ""})
    with pytest.raises(ArtifactError, match=r"labels image set a{12}"):
        run_student(arm, store)


# --- smaller files -------------------------------------------------------------------------------------------------

ENCODINGS = [
    LabelEncoding("int8"), LabelEncoding(top_k=2), LabelEncoding(top_k=2, tail="spread"), LabelEncoding("int8", 2, "spread")
]  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODINGS, ids=str)
def test_a_file_says_how_it_is_encoded_and_is_read_as_float32_logits(encoding):
    epochs = [made_up(e) for e in range(2)]
    about = {"images": "abc", "num_classes": CLASSES, **encoding_metadata(encoding)}
    data = write_labels([label_batch(rows, encoding) for rows in epochs], about)
    labels = read(data)
    assert labels.encoding == encoding
    for epoch, rows in enumerate(epochs):
        for (plan, logits), (plan2, logits2) in zip(rows, labels.epoch(epoch), strict=True):
            assert_same_plan(plan, plan2)
            assert logits2.dtype == torch.float32
            assert torch.equal(logits2, decode_logits(encode_logits(logits, encoding), CLASSES))
            if encoding.top_k:
                largest = logits.sort(dim=1, descending=True).indices[:, :2]
                assert float((logits2 - logits).gather(1, largest).abs().max()) < 0.2
    first = pa.ipc.open_file(pa.py_buffer(data)).get_batch(0).to_pylist()[0]  # 16 images
    kept = encoding.top_k or CLASSES
    assert {name: len(first[name]) for name in encoding.parts(CLASSES)} == {
        name: 16 * (kept if name in ("logits", "classes") else 1) for name in encoding.parts(CLASSES)
    }


@pytest.mark.parametrize("encoding", [LabelEncoding(), *ENCODINGS], ids=str)
@pytest.mark.parametrize(("num_images", "num_classes", "batch_size"), [(20, 10, 10), (100, 10, 16), (200, 1000, 16)])
def test_bytes_of_an_epoch_are_those_of_a_file(encoding, num_images, num_classes, batch_size):
    epochs = [label_batch(made_up(e, num_images, num_classes, batch_size), encoding) for e in range(5)]
    written = len(write_labels(epochs, {"images": "x", "num_classes": num_classes}))
    one = epoch_bytes(num_images, -(-num_images // batch_size), num_classes, encoding)
    assert file_bytes(num_classes, encoding) + 5 * one == pytest.approx(written, rel=0.05, abs=1000)
    assert one == pytest.approx(
        (written - len(write_labels(epochs[:1], {"images": "x", "num_classes": 1}))) / 4, rel=0.02
    )


def test_a_file_that_is_encoded_in_another_way_than_it_says_is_refused():
    batch, about = label_batch(made_up(0), LabelEncoding("int8")), {"images": "abc", "num_classes": CLASSES}
    for encoding in ({}, {"precision": "int8", "top_k": 2}, {"precision": "int4"}, {"bits": 8}):
        data = write_labels([batch], {**about, "encoding": encoding})
        with pytest.raises(ArtifactError, match=r"labels\.arrow is not a soft-label file"):
            read(data)
    assert read(write_labels([batch], {**about, "encoding": {"precision": "int8"}})).num_epochs == 1


@pytest.mark.parametrize("shards", [1, 2])
def test_a_student_takes_stored_epochs_again_and_again(shards):
    about = {"images": "abc", "num_classes": CLASSES, "replayed_epochs": 8}
    cut = [range(3)] if shards == 1 else [range(2), range(2, 3)]
    if shards > 1:
        about |= {"epochs": 3, "epochs_per_shard": 2}
    files = [write_labels([label_batch(made_up(e)) for e in span], about) for span in cut]
    labels = SoftLabels([lambda data=data: pa.py_buffer(data) for data in files], "labels", "abc")
    assert (labels.stored_epochs, labels.num_epochs) == (3, 8)
    for epoch in range(8):
        for (plan, logits), (plan2, logits2) in zip(labels.epoch(epoch), made_up(epoch % 3), strict=True):
            assert_same_plan(plan, plan2)
            assert torch.equal(logits, logits2.half().float())
    with pytest.raises(ArtifactError, match=r"epoch 8 has no soft labels, the file holds 0\.\.7"):
        labels.epoch(8)


# --- the file as an artifact ---------------------------------------------------------------------------------------


def run_student(arm, store):
    settings = StudentSettings(
        epochs=1, batch_size=16, bn_group=8, lr=0.1, weight_decay=0.0, eta=1.0, temperature=20.0, test_every=1
    )
    task, test = (
        evaluate.StudentTask("distilled", "convnet3", 0, "student.checkpoint", 5.0),
        (pixels(8), np.arange(8) % CLASSES),
    )
    return json.loads(
        evaluate.run_student(task, {"distilled": arm}, store, test, INFO, settings, views(), 0.07, lambda report: None)
    )


@pytest.fixture
def finished(tmp_path):
    """As much of a run as `evaluate` asks for: a distilled image set and its labels, both committed."""
    config = RunConfig.model_validate({"ipc": [5], "evaluate": {"baselines": []}, "relabel": {"epochs": 1}})
    artifacts = Artifacts(Store(str(tmp_path)))
    images = ImageSet(pixels(20), np.arange(20) % CLASSES, ("a", "b", "c", "d"))
    data = as_file([label_batch(made_up(0))], images=images.content())
    for stage, files in (
        ("synthesize/ipc5", {"distilled.arrow": write_image_set(images)}),
        ("relabel/ipc5/distilled", {"labels.arrow": data}),
    ):
        artifacts.commit(StagePlan(stage, {}, {}, images.classes, 0), files, wall_s=0.0, facts={})
    run = SimpleNamespace(
        config=config,
        artifacts=artifacts,
        store=artifacts.store,
        classes=images.classes,
        info=INFO,
        require=artifacts.require,
    )
    return SimpleNamespace(run=run, labels=data, name="relabel/ipc5/distilled/labels.arrow")


def evaluate_one(finished):
    arms, _ = evaluate.load_arms(finished.run, 5)
    return run_student(arms["distilled"], finished.run.store)


def test_a_student_trains_from_committed_labels(finished):
    row = evaluate_one(finished)
    assert (row["arm"], row["student"], row["seed"]) == ("distilled", "convnet3", 0)
    assert [epoch for epoch, *_ in row["curve"]] == [0]
    assert row["last"] == row["best"] == row["curve"][-1][3]
    assert 0 <= row["last"] <= 100


def test_altered_labels_are_refused(finished):
    """A single flipped bit of one logit, which the format itself cannot notice."""
    logits = torch.cat([logits for _, logits in made_up(0)]).half().numpy().tobytes()
    at = finished.labels.index(logits)
    altered = bytearray(finished.labels)
    altered[at + 1] ^= 0x80  # the sign of the first logit
    finished.run.store.write(finished.name, bytes(altered))
    with pytest.raises(ArtifactError):
        evaluate_one(finished)


def test_a_missing_label_file_is_refused(finished):
    finished.run.store.delete(finished.name)
    with pytest.raises(ArtifactError):
        evaluate_one(finished)
