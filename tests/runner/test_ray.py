"""Ray against local: the same artifacts to the bit, whatever the placement, and after an actor's death."""

import numpy as np
import pytest
import ray
import torch

from cvdd_ray.core.committee import Ballot
from cvdd_ray.core.experts import ExpertSpec
from cvdd_ray.core.models import build_seeded, save_weights
from cvdd_ray.errors import DataError, NumericsError
from cvdd_ray.runner.actors import ExpertActor
from cvdd_ray.runner.cluster import expert_share, task_share
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


@pytest.mark.parametrize("placement", ["spread", "colocate"])
def test_ray_and_local_make_equal_artifacts(placement, make_config, tmp_path, ray_runtime, local_hashes, monkeypatch):
    config = make_config(runtime={"placement": placement})
    monkeypatch.setattr(ray_runtime, "_c", config.runtime)
    assert distil(config, tmp_path, ray_runtime) == local_hashes


def spec(name="resnet18", seed=0) -> ExpertSpec:
    return ExpertSpec(name, 10, 16, 0.125, save_weights(build_seeded(name, 10, 16, width=0.125, seed=seed)))


def ballot(groups=2) -> Ballot:
    draw = torch.Generator().manual_seed(1)
    return Ballot(torch.randn(groups, 4, 3, 16, 16, generator=draw), torch.randint(10, (groups, 4), generator=draw))


def test_ray_committee_answers_as_the_local_one(ray_runtime):
    specs = {"a": spec(), "b": spec("shufflenet_v2")}
    actors = {name: ray.remote(num_cpus=0)(ExpertActor).remote(value, VOTER, 1) for name, value in specs.items()}
    asked = {"a": ballot(2), "b": ballot(1)}
    local = local_committee(specs, VOTER, torch.device("cpu")).vote(asked)
    remote = RayCommittee(actors).vote(asked)
    for name in specs:
        for part in ("gradient_GBCHW", "cross_entropy_G", "bn_term_G"):
            assert torch.equal(getattr(local[name], part), getattr(remote[name], part)), (name, part)
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
        return int(item + shared.sum()), torch.get_num_threads()

    items = {f"item{i}": i for i in range(4)}
    done = dict(ray_runtime.map(echo, items, (np.ones(3),)))
    assert {name: value for name, (value, _) in done.items()} == {f"item{i}": i + 3 for i in range(4)}
    assert {threads for _, threads in done.values()} == {1}


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
        module.distill(run, work, {"": jobs}, 2, 3, {**specs, "shufflenet_v2": broken})


class TestShares:
    """What actors and tasks ask of a cluster, without one."""

    def have(self, monkeypatch, **resources):
        monkeypatch.setattr(ray, "cluster_resources", lambda: resources)

    def test_gpus_are_divided_among_experts(self, monkeypatch, make_config):
        self.have(monkeypatch, CPU=16.0, GPU=2.0)
        assert expert_share(make_config().runtime, 5).num_gpus == 0.4
        assert expert_share(make_config().runtime, 1).num_gpus == 1.0

    def test_more_gpus_than_there_are_is_a_clear_error(self, monkeypatch, make_config):
        from cvdd_ray.errors import ConfigError

        self.have(monkeypatch, CPU=16.0, GPU=1.0)
        with pytest.raises(ConfigError, match=r"runtime\.gpus_per_actor: 0\.5 for each of 5 actors"):
            expert_share(make_config(runtime={"gpus_per_actor": 0.5}).runtime, 5)

    def test_cpu_cluster_gives_tasks_their_threads(self, monkeypatch, make_config):
        self.have(monkeypatch, CPU=8.0)
        share = task_share(make_config(runtime={"threads_per_actor": 4}).runtime)
        assert (share.num_cpus, share.num_gpus) == (4.0, 0.0)
