"""The paper's numbers, which are shown beside ours and are never ours."""

from functools import cache
from importlib import resources
from typing import Any

import yaml

PAPER = "paper"
"""How a column of the paper's numbers is headed."""


@cache
def paper(table: str) -> Any:
    """Return one table of paper.yaml."""
    text = (resources.files("cvdd_ray") / "paper.yaml").read_text(encoding="utf-8")
    return yaml.safe_load(text)[table]


def paper_note(table: str, dataset: str | None, ipc: int | None) -> str:
    """Return why the paper's column is empty, or whose its numbers are."""
    about = paper(table)
    measured = about.get("dataset") or ", ".join(name for name in about.get("values", about))
    at = f" at IPC {about['ipc']}" if isinstance(about.get("ipc"), int) else ""
    return (
        f"The column {PAPER!r} has numbers of {paper('source')}, which were not measured here, where the data set is the same "
        f"({measured}{at}; here {dataset or 'unknown'}{'' if ipc is None else f' at IPC {ipc}'}); they are of full-width "
        f"networks, one run each, on test."
    )
