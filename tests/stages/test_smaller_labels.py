"""Labels that are smaller, or not stored at all, through the stages of a run: made, learnt from, shown, planned, published."""

import copy
import json

import datasets
import pytest
import torch
from helpers import Threads
from test_export import Said, run_card

import cvdd_ray
from cvdd_ray.core.labelcodes import DROPPED
from cvdd_ray.data.artifacts import Artifacts
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError
from cvdd_ray.labelconfig import RelabelConfig
from cvdd_ray.recipes import with_settings
from cvdd_ray.stages import evaluate as evaluation
from cvdd_ray.stages import relabel as stage
from cvdd_ray.stages.arms import OURS
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.evaluate import (
    StudentTask,
    build_student,
    evaluate,
    load_arms,
    run_student,
    student_settings,
)
from cvdd_ray.stages.pipeline import STAGES, check, remember
from cvdd_ray.stages.real import split_for_workers
from cvdd_ray.stages.report import rich_summary, write_report
from cvdd_ray.stages.summary import summarize_run
from cvdd_ray.stages.trial import TrialStudents

LABELS = "relabel/ipc2/distilled"
COMBINED = {"epochs": 6, "stored_epochs": 2, "precision": "int8", "top_k": 3, "tail": "spread"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A run whose images are distilled in two iterations and not labelled yet."""
    from conftest import tiny_config

    config = tiny_config(
        synthesize={"iterations": 2}, prior={"iterations": 1}, relabel={"epochs": 3},
        evaluate={"baselines": [], "seeds": 1}, runtime={"engine": "local"},
    )  # fmt: skip
    run = Run(config, str(tmp_path_factory.mktemp("base")))
    for name in ("pretrain", "prior", "initialize", "synthesize"):
        STAGES[name](run)
    return run


def labelled(base, out, verbs=("relabel",), **relabel):
    """The run with other labels, in a directory of its own."""
    run = Run(with_settings(base.config, {"relabel": relabel}), Artifacts(Store(str(out)), sources=[base.store]))
    check(run)
    for name in ("pretrain", "prior", "initialize", "synthesize", *verbs):
        STAGES[name](run)
    remember(run)
    return run


@pytest.fixture(scope="module")
def stored(base, tmp_path_factory):
    """(run with float16 labels, the logits its teachers had said before they were stored, epoch by epoch)."""
    said = []

    def listen(rows, encoding):
        said.append([logits.clone() for _, logits in rows])
        return original(rows, encoding)

    original = stage.label_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stage, "label_batch", listen)
        run = labelled(base, tmp_path_factory.mktemp("stored"))
    return run, said


@pytest.fixture(scope="module")
def combined(base, tmp_path_factory):
    return labelled(base, tmp_path_factory.mktemp("combined"), ("relabel", "evaluate"), **COMBINED)


@pytest.fixture(scope="module")
def online(base, tmp_path_factory):
    return labelled(base, tmp_path_factory.mktemp("online"), ("relabel", "evaluate"), online=True)


def rows_of(run, epoch):
    return load_arms(run, 2)[0][OURS].soft_labels(run.store, run.info)(epoch)


# --- online --------------------------------------------------------------------------------------------------------


def test_online_labels_are_what_teachers_say_before_it_is_stored(stored, online):
    run, said = stored
    assert len(said) == 3
    for epoch, logits_of_epoch in enumerate(said):
        asked, read = rows_of(online, epoch), rows_of(run, epoch)
        for (plan, logits), before, (plan2, logits2) in zip(asked, logits_of_epoch, read, strict=True):
            assert torch.equal(logits, before)
            assert torch.equal(logits.half().float(), logits2)
            assert not torch.equal(logits, logits2)
            assert torch.equal(plan.image_index_B, plan2.image_index_B)
            assert torch.equal(plan.views.boxes_N4, plan2.views.boxes_N4)
            assert (plan.batch, plan.box) == (plan2.batch, plan2.box)


def test_nothing_is_stored_online_and_students_learn(online):
    assert [name.rpartition("/")[2] for name in online.store.names(LABELS)] == ["manifest.json", "online.json"]
    (row,) = json.loads(online.store.read("evaluate/ipc2/results.json"))["runs"]
    assert len(row["curve"]) == 3
    assert 0 < row["curve"][0][1] < 10  # the loss


def test_dropout_of_teachers_leaves_students_their_own_random_numbers(base, tmp_path):
    """scope full: teachers draw from torch's generator, students from theirs."""
    run = labelled(base, tmp_path, online=True, scope="full")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, again = rows_of(run, 1), rows_of(run, 1)
    assert torch.equal(torch.rand(3), expected)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))


