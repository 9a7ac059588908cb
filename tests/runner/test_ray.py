"""Ray against local: the same artifacts to the bit, whatever the placement, and after an actor's death."""

import time

import numpy as np
import pytest
import ray
import torch

from cvdd_ray.core.committee import Ballot
from cvdd_ray.core.experts import ExpertSpec
from cvdd_ray.core.models import build_seeded, save_weights
from cvdd_ray.errors import ConfigError, DataError, NumericsError
from cvdd_ray.runner.actors import ExpertActor
from cvdd_ray.runner.cluster import Share, expert_share, outgrown, task_share
from cvdd_ray.runner.committee import RayCommittee
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.grouptask import VoterSettings
from cvdd_ray.stages.initialize import initialize
from cvdd_ray.stages.pretrain import load_experts, pretrain
from cvdd_ray.stages.prior import prior
from cvdd_ray.stages.relabel import relabel
from cvdd_ray.stages.runtime import LocalRuntime, local_committee
from cvdd_ray.stages.synthesize import synthesize

STAGES = ["prior", "initialize/ipc2", "synthesize/ipc2", "relabel/ipc2/distilled"]
VOTER = VoterSettings(0.01, 10.0)


def distil(config, out, runtime) -> dict[str, str]:
    """Run every stage up to the labels; return the content hash of each artifact."""
    run = Run(config, str(out), runtime=runtime)
    pretrain(run)
    prior(run)
    initialize(run, 2)
    synthesize(run, 2)
    relabel(run, 2)
    experts = [f"pretrain/{name}" for name in config.committee.experts]
    return {stage: run.artifacts.manifest(stage).content for stage in [*experts, *STAGES]}


@pytest.fixture(scope="module")
def local_hashes(tmp_path_factory):
    from conftest import tiny_config

    return distil(tiny_config(), tmp_path_factory.mktemp("local"), LocalRuntime(1))


@pytest.mark.parametrize("placement", ["spread", "colocate", "auto"])
def test_ray_and_local_make_equal_artifacts(placement, make_config, tmp_path, ray_runtime, local_hashes, monkeypatch):
    config = make_config(runtime={"placement": placement})
    monkeypatch.setattr(ray_runtime, "_c", config.runtime)
    assert distil(config, tmp_path, ray_runtime) == local_hashes


def test_experts_and_coordinator_may_die_in_the_middle(make_config, tmp_path, ray_runtime, monkeypatch):
    """Every expert and the coordinator are killed once while they work; Ray restarts them, the images are the same."""
    killed = []

    def kill_once(name: str, report: dict) -> None:
        if not killed and 0.3 <= report["done"] < 1.0:
            experts = [actor for actors in ray_runtime._experts.actors.values() for actor in actors]
            victims = [*experts, *crews[-1].workers.actors.values()]
            killed.extend(victims)
            for victim in victims:
                ray.kill(victim, no_restart=False)

    events = []
    monkeypatch.setattr(ray_runtime, "_on_event", lambda event, facts: events.append((event, facts)))
    muster, crews = ray_runtime._muster, []
    monkeypatch.setattr(ray_runtime, "_muster", lambda *a: (made := muster(*a), crews.append(made[0]))[0])
    config = make_config(synthesize={"iterations": 100}, runtime={"placement": "spread"})
    monkeypatch.setattr(ray_runtime, "_c", config.runtime)
    run = Run(config, str(tmp_path / "disturbed"), runtime=ray_runtime)
    calm = Run(run.config, str(tmp_path / "calm"))
    for this in (run, calm):
        pretrain(this)
    prior(calm)
    for name in calm.store.names("prior") + calm.store.names("initialize"):
        run.store.write(name, calm.store.read(name))
    initialize(run, 2)
    distill = ray_runtime.distill
    monkeypatch.setattr(
        ray_runtime, "distill",
        lambda tasks, specs, voter, store, on_report: distill(
            tasks, specs, voter, store, lambda name, report: (kill_once(name, report), on_report(name, report))
        ),
    )  # fmt: skip
    synthesize(run, 2)
    initialize(calm, 2)
    synthesize(calm, 2)
    assert len(killed) == 3
    assert sorted(facts["what"] for event, facts in events if event == "failure") == [
        "coordinator", "expert resnet18", "expert shufflenet_v2",
    ]  # fmt: skip
    assert run.artifacts.manifest("synthesize/ipc2").content == calm.artifacts.manifest("synthesize/ipc2").content


