"""A trial without Ray: what it shares with others, that it can be taken up again, and that it never sees the test set."""

import dataclasses
import json

import numpy as np
import pytest

from cvdd_ray.data.artifacts import Artifacts
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ConfigError
from cvdd_ray.recipes import with_settings
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.evaluate import evaluate
from cvdd_ray.stages.initialize import load_image_set
from cvdd_ray.stages.pipeline import run_all
from cvdd_ray.stages.synthesize import DISTILLED
from cvdd_ray.stages.trial import FIRST_STAGE, TrialStudents, prepare, run_trial, untouched_stages, with_history
from cvdd_ray.sweepconfig import SweepConfig


@pytest.fixture(scope="module")
def base():
    from conftest import tiny_config

    return tiny_config(
        relabel={"epochs": 6}, evaluate={"baselines": [], "seeds": 1, "test_every": 1}, runtime={"engine": "local"}
    )


@pytest.fixture(scope="module")
def pool(base, tmp_path_factory):
    """A store with everything the unchanged run needs."""
    store = Store(str(tmp_path_factory.mktemp("pool")))
    prepare(runs(store), base, {})
    return store


def runs(store, said=None):
    """Return `run_of` over one set of artifacts, as a process of a sweep has it."""
    artifacts = Artifacts(store, variants=True)
    return lambda config: Run(config, artifacts)


def folders(used):
    return {stage: manifest.identity["stage"] + manifest.content for stage, manifest in used.items()}


def made(store):
    return {name for name in store.names("stages") if name.endswith("manifest.json")}


@pytest.mark.parametrize(
    ("keys", "stages"),
    [
        ((), "pretrain prior initialize synthesize relabel"),
        (("evaluate.lr",), "pretrain prior initialize synthesize relabel"),
        (("evaluate.lr", "relabel.bn_group"), "pretrain prior initialize synthesize"),
        (("voting",), "pretrain prior initialize"),
        (("synthesize.lr",), "pretrain prior initialize"),
        (("initialize.difficulty",), "pretrain prior"),
        (("prior.ipc", "evaluate.eta"), "pretrain"),
        (("committee.experts",), ""),
    ],
)
def test_stages_that_no_swept_setting_touches(keys, stages):
    assert untouched_stages(keys) == tuple(stages.split())


def test_every_section_that_can_be_swept_says_what_it_changes_first():
    assert set(FIRST_STAGE) == set(SweepConfig.model_fields) - {"seed", "runtime", "storage", "sweep"}


def test_trials_of_the_post_evaluation_make_nothing(base, pool):
    before = made(pool)
    _, used = prepare(runs(pool), base, {"evaluate.temperature": 3.0, "evaluate.eta": 2.0, "evaluate.lr": 0.01})
    assert made(pool) == before
    assert {stage.split("/")[0] for stage in used} == {"pretrain", "prior", "initialize", "synthesize", "relabel"}


def test_trials_of_the_votes_share_experts_priors_and_starting_images(base, pool):
    before = made(pool)
    _, plain = prepare(runs(pool), base, {})
    _, random = prepare(runs(pool), base, {"voting.weighting": "random"})
    new = {name.split("/")[1] for name in made(pool) - before}
    assert new == {"synthesize", "relabel"}
    assert folders(plain)["prior"] == folders(random)["prior"]
    assert folders(plain)["synthesize/ipc2"] != folders(random)["synthesize/ipc2"]


def test_trials_of_the_labels_share_the_images_and_equal_label_settings_one_set(base, pool):
    before = made(pool)
    for lr in (0.001, 0.01):
        prepare(runs(pool), base, {"relabel.batchnorm": "eval", "evaluate.lr": lr})
    assert [name.split("/")[1] for name in made(pool) - before] == ["relabel"]


def test_other_experts_have_priors_of_their_own(base, pool):
    before = made(pool)
    _, used = prepare(runs(pool), base, {"committee.experts": ["shufflenet_v2", "resnet18"]})
    assert not {name for name in made(pool) - before if "/pretrain/" in name}  # the same two experts, in another order
    priors = json.loads(Artifacts(pool, variants=True).read(used["prior"], "priors.json"))["priors"]
    assert list(priors) == ["shufflenet_v2", "resnet18"]


