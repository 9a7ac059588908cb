"""Packaged recipes, and the way from a recipe or a YAML file to a checked RunConfig."""

import difflib
import os
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
from cvdd_ray.yamltext import MAX_BYTES, read_yaml

HEADER_KEYS = ("base", "description")
_NEEDS = {
    "string": "text; put it in quotes", "int": "a whole number", "float": "a number", "bool": "true or false",
    "tuple": "a list, e.g. [a, b]", "dict": "a mapping, e.g. {{key: value}}", "finite": "a finite number",
    "greater_than": "more than {gt}", "greater_than_equal": "at least {ge}", "less_than": "less than {lt}",
    "less_than_equal": "at most {le}", "literal_error": "{expected}",
    "too_short": "at least {min_length} values", "too_long": "at most {max_length} values",
}  # fmt: skip
"""What a setting needs, by the type of pydantic's fault or the word it begins with."""
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
    text: str | bytes, name: str, overrides: Iterable[str] = (), *, model: type[Config] = RunConfig
) -> Config:  # fmt: skip
    """Return the checked configuration in YAML text without a base; `name` is used in messages.  Raises ConfigError."""
    if not text.strip():
        raise ConfigError(f"{name}: is empty, but should hold all settings of a run; name a recipe, or restore it")
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


def without_logins(text: str) -> str:
    """Return a text for people without the logins of the URIs in it."""
    return re.sub(r"\b([A-Za-z][A-Za-z0-9+]*://)(?:[^/@?\s]*|[^/?\s]*:\S*)@", r"\1", text)


def _with_overrides(settings: dict[str, Any], overrides: Iterable[str], model: type[Config]) -> Config:
    for override in overrides:
        path, sign, text = override.partition("=")
        asked = f"--set {' '.join(override.split())}"
        if not sign or "" in path.split("."):
            raise ConfigError(f"{asked}: give section.key=value, e.g. --set synthesize.iterations=500")
        _set(settings, path, read_yaml(text, asked, "quote it, e.g. 'ipc=[1, 10]'"), asked)
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
        return model.model_validate(settings)
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
    if base is not None and not isinstance(base, str):
        raise ConfigError(f"{recipe}: base is {shown(base)}; give the name of one recipe or file")
    own = {name: value for name, value in settings.items() if name not in HEADER_KEYS}
    if base is None:
        return own
    beside = Path(recipe).parent / base
    return _merge(_resolve(str(beside) if os.path.isfile(beside) else base, (*seen, recipe)), own)


def _read(recipe: str) -> dict[str, Any]:
    if _is_composed(recipe):
        return compose(parse_name(recipe))
    packaged = resources.files(__name__) / f"{recipe}.yaml"
    source = packaged if recipe in recipe_names() else Path(recipe)
    if source is not packaged and not os.path.isfile(source):  # unlike Path's, it bears any name
        near = difflib.get_close_matches(recipe, [*recipe_names(), *map(str, all_names())], 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        what = "is a directory" if os.path.isdir(source) and recipe else "is neither packaged nor a file"
        raise ConfigError(f"recipe {shown(recipe)} {what}; {hint}`cvdd recipes` lists the packaged ones")
    try:
        with source.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(f"{recipe}: cannot be read ({error.strerror}); check its permissions") from None
    return _parse(content, recipe)


def _is_composed(recipe: str) -> bool:
    return is_composed(recipe) and recipe not in recipe_names() and not os.path.isfile(recipe)


def _parse(content: str | bytes, recipe: str) -> dict[str, Any]:
    settings = read_yaml(content, recipe)
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise ConfigError(f"{recipe}: holds {shown(settings)}, needs sections with keys, as `cvdd recipes NAME` prints")
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
        return (
            f"{where}: is missing; give it" if where != "sweep" else "sweep: is missing; it names the `space` to search"
        )
    if fault["type"] == "extra_forbidden":
        if where == "sweep":
            return "sweep: this file describes a sweep; run it with `cvdd sweep`"
        known = list(_fields(fault["loc"][:-1], model))
        near = difflib.get_close_matches(str(fault["loc"][-1]), known, 1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{where}: unknown key; {hint}known here: {', '.join(known)}"
    message = fault["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if fault["type"] == "value_error":
        return f"{where}: {message}" if where else message
    needs = _NEEDS.get(fault["type"]) or _NEEDS.get(fault["type"].split("_")[0])
    if needs:
        message = f"needs {needs.format(**fault.get('ctx', {}))}"
    if fault["type"].startswith("model_"):
        message = f"needs a section with some of the keys {', '.join(_fields(fault['loc'], model))}, or leave it out"
    return f"{where}: got {shown(fault['input'])}; {message}"


def shown(value: Any) -> str:
    """Return a value that was given as short text for a message, without logins."""
    text = without_logins(repr(value))
    return text if len(text) <= 80 else f"{text[:80]}..."


def _fields(path: tuple, model: Any) -> Iterable[str]:
    """Return the names of the fields at a place in a model, through mappings and lists."""
    for part in path:
        if hasattr(model, "model_fields"):
            model = model.model_fields[part].annotation
        else:  # the values of a mapping, the items of a list
            model = next(kind for kind in reversed(get_args(model)) if kind is not Ellipsis)
    return model.model_fields
