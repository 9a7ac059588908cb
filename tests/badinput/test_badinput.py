"""Bad input is one clear line and exit code 2; nothing is written, nothing is run. The cases are those of `table`."""

import functools
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from badinput import CANARY, Outcome, outcome_of
from table import CASES, MESSAGES, message_of, messages

BY_ID = {case.id: case for case in CASES}


@functools.cache
def found(case_id: str) -> tuple[Outcome, str]:
    """Return the outcome of a case and its message; every case is run once per session."""
    case = BY_ID[case_id]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder).resolve()
        outcome = outcome_of(case, place)
        return outcome, message_of(case, outcome, place)


def test_the_table_is_large_and_says_everything_once():
    assert len(BY_ID) == len(CASES) >= 120


@pytest.mark.parametrize("case_id", BY_ID)
def test_bad_input_is_one_clear_line_and_leaves_nothing(case_id):
    outcome, _ = found(case_id)
    assert outcome.code == 2, outcome.stderr
    assert len(outcome.lines) == 1, outcome.stderr
    assert outcome.lines[0].startswith("error: ")
    assert BY_ID[case_id].says in outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert "AKIAKEY" not in outcome.stderr
    assert "se/cret" not in outcome.stderr
    assert outcome.changed == []


def test_messages_are_those_of_today():
    made = messages((case, found(case.id)[1]) for case in CASES)
    assert MESSAGES.read_text(encoding="utf-8") == made, "run `make messages`"


def test_a_process_of_its_own_says_the_same(tmp_path):
    case = CASES[0]
    case.prepare(tmp_path)
    words = [word.format(out="out") for word in shlex.split(case.command)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-m", "cvdd_ray.cli", *words], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2, done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert message_of(case, Outcome(2, done.stderr, []), tmp_path.resolve()) == found(case.id)[1]
    assert not (tmp_path / CANARY).exists()
    assert not (tmp_path / "out").exists()
