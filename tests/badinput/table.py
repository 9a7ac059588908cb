"""The one table of bad inputs, and what is said of each: `python tests/badinput/table.py` writes MESSAGES.md."""

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

import bad_artifacts
import bad_commands
import bad_configs
import bad_data
import bad_weights
from badinput import Bad, Outcome, normalised, outcome_of

CASES: list[Bad] = [
    case for part in (bad_commands, bad_configs, bad_data, bad_weights, bad_artifacts) for case in part.CASES
]
MESSAGES = Path(__file__).parent / "MESSAGES.md"
HEAD = """# Bad inputs and what is said of them

Made by `make messages` from the table in `tests/badinput`; a test checks that it is up to date. Every command ends with exit
code 2 and this one line on standard error, having written nothing. DIR: the directory it was given in; `...`: words of a
library.
"""
LONGEST = 400  # characters of a command or a message that are shown


def messages(outcomes: Iterable[tuple[Bad, str]]) -> str:
    """Return MESSAGES.md from the cases and their messages."""
    parts, kind = [HEAD], ""
    for case, message in outcomes:
        if case.kind != kind:
            kind = case.kind
            parts.append(f"\n## {kind[0].upper()}{kind[1:]}\n\n")
        command = f"cvdd {case.command}".format(out="out")
        parts.append(f"* **{case.name}**: `` {_cut(command)} ``\n  `` {_cut(message)} ``\n")
    return "".join(parts)


def message_of(case: Bad, outcome: Outcome, folder: Path) -> str:
    """Return the message of an outcome as MESSAGES.md has it."""
    return normalised(outcome.stderr.strip(), case, folder)


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} [...]"


def main() -> None:
    found = []
    for case in CASES:
        with tempfile.TemporaryDirectory() as folder:
            place = Path(folder).resolve()
            found.append((case, message_of(case, outcome_of(case, place), place)))
    MESSAGES.write_text(messages(found), encoding="utf-8")
    print(f"{MESSAGES}: {len(found)} messages", file=sys.stderr)


if __name__ == "__main__":
    main()
