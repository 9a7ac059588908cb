"""What `plan` counts against finished runs, hand arithmetic and the published figures of ImageNet-1K."""

import io
import json
import math
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
import torch
from helpers import write_labels
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

from cvdd_ray import plan
from cvdd_ray.core.costs import Network, view_flops, vote_cost, weight_bytes
from cvdd_ray.data.labels import epoch_bytes, label_batch
from cvdd_ray.data.shards import open_labels
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError
from cvdd_ray.recipes import load_config, recipe_names
from cvdd_ray.stages import speeds
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.initialize import initialize
from cvdd_ray.stages.pipeline import STAGES, remember
from cvdd_ray.stages.planreport import rich_plan, size
from cvdd_ray.stages.relabel import ViewSettings
from cvdd_ray.stages.simulation import Wire

TINY = {
    "committee": {"experts": ["resnet18", "wide_resnet16_2"], "width": 0.125},  # torch's counter knows these exactly
    "runtime": {"engine": "local", "placement": "colocate"},
    "synthesize": {"iterations": 7, "jobs_per_group": 2, "checkpoint_every": 3},
    "ipc": [3],
    "data": {"max_per_class": 20, "max_test": 30},
    "evaluate": {"seeds": 1, "baselines": ["random_hard", "eval_labels"]},
}
ORDER = ("pretrain", "initialize", "prior", "synthesize", "relabel", "evaluate")


class Finished:
    """A tiny run, stage by stage: FLOPs that torch counted, files in `partial/` before the commits, checkpoints written."""

    def __init__(self, config, folder):
        self.flops, self.partial, self.checkpoints = {}, {}, Counter()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "delete_folder", self._deleting(Store.delete_folder))
            patch.setattr(Store, "write", self._writing(Store.write))
            self.run = Run(config, str(folder))
            for verb in ORDER:
                with FlopCounterMode(display=False) as counter:
                    if verb == "initialize":
                        initialize(self.run, config.prior.ipc)
                    STAGES[verb](self.run)
                self.flops[verb] = counter.get_total_flops()
            remember(self.run)
        self.plan = plan(config)

    def _deleting(self, delete):
        def delete_folder(store, folder):
            if names := store.names(folder):
                self.partial[folder.removesuffix("/partial")] = names
            delete(store, folder)

        return delete_folder

    def _writing(self, write):
        def write_and_note(store, name, content):
            if name.endswith(".checkpoint"):
                self.checkpoints[name.split("/partial")[0], len(content)] += 1
            write(store, name, content)

        return write_and_note

    def planned(self, verb):
        return [stage for stage in self.plan.stages if stage.stage.split("/")[0] == verb]

    def names(self, folder):
        return self.run.store.names(folder)

    def bytes(self, folder):
        return sum(len(self.run.store.read(name)) for name in self.names(folder))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    from conftest import tiny_config

    return Finished(tiny_config(**TINY), tmp_path_factory.mktemp("plan") / "run")


@pytest.mark.parametrize("verb", ["pretrain", "prior", "synthesize", "relabel", "evaluate"])
def test_flops_are_those_that_torch_counts_in_a_run(finished, verb):
    assert sum(stage.flops for stage in finished.planned(verb)) == finished.flops[verb]


def test_flops_of_scoring_are_those_of_the_observer(finished):
    """Cutting crops out of real images is work of other processors; here it was counted, once to score and once to use."""
    stages = finished.planned("initialize")
    cropped = sum(stage.counts["crops"] for stage in stages) + 2 * 10 * (2 + 3)
    assert sum(stage.flops for stage in stages) + cropped * view_flops(16) == finished.flops["initialize"]


def test_files_are_those_of_the_run(finished):
    """Per stage, when it is finished and before that; what no stage has is config.yaml."""
    stages = finished.plan.stages
    assert [stage.stage for stage in stages] == [
        "pretrain", "initialize/ipc2", "prior", "initialize/ipc3", "synthesize/ipc3", "relabel/ipc3/distilled",
        "relabel/ipc3/distilled-eval", "evaluate/ipc3",
    ]  # fmt: skip
    for stage in stages:
        assert stage.storage.files == len(finished.names(stage.stage)), stage.stage
        assert stage.storage.partial_files == len(finished.partial.get(stage.stage, [])), stage.stage
    everything = [path for path in Path(finished.run.store.root).rglob("*") if path.is_file()]
    assert finished.plan.files == len(everything)


