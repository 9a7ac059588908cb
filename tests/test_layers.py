"""The architecture's rules about imports: they point down, only runner/ knows Ray, what is heavy is loaded late."""

import ast
import subprocess
import sys
from inspect import ismodule
from pathlib import Path

import pytest

import cvdd_ray
from cvdd_ray import api

PACKAGE = Path(__file__).parent.parent / "cvdd_ray"
LAYERS = {
    "errors": 0,
    "config": 0,
    "fields": 0,
    "labelconfig": 0,
    "runtimeconfig": 0,
    "evaluateconfig": 0,
    "matchingconfig": 0,
    "synthesizeconfig": 0,
    "trajectoryconfig": 0,
    "space": 0,
    "sweepconfig": 0,
    "yamltext": 0,
    "recipes": 0,
    "core": 1,
    "data": 2,
    "stages": 3,
    "bench": 4,
    "runner": 4,
    "api": 5,
    "cli": 5,
    "comparing": 5,
}


def imports_of(path: Path) -> set[str]:
    """Every module imported anywhere in a file, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def layer_of(module: str) -> int | None:
    parts = module.split(".")
    return LAYERS.get(parts[1]) if parts[0] == "cvdd_ray" and len(parts) > 1 else None


FILES = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_point_down(path):
    own = LAYERS[path.relative_to(PACKAGE).parts[0].removesuffix(".py")]
    above = sorted(name for name in imports_of(path) if (layer_of(name) or 0) > own)
    assert not above


@pytest.mark.parametrize("path", [PACKAGE / "__init__.py", *FILES], ids=lambda path: str(path.relative_to(PACKAGE)))
def test_only_the_runner_imports_ray(path):
    if path.relative_to(PACKAGE).parts[0] == "runner":
        return
    assert not [name for name in imports_of(path) if name == "ray" or name.startswith("ray.")]


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        ("cvdd_ray.api", "ray"),  # the library without the runner
        ("cvdd_ray.cli, cvdd_ray.recipes.overview", "torch"),  # commands that only read settings
        ("cvdd_ray.runner.mailbox", "torch"),
        ("cvdd_ray.runner.actors", "torchvision"),  # coordinators, which ask others
    ],
)
def test_what_is_heavy_is_loaded_only_where_it_is_needed(modules, heavy):
    code = f"import sys, {modules}; assert {heavy!r} not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_library_is_what_it_lists():
    assert [name for name in cvdd_ray.__all__ if getattr(cvdd_ray, name) is not getattr(api, name)] == []
    public = [name for name, value in vars(api).items() if not name.startswith("_") and not ismodule(value)]
    assert sorted(public) == sorted(cvdd_ray.__all__)
    assert set(cvdd_ray.__all__) <= set(dir(cvdd_ray))
    with pytest.raises(AttributeError, match="no attribute 'distil'"):
        cvdd_ray.distil  # noqa: B018


def test_files_stay_small():
    long = {str(path.relative_to(PACKAGE)): n for path in FILES if (n := len(path.read_text().splitlines())) > 400}
    assert not long, "a file over 400 lines needs a room of its own"
