"""Bytes and settings changed at random: what reads them gives what it should, or its own error in one line."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from bad_data import good_table, parquet_files, picture
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cvdd_ray.config import RunConfig
from cvdd_ray.core.models import build_seeded, save_weights, weights_from_bytes
from cvdd_ray.data.artifacts import Artifacts, StagePlan
from cvdd_ray.data.images import BadImage, decode
from cvdd_ray.data.sources import load_real
from cvdd_ray.data.storage import Store
from cvdd_ray.errors import ArtifactError, ConfigError, DataError
from cvdd_ray.recipes import dump_config, load_config, parse_config, recipe_names

SEEDS = st.integers(0, 2**32 - 1)


def few(examples: int) -> Callable:
    """Settings of a test with so many examples, the same ones every time."""
    return settings(
        max_examples=examples, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )


def mutated(data: bytes, seed: int) -> bytes:
    """Return bytes with some changed, cut out, put in twice, or cut off."""
    draw, changed = random.Random(seed), bytearray(data)
    for _ in range(draw.randint(1, 4)):
        at, size = draw.randrange(len(changed) or 1), draw.randint(1, 16)
        kind = draw.choice(["flip", "random", "cut", "twice", "end", "ff"])
        if kind == "flip" and changed:
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == "random":
            changed[at : at + size] = draw.randbytes(size)
        elif kind == "ff":
            changed[at : at + size] = b"\xff" * size
        elif kind == "cut":
            del changed[at : at + size]
        elif kind == "twice":
            changed[at:at] = changed[at : at + size]
        elif draw.random() < 0.3:
            del changed[at:]
    return bytes(changed)


def refused(error: Exception) -> None:
    assert str(error)
    assert len(str(error).splitlines()) == 1


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2), st.sampled_from(["resnet18", "1e-3", "a\nb", ".nan"]),
)  # fmt: skip
SETTINGS = [
    f"{section}.{name}" for section, about in RunConfig.model_fields.items() if hasattr(about.annotation, "model_fields")
    for name in about.annotation.model_fields
] + ["seed", "ipc"]  # fmt: skip


@few(150)
@given(st.sampled_from(recipe_names()), st.dictionaries(st.sampled_from(SETTINGS), VALUES, min_size=1, max_size=4))
def test_settings_are_refused_or_come_back_the_same(recipe, changes):
    try:
        config = load_config(recipe, [f"{key}={yaml.safe_dump(value)}" for key, value in changes.items()])
    except ConfigError as error:
        refused(error)
        return
    assert parse_config(dump_config(config), "copy") == config


@few(150)
@given(SEEDS)
def test_a_mutated_configuration_is_refused_or_read(seed):
    text = mutated(dump_config(load_config("digits-demo")).encode(), seed)
    try:
        parse_config(text, "mutated")
    except ConfigError as error:
        refused(error)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP"])
def test_a_mutated_image_is_an_image_or_a_bad_one(kind):
    data = picture(kind=kind)

    @few(150)
    @given(SEEDS)
    def check(seed):
        try:
            pixels, _ = decode(mutated(data, seed))
        except BadImage as error:
            refused(error)
            return
        assert pixels.ndim == 3
        assert pixels.shape[-1] == 3

    check()


def test_mutated_parquet_is_read_or_refused(tmp_path):
    parquet_files(tmp_path, good_table(), good_table())
    path = tmp_path / "data/train-00000-of-00001.parquet"
    data, config = path.read_bytes(), load_config(str(tmp_path / "my.yaml")).data
    config = config.model_copy(update={"path": str(tmp_path / "data")})

    @few(150)
    @given(SEEDS)
    def check(seed):
        path.unlink()  # another file, and not the one that is mapped
        path.write_bytes(mutated(data, seed))
        try:
            load_real(config, 0)
        except DataError as error:
            refused(error)

    check()


def test_mutated_weights_are_loaded_whole_or_not_at_all():
    data = save_weights(build_seeded("convnet3", 4, 16, width=0.125, seed=0))
    net = build_seeded("convnet3", 4, 16, width=0.125, seed=1)
    before = {name: value.clone() for name, value in net.state_dict().items()}

    @few(100)
    @given(SEEDS)
    def check(seed):
        try:
            weights_from_bytes(net, mutated(data, seed))
        except DataError as error:
            refused(error)
            assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
            return
        assert all(torch.isfinite(value).all() for value in net.state_dict().values())
        net.load_state_dict(before)

    check()


def test_a_mutated_manifest_is_read_or_refused(tmp_path: Path):
    artifacts = Artifacts(Store(str(tmp_path)))
    plan = StagePlan("prior", {"a": 1}, {"train": "x"}, ("cat", "dog"), 0)
    artifacts.commit(plan, {"priors.json": b"{}"}, wall_s=1.0, facts={"images": 2})
    path = tmp_path / "prior/manifest.json"
    data = path.read_bytes()

    @few(200)
    @given(SEEDS)
    def check(seed):
        path.write_bytes(mutated(data, seed))
        try:
            found = artifacts.finished(plan)
            if found is not None:
                json.dumps(found.content)
                for name in found.files:
                    artifacts.read(found, name)
        except ArtifactError as error:
            refused(error)

    check()
