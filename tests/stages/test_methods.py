"""Other methods as settings: each runs from start to end, twice to the same bytes, and goes on after an interruption."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import tiny_config

import cvdd_ray
from cvdd_ray.bench.works import bench
from cvdd_ray.core.costs import Network, image_flops, view_flops
from cvdd_ray.core.statistics import read_targets
from cvdd_ray.errors import ConfigError
from cvdd_ray.recipes import load_config, with_settings
from cvdd_ray.stages import grouptask
from cvdd_ray.stages.analyze import analyze
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.costsheet import stage_costs
from cvdd_ray.stages.pipeline import STAGES, run_all
from cvdd_ray.stages.report import write_report
from cvdd_ray.stages.summary import RunReader

GVBSM = {
    "committee": {"experts": ["resnet18", "convnet3", "wide_resnet16_2"], "width": 0.125},
    "voting": {"size": 3, "weighting": "equal", "turns": True},
    "initialize": {"method": "noise"},
    "synthesize": {
        "iterations": 7, "class_chunk": 5, "class_together": True, "crop": "pad", "pad": 2, "densification": 1.0,
        "matching": {"convolutions": True, "momentum": 0.8, "drop_rate": 0.4},
    },
    "relabel": {"batchnorm": "eval", "weighting": "equal", "rescale": True},
    "evaluate": {"baselines": [], "seeds": 1},
}  # fmt: skip
EDC = {
    **GVBSM,
    "initialize": {"method": "real"},
    "synthesize": {
        "iterations": 5, "class_chunk": 5, "class_together": True, "crop_scale": [0.5, 1.0], "roll": 0,
        "matching": {"convolutions": True, "momentum": 0.8, "class_share": 0.5},
    },
    "evaluate": {
        "baselines": ["random_hard"], "seeds": 1, "loss": "mse_gt", "label_weight": 0.025, "ema": 0.99, "eta": 2.0,
        "schedule": "cosine_linear",
    },
}  # fmt: skip
METHODS = {"gvbsm": GVBSM, "edc": EDC}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """A run with every expert that the methods here have."""
    run = Run(tiny_config(**GVBSM), str(tmp_path_factory.mktemp("experts")))
    STAGES["pretrain"](run)
    return run


def started(experts, folder, sections):
    """A run of a method that finds its experts there."""
    run = Run(tiny_config(**sections), str(folder))
    for name in experts.store.names("pretrain"):
        run.store.write(name, experts.store.read(name))
    return run


@pytest.fixture(scope="module")
def finished(experts, tmp_path_factory):
    runs = {}
    for method, sections in METHODS.items():
        runs[method] = started(experts, tmp_path_factory.mktemp(method), sections)
        run_all(runs[method])
    return runs


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_twice_to_the_same_bytes(method, finished, experts, tmp_path):
    again = started(experts, tmp_path, METHODS[method])
    for stage in list(STAGES)[:-1]:
        STAGES[stage](again)
    for stage in ("synthesize/ipc2", "relabel/ipc2/distilled"):
        assert again.artifacts.manifest(stage).content == finished[method].artifacts.manifest(stage).content
    assert finished[method].artifacts.manifest("evaluate/ipc2").wall_s >= 0


@pytest.mark.parametrize("method", METHODS)
def test_plan_counts_a_method_s_work(method, finished):
    run = finished[method]
    planned = cvdd_ray.plan(with_settings(run.config, {"runtime.placement": "colocate"}))
    trace = run.artifacts.manifest("synthesize/ipc2")
    counts = planned.stage("synthesize/ipc2").counts
    table = pa.ipc.open_stream(run.store.read("synthesize/ipc2/distilled.arrow")).read_all()
    assert table.num_rows == 20
    assert trace.facts["images"] == 20
    assert counts["expert_calls"] == counts["groups"] * run.config.synthesize.iterations
    statistics = run.artifacts.manifest("statistics")
    stage = planned.stage("statistics")
    assert stage.storage.files == len(statistics.files) + 1
    written = sum(len(run.store.read(f"statistics/{name}")) for name in statistics.files)
    assert written == pytest.approx(stage.storage.bytes, rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_flops_of_voters_in_turn_are_those_of_one_voter_per_iteration(method, finished):
    run = finished[method]
    write_report(run.store)
    costs = {cost.stage: cost for cost in stage_costs(RunReader(run.store))}
    networks = {n: image_flops(Network(n, 10, 16, 0.125)) for n in run.config.committee.experts}
    per_image = [networks[n] for n in run.config.committee.experts]
    voted = sum(per_image[t % 3].vote for t in range(run.config.synthesize.iterations))
    views = run.config.synthesize.iterations * 2 * view_flops(16)
    assert costs["synthesize/ipc2"].flops == 20 * (voted + views)
    trained_on = run.artifacts.manifest("pretrain/resnet18").facts["train_images"]
    passes = {"gvbsm": 1, "edc": 2}[method]  # EDC's classes have statistics of their own
    assert costs["statistics"].flops == passes * trained_on * sum(network.forward for network in per_image)
    assert costs["evaluate/ipc2"].flops > 0
    assert all(cost.bytes > 0 for cost in costs.values())
    (found,) = analyze([run.store.root], "efficiency").numbers.values()
    assert found["flops"] == pytest.approx(voted / run.config.synthesize.iterations + 2 * view_flops(16))


def test_images_are_stored_index_by_index_however_they_were_made(finished):
    """Class after class in a job, image index after image index in the file; all with the job's voters."""
    table = pa.ipc.open_stream(finished["gvbsm"].store.read("synthesize/ipc2/distilled.arrow")).read_all()
    rows = table.to_pylist()
    assert [(row["image_index"], row["label"]) for row in rows] == [(i, c) for i in range(2) for c in range(10)]
    assert all(row["voters"] == list(GVBSM["committee"]["experts"]) for row in rows)
    assert [row["chunk"] for row in rows[:10]] == [0] * 5 + [1] * 5


