"""Packaged recipes, and the way from a recipe or a YAML file to a checked RunConfig."""

import difflib
import re
from collections.abc import Iterable, Mapping
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ValidationError

from cvdd_ray.config import RunConfig, StorageConfig
from cvdd_ray.errors import ConfigError
from cvdd_ray.recipes.composed import all_names, compose, describe, is_composed, parse_name

HEADER_KEYS = ("base", "description")
Config = TypeVar("Config", bound=RunConfig)


def recipe_names() -> list[str]:
    """Return the names of the recipes with a file of their own; `composed` has those that are put together by name."""
    return sorted(entry.name.removesuffix(".yaml") for entry in resources.files(__name__).iterdir()
                  if entry.name.endswith(".yaml"))  # fmt: skip


def recipe_description(name: str) -> str:
    """Return a recipe's one-line description."""
    if _is_composed(name):
        return describe(parse_name(name))
    return str(_read(name).get("description", "")).strip()


def load_config(
    recipe: str, overrides: Iterable[str] = (), *, model: type[Config] = RunConfig, base: str | None = None
) -> Config:
    """Return the checked configuration of a packaged recipe or a YAML file, with `section.key=value` overrides.

    A file may name a `base` (recipe or file) whose settings it changes; a `base` given here takes its place. `model` is
    what the settings describe: a run, or a sweep.  Raises ConfigError: unknown recipe, unreadable YAML, unknown key,
    wrong type, impossible combination; the message names the field, what was given, what is allowed.
    """
    return _with_overrides(_resolve(recipe, seen=(), base=base), overrides, model)


def parse_config(
    text: str, name: str, overrides: Iterable[str] = (), *, model: type[Config] = RunConfig
) -> Config:  # fmt: skip
    """Return the checked configuration in YAML text without a base; `name` is used in messages.  Raises ConfigError."""
    return _with_overrides(_parse(text, name), overrides, model)


def with_settings(config: Config, values: Mapping[str, Any]) -> Config:
    """Return the configuration with dotted settings changed; a mapping changes the settings of a section it names.

    Raises ConfigError for an unknown setting, a wrong value, or an impossible combination.
    """
    settings = config.model_dump()
    for path, value in values.items():
        _set(settings, path, value, path)
    return validate(settings, type(config))


def without_place(config: Config) -> Config:
    """Return the configuration without the cluster's address, the directory and all logins in URIs: what it is, not
    where."""
    runtime = config.runtime.model_copy(update={"address": None, "wait_for_nodes": None, "wait_for_gpus": None})
    data = config.data.model_copy(update={"path": config.data.path and without_login(config.data.path)})
    weights = {name: without_login(source) for name, source in config.committee.weights.items()}
    committee = config.committee.model_copy(update={"weights": weights})
    changed = {"runtime": runtime, "storage": StorageConfig(), "data": data, "committee": committee}
    return config.model_copy(update=changed)


def without_login(address: str) -> str:
    """Return a URI without KEY:SECRET@, also where a / in the secret was left as it is; other addresses as they are."""
    return re.sub(r"^([A-Za-z][A-Za-z0-9+]*://)(?:[^/@?]*|[^/?]*:.*)@", r"\1", address)


def _with_overrides(settings: dict[str, Any], overrides: Iterable[str], model: type[Config]) -> Config:
    for override in overrides:
        path, sign, text = override.partition("=")
        if not sign or not path:
            raise ConfigError(f"--set {override}: give section.key=value, e.g. --set synthesize.iterations=500")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {override}: {text!r} is not a YAML value; quote it, e.g. 'ipc=[1, 10]'") from None
        _set(settings, path, value, f"--set {override}")
    return validate(settings, model)


def _set(settings: dict[str, Any], path: str, value: Any, asked: str) -> None:
    """Change one dotted setting in place; a mapping changes what it names of a section, anything else takes its place."""
    *sections, last = path.split(".")
    target = settings
    for section in sections:
        child = target.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(f"{asked}: {section!r} is a value, not a section")
        target = child
    is_section = not sections and isinstance(value, dict) and isinstance(target.get(last), dict)
    target[last] = _merge(target[last], value) if is_section else value


def validate(settings: Mapping[str, Any], model: type[Config] = RunConfig) -> Config:
    """Return the configuration of plain settings.  Raises ConfigError with all faults in one line."""
    try:
        return model(**settings)
    except ValidationError as error:
        raise ConfigError("; ".join(_explain(fault, model) for fault in error.errors())) from None


def dump_config(config: RunConfig) -> str:
    """Return the whole resolved configuration as YAML that load_config takes."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _resolve(recipe: str, seen: tuple[str, ...], base: str | None = None) -> dict[str, Any]:
    if recipe in seen:
        raise ConfigError(f"recipe {recipe!r}: its bases form a circle ({' -> '.join([*seen, recipe])})")
    settings = _read(recipe)
    base = base or settings.get("base")
    own = {name: value for name, value in settings.items() if name not in HEADER_KEYS}
    if base is None:
        return own
    beside = Path(recipe).parent / str(base)
    return _merge(_resolve(str(beside) if beside.is_file() else str(base), (*seen, recipe)), own)


def _read(recipe: str) -> dict[str, Any]:
    if _is_composed(recipe):
        return compose(parse_name(recipe))
    packaged = resources.files(__name__) / f"{recipe}.yaml"
    source = packaged if "/" not in recipe and packaged.is_file() else Path(recipe)
    if not source.is_file():
        near = difflib.get_close_matches(recipe, [*recipe_names(), *map(str, all_names())], 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(
            f"recipe {recipe!r} is neither packaged nor a file; {hint}`cvdd recipes` lists the packaged ones"
        )
    try:
        text = source.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise ConfigError(f"{recipe}: cannot be read as text ({error})") from None
    return _parse(text, recipe)


def _is_composed(recipe: str) -> bool:
    return is_composed(recipe) and recipe not in recipe_names() and not Path(recipe).is_file()


def _parse(text: str, recipe: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        raise ConfigError(f"{recipe}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(settings, dict):
        raise ConfigError(
            f"{recipe}: holds a {type(settings).__name__}, needs sections with keys, as `cvdd recipes NAME` prints"
        )
    return settings


def _merge(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merge(merged[name], value) if both else value
    return merged


def _explain(fault: Mapping[str, Any], model: type[BaseModel]) -> str:
    """Return `field: what was given, what is allowed` for one pydantic fault."""
    where = ".".join(str(part) for part in fault["loc"])
    if fault["type"] == "missing":
        return f"{where}: is missing" if where != "sweep" else "sweep: is missing; it names the `space` to search"
    if fault["type"] == "extra_forbidden":
        if where == "sweep":
            return "sweep: this file describes a sweep; run it with `cvdd sweep`"
        known = list(_fields(fault["loc"][:-1], model))
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{where}: unknown key; {hint}known here: {', '.join(known)}"
    given = fault["input"] if not isinstance(fault["input"], (BaseModel, dict)) else None
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message
    return f"{where}: got {given!r}; {message}"


def _fields(path: tuple, model: Any) -> Iterable[str]:
    """Return the names of the fields at a place in a model, through mappings and lists."""
    for part in path:
        if hasattr(model, "model_fields"):
            model = model.model_fields[part].annotation
        else:  # the values of a mapping, the items of a list
            model = next(kind for kind in reversed(get_args(model)) if kind is not Ellipsis)
    return model.model_fields
