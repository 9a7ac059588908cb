"""What a bad input is, and what `cvdd` does with it: exit code, standard error, and whether anything was left behind."""

import io
import os
import re
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

from cvdd_ray import cli

CANARY = "CANARY"
"""A file that appears in the case's folder when its content has been run as a program."""


@dataclass(frozen=True)
class Bad:
    """One bad input: a command in a folder, `prepare(folder)` having put there what is wrong.

    Of the message `says` is a part that must be there. `theirs` is a pattern of what a library words, which may be worded
    otherwise in another version. {out} in the command is a directory that must not come to be.
    """

    kind: str
    name: str
    command: str
    says: str
    prepare: Callable[[Path], object] = lambda folder: None
    theirs: str = ""

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.name}"


@dataclass(frozen=True)
class Outcome:
    """What became of a bad input; `changed` are files that came, went or changed in its folder."""

    code: int
    stderr: str
    changed: list[str]

    @property
    def lines(self) -> list[str]:
        return self.stderr.strip().splitlines()


def outcome_of(case: Bad, folder: Path) -> Outcome:
    """Run a case in this process, in an empty folder, without a Ray and without the work itself."""
    case.prepare(folder)
    before = snapshot(folder)
    words = [word.format(out="out") for word in shlex.split(case.command)]
    with _inside(folder), tempfile.TemporaryDirectory() as cache, patch.dict(os.environ, CVDD_RAY_CACHE=cache):
        code, stderr = call(words)
    after = snapshot(folder)
    return Outcome(code, stderr, sorted(name for name in before | after if before.get(name) != after.get(name)))


def call(words: list[str]) -> tuple[int, str]:
    """Return exit code and standard error of `cvdd WORDS`; warnings, tracebacks and what C libraries say are part of it."""
    text = io.StringIO()
    with tempfile.TemporaryFile() as low, warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        warnings.simplefilter("ignore", DeprecationWarning)
        with (
            _descriptor(2, low),
            redirect_stderr(text),
            redirect_stdout(io.StringIO()),
            patch.object(sys, "argv", ["cvdd", *words]),
        ):
            try:
                cli.main()
                code = 0
            except SystemExit as exit_:
                code = exit_.code or 0
            except BaseException:
                code = 1
                text.write(traceback.format_exc())
        low.seek(0)
        said = low.read().decode("utf-8", "replace")
    return code, text.getvalue() + said + "".join(f"warning: {one.message}\n" for one in warned)


def snapshot(folder: Path) -> dict[str, tuple]:
    """Return what is in a folder, by name; unchanged files have equal values."""
    found = {}
    for path in sorted(folder.rglob("*")):
        about = path.lstat()
        found[path.relative_to(folder).as_posix()] = (about.st_mode, about.st_size, about.st_mtime_ns)
    return found


def normalised(text: str, case: Bad, folder: Path) -> str:
    """Return a message without what differs from machine to machine: folders, and the words of libraries."""
    text = text.replace(str(folder), "DIR").replace(str(folder.resolve()), "DIR")
    return re.sub(case.theirs, "...", text) if case.theirs else text


@contextmanager
def _inside(folder: Path):
    here = os.getcwd()
    os.chdir(folder)
    try:
        with patch("cvdd_ray.stages.pipeline.run_all", _accepted), patch("cvdd_ray.runner.sweep.connect", _accepted):
            yield
    finally:
        os.chdir(here)


def _accepted(*args, **kwargs):
    raise AssertionError("the bad input was accepted")


@contextmanager
def _descriptor(number: int, file):
    kept = os.dup(number)
    os.dup2(file.fileno(), number)
    try:
        yield
    finally:
        os.dup2(kept, number)
        os.close(kept)