def test_bytes_are_those_of_the_run(finished):
    """Up to what manifests, headers and the PNG of tiny images make of it."""
    for stage in finished.plan.stages:
        written, slack = finished.bytes(stage.stage), 5000 * stage.storage.files
        assert stage.storage.bytes == pytest.approx(written, rel=0.1, abs=slack), stage.stage


def test_checkpoints_are_those_of_the_run(finished):
    """7 iterations, one every 3: two of each group; the first group has two jobs, the second one."""
    stage = finished.plan.stage("synthesize/ipc3")
    written = {size: count for (name, size), count in finished.checkpoints.items() if name == stage.stage}
    assert stage.storage.checkpoints == sum(written.values()) == 4
    assert max(written) == pytest.approx(stage.storage.checkpoint_bytes, rel=0.02)
    assert finished.plan.stage("prior").storage.checkpoints == 0  # 3 iterations
    assert not [name for name, _ in finished.checkpoints if name == "prior"]


def test_counts_are_those_of_the_run(finished):
    made = finished.plan.stage("synthesize/ipc3").counts
    trace = json.loads(finished.run.store.read("synthesize/ipc3/trace.json"))
    assert made["jobs"] == len({(index, chunk) for _, index, chunk, *_ in trace}) == 3
    assert made["groups"] == len([name for name in finished.partial["synthesize/ipc3"] if "group" in name]) // 2
    assert made["trace_rows"] == len(trace)
    assert made["iterations"] == 7 * 3
    assert made["image_views"] == 7 * 30
    labels = open_labels(finished.run.store, {"relabel/ipc3/distilled/labels.arrow": "of the local disk"}, None)
    rows = [plan for epoch in range(labels.num_epochs) for plan, _ in labels.epoch(epoch)]
    made = finished.plan.stage("relabel/ipc3/distilled").counts
    assert made["epochs"] == labels.num_epochs
    assert made["batches"] == len(rows)
    assert made["image_views"] == sum(len(plan.image_index_B) for plan in rows)
    table = json.loads(finished.run.store.read("evaluate/ipc3/results.json"))
    made = finished.plan.stage("evaluate/ipc3").counts
    assert made["students"] == len(table["runs"])
    assert made["tests"] == sum(len(run["curve"]) for run in table["runs"])


def test_label_bytes_are_those_of_a_file():
    """200 images of 1,000 classes, two epochs."""
    views = ViewSettings(0, True, 64, load_config("cifar10").relabel)
    epochs = [
        label_batch([(p, torch.zeros(len(p.image_index_B), 1000)) for p in views.plans(e, 200)]) for e in range(2)
    ]
    written = write_labels(epochs, {"images": "x", "num_classes": 1000})
    assert 2 * epoch_bytes(200, 13, 1000) == pytest.approx(len(written), rel=0.01)


# ------------------------------------------------------------------------------------------------- ImageNet-1K

COLOCATED = ["runtime.placement=colocate"]


@pytest.fixture(scope="module")
def imagenet():
    return plan(load_config("imagenet1k-ipc10", COLOCATED), flops_per_s=1e13)


def test_imagenet_is_the_published_work(imagenet):
    """Spec section 7.1: 400,000 iterations with two voters; 187,500 batches of labels; 6 GB of fp16 logits."""
    made, labels, students = (
        imagenet.stage(s) for s in ("synthesize/ipc10", "relabel/ipc10/distilled", "evaluate/ipc10")
    )
    assert {name: made.counts[name] for name in ("jobs", "groups", "iterations", "expert_calls", "image_views")} == {
        "jobs": 100, "groups": 100, "iterations": 400_000, "expert_calls": 800_000, "image_views": 40_000_000,
    }  # fmt: skip
    assert made.storage.files == 10 + 2  # a shard per image index, trace, manifest
    assert labels.storage.files == 30 + 1
    assert labels.counts["batches"] == 187_500
    assert students.counts["iterations"] == 3 * 187_500
    assert labels.storage.bytes == pytest.approx(6e9, rel=0.02)
    assert made.storage.bytes == pytest.approx(10_000 * 3 * 224**2, rel=0.01)
    assert made.storage.checkpoint_bytes == 3 * 100 * 3 * 224**2 * 4
    assert made.storage.checkpoints == 100 * 7
    assert made.useful_gpus == 100


