"""The driver of a run or a sweep on a Ray cluster. Submitted again, it continues.

    ray submit cluster/cluster.yaml cluster/run.py -- --recipe imagenet1k-ipc10 --out s3://bucket/run1
    ray job submit --working-dir . -- python cluster/run.py --recipe imagenet1k-ipc10 --out s3://bucket/run1

--out must be a place that every node sees, an s3:// URI or a shared directory; this is checked before work starts.
Exit code: 0, 2 for mistakes that can be mended (one line says which), 130 when interrupted.
"""

import argparse
import sys
from typing import NoReturn

from cvdd_ray import cli  # alone: `ray submit` copies only this file to the head, where the package is installed
from cvdd_ray.data.storage import Store


class Words(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"error: {message}; --help lists the options", file=sys.stderr)
        raise SystemExit(2)


def parse(words: list[str]) -> argparse.Namespace:
    """Return the driver's options.  Exits with code 2 for wrong ones."""
    parser = Words(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("--recipe", metavar="NAME", help="packaged recipe or YAML file; with --sweep: what is swept")
    add("--sweep", metavar="FILE", help="a sweep (tune_configs/) instead of one run")
    add("--out", required=True, metavar="PLACE", help="s3:// URI or shared directory of the results")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting; may be repeated")
    add(
        "--reuse", action="append", default=[], metavar="PLACE", help="take over fitting stages of another run or sweep"
    )
    add("--overwrite", action="store_true", help="replace what was made with other settings")
    add("--address", default="auto", help="cluster to join (default: the one this runs on)")
    add("--wait-for-nodes", metavar="N", help="start when N nodes, the head among them, are there")
    add("--gpus", metavar="N", help="start when N GPUs are free; an autoscaling cluster is asked for them")
    add("--wait-s", metavar="S", help="how long to wait for nodes and GPUs (default: 900)")
    given = parser.parse_args(words)
    if not (given.recipe or given.sweep):
        parser.error("give --recipe NAME or --sweep FILE")
    return given


def command(given: argparse.Namespace) -> list[str]:
    """Return the words of `cvdd run` or `cvdd sweep` for the driver's options."""
    if given.sweep:
        words = ["sweep", given.sweep, *(["--base", given.recipe] if given.recipe else [])]
    else:
        words = ["run", given.recipe]
    waits = {"wait_for_nodes": given.wait_for_nodes, "wait_for_gpus": given.gpus, "wait_s": given.wait_s}
    changes = [*given.set, *(f"runtime.{name}={value}" for name, value in waits.items() if value is not None)]
    words += ["--out", given.out, "--address", given.address]
    words += [word for change in changes for word in ("--set", change)]
    words += [word for place in given.reuse for word in ("--reuse", place)]
    return [*words, *(["--overwrite"] if given.overwrite else [])]


def main(words: list[str]) -> None:
    given = parse(words)
    sys.argv = ["cvdd", *command(given)]
    try:
        cli.main()
    except SystemExit as end:
        if not end.code:
            print(f"results: {Store(given.out).display('').rstrip('/')}")
        raise


if __name__ == "__main__":
    main(sys.argv[1:])