def test_the_teachers_of_eval_mode_labels_are_asked_in_eval_mode(base, tmp_path):
    settings = {"relabel": {"online": True}, "evaluate": {"baselines": ["eval_labels"]}}
    run = Run(with_settings(base.config, settings), Artifacts(Store(str(tmp_path)), sources=[base.store]))
    for name in ("pretrain", "prior", "initialize", "synthesize", "relabel"):
        STAGES[name](run)
    arms = load_arms(run, 2)[0]
    assert {name: arm.online.views.c.batchnorm for name, arm in arms.items()} == {
        "distilled": "batch",
        "eval_labels": "eval",
    }
    evaluate(run, 2)
    assert {row["arm"] for row in json.loads(run.store.read("evaluate/ipc2/results.json"))["table"]} == set(arms)


def test_students_of_a_trial_ask_too(online):
    students = TrialStudents(online, 1)
    students.run_epoch()
    curve = json.loads(online.store.read("evaluate/ipc2/results.json"))["runs"][0]["curve"]
    assert students.measure().train_loss == pytest.approx(curve[0][1])


def test_workers_of_one_student_ask_for_the_same_labels(online, monkeypatch):
    """Two workers with a BatchNorm group each learn what one does, up to the last bits of sums."""
    arms, _ = load_arms(online, 2)
    s, views = student_settings(online, 3, 20), arms[OURS].online.views
    test = split_for_workers(online.real.test, online.info)
    student, seed = build_student("resnet18", 0, online.info, online.config.seed, online.width)
    monkeypatch.setattr(
        evaluation, "build_student", lambda *args: (copy.deepcopy(student), seed)
    )  # threads share one RNG

    def train(workers):
        task = StudentTask(OURS, "resnet18", 0, f"unfinished{workers.world_size}", 99.0)
        shared = (arms, online.store, test, online.info, s, views, online.width)
        return json.loads(run_student(task, *shared, lambda report: None, workers))

    both = Threads(2).run(train)
    alone = json.loads(online.store.read("evaluate/ipc2/results.json"))["runs"][0]
    for row in both:
        assert [loss for _, loss, *_ in row["curve"]] == pytest.approx(
            [loss for _, loss, *_ in alone["curve"]], rel=1e-3
        )


def test_online_labels_of_other_images_or_experts_are_refused(base, tmp_path):
    run = labelled(base, tmp_path, online=True)
    manifest = run.artifacts.manifest(LABELS)
    with pytest.raises(ArtifactError, match=r"labels image set .*, but was asked about xyz"):
        stage.online_labels(run, manifest, "xyz")
    STAGES["pretrain"](Run(with_settings(run.config, {"pretrain": {"lr": 0.001}}), str(tmp_path), overwrite=True))
    other = Run(with_settings(run.config, {"pretrain": {"lr": 0.001}}), str(tmp_path))
    with pytest.raises(
        ArtifactError, match=r"experts that are not there any more: resnet18, shufflenet_v2; make it anew"
    ):
        load_arms(other, 2)


def test_online_labels_cannot_be_loaded_or_exported(online, tmp_path):
    dataset = cvdd_ray.load_distilled(online.store.root)
    assert len(dataset) == 20
    with pytest.raises(ArtifactError, match=r"online labels: .*relabel\.online=false"):
        next(dataset.soft_batches(0))
    said = Said()
    cvdd_ray.export(online.store.root, "hub", str(tmp_path / "hub"), progress=said)
    assert "IPC 2 has online labels, which are not stored (relabel.online): its images are exported alone" in said.lines
    assert not (tmp_path / "hub/data/soft_labels").exists()
    card = (tmp_path / "hub/README.md").read_text()
    assert "asked of the teachers as students train, not stored" in card
    assert "soft_batches" not in card
    assert LABELS not in (tmp_path / "hub/export.json").read_text()


