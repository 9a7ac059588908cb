"""The whole pipeline in this process: what it writes, what it skips, how it goes on after an interruption."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image

import cvdd_ray
from cvdd_ray.data.imagesets import read_image_set
from cvdd_ray.errors import ArtifactError, ConfigError
from cvdd_ray.stages import grouptask
from cvdd_ray.stages.arms import label_sets
from cvdd_ray.stages.calibrate import job_groups
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pipeline import STAGES, check, run_all


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from conftest import tiny_config

    out = tmp_path_factory.mktemp("run")
    run = Run(tiny_config(), str(out))
    run_all(run)
    return run


class Recorder:
    def __init__(self):
        self.said = []

    def start(self, title, total, unit):
        self.said.append(f"start {title}")

    def update(self, done, note=""):
        self.said.append(f"update {done} {note}")

    def finish(self, note=""): ...

    def say(self, text):
        self.said.append(text)


def test_every_stage_is_there_and_the_second_run_does_nothing(finished, monkeypatch):
    recorder = Recorder()
    again = Run(finished.config, finished.store.root, progress=recorder)
    monkeypatch.setattr(again.runtime, "map", lambda *a: pytest.fail("a finished stage ran again"))
    monkeypatch.setattr(again.runtime, "distill", lambda *a: pytest.fail("a finished stage ran again"))
    run_all(again)
    assert not [line for line in recorder.said if line.startswith("start")]
    assert not [name for name in finished.store.names("synthesize") if "partial" in name]


def test_hashes_of_a_manifest_are_those_of_its_files(finished):
    import hashlib

    manifest = finished.artifacts.manifest("synthesize/ipc2")
    for name, digest in manifest.files.items():
        assert hashlib.sha256(finished.store.read(f"synthesize/ipc2/{name}")).hexdigest() == digest
    assert manifest.identity["inputs"]["pretrain/resnet18"] == finished.artifacts.manifest("pretrain/resnet18").content
    assert manifest.identity["classes"] == [str(i) for i in range(10)]
    assert manifest.versions["torch"] == torch.__version__


def test_distilled_rows_say_who_voted(finished):
    data = finished.store.read("synthesize/ipc2/distilled.arrow")
    table = pa.ipc.open_stream(data).read_all()
    rows = table.to_pylist()
    assert [(row["image_index"], row["label"]) for row in rows] == [(i, c) for i in range(2) for c in range(10)]
    for row in rows:
        assert row["voters"] == ["resnet18", "shufflenet_v2"]
        assert sum(row["voter_weights"]) == pytest.approx(1, abs=1e-6)
        assert row["cross_entropy"] > 0
        assert row["bn_term"] > 0
    config = json.loads(table.schema.metadata[b"cvdd_ray"])["config"]
    assert config["synthesize"]["iterations"] == 6
    pixels = np.asarray(Image.open(io.BytesIO(rows[0]["image"]["bytes"])))
    assert np.array_equal(pixels.transpose(2, 0, 1), read_image_set(data, "x").images_NCHW[0])


def test_images_moved_away_from_their_start(finished):
    start = read_image_set(finished.store.read("initialize/ipc2/start.arrow"), "start").images_NCHW
    distilled = read_image_set(finished.store.read("synthesize/ipc2/distilled.arrow"), "distilled").images_NCHW
    assert np.abs(start.astype(int) - distilled).mean() > 2


def test_a_larger_set_keeps_the_first_images_under_equal_votes(finished, make_config, tmp_path):
    """Image i is a function of (seed, i): with the same voters, IPC 3 begins with the images of IPC 2."""
    sets = {}
    for ipc in (2, 3):
        c = make_config(
            ipc=[ipc], voting={"selection": "fixed", "fixed": ["resnet18", "shufflenet_v2"], "weighting": "equal"},
            initialize={"method": "noise"}, relabel={"weighting": "equal"},
        )  # fmt: skip
        run = Run(c, str(tmp_path / str(ipc)))
        for stage in ("pretrain", "prior", "initialize", "synthesize"):
            STAGES[stage](run)
        sets[ipc] = read_image_set(run.store.read(f"synthesize/ipc{ipc}/distilled.arrow"), "x").images_NCHW
    assert np.array_equal(sets[3][:20], sets[2])


def test_interrupted_synthesis_goes_on_from_checkpoint_to_the_same_bits(finished, tmp_path, monkeypatch):
    run = Run(finished.config, str(tmp_path))
    for stage in ("pretrain", "prior", "initialize"):
        STAGES[stage](run)
    calls = {"n": 0}
    original = grouptask.encode_state

    def interrupted(state):
        calls["n"] += 1
        if calls["n"] == 4:  # second group, its first checkpoint is written, its second is not
            raise KeyboardInterrupt
        return original(state)

    monkeypatch.setattr(grouptask, "encode_state", interrupted)
    with pytest.raises(KeyboardInterrupt):
        STAGES["synthesize"](run)
    monkeypatch.setattr(grouptask, "encode_state", original)
    left = [name.rsplit("/", 1)[1] for name in run.store.names("synthesize")]
    assert left == [f"distilled-group0000{end}" for end in ("0", "0.arrow", "1.checkpoint")]
    began = []
    monkeypatch.setattr(
        grouptask, "distill_group",
        lambda _, jobs, state, *a, **k: began.append(state.iteration) or original_distill(_, jobs, state, *a, **k),
    )  # fmt: skip
    STAGES["synthesize"](Run(finished.config, str(tmp_path)))
    assert began == [2]
    manifest = run.artifacts.manifest("synthesize/ipc2")
    assert manifest.content == finished.artifacts.manifest("synthesize/ipc2").content


original_distill = grouptask.distill_group


def test_damaged_parts_of_unfinished_work_are_made_again(finished, tmp_path, monkeypatch):
    """Four groups: the first is finished, but its piece is damaged; the second, but its receipt; the third has a damaged
    checkpoint. Each is named, and the images are those of an undisturbed run."""
    config = finished.config.model_copy(
        update={"synthesize": finished.config.synthesize.model_copy(update={"class_chunk": 5})}
    )
    calm, run = Run(config, str(tmp_path / "calm")), Run(config, str(tmp_path / "run"))
    for name in finished.store.all_names():
        if name.startswith(("pretrain", "initialize")):
            calm.store.take(finished.store, name, name)
    STAGES["prior"](calm)
    for name in calm.store.all_names():
        run.store.take(calm.store, name, name)
    STAGES["synthesize"](calm)
    write, count = type(run.store).write, {"checkpoints": 0}

    def interrupted(store, name, content):
        write(store, name, content)
        count["checkpoints"] += name.endswith(".checkpoint")
        if count["checkpoints"] == 5:  # the first of the third group
            raise KeyboardInterrupt

    monkeypatch.setattr(type(run.store), "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        STAGES["synthesize"](run)
    monkeypatch.setattr(type(run.store), "write", write)
    names = {name.rsplit("/", 1)[1]: name for name in run.store.names("synthesize")}
    damaged = ["distilled-group00000.arrow", "distilled-group00001", "distilled-group00002.checkpoint"]
    assert sorted(names) == sorted([*damaged, "distilled-group00000", "distilled-group00001.arrow"])
    for name, cut in zip(damaged, (False, True, False), strict=True):
        data = run.store.read(names[name])
        run.store.write(names[name], data[: len(data) // 2] if cut else data[:-9] + b"?" + data[-8:])
    began, recorder = [], Recorder()
    monkeypatch.setattr(
        grouptask, "distill_group",
        lambda _, jobs, state, *a, **k: began.append(state.iteration) or original_distill(_, jobs, state, *a, **k),
    )  # fmt: skip
    STAGES["synthesize"](Run(config, str(tmp_path / "run"), progress=recorder))
    assert began == [0, 0, 0, 0]
    said = [text for text in recorder.said if "damaged" in text]
    assert len(said) == 3
    assert all(any(f"group0000{k}" in text for text in said) for k in range(3))
    assert run.artifacts.manifest("synthesize/ipc2").files == calm.artifacts.manifest("synthesize/ipc2").files


def test_other_settings_do_not_overwrite_silently(finished, make_config):
    changed = make_config(synthesize={"iterations": 7})
    run = Run(changed, finished.store.root)
    with pytest.raises(ArtifactError, match=r"synthesize\.iterations = 6, now asked for 7; choose another --out"):
        STAGES["synthesize"](run)


def test_a_missing_stage_is_named_with_its_verb(make_config, tmp_path):
    run = Run(make_config(), str(tmp_path))
    with pytest.raises(ArtifactError, match=r"pretrain/resnet18 is not finished; make it with `cvdd pretrain`"):
        STAGES["synthesize"](run)
    assert not run.store.names("synthesize")


def test_labels_replay_to_what_the_teachers_saw(finished):
    """Recompute the committee's logits on the replayed views: equal within fp16 rounding (spec check 9)."""
    from cvdd_ray.core.softlabels import Teacher, committee_logits
    from cvdd_ray.core.voting import prior_weights
    from cvdd_ray.stages.pretrain import load_experts
    from cvdd_ray.stages.votes import load_priors

    dataset = cvdd_ray.load_distilled(finished.store.root)
    specs, _ = load_experts(finished)
    priors, _ = load_priors(finished)
    weights = prior_weights([priors[name] for name in specs], 10.0)
    teachers = [Teacher(spec.build(), batchnorm="batch") for spec in specs.values()]
    for views, logits in dataset.soft_batches(1):
        (again,) = committee_logits(teachers, weights, [views], 5)
        assert torch.allclose(again, logits, rtol=2**-10, atol=2e-3)
        assert not torch.equal(views, dataset.normalized()[: len(views)])


