"""The verbs that read finished runs side by side: `cvdd compare` and `cvdd analyze`."""

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from cvdd_ray.errors import ArtifactError, ConfigError


def compare_command(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Directories (or s3:// URIs) of finished runs.")
    ],
    row: Annotated[
        str | None,
        typer.Option("--row", metavar="NAME", help="Row of the tables, of evaluate.baselines; default: the run's own."),
    ] = None,
    csv: Annotated[bool, typer.Option("--csv", help="As CSV.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="As Markdown.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="Everything as JSON, protocols included.")] = False,
) -> None:
    """Runs side by side, of any methods; ranked only where students, labels' regime and data were the same."""
    from cvdd_ray.stages.compare import compare, csv_comparison, markdown_comparison, rich_comparison

    if csv + markdown + json_ > 1:
        raise ConfigError("--csv, --markdown and --json: give one of them")
    found = compare(folders, row)
    if csv or markdown:
        print(csv_comparison(found) if csv else markdown_comparison(found), end="")
        return
    if json_:
        print(json.dumps(found.plain(), indent=1))
        return
    console = Console(width=None if sys.stdout.isatty() else 170)
    for part in rich_comparison(found):
        console.print(part, soft_wrap=not isinstance(part, Table))


def analyze_command(
    folders: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Directory (or s3:// URI) of a finished run or sweep; of several runs.")
    ],
    what: Annotated[str, typer.Option("--what", metavar="NAME", help="Which analysis; an unknown name lists them.")],
    ipc: Annotated[int | None, typer.Option("--ipc", metavar="N", help="Of several; default: the largest.")] = None,
    expert: Annotated[
        str | None, typer.Option("--expert", metavar="NAME", help="Who looks at the images; default: the first.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Its numbers as JSON.")] = False,
) -> None:  # fmt: skip
    """One of the paper's analyses, as a table and perhaps a picture, written to DIR/analysis of the first DIR."""
    from cvdd_ray.data.storage import Store
    from cvdd_ray.stages.analyze import analyze, rich_analysis, write_analysis

    found = analyze(folders, what, ipc=ipc, expert=expert)
    if json_:
        print(json.dumps(found.numbers, indent=1))
    else:
        console = Console(width=None if sys.stdout.isatty() else 130)
        for part in rich_analysis(found):
            console.print(part)
    store = Store(folders[0])
    try:
        written = write_analysis(store, what, found)
    except ArtifactError as error:
        if store.is_local:
            raise
        print(f"the analysis was not written: {error}", file=sys.stderr)  # a bucket that may only be read
        return
    for name, path in written.items():
        print(f"{name}: {path}", file=sys.stderr if json_ else sys.stdout)