def test_a_run_s_own_stages_serve_the_sweep_and_the_trials_configuration_repeats_them(base, tmp_path):
    """`cvdd run`, then a sweep that takes its stages over; and the trial's resolved settings as a run of their own."""
    run = Run(base, str(tmp_path / "run"))
    run_all(run)
    sweep_store = Store(str(tmp_path / "sweep"))
    artifacts = Artifacts(sweep_store, variants=True, sources=[run.store])
    trial, used = prepare(lambda config: Run(config, artifacts), base, {"evaluate.eta": 2.0})
    walls = {stage: run.artifacts.manifest(stage).wall_s for stage in used}
    assert {stage: manifest.wall_s for stage, manifest in used.items()} == walls  # taken over, not made again
    assert trial.config.prior.method == "given"
    again = Run(trial.config, str(tmp_path / "again"))
    run_all(again)
    images = [load_image_set(one, "synthesize/ipc2", DISTILLED, "synthesize") for one in (again, run)]
    assert images[0].content() == images[1].content()
    labels = [one.artifacts.manifest("relabel/ipc2/distilled").content for one in (again, run)]
    assert labels[0] == labels[1]


def test_settings_that_do_not_fit_are_refused(base, pool):
    with pytest.raises(ConfigError, match="vgg99"):
        prepare(runs(pool), base, {"evaluate.students": ["vgg99"]})


def test_several_workers_for_a_student_are_refused(base, pool):
    run, _ = prepare(runs(pool), base, {})
    run.config = run.config.model_copy(update={"evaluate": run.config.evaluate.model_copy(update={"workers": 2})})
    with pytest.raises(ConfigError, match=r"evaluate\.workers: got 2, but a trial trains its students in one process"):
        TrialStudents(run, 1)


# --- its students -------------------------------------------------------------------------------------------------------


def students(base, pool, values=None, seeds=2):
    run, _ = prepare(runs(pool), base, values or {})
    return TrialStudents(run, seeds)


def measured(trial, **options):
    reports = []
    run_trial(trial, lambda measurement, state: reports.append((measurement, state)), **options)
    return reports


def test_students_of_a_trial_are_those_of_the_evaluation(base, pool, tmp_path):
    """Trained side by side on the labels, they are the students that `evaluate` trains one by one."""
    reports = measured(students(base, pool))
    last = reports[-1][0]
    run, _ = prepare(runs(pool), base, {"evaluate.seeds": 2})
    run.real = dataclasses.replace(run.real, test=run.real.holdout)  # so that both measure on the same images
    evaluate(run, 2)
    results = json.loads(run.artifacts.read(run.require("evaluate/ipc2", "evaluate"), "results.json"))["runs"]
    assert [row["last"] for row in results] == list(last.holdout_accuracies)
    assert [[row[3] for row in one["curve"]] for one in results] == [
        [report.holdout_accuracies[seed] for report, _ in reports] for seed in range(2)
    ]
    assert np.mean([one["curve"][-1][1] for one in results]) == pytest.approx(last.train_loss)


def test_first_seed_makes_fresh_students(base, pool):
    def curves(**changes):
        run, _ = prepare(runs(pool), base, {f"evaluate.{name}": value for name, value in changes.items()})
        evaluate(run, 2)
        results = json.loads(run.artifacts.read(run.require("evaluate/ipc2", "evaluate"), "results.json"))["runs"]
        return {row["seed"]: [point[1] for point in row["curve"]] for row in results}

    first, fresh = curves(seeds=2), curves(seeds=2, first_seed=1)
    assert set(fresh) == {1, 2}
    assert fresh[1] == first[1]
    assert fresh[2] not in first.values()


def test_a_trial_taken_up_again_reports_what_it_would_have(base, pool):
    undisturbed = [report for report, _ in measured(students(base, pool))]
    reports = measured(students(base, pool), checkpoint_every=2)
    assert [report.epoch for report, state in reports if state] == [2, 4]  # not after the last
    again = students(base, pool)
    again.load(reports[1][1])
    assert [report for report, _ in measured(again)] == undisturbed[2:]
    assert undisturbed[-1].history == ((0, {"lr": 0.001, "weight_decay": 0.01, "eta": 1.0, "temperature": 20.0}),)