# --- smaller -------------------------------------------------------------------------------------------------------


def test_a_smaller_set_holds_what_it_says_of_the_same_labels(stored, combined):
    """Two epochs, 3 of 10 logits to 8 bits, the others' mean; students train six."""
    full, said = stored
    assert said
    for epoch in range(6):
        rows = rows_of(combined, epoch)
        for (plan, logits), (plan2, logits2) in zip(rows, rows_of(full, epoch % 2), strict=True):
            assert torch.equal(plan.image_index_B, plan2.image_index_B)
            top = logits2.sort(dim=1, descending=True)
            step = (top.values[:, :1] - top.values[:, 2:3]) / 254
            off = (logits.gather(1, top.indices[:, :3]) - top.values[:, :3]).abs()
            assert bool((off <= step + 2**-9 * (1 + logits2.abs().amax())).all())
            rest = logits.gather(1, top.indices[:, 3:])
            torch.testing.assert_close(
                rest, top.values[:, 3:].mean(1, keepdim=True).expand(-1, 7), rtol=2e-3, atol=2e-3
            )
    curve = json.loads(combined.store.read("evaluate/ipc2/results.json"))["runs"][0]["curve"]
    assert [epoch for epoch, *_ in curve] == list(range(6))
    assert all(0 < loss < 10 for _, loss, *_ in curve)


def test_a_user_reads_epoch_after_epoch(combined):
    dataset = cvdd_ray.load_distilled(combined.store.root)
    assert dataset.labels.num_epochs == 6
    for (views, logits), (views2, logits2) in zip(dataset.soft_batches(5), dataset.soft_batches(1), strict=True):
        assert torch.equal(views, views2)
        assert torch.equal(logits, logits2)
    assert not torch.equal(next(dataset.soft_batches(4))[0], next(dataset.soft_batches(5))[0])
    with pytest.raises(ArtifactError, match=r"0\.\.5"):
        next(dataset.soft_batches(6))


def test_dropped_classes_train_a_student(base, tmp_path):
    run = labelled(base, tmp_path, ("relabel", "evaluate"), top_k=2)
    for _, logits in rows_of(run, 0):
        assert (logits > DROPPED).sum(1).tolist() == [2] * len(logits)
    curve = json.loads(run.store.read("evaluate/ipc2/results.json"))["runs"][0]["curve"]
    assert all(0 < loss < 10 for _, loss, *_ in curve)


def test_labels_in_shards_are_those_in_one_file(combined, base, tmp_path, monkeypatch):
    monkeypatch.setattr("cvdd_ray.data.shards.SHARD_BYTES", 1)
    run = labelled(base, tmp_path, **COMBINED)
    assert sum("-of-00002.arrow" in name for name in run.store.names(LABELS)) == 2
    for epoch in (0, 1, 5):
        for (_, logits), (_, logits2) in zip(rows_of(run, epoch), rows_of(combined, epoch), strict=True):
            assert torch.equal(logits, logits2)


def test_what_is_stored_as_ever_belongs_to_the_settings_of_ever(stored):
    """Labels that were made before there were other ways to store them are found by their settings."""
    settings = stored[0].artifacts.manifest(LABELS).identity["settings"]["relabel"]
    assert not set(settings) & set(RelabelConfig.LATER)
    assert set(RelabelConfig.model_fields) - set(settings) == set(RelabelConfig.LATER)
    metadata = cvdd_ray.load_distilled(stored[0].store.root).labels.metadata
    assert not {"encoding", "replayed_epochs"} & set(metadata)


# --- shown, planned, published -------------------------------------------------------------------------------------


def test_the_report_says_how_much_smaller(stored, combined, online):
    (one,) = summarize_run(combined.store).ipcs
    size = len(combined.store.read(f"{LABELS}/labels.arrow"))
    run = labelled(stored[0], f"{combined.store.root}-full", epochs=6)  # what all six would have taken
    full = len(run.store.read(f"{LABELS}/labels.arrow"))
    labels = one.labels["distilled"]
    assert (labels.bytes, labels.is_online) == (size, False)
    assert labels.full_bytes == pytest.approx(full, rel=0.02)
    ratio = f"({labels.full_bytes / size:.1f}x smaller than float16 for every epoch)"
    for text in (" ".join(map(str, rich_summary(summarize_run(combined.store)))), table_of(combined)):
        assert f"labels: distilled {size / 1000:.3g} kB {ratio}" in text
    assert "smaller than" not in table_of(run)
    assert "labels: distilled online, nothing stored" in table_of(online)


