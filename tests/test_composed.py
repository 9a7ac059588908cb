"""Recipes by name: every name resolves, the published numbers are in them, recipes of old stay what they were."""

import hashlib
import json
from pathlib import Path

import pytest
import yaml

import cvdd_ray
from cvdd_ray.config import RunConfig
from cvdd_ray.data.datasets import dataset_info
from cvdd_ray.errors import ConfigError
from cvdd_ray.recipes import composed as names_of
from cvdd_ray.recipes import dump_config, load_config, recipe_description, recipe_names
from cvdd_ray.recipes.composed import DATASETS, RecipeName, all_names, parse_name, part
from cvdd_ray.stages.context import Run
from cvdd_ray.stages.pipeline import STAGES
from cvdd_ray.stages.votes import needs_priors

FROZEN = json.loads((Path(__file__).parent / "frozen_recipes.json").read_text())
NAMES = [str(name) for name in all_names()]
FIVE = ("cifar10", "cifar100", "tinyimagenet", "imagenette", "imagenet1k")  # of the paper


# ------------------------------------------------------------------------------------------------- every name


def test_every_name_resolves_and_is_read_back():
    """Each to a checked configuration of its own, of the dataset, IPC and student that it names."""
    seen = {}
    for name in NAMES:
        config, about = load_config(name), parse_name(name)
        assert str(about) == name
        assert config.ipc == (about.ipc,)
        assert config.evaluate.students == (part("common")["students"][about.student],)
        assert dataset_info(config.data).name == {"tinyimagenet": "tiny_imagenet"}.get(about.dataset, about.dataset)
        assert str(about.ipc) in recipe_description(name)
        written = config.model_dump_json()
        assert written not in seen, f"{name} is {seen.get(written)} under another name"
        seen[written] = name
    for dataset in FIVE:
        for ipc in (1, 10, 50):
            for student in ("r18", "r50", "r101"):
                for tail in ("", "-sre2l++", "-paper", "-code", "-sre2l++-paper", "-sre2l++-code"):
                    assert f"{dataset}-ipc{ipc}-{student}{tail}" in NAMES


def test_rules_speak_of_what_there_is():
    """No rule waits for a word that no name has, none is without effect on all recipes it could be for."""
    for name in NAMES:
        parse_name(name)
    known = {
        "dataset": set(DATASETS), "ipc": set(part("common")["ipc"]), "student": set(part("common")["students"]),
        "method": {"", *part("methods")}, "variant": {"", *part("variants")},
    }  # fmt: skip
    files = ["common", *DATASETS]
    lists = [part(file)["rules"] for file in files] + [
        [*about["rules"], *about.get("last", [])] for kind in ("methods", "variants") for about in part(kind).values()
    ]
    for rule in (rule for rules in lists for rule in rules):
        assert set(rule) <= {"when", "set"}
        for key, values in rule.get("when", {}).items():
            assert set(values) <= known[key], rule


def test_methods_and_variants_are_small_differences():
    """A method or a variant is a few lines, not a recipe of its own."""
    for kind in ("methods", "variants"):
        for word, about in part(kind).items():
            assert "-" not in word, f"{word}: a dash separates the parts of a name"
            assert about["title"]
            assert len(yaml.safe_dump([*about["rules"], *about.get("last", [])])) < 3500