def spec(name="resnet18", seed=0) -> ExpertSpec:
    return ExpertSpec(name, 10, 16, 0.125, save_weights(build_seeded(name, 10, 16, width=0.125, seed=seed)))


def ballot(groups=2) -> Ballot:
    draw = torch.Generator().manual_seed(1)
    return Ballot(torch.randn(groups, 4, 3, 16, 16, generator=draw), torch.randint(10, (groups, 4), generator=draw))


def test_ray_committee_answers_as_the_local_one(ray_runtime):
    specs = {"a": spec(), "b": spec("shufflenet_v2")}
    expert = ray.remote(num_cpus=0)(ExpertActor)
    actors = {
        name: [expert.remote(value, VOTER, 1) for _ in range(2 if name == "a" else 1)] for name, value in specs.items()
    }
    asked = {"a": ballot(2), "b": ballot(1)}
    local = local_committee(specs, VOTER, torch.device("cpu")).vote(asked)
    committee = RayCommittee(actors)
    for remote in (committee.vote(asked), committee.vote(asked)):  # by the first and by the second actor of a
        for name in specs:
            for part in ("gradient_GBCHW", "cross_entropy_G", "bn_term_G"):
                assert torch.equal(getattr(local[name], part), getattr(remote[name], part)), (name, part)
    assert committee._least_busy._asked == {("a", 0): 1, ("a", 1): 1, ("b", 0): 2}
    assert not torch.equal(local["a"].gradient_GBCHW[:1], local["b"].gradient_GBCHW)


def test_an_expert_that_dies_is_restarted_and_answers_the_same(ray_runtime):
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(ExpertActor)
    spec_ref = ray.put(spec())
    actor = remote.remote(spec_ref, VOTER, 1)
    views, labels = ballot().views_GBCHW.numpy(), ballot().labels_GB.numpy()
    before = ray.get(actor.vote.remote(views, labels))
    ray.kill(actor, no_restart=False)
    after = ray.get(actor.vote.remote(views, labels), timeout=120)
    assert all(np.array_equal(x, y) for x, y in zip(before, after, strict=True))


def test_map_shares_reports_and_names_results(ray_runtime):
    def echo(item, shared, *, report):  # inside the test, so that workers need not import this file
        report({"done": 0.5})
        time.sleep(0.6)  # longer than the driver waits between two looks at the reports
        return int(item + shared.sum()), torch.get_num_threads()

    items = {f"item{i}": i for i in range(4)}
    reports = []
    done = dict(
        ray_runtime.map(echo, items, (np.ones(3),), lambda name, report: reports.append((name, report["done"])))
    )
    assert {name: value for name, (value, _) in done.items()} == {f"item{i}": i + 3 for i in range(4)}
    assert {threads for _, threads in done.values()} == {1}
    assert sorted(reports) == [(name, 0.5) for name in sorted(items)]


def test_errors_a_user_can_mend_cross_ray_as_themselves(ray_runtime):
    def refuse(item, *, report):
        raise DataError(f"{item}.png cannot be read; remove it")

    with pytest.raises(DataError, match=r"^cat\.png cannot be read; remove it$"):
        list(ray_runtime.map(refuse, {"x": "cat"}))