def test_load_distilled_is_a_torch_dataset(finished):
    dataset = cvdd_ray.load_distilled(finished.store.root)
    assert len(dataset) == 20
    image, label = dataset[13]
    assert (image.shape, image.dtype, label) == ((3, 16, 16), torch.uint8, 3)
    batch = next(iter(torch.utils.data.DataLoader(dataset, batch_size=7)))
    assert batch[0].shape == (7, 3, 16, 16)
    assert len(cvdd_ray.load_distilled(f"{finished.store.root}/synthesize/ipc2/distilled.arrow")) == 20
    with pytest.raises(ArtifactError, match=r"distilled sets for IPC 2; name one"):
        cvdd_ray.load_distilled(finished.store.root, ipc=5)
    with pytest.raises(ArtifactError, match="no such directory"):
        cvdd_ray.load_distilled("/nowhere/at/all")


def test_evaluate_rows_and_statistics(finished):
    results = json.loads(finished.store.read("evaluate/ipc2/results.json"))
    arms = {"distilled", "random_hard", "random_soft", "start_soft", "eval_labels"}
    assert {row["arm"] for row in results["table"]} == arms
    assert len(results["runs"]) == len(arms) * 2
    for row in results["table"]:
        last = [r["last"] for r in results["runs"] if r["arm"] == row["arm"]]
        assert row["last_mean"] == pytest.approx(np.mean(last))
        assert row["last_std"] == pytest.approx(np.std(last, ddof=1))