def test_statistics_are_made_only_when_asked_for(finished, experts, tmp_path):
    files = finished["gvbsm"].artifacts.manifest("statistics").files
    assert set(files) == {f"{name}.safetensors" for name in GVBSM["committee"]["experts"]}
    targets = read_targets(finished["gvbsm"].store.read("statistics/convnet3.safetensors"))
    assert targets.class_KS is None
    assert np.isfinite(targets.all_S.numpy()).all()
    plain = {**GVBSM, "synthesize": {"iterations": 2}, "voting": {"weighting": "equal"}}
    plain["committee"] = {"experts": ["resnet18", "wide_resnet16_2"], "width": 0.125}
    run = started(experts, tmp_path, plain)
    for stage in list(STAGES)[:4]:
        STAGES[stage](run)
    assert run.artifacts.manifest("statistics") is None


def test_an_interrupted_group_goes_on_with_its_memory(finished, experts, tmp_path, monkeypatch):
    run, calls, sizes, original = started(experts, tmp_path, GVBSM), [], [], grouptask.encode_state

    def interrupted(state):
        calls.append(state.iteration)
        sizes.append(len(original(state)))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return original(state)

    monkeypatch.setattr(grouptask, "encode_state", interrupted)
    for stage in list(STAGES)[:3]:
        STAGES[stage](run)
    with pytest.raises(KeyboardInterrupt):
        STAGES["synthesize"](run)
    assert calls == [2, 4, 6]
    STAGES["synthesize"](Run(run.config, run.store.root))
    assert calls[3:] == [6, 2, 4, 6]  # the first group from iteration 4 on, then the second
    content = finished["gvbsm"].artifacts.manifest("synthesize/ipc2").content
    assert run.artifacts.manifest("synthesize/ipc2").content == content
    planned = cvdd_ray.plan(with_settings(run.config, {"runtime.placement": "colocate"})).stage("synthesize/ipc2")
    assert max(sizes) == pytest.approx(planned.storage.checkpoint_bytes, rel=0.05)


def test_ray_and_local_make_equal_images(finished, experts, tmp_path, ray_runtime, monkeypatch):
    """Memories travel with every question and answer: expert actors keep nothing."""
    run = started(experts, tmp_path, {**GVBSM, "runtime": {"placement": "spread"}})
    monkeypatch.setattr(ray_runtime, "_c", run.config.runtime)
    run.runtime = ray_runtime
    for stage in list(STAGES)[:4]:
        STAGES[stage](run)
    content = finished["gvbsm"].artifacts.manifest("synthesize/ipc2").content
    assert run.artifacts.manifest("synthesize/ipc2").content == content


