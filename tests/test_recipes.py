"""Recipes and configuration: what ships parses, what is wrong is refused in one line that helps."""

import json

import pytest
import yaml

from cvdd_ray.config import RunConfig
from cvdd_ray.errors import ConfigError
from cvdd_ray.recipes import dump_config, load_config, recipe_description, recipe_names, validate


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_parses_and_round_trips(name, tmp_path):
    config = load_config(name)
    assert recipe_description(name)
    (tmp_path / "copy.yaml").write_text(dump_config(config))
    assert load_config(str(tmp_path / "copy.yaml")) == config


def test_recipes_are_what_the_readme_promises():
    assert {"digits-demo", "cifar10", "cifar10-cpu", "folder224"} <= set(recipe_names())


def test_paper_numbers_of_cifar10():
    c = load_config("cifar10")
    assert (c.synthesize.iterations, c.synthesize.lr, c.synthesize.betas) == (4000, 0.25, (0.5, 0.9))
    assert (c.synthesize.bn_weight, c.synthesize.first_bn_multiplier) == (0.01, 10.0)
    assert (c.voting.size, c.voting.temperature, c.relabel.temperature) == (2, 5.0, 10.0)
    assert (c.relabel.epochs, c.relabel.batch_size, c.relabel.resolved_bn_group(500)) == (300, 16, 8)
    assert (c.relabel.resolved_batch_size(10), c.relabel.resolved_bn_group(10)) == (10, 5)  # IPC 1, as published
    assert (c.evaluate.temperature, c.evaluate.lr, c.evaluate.weight_decay, c.evaluate.eta) == (20.0, 1e-3, 0.01, 1.0)
    assert (c.pretrain.optimizer, c.pretrain.epochs, c.pretrain.batch_size, c.pretrain.lr) == ("adam", 200, 512, 1e-3)


def test_base_is_changed_not_copied(tmp_path):
    (tmp_path / "mine.yaml").write_text("base: cifar10\nsynthesize: {iterations: 7}\n")
    mine, base = load_config(str(tmp_path / "mine.yaml")), load_config("cifar10")
    assert mine.synthesize.iterations == 7
    assert mine.model_copy(update={"synthesize": base.synthesize}) == base


def test_a_circle_of_bases_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: a.yaml\n")
    with pytest.raises(ConfigError, match="circle"):
        load_config(str(tmp_path / "a.yaml"))


def test_overrides_are_yaml_values():
    c = load_config("digits-demo", ["ipc=[1, 10]", "evaluate.students=[resnet18, convnet3]", "pretrain.lr=1e-2"])
    assert c.ipc == (1, 10)
    assert c.evaluate.students == ("resnet18", "convnet3")
    assert c.pretrain.lr == 0.01