def test_baselines_share_views_with_ours(finished):
    """Rows differ in images or labels alone: every label set has the same views, epoch by epoch."""
    from cvdd_ray.data.labels import SoftLabels

    plans = []
    for name in label_sets(finished.config):
        file = f"relabel/ipc2/{name}/labels.arrow"
        plans.append(SoftLabels(finished.store.open(file), file, None).epoch(1))
    for other in plans[1:]:
        for (mine, _), (theirs, _) in zip(plans[0], other, strict=True):
            assert torch.equal(mine.views.boxes_N4, theirs.views.boxes_N4)
            assert torch.equal(mine.image_index_B, theirs.image_index_B)
            assert mine.box == theirs.box


def test_prior_is_measured_on_the_holdout_only(finished, make_config, tmp_path, monkeypatch):
    run = Run(make_config(), str(tmp_path))
    STAGES["pretrain"](run)
    monkeypatch.setattr(type(run.real.test), "stack", lambda self, size: stack_unless_test(self, size, run))
    STAGES["prior"](run)
    priors = json.loads(run.store.read("prior/priors.json"))
    assert set(priors["priors"]) == {"resnet18", "shufflenet_v2"}
    assert priors["split"] == "holdout"
    share = 100 / len(run.real.holdout)
    assert all(round(v / share, 6) == round(v / share) for v in priors["priors"].values())


