"""Errors a user can act on. Each message is one line: what was given, what is allowed, what to do next."""


class CvddError(Exception):
    """Base of every error the user can mend; the command line prints it as one line and exits with code 2."""


class ConfigError(CvddError):
    """A setting is unknown, of the wrong type, or impossible together with another one."""


class DataError(CvddError):
    """A dataset, an image, a class list or a weights file is missing or not what it should be."""


class ArtifactError(CvddError):
    """An artifact of an earlier stage is missing, damaged, or belongs to other settings."""


class NumericsError(CvddError):
    """A loss or a gradient stopped being finite; the message names the job, the iteration and the expert."""


def require_within(option: str, given: float | None, low: float, high: float) -> None:
    """Raise ConfigError for a number outside of [low, high], and for NaN; None is a number that was not given."""
    if given is not None and not low <= given <= high:
        shown = given if isinstance(given, int) else f"{given:g}"
        raise ConfigError(f"{option} {shown}: give at least {low:g} and at most {high:g}")