def test_flops_of_imagenet_by_hand(imagenet):
    """Every pair of five votes on 4 of 10 image indices; a view out and its gradient back are two matrix products each."""
    published = 2e9 * (1.814 + 4.089 + 0.145 + 0.301 + 2.834)
    per_image = 2 * published * 2 / 5 + 8 * 3 * 224**3
    assert imagenet.stage("synthesize/ipc10").flops == pytest.approx(40e6 * per_image, rel=0.003)
    views = 300 * 10_000 * 4 * 3 * 224**3
    assert imagenet.stage("relabel/ipc10/distilled").flops == pytest.approx(3e6 * published + views, rel=0.003)
    first_layer = 2 * 112**2 * 64 * 3 * 7**2
    learning = 3e6 * (3 * 2e9 * 1.814 - first_layer) + views + 31 * 50_000 * 2e9 * 1.814
    assert imagenet.stage("evaluate/ipc10").flops == pytest.approx(3 * learning, rel=0.003)
    scoring = 300_000 * 5 * 2e9 * 1.814
    assert imagenet.stage("initialize/ipc10").flops == pytest.approx(scoring, rel=0.003)


def test_one_gpu_is_always_busy(imagenet):
    assert all(stage.busy == pytest.approx(1.0) for stage in imagenet.stages if stage.flops)
    assert imagenet.wall_hours == pytest.approx(imagenet.flops / 1e13 / 3600)
    assert imagenet.gpu_hours == pytest.approx(imagenet.wall_hours)


def test_bytes_on_the_wire_by_hand(imagenet):
    """100 views out and 100 gradients back for both voters, labels, and two numbers per group."""
    wire = imagenet.stage("synthesize/ipc10").wire_bytes_per_iteration
    assert wire == 2 * (2 * 100 * 3 * 224**2 * 4 + 100 * 8 + 8)


def test_memory_holds_what_it_must(imagenet):
    """The distilled set as uint8 once per node; images and moments of a job; all experts' weights on a colocated GPU."""
    pixels, labels = 10_000 * 3 * 224**2, imagenet.stage("relabel/ipc10/distilled")
    weights = sum(
        weight_bytes(Network(name, 1000, 224))[0] for name in load_config("imagenet1k-ipc10").committee.experts
    )
    assert labels.store_bytes == pixels + weights
    assert labels.worker_bytes > pixels + 10_000 * 1000 * (4 + 2)
    assert labels.node_bytes == labels.store_bytes + 4 * labels.worker_bytes  # four tasks share the GPU
    assert labels.driver_bytes > 2 * pixels
    made, job = imagenet.stage("synthesize/ipc10"), 100 * 3 * 224**2 * 4
    assert made.gpu_bytes > weights + 5 * job + vote_cost(Network("densenet121", 1000, 224), 1, 100).peak_bytes