BAD = {
    "synthesize.iteration=5": r"synthesize\.iteration: unknown key; did you mean 'iterations'",
    "nonsense.key=1": r"nonsense: unknown key; .*known here: seed, ipc, data",
    "synthesize.iterations=abc": r"synthesize\.iterations: got 'abc'; needs a whole number",
    "synthesize.iterations=-1": r"synthesize\.iterations: got -1; needs at least 0",
    "synthesize.lr=-1": r"synthesize\.lr: got -1; needs more than 0",
    "voting.weighting=best": r"voting\.weighting: got 'best'; .*'prior', 'equal' or 'random'",
    "voting.fixed=[resnet18]": r"voting: fixed names 1 experts, but size is 2",
    "voting.selection=fixed": r"needs the list",
    "committee.experts=[resnet18, resnet18]": r"without repeats",
    "committee.experts=[]": r"non-empty",
    "committee.weights={resnet99: a.pth}": r"resnet99.*not among experts",
    "prior.values={resnet18: 50}": r"only used with method 'given'",
    "relabel.bn_group=99": r"bn_group 99 is larger than batch_size",
    "relabel.bn_group=1": r"at least 2 images",
    "data.holdout=1": r"data\.holdout: got 1",
    "seed=-1": r"seed: got -1",
    "ipc=[]": r"ipc",
    "ipc=[10, 10]": r"ipc",
    "relabel={batchnorm: eval, scope: full}": r"no effect",
    "relabel.batchnorm=eval": r"eval_labels",
    "relabel={epochs: 9, stored_epochs: 9}": r"stored_epochs 9 has no effect with 9 epochs; use fewer",
    "relabel.tail=spread": r"tail 'spread' has no effect without top_k",
    "relabel={online: true, precision: int8}": r"precision has no effect with online labels",
    "relabel={online: true, stored_epochs: 3}": r"stored_epochs has no effect with online labels",
    "synthesize.precision=float16": r"synthesize\.precision: got 'float16'; .*'float32', 'tf32' or 'bfloat16'",
    "evaluate.precision=tf32": r"evaluate\.precision: got 'tf32'; .*'float32' or 'bfloat16'",
    "relabel.precision=int4": r"relabel\.precision: got 'int4'; .*'float16' or 'int8'",
    "synthesize.betas=[1.0, 0.9]": r"synthesize\.betas\.0: got 1\.0; .*less than 1",
    "synthesize.crop_scale=[0.9, 0.1]": r"synthesize\.crop_scale: needs 0 < low",
    "runtime={engine: local, address: auto}": r"address has no effect",
    "synthesize.crop_milestone=0.5": r"crop_milestone has no effect with crop_schedule 'constant'",
    "synthesize={crop_schedule: cosine, augment: false}": r"crop_schedule 'cosine' has no effect without augment",
    "initialize={method: noise, pool: 5}": r"pool has no effect with method 'noise'",
    "pretrain.warmup_epochs=8": r"warmup_epochs 8 must be fewer than the 8 epochs",
    "prior={method: given, eta: 2}": r"lr and eta have no effect with method 'given'",
    "synthesize.trajectories.steps=5": r"trajectories has no effect with method 'committee'",
    "synthesize={method: trajectories, iterations: 0}": r"needs iterations of at least 1",
    "synthesize={method: trajectories, trajectories: {epochs: 21}}": r"need trajectories of 22 epochs, got 21",
    "synthesize.method=trajectories": r"crop_scale has no effect with method 'trajectories'; leave it out",
    "synthesize.method=voting": r"synthesize\.method: got 'voting'; .*'committee' or 'trajectories'",
    "evaluate.labels=hard": r"baselines has random_soft, but with labels 'hard' .* use some of random_hard, real_hard",
    "evaluate={learned_lr: true, lr: 0.001}": r"evaluate\.learned_lr: synthesize\.method 'committee' learns no learning rate",
    "evaluate={learned_lr: true, lr: 0.1}": r"lr 0\.1 has no effect with learned_lr",
    "evaluate={schedule: step, eta: 2}": r"eta 2 has no effect with schedule 'step'",
    "synthesize": r"give section\.key=value",
    "ipc=[1,": r"cannot be read as YAML",
    "seed.x=1": r"'seed' is a value|seed: got",
}


@pytest.mark.parametrize("override", BAD)
def test_bad_settings_are_refused_in_one_line(override):
    with pytest.raises(ConfigError, match=BAD[override]) as caught:
        load_config("digits-demo", [override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [1,\n", "just words", "base: [1]\n"])
def test_bad_files_are_refused(tmp_path, text):
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(str(tmp_path / "bad.yaml"))
    assert "\n" not in str(caught.value)


def test_unknown_recipe_names_a_near_one():
    with pytest.raises(ConfigError, match=r"did you mean 'digits-demo'"):
        load_config("digit-demo")


def test_all_faults_are_named_at_once():
    with pytest.raises(ConfigError, match=r"synthesize\.lr.*relabel\.epochs"):
        validate({"synthesize": {"lr": "x"}, "relabel": {"epochs": 0}})


def test_config_is_frozen_and_documented():
    config = load_config("digits-demo")
    with pytest.raises(ValueError, match="frozen"):
        config.seed = 3
    schema = json.dumps(RunConfig.model_json_schema())
    undocumented = [
        f"{name}.{key}"
        for name, section in RunConfig.model_fields.items()
        if hasattr(section.annotation, "model_fields")
        for key, field in section.annotation.model_fields.items()
        if not field.description
    ]
    assert not undocumented
    assert "softmax(prior / temperature)" in schema


def test_dump_is_plain_yaml():
    assert isinstance(yaml.safe_load(dump_config(load_config("cifar10-cpu"))), dict)
