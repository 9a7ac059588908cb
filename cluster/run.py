"""The driver of a run on a Ray cluster: joins the cluster it is submitted to and runs every stage.

    ray job submit --working-dir . -- python cluster/run.py --recipe cifar10 --out /shared/runs/cifar10

`--out` must be a place every node sees (a shared file system or s3://...). Submitted again, it continues.
"""

import argparse
import sys

from cvdd_ray.cli import main


def command(arguments: list[str]) -> list[str]:
    """Return the `cvdd run` words for the driver's arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", required=True, help="packaged recipe or YAML file")
    parser.add_argument("--out", required=True, help="directory or s3:// URI that every node sees")
    parser.add_argument("--address", default="auto", help="Ray cluster to join (default: the one this runs on)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a setting")
    given = parser.parse_args(arguments)
    changes = [word for change in given.set for word in ("--set", change)]
    return ["cvdd", "run", given.recipe, "--out", given.out, "--address", given.address, *changes]


if __name__ == "__main__":
    sys.argv = command(sys.argv[1:])
    main()
