"""MTT as stages: from start to end, twice to the same bytes, taken up after an interruption; what plan, report and card say."""

import json

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import tiny_config
from safetensors.torch import load

import cvdd_ray
from cvdd_ray.bench.works import bench
from cvdd_ray.core.models import build_seeded
from cvdd_ray.core.trajectories import FlatNetwork
from cvdd_ray.data.trajectories import Trajectories, trajectory_files
from cvdd_ray.errors import ArtifactError, ConfigError
from cvdd_ray.recipes import with_settings
from cvdd_ray.stages import matching
from cvdd_ray.stages.analyze import analyze
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.costsheet import stage_costs
from cvdd_ray.stages.export import export
from cvdd_ray.stages.pipeline import STAGES, run_all
from cvdd_ray.stages.report import write_report
from cvdd_ray.stages.summary import RunReader, read_summary

MTT = {
    "synthesize": {
        "method": "trajectories", "iterations": 4, "lr": 100.0, "checkpoint_every": 2, "jobs_per_group": 5,
        "trajectories": {"experts": 2, "epochs": 3, "max_start": 2, "target_epochs": 2, "steps": 3, "step_images": 12},
    },
    "initialize": {"method": "real"},
    "evaluate": {
        "labels": "hard", "learned_lr": True, "optimizer": "sgd", "schedule": "step", "baselines": ["random_hard"],
        "students": ["convnet3"], "seeds": 1,
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    run = Run(tiny_config(**MTT), str(tmp_path_factory.mktemp("mtt")))
    run_all(run)
    return run


def begun(finished, folder, **changes):
    """A run that finds trajectories and starting images there."""
    run = Run(with_settings(finished.config, changes), str(folder))
    for name in (*finished.store.names("trajectories"), *finished.store.names("initialize")):
        run.store.write(name, finished.store.read(name))
    return run


def content(run, stage="synthesize/ipc2"):
    return run.artifacts.manifest(stage).content


def test_no_expert_and_no_label_is_made_that_nobody_asks_for(finished):
    folders = {name.split("/")[0] for name in finished.store.all_names()}
    assert folders == {"config.yaml", "trajectories", "initialize", "synthesize", "evaluate"}
    summary = read_summary(RunReader(finished.store))
    assert not summary.unfinished()
    assert [(row.arm, row.regime) for row in summary.ipcs[0].rows] == [
        ("distilled_hard", "hard"),
        ("random_hard", "hard"),
    ]


def test_trajectories_begin_where_networks_do_and_are_read_epoch_by_epoch(finished):
    manifest = finished.artifacts.manifest("trajectories")
    assert sorted(manifest.files) == ["expert000.safetensors", "expert001.safetensors"]
    read = Trajectories(finished.store, trajectory_files(finished.artifacts, manifest))
    for expert in range(2):
        theta_EP = load(finished.store.read(f"trajectories/expert{expert:03d}.safetensors"))["theta"]
        assert theta_EP.shape[0] == 4
        assert all(torch.equal(read(expert, epoch), theta_EP[epoch]) for epoch in range(4))
        moved = (theta_EP[1:] - theta_EP[:-1]).norm(dim=1)
        assert (moved > 0).all()
    model = build_seeded("convnet3", 10, 16, width=0.125, seed=0)
    assert theta_EP.shape[1] == len(FlatNetwork(model, "convnet3").theta())
    assert not torch.equal(read(0, 0), read(1, 0))


def test_images_start_at_real_ones_and_end_somewhere_else(finished):
    table = pa.ipc.open_stream(finished.store.read("synthesize/ipc2/distilled.arrow")).read_all()
    rows = table.to_pylist()
    assert [(row["image_index"], row["label"], row["voters"]) for row in rows] == [
        (i, label, []) for i in range(2) for label in range(10)
    ]
    start, distilled = (
        RunReader(finished.store).images(stage, base).images_NCHW.astype(int)
        for stage, base in (("initialize/ipc2", "start"), ("synthesize/ipc2", "distilled"))
    )
    assert not np.array_equal(start, distilled)
    correlation = np.corrcoef(start.ravel(), distilled.ravel())[0, 1]
    assert correlation > 0.5, "image by image the same order"


def test_the_learned_rate_is_what_students_train_with(finished):
    rate = finished.artifacts.manifest("synthesize/ipc2").facts["student_lr"]
    trace = json.loads(finished.store.read("synthesize/ipc2/trace.json"))
    assert len(trace) == 4
    assert {row[3] for row in trace} == {"convnet3"}
    assert trace[0][5] == 0.01 != rate
    assert finished.artifacts.manifest("evaluate/ipc2").identity["settings"]["student_lr"] == rate


def test_the_same_again_has_the_same_bytes_and_another_seed_has_others(finished, tmp_path):
    again = Run(finished.config, str(tmp_path / "again"))
    for stage in ("initialize", "synthesize"):
        STAGES[stage](again)
    for stage in ("trajectories", "synthesize/ipc2"):
        assert content(again, stage) == content(finished, stage)
    changed = begun(finished, tmp_path / "changed", **{"synthesize.trajectories.lr_of_lr": 0.0})
    STAGES["synthesize"](changed)
    assert changed.artifacts.manifest("synthesize/ipc2").facts["student_lr"] == 0.01
    assert content(changed) != content(finished)
    assert content(changed, "trajectories") == content(finished, "trajectories")


def test_an_interrupted_set_goes_on_to_the_same_bytes(finished, tmp_path, monkeypatch):
    run, original, begun_at = begun(finished, tmp_path), matching.match_trajectories, []

    def interrupted(loss, labels, state, *rest, on_progress, **more):
        begun_at.append(state.iteration)

        def progress(state):
            if len(begun_at) == 1 and state.iteration == 3:
                raise KeyboardInterrupt
            on_progress(state)

        return original(loss, labels, state, *rest, on_progress=progress, **more)

    monkeypatch.setattr(matching, "match_trajectories", interrupted)
    with pytest.raises(KeyboardInterrupt):
        STAGES["synthesize"](run)
    STAGES["synthesize"](run)
    assert begun_at == [0, 2]
    assert content(run) == content(finished)


def test_a_damaged_checkpoint_is_said_and_the_set_begins_again(finished, tmp_path, monkeypatch):
    run, said = begun(finished, tmp_path), []
    monkeypatch.setattr(run.progress, "say", said.append)
    original = matching.kept_state

    def damaged(task, store, report):
        store.write(task.checkpoint, b"not a checkpoint")
        return original(task, store, report)

    monkeypatch.setattr(matching, "kept_state", damaged)
    STAGES["synthesize"](run)
    assert any("damaged" in line and "the set begins again" in line for line in said)
    assert content(run) == content(finished)


def test_a_damaged_trajectory_is_refused(finished, tmp_path):
    run = begun(finished, tmp_path)
    name = "trajectories/expert001.safetensors"
    data = bytearray(run.store.read(name))
    data[-1] ^= 1
    run.store.write(name, bytes(data))
    with pytest.raises(ArtifactError, match="expert001"):
        STAGES["synthesize"](run)


def test_plan_counts_what_was_written_and_done(finished):
    planned = cvdd_ray.plan(finished.config)
    assert [stage.stage for stage in planned.stages] == [
        "initialize/ipc2", "trajectories", "synthesize/ipc2", "evaluate/ipc2",
    ]  # fmt: skip
    made = planned.stage("trajectories")
    written = sum(len(finished.store.read(f"trajectories/expert{k:03d}.safetensors")) for k in range(2))
    assert made.storage.bytes == pytest.approx(written, rel=0.01)
    assert made.storage.files == 3
    assert planned.stage("synthesize/ipc2").counts["steps"] == 12
    assert planned.stage("synthesize/ipc2").storage.files == len(finished.store.names("synthesize"))
    costs = {cost.stage: cost for cost in stage_costs(RunReader(finished.store))}
    for stage in ("trajectories", "synthesize/ipc2"):
        assert costs[stage].flops == pytest.approx(planned.stage(stage).flops, rel=0.01)
    assert any("one piece of work" in note for note in planned.notes)


def test_report_card_and_refusals(finished, tmp_path):
    assert "table.md" in write_report(finished.store)
    export(finished.store.root, "hub", str(tmp_path / "hub"))
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "2 trainings of convnet3; 3 steps for 2 epochs" in card
    assert "Matching Training Trajectories" in card
    assert "voted" not in card.split("## ")[0]
    with pytest.raises(ConfigError, match="no votes on its images"):
        analyze([finished.store.root], "efficiency")
    with pytest.raises(ConfigError, match=r"the plain reference knows no synthesize\.method"):
        bench(finished.config, ["synthesis"])


def test_what_needs_votes_is_refused(finished):
    soft = {"evaluate": {"labels": "soft", "learned_lr": False, "baselines": []}}
    with pytest.raises(
        ConfigError, match=r"relabel\.weighting 'prior' needs priors, which are measured by distilling with"
    ):
        with_settings(finished.config, soft)
    with pytest.raises(ConfigError, match=r"voting has no effect with synthesize\.method 'trajectories'"):
        with_settings(finished.config, {"voting.size": 3})
    with pytest.raises(ConfigError, match=r"lr 0\.1 has no effect with learned_lr"):
        with_settings(finished.config, {"evaluate.lr": 0.1})


def test_ray_makes_the_same_bytes(finished, tmp_path, ray_runtime):
    run = Run(finished.config, str(tmp_path), runtime=ray_runtime)
    for stage in ("initialize", "synthesize"):
        STAGES[stage](run)
    for stage in ("trajectories", "synthesize/ipc2"):
        assert content(run, stage) == content(finished, stage)


def test_with_soft_labels_the_committee_labels_without_votes(finished, tmp_path):
    soft = {
        "evaluate": {"labels": "soft", "learned_lr": False, "students": ["resnet18"], "baselines": [], "optimizer": "adamw",
                     "schedule": "cosine"},
        "relabel.weighting": "equal", "committee.experts": ["resnet18", "convnet3"],
    }  # fmt: skip
    run = begun(finished, tmp_path, **soft)
    run_all(run)
    folders = {name.split("/")[0] for name in run.store.all_names()}
    assert {"pretrain", "relabel"} <= folders
    assert "prior" not in folders
    assert content(run) != ""
    (row,) = json.loads(run.store.read("evaluate/ipc2/results.json"))["table"]
    assert (row["arm"], row["student"]) == ("distilled", "resnet18")
