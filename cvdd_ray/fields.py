"""What the sections of a configuration are made of: numbers with bounds, lists of names, and the base of all sections."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

LIMIT = 2**31
"""Whole numbers are below it: what counts or seeds anything fits into 32 bits everywhere."""


def _number(value: Any) -> Any:
    """Refuse true and false, which Python takes for 1 and 0."""
    if isinstance(value, bool):
        raise ValueError(f"got {str(value).lower()}, needs a number")
    return value


def _positive_or_auto(value: Any) -> Any:
    """Refuse what is neither, in words for both."""
    if value != "auto" and (not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < LIMIT):
        raise ValueError(f"got {repr(value)[:80]}; needs a whole number of at least 1, or auto")
    return value


Whole = Annotated[int, BeforeValidator(_number), Field(lt=LIMIT)]
Number = Annotated[float, BeforeValidator(_number)]
Positive = Annotated[Whole, Field(ge=1)]
Count = Annotated[Whole, Field(ge=0)]
PositiveOrAuto = Annotated[Positive | Literal["auto"], BeforeValidator(_positive_or_auto)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Beta = Annotated[Number, Field(ge=0, lt=1)]
PositiveFloat = Annotated[Number, Field(gt=0)]
NonNegative = Annotated[Number, Field(ge=0)]
Width = Annotated[Number, Field(gt=0, le=16)]  # of the published channels; more would not fit anywhere


def _ordered(scale: tuple[float, float]) -> tuple[float, float]:
    low, high = scale
    if not 0 < low <= high:
        raise ValueError(f"needs 0 < low <= high <= 1, got {list(scale)}")
    return scale


AreaRange = Annotated[tuple[Fraction, Fraction], AfterValidator(_ordered)]


def unrepeated(names: tuple) -> tuple:
    """Return a tuple without repeats as it is.  Raises ValueError for another."""
    if len(set(names)) != len(names):
        raise ValueError(f"needs a list without repeats, got {list(names)}")
    return names


def _filled(names: tuple) -> tuple:
    if not names:
        raise ValueError("needs a non-empty list without repeats, got []")
    return unrepeated(names)


Names = Annotated[tuple[str, ...], AfterValidator(_filled)]


class Section(BaseModel):
    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True, allow_inf_nan=False
    )
    LATER: ClassVar[tuple[str, ...]] = ()
    """Settings that came after results were made with the others."""

    def unused(self) -> set[str]:
        """Return the later settings that are as if they had never come: at their defaults."""
        return {name for name in self.LATER if getattr(self, name) == type(self).model_fields[name].default}

    def counted(self, **options: Any) -> dict[str, Any]:
        """Return all settings by name, but later ones only where they are not at their defaults: what is made as ever
        belongs to the same settings as ever. `options` as of `model_dump`."""
        exclude = options.pop("exclude", set()) | self.unused()
        return self.model_dump(exclude=exclude, **options)
