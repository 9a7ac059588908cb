"""What the sections of a configuration are made of: numbers with bounds, and the base of all sections."""

from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0, le=1)]
Positive = Annotated[int, Field(ge=1)]
Beta = Annotated[float, Field(ge=0, lt=1)]


def _ordered(scale: tuple[float, float]) -> tuple[float, float]:
    low, high = scale
    if not 0 < low <= high:
        raise ValueError(f"needs 0 < low <= high <= 1, got {list(scale)}")
    return scale


AreaRange = Annotated[tuple[Fraction, Fraction], AfterValidator(_ordered)]
PositiveFloat = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, validate_default=True)
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