def test_reports_come_at_their_cadence_after_the_last_epoch_and_with_every_state(base, pool):
    reports = measured(students(base, pool, seeds=1), report_every=4, checkpoint_every=3, keep_last=True)
    assert [(report.epoch, state is not None) for report, state in reports] == [(3, True), (4, False), (6, True)]


def test_finished_students_that_are_taken_up_are_measured_once(base, pool):
    last, state = measured(students(base, pool), checkpoint_every=6, keep_last=True)[-1]
    copy = students(base, pool)
    copy.load(state)
    assert measured(copy) == [(last, None)]


def test_metrics_are_plain_values(base, pool):
    metrics = measured(students(base, pool))[-1][0].metrics()
    assert metrics["holdout_accuracy"] == pytest.approx(
        (metrics["holdout_accuracy_0"] + metrics["holdout_accuracy_1"]) / 2
    )
    assert (metrics["epoch"], metrics["epochs"]) == (6, 6)
    assert json.loads(json.dumps(metrics)) == metrics


def test_settings_changed_on_the_way_are_remembered_and_can_be_repeated(base, pool):
    """What population-based training does: a state goes on under other settings; best.yaml repeats it phase by phase."""
    first = students(base, pool, seeds=1)
    states = [state for _, state in measured(first, checkpoint_every=2) if state]
    changed = students(base, pool, {"evaluate.lr": 0.02, "evaluate.temperature": 5.0}, seeds=1)
    changed.load(states[0])
    both = measured(changed, checkpoint_every=4)
    reports = [report for report, _ in both]
    resumed = students(base, pool, {"evaluate.lr": 0.02, "evaluate.temperature": 5.0}, seeds=1)
    resumed.load(both[1][1])  # the same settings as it was saved with: nothing changes once more
    assert [report for report, _ in measured(resumed)] == reports[2:]
    assert reports[-1].history[1:] == ((2, {"lr": 0.02, "temperature": 5.0}),)
    replayed = with_history(base, reports[-1].history)
    assert replayed.evaluate.phases[0].from_epoch == 2
    repeated = measured(students(replayed, pool, seeds=1))
    assert [report for report, _ in repeated[2:]] == reports
    half_way = next(state for _, state in measured(students(replayed, pool, seeds=1), checkpoint_every=4) if state)
    again = students(replayed, pool, seeds=1)  # a run that has phases is taken up as it was, too
    again.load(half_way)
    assert [report for report, _ in measured(again)] == reports[2:]
    plain = measured(students(base, pool, seeds=1))
    assert plain[-1][0].train_loss != reports[-1].train_loss


def test_what_changed_after_the_last_epoch_is_not_repeated(base):
    """Population-based training copies finished students and gives them other settings, which train nothing any more."""
    first = {"lr": 0.01, "temperature": 4.0}
    history = [(0, first), (2, {"lr": 0.02}), (base.student_epochs, {"lr": 0.5})]
    replayed = with_history(base, history)
    assert [phase.from_epoch for phase in replayed.evaluate.phases] == [2]
    assert (replayed.evaluate.lr, replayed.evaluate.temperature) == (0.01, 4.0)


def test_a_trial_needs_no_test_images(base, pool):
    """Its real data comes without any; the same trial reports the same."""
    artifacts = Artifacts(pool, variants=True)
    full = Run(base, artifacts).real
    blind = dataclasses.replace(full, test=full.test.subset(np.arange(0)))
    run, _ = prepare(lambda config: Run(config, artifacts, real=blind), base, {})
    assert len(run.real.test) == 0
    assert [r for r, _ in measured(TrialStudents(run, 1))] == [r for r, _ in measured(students(base, pool, seeds=1))]


def test_warmup_and_schedule_reach_the_students(base, pool):
    changed = with_settings(base, {"evaluate": {"schedule": "linear", "warmup_epochs": 2}})
    rates = [report.lr for report, _ in measured(students(changed, pool, seeds=1))]
    assert rates == pytest.approx([0.001 / 3, 0.002 / 3, 0.001, 0.00075, 0.0005, 0.00025])