def table_of(run):
    write_report(run.store)
    return run.store.read("report/table.md").decode()


def test_plan_counts_what_is_stored(combined):
    planned = cvdd_ray.plan(combined.config).stage(LABELS)
    assert planned.storage.files == len(combined.store.names(LABELS))
    assert planned.storage.bytes == pytest.approx(len(combined.store.read(f"{LABELS}/labels.arrow")), rel=0.1)
    assert (planned.counts["epochs"], planned.counts["batches"], planned.counts["image_views"]) == (2, 4, 40)


def test_plan_of_large_sets():
    """ImageNet-1K at IPC 10: 6.1 GB, of which 10 of 1000 logits in int8 for 30 of 300 epochs are little."""
    config = cvdd_ray.load_config("imagenet1k-ipc10", ["runtime.placement=colocate"])
    small = with_settings(config, {"relabel": {"stored_epochs": 30, "precision": "int8", "top_k": 10}})
    full, planned = (cvdd_ray.plan(c).stage("relabel/ipc10/distilled") for c in (config, small))
    assert full.storage.bytes == pytest.approx(6.06e9, rel=0.005)
    assert planned.storage.bytes == pytest.approx(30 * 10_000 * (10 + 20 + 4 + 16.125 + 48 / 16), rel=0.01)
    assert planned.flops * 10 == full.flops
    assert planned.storage.files == 1 + 1  # one file


def test_plan_moves_the_teachers_work_to_the_students_that_ask(base):
    c = with_settings(base.config, {"evaluate": {"baselines": ["random_hard", "random_soft"]}})
    usual, online = (cvdd_ray.plan(with_settings(c, {"relabel.online": on})) for on in (False, True))
    labels = [plan.stage(LABELS) for plan in (usual, online)]
    assert (labels[1].flops, labels[1].storage.files, labels[1].storage.bytes) == (0, 2, 0)
    students = [plan.stage("evaluate/ipc2").flops for plan in (usual, online)]
    assert students[1] - students[0] == 2 * labels[0].flops  # of three students one has hard labels


@pytest.mark.parametrize(
    "relabel", [COMBINED, {"top_k": 2}, {"precision": "int8", "epochs": 3}], ids=["combined", "top_k", "int8"]
)
def test_the_hub_layout_and_its_card_have_the_labels(base, combined, tmp_path, monkeypatch, relabel):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    datasets.disable_progress_bars()
    run = combined if relabel is COMBINED else labelled(base, tmp_path / "run", **relabel)
    dest = tmp_path / "hub"
    cvdd_ray.export(run.store.root, "hub", str(dest))
    names, mine = run_card(dest, monkeypatch), cvdd_ray.load_distilled(run.store.root)
    for epoch in (1, mine.labels.num_epochs - 1):
        for (views, logits), (views2, logits2) in zip(
            names["soft_batches"](epoch), mine.soft_batches(epoch), strict=True
        ):
            assert torch.equal(views, views2)
            assert torch.equal(logits, logits2)
    table = datasets.load_dataset(str(dest), "soft_labels", split="train")
    assert len(table) == 2 * mine.labels.stored_epochs
    assert set(mine.labels.encoding.parts(10)) < set(table.features)
    card = (dest / "README.md").read_text()
    assert ("3 largest logits of 10 (others have their mean)" in card) == (relabel is COMBINED)
    assert ("6 epochs (2 of their own, taken again and again)" in card) == (relabel is COMBINED)


def test_top_k_of_all_classes_is_refused(base, tmp_path):
    config = with_settings(base.config, {"relabel.top_k": 10})
    for refused in (lambda: check(Run(config, str(tmp_path / "out"))), lambda: cvdd_ray.plan(config)):
        with pytest.raises(ConfigError, match=r"relabel\.top_k: got 10, but there are 10 classes; use fewer"):
            refused()
    assert not (tmp_path / "out").exists()
