"""Search spaces: what they may hold, how their points are called, and what is refused."""

import random

import pytest
from pydantic import ValidationError

from cvdd_ray.space import Domain, grid_points, label, point, samples


@pytest.mark.parametrize(
    ("kind", "argument", "inside"),
    [
        ("uniform", [2, 4], lambda x: 2 <= x < 4),
        ("loguniform", [1e-4, 1e-1], lambda x: 1e-4 <= x < 1e-1),
        ("quniform", [0, 1, 0.25], lambda x: x in (0, 0.25, 0.5, 0.75, 1)),
        ("randint", [3, 6], lambda x: x in (3, 4, 5)),
        ("lograndint", [1, 100], lambda x: isinstance(x, int) and 1 <= x < 100),
        ("choice", ["a", "b"], lambda x: x in ("a", "b")),
    ],
)
def test_draws_stay_inside_and_vary(kind, argument, inside):
    domain, source = Domain(**{kind: argument}), random.Random(1)
    drawn = [domain.draw(source) for _ in range(200)]
    assert all(inside(value) for value in drawn)
    assert len(set(drawn)) > 1


def test_log_draws_are_uniform_in_the_logarithm():
    domain, source = Domain(loguniform=[1e-4, 1e-2]), random.Random(2)
    below = sum(domain.draw(source) < 1e-3 for _ in range(2000))
    assert abs(below - 1000) < 120


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "exactly one of grid, choice"),
        ({"grid": [1], "choice": [2]}, "got grid, choice"),
        ({"grid": []}, "at least 1"),
        ({"grid": [1, 2, 1]}, "a value twice: 1, 2, 1"),
        ({"grid": [[1, 2], "1+2"]}, "a value twice"),
        ({"uniform": [4, 1]}, "low < high"),
        ({"uniform": [1, 1]}, "low < high"),
        ({"loguniform": [0, 1]}, "0 < low < high"),
        ({"lograndint": [-1, 3]}, "0 < low < high"),
        ({"quniform": [0, 1, 2]}, "0 < step"),
        ({"uniform": [1]}, "missing|at least 2|Field required"),
        ({"normal": [0, 1]}, "normal"),
    ],
)
def test_impossible_domains_are_refused(given, message):
    with pytest.raises(ValidationError, match=message):
        Domain(**given)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (20, "20"), (0.001, "0.001"), (1.23456789, "1.235"), (True, "true"), (None, "null"), ("resnet18", "resnet18"),
        (["resnet18", "resnet50"], "resnet18+resnet50"), ({"size": 3, "fixed": None}, "size=3 fixed=null"),
        ({"batchnorm": "batch", "scale": [0.5, 1.0]}, "batchnorm=batch scale=0.5+1"),
    ],
)  # fmt: skip
def test_labels_are_short_text(value, text):
    assert label(value) == text


def test_points_name_listed_values_and_lead_back_to_them():
    values = [{"size": 2}, {"size": 3, "fixed": None}, ["a", "b"], 4, 0.5, True, None]
    domain = Domain(choice=values)
    assert domain.points() == ("size=2", "size=3 fixed=null", "a+b", 4, 0.5, "true", "null")
    assert [domain.value(at) for at in domain.points()] == values
    assert Domain(uniform=[0, 1]).value(0.3) == 0.3
    assert point(0.123456789) == 0.123456789  # numbers keep all their digits


def test_numbers_that_yaml_takes_for_text_are_numbers():
    assert Domain(grid=["1e-4", "2E3", 0.99951, 0.99952]).values == (1e-4, 2000.0, 0.99951, 0.99952)
    assert Domain(choice=["resnet18", "1"]).values == ("resnet18", "1")


def test_grids_are_gone_through_completely_in_order():
    space = {"a": Domain(grid=[1, 2]), "b": Domain(grid=["x", "y", "z"])}
    expected = [{"a": a, "b": b} for a in (1, 2) for b in "xyz"]
    assert list(grid_points(space)) == expected == samples(space, 3)


def test_samples_of_other_spaces_are_always_the_same():
    space = {"a": Domain(uniform=[0, 1]), "b": Domain(grid=["x", "y"])}
    assert samples(space, 50) == samples(space, 50)
    assert {values["b"] for values in samples(space, 50)} == {"x", "y"}


def test_a_domain_is_written_as_it_was_given():
    assert Domain(grid=[1, 2]).model_dump(mode="json") == {"grid": [1, 2]}
