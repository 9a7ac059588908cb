"""Search spaces in plain YAML: what may become of a dotted setting, and which settings a point of the space means."""

import itertools
import math
import random
import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_serializer, model_validator

MAX_GRID = 10_000  # points of a grid; more is a mistake


def _number(value: Any) -> Any:
    """Return `1e-3`, which YAML takes for text, as the number it is."""
    is_number = isinstance(value, str) and re.fullmatch(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+", value)
    return float(value) if is_number else value


SEVERAL = "settings"
"""A space's key whose values are mappings of dotted settings, of any sections: they change together."""


Values = Annotated[tuple[Annotated[Any, BeforeValidator(_number)], ...], Field(min_length=1)]
Pair = tuple[float, float]


class Domain(BaseModel):
    """What one setting may become; exactly one kind is given, e.g. `{grid: [1, 4, 20]}` or `{loguniform: [1e-4, 1e-2]}`."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    grid: Values | None = None
    """Every one of these values. A mapping changes several settings of a section at once."""
    choice: Values | None = None
    """One of these values, drawn. A mapping changes several settings of a section at once."""
    uniform: Pair | None = None
    """A number from [low, high), all equally likely."""
    loguniform: Pair | None = None
    """A number from [low, high), its logarithm uniform."""
    quniform: tuple[float, float, float] | None = None
    """[low, high, step]: a multiple of step from low to high."""
    randint: tuple[int, int] | None = None
    """A whole number from low to high - 1."""
    lograndint: tuple[int, int] | None = None
    """A whole number from low to high - 1, its logarithm uniform."""

    @model_validator(mode="after")
    def _check(self):
        given = self._given()
        if len(given) != 1:
            raise ValueError(
                f"needs exactly one of {', '.join(Domain.model_fields)}, got {', '.join(given) or 'none'}; "
                f"e.g. {{grid: [1, 4, 20]}}"
            )
        if self.values is not None:
            if len(set(self.points())) != len(self.values):
                raise ValueError(f"{self.kind} has a value twice: {', '.join(map(str, self.points()))}")
            return self
        low, high = self.argument[:2]
        if not low < high or (self.kind.startswith("log") and low <= 0):
            positive = "0 < " if self.kind.startswith("log") else ""
            raise ValueError(f"{self.kind} needs {positive}low < high, got {list(self.argument)}")
        if self.kind == "quniform" and not 0 < self.argument[2] <= high - low:
            raise ValueError(f"quniform needs 0 < step <= high - low, got {list(self.argument)}")
        return self

    @model_serializer
    def _plain(self) -> dict[str, Any]:
        return {self.kind: self.argument}

    def _given(self) -> list[str]:
        return [name for name in Domain.model_fields if getattr(self, name) is not None]

    @property
    def kind(self) -> str:
        return self._given()[0]

    @property
    def argument(self) -> tuple:
        """What the kind was given: values, or low, high (and step)."""
        return getattr(self, self.kind)

    @property
    def values(self) -> tuple[Any, ...] | None:
        """The listed values of `grid` and `choice`, None for ranges."""
        return self.argument if self.kind in ("grid", "choice") else None

    @property
    def is_log(self) -> bool:
        return self.kind.startswith("log")

    def points(self) -> tuple[float | int | str, ...]:
        """Return the names of the listed values (numbers as they are, everything else as text); none for ranges."""
        return tuple(point(value) for value in self.values or ())

    def value(self, at: Any) -> Any:
        """Return the setting that a point stands for: the listed value of that name, or the number itself."""
        return next((value for value in self.values or () if point(value) == at), at)

    def draw(self, source: random.Random) -> Any:
        """Return a value of this domain."""
        if self.values is not None:
            return source.choice(self.values)
        low, high = self.argument[:2]
        number = math.exp(source.uniform(math.log(low), math.log(high))) if self.is_log else source.uniform(low, high)
        if self.kind == "quniform":
            return self.argument[2] * round(number / self.argument[2])
        return min(int(number), high - 1) if self.kind in ("randint", "lograndint") else number


Space = Mapping[str, Domain]


def grid_points(space: Space) -> Iterator[dict[str, Any]]:
    """Yield the settings of every point of a space of grids, the last key fastest."""
    for values in itertools.product(*(domain.values or () for domain in space.values())):
        yield dict(zip(space, values, strict=True))


def samples(space: Space, count: int) -> list[dict[str, Any]]:
    """Return settings to try a space with: for grids every point, else `count` draws that are always the same."""
    if all(domain.kind == "grid" for domain in space.values()):
        return list(grid_points(space))
    source = random.Random(0)
    return [{key: domain.draw(source) for key, domain in space.items()} for _ in range(count)]


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with those under `SEVERAL` among the others."""
    return {**{key: value for key, value in values.items() if key != SEVERAL}, **values.get(SEVERAL, {})}


def point(value: Any) -> float | int | str:
    """Return how a value is called in tables and plots: numbers as they are, everything else as short text."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number else label(value)


def label(value: Any) -> str:
    """Return a value as short text: `resnet18`, `resnet18+resnet50`, `size=3 weighting=equal`, `1e-3`."""
    if isinstance(value, Mapping):
        return " ".join(f"{name}={label(part)}" for name, part in value.items())
    if isinstance(value, (list, tuple)):
        return "+".join(label(part) for part in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return value if isinstance(value, str) else yaml.safe_dump(value).removesuffix("...\n").strip()