@pytest.mark.parametrize("gpus", [8, 64])
def test_equal_jobs_lose_what_does_not_divide(gpus):
    """jobs / (GPUs * ceil(jobs / GPUs)); pairs of unequal cost fill each other's gaps."""
    equal = ["voting={selection: fixed, fixed: [resnet18, resnet50]}", *COLOCATED]
    made = plan(load_config("imagenet1k-ipc10", equal), nodes=gpus // 8, gpus_per_node=8).stage("synthesize/ipc10")
    expected = 100 / (gpus * math.ceil(100 / gpus))
    assert made.balance == pytest.approx(expected)
    assert made.busy == pytest.approx(expected)
    unequal = plan(load_config("imagenet1k-ipc10", COLOCATED), nodes=gpus // 8, gpus_per_node=8).stage(
        "synthesize/ipc10"
    )
    assert unequal.balance == pytest.approx(expected)
    assert unequal.busy > expected + 0.02


# ------------------------------------------------------------------------------------------------- what changes what

CIFAR = ["voting={selection: fixed, fixed: [resnet18, mobilenet_v2]}", "prior.method=given", "ipc=[10]",
         "prior.values={resnet18: 1, resnet50: 1, shufflenet_v2: 1, mobilenet_v2: 1, densenet121: 1}", *COLOCATED]  # fmt: skip


def cifar(*changes, **machines):
    return plan(load_config("cifar10", [*CIFAR, *changes]), **machines)


def test_work_grows_with_the_images_per_class():
    ten, fifty = cifar(), cifar("ipc=[50]")
    for before, after in zip(ten.stages[2:], fifty.stages[2:], strict=True):
        if before.stage.startswith(("synthesize", "relabel/ipc10/distilled")):
            assert after.flops == 5 * before.flops
            # of labels: short last batches and headers of epochs do not grow
            assert after.storage.bytes == pytest.approx(
                5 * before.storage.bytes, rel=0.2 if "relabel" in after.stage else 1e-6
            )
    made = ten.stage("synthesize/ipc10"), fifty.stage("synthesize/ipc50")
    assert [stage.counts["jobs"] for stage in made] == [10, 50]
    assert [stage.counts["groups"] for stage in made] == [2, 10]  # five jobs each


def test_work_follows_the_settings():
    base = cifar().stage("synthesize/ipc10")
    assert cifar("synthesize.iterations=2000").stage("synthesize/ipc10").flops * 2 == base.flops
    assert cifar("synthesize.class_chunk=5").stage("synthesize/ipc10").counts["jobs"] == 20
    labels = "relabel/ipc10/distilled"
    assert cifar("relabel.epochs=150").stage(labels).flops * 2 == cifar().stage(labels).flops
    both, one = (
        cifar(f"relabel.teachers={names}").stage(labels).flops for names in ("[resnet18, resnet50]", "[resnet18]")
    )
    alone = cifar("relabel.teachers=[resnet50]").stage(labels).flops
    assert both + 100 * 300 * view_flops(32) == one + alone
    assert cifar("evaluate.seeds=6").stage("evaluate/ipc10").flops == 2 * cifar().stage("evaluate/ipc10").flops
    assert cifar("committee.weights={resnet18: x.safetensors}").stage("pretrain").counts["trained"] == 4


def test_spread_gives_experts_gpus_by_their_cost():
    """Two groups of five jobs ask two experts; of 4 GPUs ResNet-18 would take all, but no more than groups ask it."""
    spread = cifar("runtime.placement=spread", nodes=4, gpus_per_node=1, flops_per_s=1e12)
    made, votes = spread.stage("synthesize/ipc10"), 4000 * 100
    assert (made.units, made.useful_gpus) == (4, 4)
    costs = [votes * vote_cost(Network(name, 10, 32), 1, 10).flops // 10 for name in ("resnet18", "mobilenet_v2")]
    wire = Wire()
    message_s = wire.latency_s + 2 * made.wire_bytes_per_iteration / 4 / wire.bytes_per_s
    step_s = 50 * 3 * 32**2 * wire.step_s_per_value
    alone_s = max(costs) / 2 / 1e12 + 4000 * (message_s + step_s)  # the groups do not wait for each other
    assert made.wall_hours * 3600 == pytest.approx(alone_s, rel=0.01)
    assert made.busy == pytest.approx(sum(costs) / 1e12 / (4 * alone_s), rel=0.01)
    assert not [note for note in spread.notes if "questions" in note]
    many = cifar("runtime.placement=spread", nodes=5, gpus_per_node=1, flops_per_s=1e12)
    assert "has questions for 4 GPUs at most" in " ".join(many.notes)
    one = cifar("runtime.placement=spread", flops_per_s=1e12, wire=Wire(0.0, math.inf, 0.0)).stage("synthesize/ipc10")
    assert one.wall_hours * 3600 == pytest.approx(sum(costs) / 1e12)
    assert made.store_bytes > cifar().stage("synthesize/ipc10").store_bytes  # views and gradients in flight


def test_auto_is_colocate_where_the_committee_fits():
    small, large = (
        plan(
            load_config("imagenet1k-ipc10", ["runtime.placement=auto", f"synthesize.jobs_per_group={jobs}"]), gpu="a10"
        )
        for jobs in (1, 2)
    )
    assert (small.placement, large.placement) == ("colocate", "spread")
    assert small.stage("synthesize/ipc10").gpu_bytes < 0.8 * 24e9
    assert cifar("runtime.placement=auto").placement == "colocate"  # on a GPU that is not named


def test_what_keeps_gpus_idle_is_said_with_what_would_change_it(imagenet):
    """100 jobs of ten costs: at 64 GPUs the dearest job alone takes longer than a 64th of all."""
    assert not [note for note in imagenet.notes if "busy" in note]
    many = plan(load_config("imagenet1k-ipc10", COLOCATED), nodes=8, gpus_per_node=8)
    costs = [2e9 * a + 2e9 * b for a, b in combinations((1.814, 4.089, 0.145, 0.301, 2.834), 2)]
    views = 8 * 3 * 224**3
    dearest = (2 * max(costs) + views) / (sum(2 * cost + views for cost in costs) / 10)
    assert many.stage("synthesize/ipc10").busy == pytest.approx(100 / 64 / dearest, rel=0.003)
    (note,) = (note for note in many.notes if "busy" in note)
    assert "cannot be dealt out to 64 GPUs with more than 84%" in note
    assert "95% are reached on up to 35 GPUs, or with synthesize.class_chunk=50 (other images" in note
    finer = ["synthesize.class_chunk=50", *COLOCATED]
    assert plan(load_config("imagenet1k-ipc10", finer), nodes=8, gpus_per_node=8).stage("synthesize/ipc10").busy > 0.95
    fifty = plan(load_config("imagenet1k-ipc10", ["ipc=[50]", *COLOCATED]), nodes=8, gpus_per_node=8)
    assert fifty.stage("synthesize/ipc50").busy > 0.95


def test_smaller_groups_are_named_before_other_images():
    notes = " ".join(cifar(nodes=5, gpus_per_node=1).notes)
    assert "with synthesize.jobs_per_group=1 (last bits differ)" in notes


def test_simulate_is_the_plan_for_other_numbers_of_gpus(imagenet):
    table = plan(load_config("imagenet1k-ipc10", COLOCATED), flops_per_s=1e13, simulate=True)
    assert imagenet.simulated == ()
    assert [one.gpus for one in table.simulated] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for one in table.simulated[3:7:3]:
        for placement in ("colocate", "spread"):
            config = load_config("imagenet1k-ipc10", [f"runtime.placement={placement}"])
            made = plan(config, gpus_per_node=one.gpus, flops_per_s=1e13).stage("synthesize/ipc10")
            assert one.busy[placement] == pytest.approx(made.busy)
            assert one.wall_hours[placement] == pytest.approx(made.wall_hours)
    assert table.simulated[5].busy["colocate"] > 0.95 > table.simulated[6].busy["colocate"]
    text = printed(table)
    assert f"{table.simulated[5].busy['colocate']:.1%}" in text
    assert json.loads(json.dumps(table.plain()))["simulated"][0]["gpus"] == 1


def test_tasks_fill_a_gpu_before_the_next(imagenet):
    many = plan(load_config("imagenet1k-ipc10", COLOCATED), nodes=8, gpus_per_node=8, flops_per_s=1e13)
    labels, apart = many.stage("relabel/ipc10/distilled"), "runtime.gpus_per_actor=1"
    assert labels.useful_gpus == 8
    assert labels.wall_hours == pytest.approx(imagenet.stage("relabel/ipc10/distilled").wall_hours * 4 / 30)
    assert apart in " ".join(many.notes)
    alone = plan(load_config("imagenet1k-ipc10", [*COLOCATED, apart]), nodes=8, gpus_per_node=8, flops_per_s=1e13)
    assert alone.stage("relabel/ipc10/distilled").useful_gpus == 30
    assert alone.stage("evaluate/ipc10").wall_hours == pytest.approx(many.stage("evaluate/ipc10").wall_hours / 3)
    assert apart not in " ".join(alone.notes)


# ------------------------------------------------------------------------------------------------- speeds


def test_no_speed_no_times():
    planned = cifar()
    assert (planned.speed, planned.wall_hours, planned.gpu_hours) == (None, None, None)
    assert {stage.wall_hours for stage in planned.stages} == {None}


def test_a_gpus_peak_is_assumed_and_said_so():
    planned = cifar(gpu="h100")
    assert planned.speed.flops_per_s == pytest.approx(0.35 * 66.9e12)
    assert "ASSUMED, not measured: 35.0%" in planned.speed.source
    assert cifar(gpu="h100", utilization=0.07).wall_hours == pytest.approx(5 * planned.wall_hours)
    given = cifar(gpu="h100", flops_per_s=1e12)
    assert given.speed.flops_per_s == 1e12


def test_a_measurement_takes_seconds_per_image_and_expert(monkeypatch):
    """A machine where a vote takes 10 ms per image of ResNet-18 and 40 ms of any other network."""
    monkeypatch.setattr(
        speeds,
        "_vote_s",
        lambda voter, network, groups, images, device: groups * images * SECONDS.get(network.name, 0.04),
    )
    planned = cifar(calibrate=True)
    votes = {name: vote_cost(Network(name, 10, 32), 5, 10).flops / 50 for name in ("resnet18", "mobilenet_v2")}
    assert planned.speed.of_network["resnet18"] == pytest.approx(votes["resnet18"] / 0.01)
    assert planned.speed.of_network["mobilenet_v2"] == pytest.approx(votes["mobilenet_v2"] / 0.04)
    assert planned.speed.flops_per_s == pytest.approx(sum(votes.values()) / 0.05)
    views = 2 * view_flops(32) / planned.speed.flops_per_s
    assert planned.stage("synthesize/ipc10").wall_hours * 3600 == pytest.approx(4000 * 100 * (0.01 + 0.04 + views))
    assert "measured here" in planned.speed.source
    assert "with 50 images" in planned.speed.source


SECONDS = {"resnet18": 0.01}


def test_a_measurement_here_takes_fewer_images_where_all_would_take_too_long(make_config, monkeypatch):
    config = make_config(prior={"method": "given", "values": {"resnet18": 1, "shufflenet_v2": 1}})
    monkeypatch.setattr(speeds, "BUDGET_S", 0.01)
    planned = plan(config, calibrate=True, gpus_per_node=2)
    assert set(planned.speed.of_network) == {"resnet18", "shufflenet_v2"}
    assert all(1e5 < value < 1e14 for value in planned.speed.of_network.values())
    assert "with 2 images" in planned.speed.source
    assert planned.stage("evaluate/ipc2").useful_gpus == 10  # on a CPU no task takes a part of a core


def test_what_does_not_fit_is_said():
    notes = plan(load_config("imagenet1k-ipc10", COLOCATED), gpu="rtx4090").notes
    assert any("relabel/ipc10/distilled needs" in note and "rtx4090 has 24 GB" in note for note in notes)
    assert not any("needs" in note for note in cifar(gpu="h100").notes)


def test_what_is_not_counted_is_said(make_config):
    given = {
        "prior": {"method": "given", "values": {"resnet18": 1, "shufflenet_v2": 1}},
        "synthesize": {"compile": True},
    }
    notes = plan(make_config(**given, pretrain={"workers": 3})).notes
    assert "votes are counted and timed as they are without synthesize.compile" in notes
    assert "pretrain.workers=3: what 3 GPUs train together is timed as if one of them did it alone" in notes
    assert not any("workers=" in note for note in plan(make_config(**given)).notes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gpu": "h1000"}, "known are t4, v100"),
        ({"utilization": 0.5}, "no effect"),
        ({"gpu": "h100", "flops_per_s": 1e12, "utilization": 0.5}, "no effect"),
        ({"gpu": "h100", "utilization": 35}, "above 0 and up to 1"),
        ({"flops_per_s": 0}, "--flops-per-s 0"),
        ({"flops_per_s": 1e12, "calibrate": True}, "give one of them"),
        ({"nodes": 0}, "--nodes 0"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, message):
    with pytest.raises(ConfigError, match=message):
        cifar(**arguments)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["ipc=[6000]"], "need 6000 real images"),
        (["committee.experts=[convnet3]", "prior.values={convnet3: 1}"], "cannot vote"),
        (["relabel.teachers=[vgg]"], "not in the committee"),
        (["prior.values={resnet18: 1}"], "exactly one number"),
        (["voting={size: 6, fixed: null, selection: enumerate}"], "voting.size: got 6"),
    ],
)  # fmt: skip
def test_what_a_run_would_refuse_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        cifar(*changes)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_can_be_planned(name):
    sizes = {"num_classes": 10, "train_images": 5000} if name == "folder224" else {}
    planned = plan(load_config(name), **sizes)
    assert planned.flops > 0
    assert rich_plan(planned)


def printed(planned) -> str:
    console = Console(width=200, record=True, file=io.StringIO())
    for part in rich_plan(planned):
        console.print(part, soft_wrap=True)
    return console.export_text()


def test_the_report_names_every_stage_and_the_source_of_the_speed(imagenet):
    text = printed(imagenet)
    assert not [stage.stage for stage in imagenet.stages if stage.stage not in text]
    assert "given: 10 TFLOP/s sustained by one GPU" in text
    assert "700 x 181 MB" in text
    assert "241 MB travel per iteration" in text
    assert json.loads(json.dumps(imagenet.plain()))["totals"]["files"] == imagenet.files


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0"), (999, "999 B"), (1500, "1.5 kB"), (6.07e9, "6.07 GB"), (2e13, "20 TB")]
)
def test_sizes_for_readers(count, text):
    assert size(int(count)) == text
