"""Recipes by name: dataset, images per class, student, and if wanted another method or one side of a disagreement.

A name such as `cifar100-ipc10-r50-sre2l++-paper` stands for rules that are applied in order, later ones winning: those of all
recipes (parts/common.yaml), of the dataset (parts/DATASET.yaml), of the variant (parts/variants.yaml), of the method
(parts/methods.yaml), and those that the variant has for the end (`last`). A dataset or a method that is `like` another one has
its rules first. A rule has `set`, changed settings, and perhaps `when`, the values of parts of the name for which it holds;
`set` with null gives a section or a setting its default again.
"""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import product
from typing import Any

import yaml

from cvdd_ray.errors import ConfigError

PATTERN = "DATASET-ipcN-STUDENT[-METHOD][-VARIANT]"
DATASETS = ("cifar10", "cifar100", "tinyimagenet", "imagenette", "imagewoof", "imagenet100", "imagenet1k")
CVDD, PLAIN = "", ""  # how the method and the variant that need no word are written
BOTH_SIDES = (CVDD, "sre2l++")
"""Methods that the paper and its code both have; a variant that names no methods is for these."""


@dataclass(frozen=True)
class RecipeName:
    """The parts of a composed recipe's name; `method` and `variant` are empty for CV-DD as this project does it."""

    dataset: str
    ipc: int
    student: str
    method: str = CVDD
    variant: str = PLAIN

    def __str__(self) -> str:
        return "-".join(
            part for part in (self.dataset, f"ipc{self.ipc}", self.student, self.method, self.variant) if part
        )


@cache
def part(name: str) -> Any:
    """Return what parts/NAME.yaml holds."""
    return yaml.safe_load((resources.files(__package__) / "parts" / f"{name}.yaml").read_text(encoding="utf-8"))


def all_names() -> Iterator[RecipeName]:
    """Yield every name that composes a recipe."""
    common = part("common")
    for dataset, ipc in product(DATASETS, common["ipc"]):
        for student, method in product(students_of(dataset), methods_of(dataset)):
            yield from (RecipeName(dataset, ipc, student, method, v) for v in variants_of(dataset, method))


def students_of(dataset: str) -> list[str]:
    """Return the words of the students that there are for a dataset's images."""
    common = part("common")
    return [word for word in common["students"] if dataset in common["students_of"].get(word, DATASETS)]


def methods_of(dataset: str) -> list[str]:
    """Return the methods that there are for a dataset's images, CV-DD first."""
    return [CVDD, *(name for name, about in part("methods").items() if dataset in about.get("datasets", DATASETS))]


def variants_of(dataset: str, method: str) -> list[str]:
    """Return the variants of a method on a dataset, the plain one first: those whose rules would change something."""
    return [PLAIN, *(name for name, about in part("variants").items()
                     if dataset in about.get("datasets", DATASETS) and method in about.get("methods", BOTH_SIDES))]  # fmt: skip


def is_composed(name: str) -> bool:
    """Return whether a name is meant as DATASET-ipc...: then it is a composed recipe, or wrong."""
    return re.match(rf"({'|'.join(DATASETS)})-ipc", name) is not None and "/" not in name


def parse_name(name: str) -> RecipeName:
    """Return the parts of a name.  Raises ConfigError that says which part is wrong and what it can be."""
    dataset, ipc, student, *rest = [*name.split("-", 3), "", ""][:4]
    common = part("common")
    if dataset not in DATASETS:
        raise _wrong(name, f"dataset {dataset!r}", DATASETS)
    allowed = [f"ipc{number}" for number in common["ipc"]]
    if ipc not in allowed:
        raise _wrong(name, f"images per class {ipc!r}", allowed, "; others with --set 'ipc=[N]'")
    students, methods = students_of(dataset), methods_of(dataset)[1:]
    if student not in students:
        raise _wrong(name, f"student {student!r}", students, "; others with --set 'evaluate.students=[NAME]'")
    words = rest[0].split("-") if rest and rest[0] else []
    method = words.pop(0) if words and words[0] in methods else CVDD
    variants = [variant for variant in variants_of(dataset, method) if variant]
    if words and (len(words) > 1 or words[0] not in variants):
        last = "-".join(words)
        about = "variant" if method else "method or variant"
        if not variants:
            raise ConfigError(f"recipe {name!r}: method {method!r} has no variants; leave -{last} out")
        raise _wrong(name, f"{about} {last!r}", [*([] if method else methods), *variants])
    return RecipeName(dataset, int(ipc.removeprefix("ipc")), student, method, words[0] if words else PLAIN)


def compose(name: RecipeName) -> dict[str, Any]:
    """Return the settings that a name stands for, as nested mappings."""
    settings: dict[str, Any] = {}
    parts = vars(name)
    for rule in _rules(name):
        when = rule.get("when", {})
        if all(parts[key] in values for key, values in when.items()):
            settings = _changed(settings, rule["set"])
    student = part("common")["students"][name.student]
    return _changed(settings, {"ipc": [name.ipc], "evaluate": {"students": [student]}})


def describe(name: RecipeName) -> str:
    """Return one line about a recipe."""
    method = part("methods")[name.method]["title"] if name.method else "CV-DD"
    variant = f"; {part('variants')[name.variant]['title']}" if name.variant else ""
    student = part("common")["students"][name.student]
    return f"{part(name.dataset)['title']}, IPC {name.ipc}, student {student}: {method}{variant}"


def vocabulary() -> dict[str, dict[str, str]]:
    """Return the words of every part of a name with what they mean."""
    common = part("common")
    titles = {kind: {word: about["title"] for word, about in part(kind).items()} for kind in ("methods", "variants")}
    return {
        "DATASET": {name: part(name)["title"] for name in DATASETS},
        "N": {", ".join(map(str, common["ipc"])): "images per class"},
        "STUDENT": common["students"],
        "METHOD": {"(none)": "CV-DD", **titles["methods"]},
        "VARIANT": {"(none)": "what this project does where paper and public code differ", **titles["variants"]},
    }


def _rules(name: RecipeName) -> list[dict[str, Any]]:
    datasets = {dataset: part(dataset) for dataset in DATASETS}
    variant = part("variants")[name.variant] if name.variant else {}
    method = _with_like(part("methods"), name.method) if name.method else []
    first = [*part("common")["rules"], *_with_like(datasets, name.dataset), *variant.get("rules", [])]
    return [*first, *method, *variant.get("last", [])]


def _with_like(entries: Mapping[str, Any], word: str) -> list[dict[str, Any]]:
    """Return the rules of an entry, after those of the one it is `like`."""
    like = entries[word].get("like")
    return [*(_with_like(entries, like) if like else []), *entries[word]["rules"]]


def _changed(settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with changes made section by section; null takes a name out."""
    changed = dict(settings)
    for name, value in changes.items():
        if value is None:
            changed.pop(name, None)
        else:
            changed[name] = _changed(changed.get(name, {}), value) if isinstance(value, Mapping) else value
    return changed


def _wrong(name: str, given: str, allowed: Sequence[str], more: str = "") -> ConfigError:
    known = [str(each) for each in all_names()]
    near = [each for each in known if each.startswith(name)] or difflib.get_close_matches(name, known, 1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"recipe {name!r}: {given} is not one of {', '.join(allowed)}{more}{hint}")