WRONG = {
    "cifar100-ipc20-r50": r"'ipc20' is not one of ipc1, ipc10, ipc50; others with --set 'ipc=\[N\]'",
    "cifar100-ipc10-r51": r"student 'r51' is not one of r18, r50, r101.*did you mean 'cifar100-ipc10-r50'",
    "cifar100-ipc10": r"student '' is not one of.*did you mean 'cifar100-ipc10-r18'",
    "cifar100-ipc10-r50-sre2l+": r"method or variant 'sre2l\+' is not one of sre2l\+\+,.*'cifar100-ipc10-r50-sre2l\+\+'",
    "cifar100-ipc10-r50-sre2l++-papr": r"variant 'papr' is not one of paper, code.*'cifar100-ipc10-r50-sre2l\+\+-paper'",
    "cifar100-ipc10-r50-paper-code": r"'paper-code' is not one of",
    "imagewoof-ipc10-r18-paper": r"'paper' is not one of",
    "cifar100ipc10-r50": r"neither packaged nor a file; did you mean 'cifar100-ipc10-r50'",
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_names_get_one_line_that_helps(name):
    with pytest.raises(ConfigError, match=WRONG[name]) as caught:
        load_config(name)
    assert "\n" not in str(caught.value)


def test_what_is_printed_is_the_recipe(tmp_path):
    (tmp_path / "copy.yaml").write_text(dump_config(load_config("imagenet1k-ipc1-r101-sre2l++-code")))
    assert load_config(str(tmp_path / "copy.yaml")) == load_config("imagenet1k-ipc1-r101-sre2l++-code")


def test_a_composed_recipe_is_a_base_like_any_other(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: cifar100-ipc10-r50\nsynthesize: {iterations: 7}\n")
    mine, base = load_config(str(tmp_path / "mine.yaml")), load_config("cifar100-ipc10-r50")
    assert mine == base.model_copy(update={"synthesize": base.synthesize.model_copy(update={"iterations": 7})})


def test_a_new_method_is_one_mapping(monkeypatch):
    """What a name means is in the YAML files alone."""
    methods = {**part("methods"), "mine": {"title": "Mine", "rules": [{"set": {"synthesize": {"lr": 0.7}}}]}}
    monkeypatch.setattr(names_of, "part", lambda name, real=part: methods if name == "methods" else real(name))
    assert load_config("cifar10-ipc1-r18-mine").synthesize.lr == 0.7
    assert RecipeName("cifar10", 1, "r18", "mine") in list(all_names())
    with pytest.raises(ConfigError, match="method 'mine' has no variants; leave -paper out"):
        load_config("cifar10-ipc1-r18-mine-paper")


@pytest.mark.parametrize("ipc", [1, 10])
def test_on_cpus_all_methods_have_one_protocol(ipc):
    """Students, views and experts' training are the same; what a method is stays, hard labels included."""
    words = ["", "sre2l++", "sre2l", "cda", "rded", "gvbsm", "edc", "mtt", "random", "kcenter", "herding"]
    assert set(words) == {"", *part("methods")}
    c = {word: load_config("-".join(filter(None, (f"cifar10-ipc{ipc}-r18", word, "cpu")))) for word in words}
    own = {"baselines", "labels"}
    for other in c.values():
        assert other.evaluate.model_dump(exclude=own) == c[""].evaluate.model_dump(exclude=own)
        assert (other.data, other.pretrain, other.committee.width) == (c[""].data, c[""].pretrain, 0.25)
        teaching = {"batchnorm", "weighting", "temperature", "teachers"}
        assert other.relabel.model_dump(exclude=teaching) == c[""].relabel.model_dump(exclude=teaching)
    still, own = ["rded", "random", "kcenter", "herding"], {"mtt": 200}
    for word in words:
        assert c[word].synthesize.iterations == (0 if word in still else own.get(word, 400))
    assert [word for word in words if c[word].relabel.batchnorm == "eval"] == ["rded", "gvbsm", "edc"]
    assert [word for word in words if c[word].evaluate.labels == "hard"] == ["mtt"]
    assert c["sre2l++"].committee.experts == ("resnet18",)
    assert c["gvbsm"].synthesize.matching.convolutions
    assert c["edc"].synthesize.matching.class_share == 0.5


# ------------------------------------------------------------------------------------------------- published numbers

# Tables 10, 12, 14, 16, 17: student -> IPC -> (learning rate, eta, batch)
STUDENTS = {
    "cifar10": {"r18": {1: (1e-3, 1, 10), 10: (1e-3, 1, 16), 50: (1e-3, 1, 16)},
                "r50": {1: (1e-3, 1, 10), 10: (1e-3, 1, 16), 50: (1e-3, 1, 16)},
                "r101": {1: (5e-4, 1, 10), 10: (5e-4, 1, 16), 50: (5e-4, 1, 16)}},
    "cifar100": {"r18": {1: (1e-3, 1, 16), 10: (1e-3, 2, 16), 50: (1e-3, 1, 16)},
                 "r50": {1: (1e-3, 1, 16), 10: (1e-3, 2, 16), 50: (1e-3, 1, 16)},
                 "r101": {1: (5e-4, 1, 16), 10: (5e-4, 1, 16), 50: (5e-4, 1, 16)}},
    "tinyimagenet": {"r18": {1: (1e-3, 2, 16), 10: (1e-3, 2, 16), 50: (1e-3, 1, 16)},
                     "r50": {1: (1e-3, 1, 16), 10: (1e-3, 1, 16), 50: (1e-3, 1, 16)},
                     "r101": {1: (5e-4, 2, 16), 10: (5e-4, 2, 16), 50: (5e-4, 2, 16)}},
    "imagenette": {"r18": {1: (5e-4, 2, 10), 10: (5e-4, 1, 10), 50: (5e-4, 2, 10)},
                   "r50": {1: (5e-4, 2, 10), 10: (1e-3, 1, 10), 50: (5e-4, 1, 10)},
                   "r101": {1: (5e-4, 2, 10), 10: (5e-4, 2, 10), 50: (1e-3, 2, 10)}},
    "imagenet1k": {"r18": {1: (1e-3, 2, 16), 10: (1e-3, 2, 16), 50: (1e-3, 1, 16)},
                   "r50": {1: (1e-3, 2, 16), 10: (1e-3, 2, 16), 50: (1e-3, 1, 16)},
                   "r101": {1: (1e-3, 2, 16), 10: (1e-3, 2, 16), 50: (5e-4, 2, 16)}},
}  # fmt: skip


@pytest.mark.parametrize("dataset", FIVE)
def test_students_are_trained_as_the_tables_say(dataset):
    for student, rows in STUDENTS[dataset].items():
        for ipc, expected in rows.items():
            for tail in ("", "-sre2l++", "-paper"):
                c = load_config(f"{dataset}-ipc{ipc}-{student}{tail}")
                batch = c.relabel.resolved_batch_size(ipc * dataset_info(c.data).num_classes)
                assert (c.evaluate.lr, c.evaluate.eta, batch) == expected, (dataset, student, ipc, tail)
                assert (c.student_epochs, c.evaluate.temperature, c.evaluate.weight_decay) == (300, 20, 0.01)
                assert (c.evaluate.schedule, c.evaluate.warmup_epochs, c.evaluate.phases) == ("cosine", 0, ())


# Tables 9, 11, 13, 15 as decisions 16-18 settle them: optimiser, lr, weight decay, batch, epochs, T_max, crop
SQUEEZE = {
    "cifar10": ("adam", 1e-3, 1e-4, 512, 200, None, "pad"),
    "cifar100": ("adam", 1e-3, 1e-4, 512, 200, None, "pad"),
    "tinyimagenet": ("sgd", 0.01, 1e-4, 128, 50, None, "pad"),
    "imagenette": ("sgd", 0.01, 1e-4, 64, 300, None, "random_resized"),
    "imagenet1k": ("sgd", 0.1, 1e-4, 128, 300, None, "random_resized"),  # the "prior" script; V1 weights are given
}
PAPER_SQUEEZE = {
    "cifar10": ("adam", 1e-3, 1e-4, 512, 200, None, "random_resized"),
    "tinyimagenet": ("sgd", 0.1, 1e-4, 128, 50, None, "random_resized"),
    "imagenette": ("sgd", 0.01, 1e-4, 64, 300, None, "random_resized"),
}
CODE_SQUEEZE = {**SQUEEZE, "imagenette": ("sgd", 0.01, 1e-4, 64, 300, 100, "random_resized")}


@pytest.mark.parametrize(("tail", "rows"), [("", SQUEEZE), ("-paper", PAPER_SQUEEZE), ("-code", CODE_SQUEEZE)])
def test_experts_are_trained_as_the_tables_say(tail, rows):
    for dataset, expected in rows.items():
        p = load_config(f"{dataset}-ipc10-r18{tail}").pretrain
        assert (p.optimizer, p.lr, p.weight_decay, p.batch_size, p.epochs, p.cosine_epochs, p.crop) == expected, dataset
        assert p.crop != "pad" or p.pad == 4


def test_the_committee_of_imagenet_1k_is_torchvisions():
    five = load_config("imagenet1k-ipc50-r50").committee
    assert set(five.weights) == set(five.experts)
    assert set(five.weights.values()) == {"torchvision:IMAGENET1K_V1"}
    assert not load_config("imagenet100-ipc50-r50").committee.weights


# Table 19 and the public code's priors: R18, R50, SV, MB, D121
PRIORS = {
    "paper": {
        "cifar10": (63.01, 65.25, 68.52, 67.61, 67.57), "cifar100": (64.00, 60.58, 51.62, 59.34, 56.36),
        "tinyimagenet": (46.50, 28.37, 43.56, 44.84, 41.5), "imagenette": (62.40, 52.00, 57.20, 54.00, 60.80),
        "imagenet1k": (43.10, 41.37, 43.73, 39.15, 38.97),
    },
    "code": {
        "cifar10": (63, 65.3, 68.5, 67.6, 67.4), "cifar100": (64, 60.6, 51.6, 59.4, 56.4),
        "tinyimagenet": (46.5, 28.3, 43.6, 44.8, 41.5), "imagenette": (62.4, 52, 57.2, 54, 60.8),
        "imagenet1k": (56.4, 42.3, 52.5, 44.2, 40.6),
    },
}  # fmt: skip
COMMITTEE = ("resnet18", "resnet50", "shufflenet_v2", "mobilenet_v2", "densenet121")


def test_both_tables_of_priors_are_shipped_and_the_default_measures():
    for variant, rows in PRIORS.items():
        for dataset, values in rows.items():
            prior = load_config(f"{dataset}-ipc10-r18-{variant}").prior
            assert (prior.method, prior.values) == ("given", dict(zip(COMMITTEE, values, strict=True)))
    for dataset, ipc in {"cifar10": 50, "cifar100": 50, "tinyimagenet": 10, "imagenette": 10, "imagenet1k": 10}.items():
        for at in (1, 10, 50):
            prior = load_config(f"{dataset}-ipc{at}-r101").prior
            assert (prior.method, prior.values, prior.ipc, prior.student) == ("distill", {}, ipc, "resnet18")
            row = STUDENTS[dataset]["r18"][
                ipc
            ]  # as ResNet-18 is trained at that IPC, whatever the recipe's own student
            assert (prior.lr, prior.eta, prior.epochs) == (*row[:2], 300)


# Spec 9.1-9.3: what other methods do; the rest is the dataset's
METHODS = {
    "imagenet1k-ipc10-r18-sre2l": {
        "initialize.method": "noise", "synthesize.lr": 0.25, "synthesize.iterations": 4000, "synthesize.bn_weight": 0.01,
        "relabel.batchnorm": "eval", "relabel.batch_size": 1024, "relabel.bn_group": 512, "evaluate.eta": 1,
    },
    "cifar100-ipc50-r18-sre2l": {
        "data.std": (0.2023, 0.1994, 0.2010), "pretrain.lr": 0.1, "pretrain.weight_decay": 5e-4, "pretrain.batch_size": 128,
        "synthesize.augment": False, "synthesize.iterations": 1000, "synthesize.lr": 0.25, "relabel.batchnorm": "batch",
        "relabel.online": True, "relabel.batch_size": 128, "relabel.epochs": 400, "evaluate.temperature": 30,
    },
    "tinyimagenet-ipc50-r18-sre2l": {
        "data.mean": (0.4802, 0.4481, 0.3975), "pretrain.lr": 0.2, "pretrain.warmup_epochs": 5, "pretrain.batch_size": 256,
        "synthesize.lr": 0.1, "synthesize.bn_weight": 1, "synthesize.roll_both_ways": True, "relabel.epochs": 100,
        "relabel.cutmix": False, "relabel.batch_size": 256, "relabel.batchnorm": "eval",
    },
    "imagenet1k-ipc10-r18-cda": {
        "initialize.method": "noise", "synthesize.crop_schedule": "cosine", "synthesize.crop_milestone": 1,
        "synthesize.lr": 0.25, "synthesize.bn_weight": 0.01, "relabel.batchnorm": "eval",
    },
    "tinyimagenet-ipc50-r18-cda": {
        "synthesize.lr": 0.4, "synthesize.bn_weight": 0.05, "synthesize.roll_both_ways": False,
        "synthesize.crop_schedule": "cosine",
    },
    "imagenet1k-ipc50-r50-rded": {
        "initialize.method": "patches", "initialize.difficulty": "easy", "initialize.pool": None, "synthesize.iterations": 0,
        "relabel.batch_size": 200, "relabel.bn_group": 200, "relabel.crop_scale": (0.5, 1), "relabel.batchnorm": "eval",
        "relabel.online": True, "evaluate.eta": 2, "evaluate.lr": 0.001,
    },
    "cifar10-ipc10-r18-rded": {
        "data.mean": (0.485, 0.456, 0.406), "relabel.batch_size": 50, "relabel.crop_scale": (1, 1), "evaluate.eta": 2,
    },
    "tinyimagenet-ipc1-r18-rded": {"relabel.batch_size": 100},
    "imagenette-ipc1-r18-rded": {"relabel.batch_size": 10, "evaluate.lr": 0.001},
    "cifar100-ipc1-r18-rded": {"relabel.batch_size": 20},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_other_methods_have_the_numbers_of_their_own_code(name):
    c = load_config(name)
    for setting, value in METHODS[name].items():
        section, key = setting.split(".")
        assert getattr(getattr(c, section), key) == value, setting
    assert (c.voting.size, c.committee.experts, c.evaluate.weight_decay) == (1, ("resnet18",), 0.01)


# ------------------------------------------------------------------------------------------------- other methods


@pytest.mark.parametrize(
    ("name", "optimizer", "batch", "epochs", "label_weight", "experts"),
    [
        ("cifar10-ipc10-r18-gvbsm", ("adamw", 1e-3, 0), 100, 1000, 0.15, 5),
        ("cifar100-ipc50-r18-gvbsm", ("sgd", 0.1, 5e-4), 64, 1000, 0.15, 5),
        ("tinyimagenet-ipc10-r101-gvbsm", ("sgd", 0.1, 5e-4), 100, 100, 0.1, 5),
        ("imagenet1k-ipc10-r18-gvbsm", ("adamw", 1e-3, 0.01), 1024, 300, 0.1, 4),
        ("cifar10-ipc10-r18-edc", ("adamw", 1e-3, 0.01), 10, 1000, 0.025, 8),
        ("cifar100-ipc1-r18-edc", ("adamw", 1e-3, 0.01), 50, 300, 0.025, 8),
        ("tinyimagenet-ipc50-r18-edc", ("adamw", 1e-3, 0.01), 100, 300, 0.025, 5),
        ("imagenet1k-ipc10-r50-edc", ("adamw", 1e-3, 0.01), 100, 300, 0.025, 5),
    ],
)
def test_students_of_other_methods(name, optimizer, batch, epochs, label_weight, experts):
    c = load_config(name)
    assert (c.evaluate.optimizer, c.evaluate.lr, c.evaluate.weight_decay) == optimizer
    assert (c.relabel.batch_size, c.relabel.epochs) == (batch, epochs)
    assert (c.evaluate.loss, c.evaluate.label_weight, c.relabel.batchnorm) == ("mse_gt", label_weight, "eval")
    assert (len(c.committee.experts), c.voting.size, c.voting.turns) == (experts, experts, True)
    assert not needs_priors(c)


@pytest.mark.parametrize(
    ("name", "lr", "steps", "target_epochs", "max_start", "lr_start", "lr_of_lr", "step_images"),
    [
        ("cifar10-ipc1-convnet3-mtt", 100, 50, 2, 2, 0.01, 1e-7, None),
        ("cifar10-ipc10-convnet3-mtt", 100, 30, 2, 20, 0.001, 1e-5, None),
        ("cifar100-ipc1-convnet3-mtt", 1000, 20, 3, 20, 0.01, 1e-5, None),
        ("cifar100-ipc50-convnet3-mtt", 1000, 80, 2, 40, 0.01, 1e-5, 125),
        ("tinyimagenet-ipc10-convnet4-mtt", 10000, 20, 2, 40, 0.01, 1e-4, 200),
    ],
)
def test_mtt_has_its_published_numbers(name, lr, steps, target_epochs, max_start, lr_start, lr_of_lr, step_images):
    c = load_config(name)
    t, e = c.synthesize.trajectories, c.evaluate
    assert (c.synthesize.lr, c.synthesize.iterations, c.initialize.method) == (lr, 5000, "real")
    assert (t.steps, t.target_epochs, t.max_start, t.step_images) == (steps, target_epochs, max_start, step_images)
    assert (t.lr_start, t.lr_of_lr, t.momentum) == (lr_start, lr_of_lr, 0.5)
    assert (t.network, t.experts, t.epochs, t.batch_size, t.expert_lr) == (
        "convnet4" if "tiny" in name else "convnet3", 100, 50, 256, 0.01,
    )  # fmt: skip
    assert (e.labels, e.optimizer, e.learned_lr, e.schedule, e.weight_decay) == ("hard", "sgd", True, "step", 5e-4)
    assert (c.student_epochs, c.relabel.batch_size, c.relabel.cutmix, c.needs_experts) == (1001, 256, False, False)


def test_what_a_method_is_not_for_is_no_name():
    with pytest.raises(ConfigError, match=r"method or variant 'mtt' is not one of sre2l\+\+"):
        load_config("imagenet1k-ipc1-r18-mtt")
    with pytest.raises(ConfigError, match=r"student 'convnet3' is not one of r18, r50, r101;"):
        load_config("imagenette-ipc1-convnet3")
    assert load_config("cifar100-ipc10-convnet3").evaluate.students == ("convnet3",)


def test_how_gvbsm_and_edc_synthesize():
    for name, dataset in (("cifar10", "small"), ("tinyimagenet", "small"), ("imagenet1k", "large")):
        gvbsm, edc = (load_config(f"{name}-ipc10-r18-{method}").synthesize for method in ("gvbsm", "edc"))
        small = dataset == "small"
        assert (gvbsm.lr, gvbsm.iterations, gvbsm.bn_weight, gvbsm.roll) == (0.05 if small else 0.1, 4000, 0.01, 32)
        assert (gvbsm.matching.momentum, gvbsm.matching.drop_rate) == ((0.8, 0.4) if small else (0.4, 0.0))
        assert (gvbsm.crop, gvbsm.densification, gvbsm.class_together) == (
            "pad" if small else "random_resized",
            1,
            True,
        )
        assert (edc.roll, edc.densification, edc.lr, edc.matching.class_share) == (0, 0, 0.05, 0.5)
        assert edc.crop_scale == ((0.08, 1) if name == "cifar10" else (0.5, 1))
        assert edc.iterations == {"cifar10": 75, "tinyimagenet": 2000, "imagenet1k": 1000}[name]
    rates = [phase.lr for phase in load_config("cifar10-ipc10-r18-edc").evaluate.phases]
    assert rates == [5e-4, 2.5e-4, 1.25e-4]
    assert load_config("tinyimagenet-ipc10-r18-gvbsm").synthesize.pad == 8
    assert load_config("imagenette-ipc10-r18-edc").synthesize.matching.momentum == 0
    chunks = [load_config(f"cifar100-ipc{ipc}-r18-gvbsm").synthesize.class_chunk for ipc in (1, 10, 50)]
    assert chunks == [None, 10, 2]


# ------------------------------------------------------------------------------------------------- recipes of old


@pytest.mark.parametrize("name", FROZEN["recipes"])
def test_a_recipe_of_old_is_what_it_was(name):
    """Setting by setting as when it was first shipped; settings that came later are at their defaults."""
    now, default = load_config(name).model_dump(mode="json"), RunConfig().model_dump(mode="json")
    was = FROZEN["recipes"][name]
    assert name in recipe_names()
    for section, values in default.items():
        if not isinstance(values, dict):
            assert now[section] == was.get(section, FROZEN["defaults"][section])
            continue
        expected = {**values, **FROZEN["defaults"][section], **was.get(section, {})}
        assert now[section] == expected, section


def test_a_run_of_old_is_found_by_its_settings(tmp_path):
    """What stages of the demo depend on, stage by stage, is what it was: results of old are taken as they are."""
    changes = [
        "runtime.engine=local", "pretrain.epochs=1", "data.max_per_class=40", "data.max_test=50", "ipc=[2]",
        "committee.experts=[resnet18, shufflenet_v2]", "prior={ipc: 2, iterations: 1, epochs: 1}", "relabel.epochs=1",
        "initialize={images_per_class: 4, num_crops: 1}", "synthesize.iterations=1", "evaluate={seeds: 1, width: 0.125}",
    ]  # fmt: skip
    run = Run(cvdd_ray.load_config("digits-demo", changes), str(tmp_path))
    for stage in STAGES.values():
        stage(run)
    found = {}
    for path in tmp_path.rglob("manifest.json"):
        settings = json.dumps(json.loads(path.read_text())["identity"]["settings"], sort_keys=True)
        found[str(path.parent.relative_to(tmp_path))] = hashlib.sha256(settings.encode()).hexdigest()[:16]
    assert found == FROZEN["identities"]