def test_an_expert_that_blows_up_is_named(make_config, tmp_path, ray_runtime):
    config = make_config(prior={"method": "given", "values": {"resnet18": 50, "shufflenet_v2": 50}, "ipc": 10})
    run = Run(config, str(tmp_path), runtime=ray_runtime)
    pretrain(run)
    prior(run)
    initialize(run, 2)
    specs, _ = load_experts(run)
    model = specs["shufflenet_v2"].build()
    torch.nn.init.constant_(model.linear.weight, 3e38)  # finite, but its logits are not
    broken = ExpertSpec("shufflenet_v2", 10, 16, 0.125, save_weights(model))
    from cvdd_ray.stages import synthesize as module

    jobs = module.image_jobs(run, 2, lambda i: (("resnet18", "shufflenet_v2"), (0.5, 0.5)))
    plan = run.plan("broken", {}, {})
    with run.stage(plan, "broken") as work, pytest.raises(NumericsError, match=r"iteration 0: expert shufflenet_v2"):
        module.distill(
            run, work, {"": jobs}, 2, 3, {**specs, "shufflenet_v2": broken}, run.config.synthesize.jobs_per_group
        )


class TestShares:
    """What actors and tasks ask of a cluster, without one."""

    def have(self, monkeypatch, *nodes):
        alive = [{"Alive": True, "Resources": resources} for resources in nodes]
        monkeypatch.setattr(ray, "nodes", lambda: [*alive, {"Alive": False, "Resources": {"GPU": 8.0, "CPU": 64.0}}])

    @pytest.mark.parametrize(
        ("gpus", "actors", "share"),
        [(1, 5, 1 / 5), (2, 5, 1 / 3), (3, 5, 1 / 2), (4, 5, 1 / 2), (8, 5, 1.0), (2, 1, 1.0)],
    )
    def test_every_expert_fits_on_a_card(self, monkeypatch, make_config, gpus, actors, share):
        self.have(monkeypatch, {"CPU": 16.0, "GPU": float(gpus)})
        assert expert_share(make_config().runtime, actors).num_gpus == pytest.approx(share)
        assert gpus * int(1 / share + 1e-9) >= actors

    @pytest.mark.parametrize(("gpus", "each"), [(1, 0.5), (2, 0.6)])
    def test_more_than_fits_is_a_clear_error(self, monkeypatch, make_config, gpus, each):
        self.have(monkeypatch, {"CPU": 16.0, "GPU": float(gpus)})
        with pytest.raises(
            ConfigError, match=rf"runtime\.gpus_per_actor: {each} GPU for each of 3 actors does not fit"
        ):
            expert_share(make_config(runtime={"gpus_per_actor": each}).runtime, 3)

    def test_gpus_on_a_cluster_without_any(self, monkeypatch, make_config):
        self.have(monkeypatch, {"CPU": 4.0})
        with pytest.raises(ConfigError, match="the cluster has no GPU"):
            expert_share(make_config(runtime={"gpus_per_actor": 0.5}).runtime, 3)

    def test_cpu_experts_hold_cores_on_a_shared_cluster_only(self, monkeypatch, make_config):
        self.have(monkeypatch, {"CPU": 4.0}, {"CPU": 4.0})
        assert expert_share(make_config().runtime, 5).num_cpus == 0.0
        assert expert_share(make_config(runtime={"address": "auto"}).runtime, 5).num_cpus == 1.0
        assert expert_share(make_config(runtime={"address": "auto"}).runtime, 10).num_cpus == 0.72

    @pytest.mark.parametrize(("nodes", "actors"), [((1, 1), 3), ((2, 2), 5), ((1, 3), 5), ((8,), 3), ((1, 1, 1), 3)])
    def test_cpu_experts_all_find_a_node(self, monkeypatch, make_config, nodes, actors):
        self.have(monkeypatch, *({"CPU": float(cores)} for cores in nodes))
        share = expert_share(make_config(runtime={"address": "auto", "threads_per_actor": 2}).runtime, actors).num_cpus
        assert 0 < share <= 2
        assert sum(int(cores / share) for cores in nodes) >= actors
        half_more = sum(int(cores / (1.5 * share)) for cores in nodes)
        assert half_more < actors or share == 2, "a good deal more would have fitted, too"

    def test_lost_nodes_are_waited_for_and_then_done_without(self, monkeypatch, make_config):
        """Three experts on three nodes with one core each; one node leaves for 9 s, then for good."""
        c, now = make_config(runtime={"address": "auto"}).runtime, 0.0
        self.have(monkeypatch, {"CPU": 1.0}, {"CPU": 1.0}, {"CPU": 1.0})
        lack_places = outgrown(c, expert_share(c, 3), 3, clock=lambda: now)
        answers = []
        for now, nodes in ((0, 3), (5, 2), (14, 2), (15, 3), (20, 2), (29, 2), (30, 2)):  # noqa: B007 - the clock
            self.have(monkeypatch, *({"CPU": 1.0} for _ in range(nodes)))
            answers.append(lack_places())
        assert answers == [False] * 6 + [True]
        assert expert_share(c, 3).num_cpus == 0.45

    def test_lost_gpus_are_waited_for_where_others_cannot_do(self, monkeypatch, make_config):
        c, now = make_config().runtime, 0.0
        set_by_user = make_config(runtime={"gpus_per_actor": 1}).runtime
        self.have(monkeypatch, {"CPU": 1.0}, {"CPU": 1.0, "GPU": 2.0})
        asked = [outgrown(this, expert_share(this, 2), 2, clock=lambda: now) for this in (c, set_by_user)]
        times = ((1, 1.0, [False, False]), (20, 1.0, [True, False]), (30, 0.0, [False, False]))
        for now, gpus, answers in times:  # noqa: B007 - the clock
            self.have(monkeypatch, {"CPU": 1.0}, {"CPU": 1.0, "GPU": gpus})
            assert [lack_places() for lack_places in asked] == answers

    def test_lost_gpus_cost_experts_their_second_actors(self, monkeypatch, make_config):
        """Four actors of two experts, one GPU each as the user has set: three GPUs will do, one will not."""
        c, now = make_config(runtime={"gpus_per_actor": 1}).runtime, 0.0
        self.have(monkeypatch, {"GPU": 4.0})
        lack_places = outgrown(c, expert_share(c, 4), 4, fewest=2, clock=lambda: now)
        answers = []
        for now, gpus in ((0, 4.0), (1, 1.0), (30, 1.0), (31, 3.0), (50, 3.0)):  # noqa: B007 - the clock
            self.have(monkeypatch, {"GPU": gpus})
            answers.append(lack_places())
        assert answers == [False] * 4 + [True]

    def test_tasks_get_their_threads_but_no_more_than_a_node_has(self, monkeypatch, make_config):
        self.have(monkeypatch, {"CPU": 8.0}, {"CPU": 2.0})
        assert task_share(make_config(runtime={"threads_per_actor": 4}).runtime) == Share(4.0, 0.0)
        assert task_share(make_config(runtime={"threads_per_actor": 32}).runtime) == Share(8.0, 0.0)


def test_a_private_ray_demands_its_token(ray_runtime):
    """Every user of the machine reaches its ports, so a stranger without the token must not get in."""
    import os
    import subprocess
    import sys

    address = ray.get_runtime_context().gcs_address
    code = f"import ray; ray.init({address!r}, logging_level='ERROR'); print('got in', ray.cluster_resources())"
    strangers = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    wrong = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "f" * 64}
    strangers["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # for Ray to take 127.0.0.1 as it is
    done = subprocess.run(
        [sys.executable, "-c", code], env={**strangers, **wrong}, capture_output=True, text=True, timeout=120
    )
    assert done.returncode != 0
    assert "got in" not in done.stdout
    assert "token" in done.stderr.lower()