original_stack = cvdd_ray.data.images.RealImages.stack


def stack_unless_test(images, size, run):
    assert images is not run.real.test, "the test set was touched before the final evaluation"
    return original_stack(images, size)


def test_prior_not_needed_is_not_made(make_config, tmp_path):
    c = make_config(voting={"weighting": "equal"}, relabel={"weighting": "equal"})
    run = Run(c, str(tmp_path))
    STAGES["prior"](run)
    assert not run.store.names("prior")


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"voting": {"size": 3}}, r"voting\.size: got 3, but the committee has 2"),
        ({"voting": {"size": 1, "selection": "fixed", "fixed": ["vgg"]}}, r"voting\.fixed: \['vgg'\]"),
        ({"relabel": {"teachers": ["resnet50"]}}, r"relabel\.teachers: \['resnet50'\]"),
        ({"committee": {"experts": ["convnet3", "resnet18"]}}, r"convnet3.*BatchNorm"),
        ({"committee": {"experts": ["resnet19", "resnet18"]}}, r"resnet19"),
        ({"evaluate": {"students": ["lenet"]}}, r"lenet"),
    ],
)
def test_impossible_runs_are_refused_before_anything_is_written(section, message, make_config, tmp_path):
    run = Run(make_config(**section), str(tmp_path / "out"))
    with pytest.raises(ConfigError, match=message):
        check(run)
    assert not (tmp_path / "out").exists()


def test_check_passes_for_a_good_run(make_config, tmp_path):
    check(Run(make_config(), str(tmp_path)))


def test_groups_are_cut_by_chunk_and_number(finished, make_config, tmp_path):
    from cvdd_ray.stages.synthesize import image_jobs

    run = Run(make_config(synthesize={"class_chunk": 4}), str(tmp_path))
    jobs = image_jobs(run, 3, lambda i: (("resnet18",), (1.0,)))
    assert sorted({job.labels for job in jobs}) == [(0, 1, 2, 3), (4, 5, 6, 7), (8, 9)]
    groups = job_groups(jobs, 2)
    assert [len(group) for group in groups] == [2, 1] * 3
    assert all(len({job.chunk for job in group}) == 1 for group in groups)


def test_given_priors_are_taken_as_they_are(make_config, tmp_path):
    values = {"resnet18": 63.0, "shufflenet_v2": 68.5}
    run = Run(make_config(prior={"method": "given", "values": values}), str(tmp_path))
    STAGES["prior"](run)
    assert json.loads(run.store.read("prior/priors.json"))["priors"] == values
    wrong = Run(make_config(prior={"method": "given", "values": {"resnet18": 63.0}}), str(tmp_path / "other"))
    with pytest.raises(ConfigError, match=r"prior\.values: got \['resnet18'\], needs exactly one"):
        STAGES["prior"](wrong)


def test_parity_jpeg_is_truncated_and_lossy(make_config, tmp_path):
    run = Run(make_config(synthesize={"image_format": "jpeg75_trunc"}), str(tmp_path))
    for stage in ("pretrain", "prior", "initialize", "synthesize"):
        STAGES[stage](run)
    table = pa.ipc.open_stream(run.store.read("synthesize/ipc2/distilled.arrow")).read_all()
    assert table["image"][0]["bytes"].as_py()[:2] == b"\xff\xd8"