def test_plan_refuses_what_it_cannot_count():
    with pytest.raises(ConfigError, match=r"voting\.turns: plan counts"):
        cvdd_ray.plan(tiny_config(**GVBSM, runtime={"placement": "spread"}))
    with pytest.raises(ConfigError, match="--calibrate measures"):
        cvdd_ray.plan(tiny_config(**GVBSM), calibrate=True)


def test_bench_refuses_what_its_reference_does_not_know():
    with pytest.raises(ConfigError, match=r"bench synthesis: the plain reference knows no synthesize\.matching"):
        bench(tiny_config(**EDC), ["synthesis"])
    with pytest.raises(ConfigError, match=r"bench evaluate: the plain reference knows no evaluate\.loss"):
        bench(tiny_config(**EDC), ["evaluate"])


def test_what_is_made_as_ever_belongs_to_the_settings_of_ever(make_config):
    from cvdd_ray.stages.synthesize import recorded_config

    c = make_config()
    for section in (c.voting, c.synthesize, c.evaluate, c.relabel):
        assert not set(section.LATER) & set(section.counted())
        assert set(section.LATER) <= set(type(section).model_fields)
    assert not set(c.synthesize.LATER) & set(recorded_config(c, 1)["synthesize"])
    assert set(c.relabel.LATER) & set(recorded_config(c, 1)["relabel"]) == set(c.relabel.STORAGE)
    assert recorded_config(tiny_config(**GVBSM), 1)["synthesize"]["matching"]["momentum"] == 0.8


BAD = {
    "voting.turns=true": r"voting: turns needs size of at least 2 and weighting 'equal'",
    "synthesize.densification=1": r"densification has no effect without class_together",
    "synthesize.densification_temperature=2": r"densification_temperature has no effect",
    "synthesize.pad=2": r"pad 2 has no effect with crop 'random_resized'",
    "synthesize.crop=pad": r"crop 'pad' needs augment, and knows no crop_scale",
    "synthesize.matching.momentum=0.5": r"momentum has no effect without convolutions",
    "synthesize.matching.convolution=true": r"unknown key; did you mean 'convolutions'",
    "relabel={teachers: [resnet18], rescale: true}": r"rescale has no effect with one teacher",
    "evaluate.label_weight=0.1": r"label_weight has no effect with loss 'kl'",
    "evaluate={loss: mse_gt, temperature: 4}": r"temperature has no effect with loss 'mse_gt'",
    "synthesize.class_together=true": r"class_together optimises all images of a class with the same voters",
}


def test_mse_gt_needs_every_logit():
    with pytest.raises(ConfigError, match=r"mse_gt compares every logit, relabel\.top_k leaves some out"):
        load_config("digits-demo", ["evaluate.loss=mse_gt", "relabel.top_k=3"])


@pytest.mark.parametrize("override", BAD)
def test_settings_without_effect_are_refused(override):
    with pytest.raises(ConfigError, match=BAD[override]) as caught:
        load_config("digits-demo", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("method", ["k_center", "herding"])
def test_coresets_are_starting_images(method, experts, tmp_path):
    """Chosen class by class among the scored images, by the observer's features; the same however classes are divided."""
    from cvdd_ray.core.coresets import CORESETS, features
    from cvdd_ray.data.datasets import normalize
    from cvdd_ray.data.imagesets import read_image_set
    from cvdd_ray.stages.initialize import class_items, initialize
    from cvdd_ray.stages.pretrain import load_experts

    sections = {**GVBSM, "initialize": {"method": method, "images_per_class": 15, "observer": "convnet3"}}
    run = started(experts, tmp_path, sections)
    initialize(run, 2)
    images = read_image_set(run.store.read("initialize/ipc2/start.arrow"), "start")
    network, pixels = load_experts(run)[0]["convnet3"].build(), run.real.train.stack(run.info.image_size)
    assert images.labels_N.tolist() == list(range(10)) * 2
    for one in class_items(run, 2):
        assert len(one.scored) == 15
        own = features(network, normalize(torch.from_numpy(pixels[one.scored]), run.info))
        for i, position in enumerate(CORESETS[method](own, 2)):
            assert np.array_equal(images.images_NCHW[10 * i + one.label], pixels[one.scored[position]])
    counts = cvdd_ray.plan(run.config.model_copy(update={"runtime": tiny_config().runtime})).stage("initialize/ipc2")
    assert counts.counts == {"scored_images": 150, "crops": 0, "cuts": 40, "images": 40}
    assert counts.flops > 0
