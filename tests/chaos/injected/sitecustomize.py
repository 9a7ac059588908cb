"""Faults from inside: Python imports this in every process that has this folder on its path, and it makes some functions of
the package fail while a file of the fault's name lies in $CHAOS_FAULTS. For tests alone."""

import os
import sys
from importlib.machinery import PathFinder

FAULTS = os.environ.get("CHAOS_FAULTS", "")


def present(fault: str) -> bool:
    return bool(FAULTS) and os.path.exists(f"{FAULTS}/{fault}")


def taken(fault: str) -> bool:
    """Return whether the fault is there, and take it away, so that it happens to one process once."""
    try:
        os.unlink(f"{FAULTS}/{fault}")
    except FileNotFoundError:
        return False
    return True


def disk_that_fails(disk) -> None:
    """Nothing can be written while `disk` lies there; what it holds is the error's number."""
    write_file = disk._write

    def failing(stream, content):
        if present("disk"):
            with open(f"{FAULTS}/disk") as file:
                number = int(file.read())
            raise OSError(number, os.strerror(number))
        write_file(stream, content)

    disk._write = failing


def voter_that_fails(committee) -> None:
    """One vote fails as on a GPU that has got lost: `device`."""
    vote = committee.Voter.vote

    def failing(self, ballot):
        if taken("device"):
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return vote(self, ballot)

    committee.Voter.vote = failing


HOOKS = {
    "cvdd_ray.data.disk": disk_that_fails,
    "cvdd_ray.core.committee": voter_that_fails,
}


class Injecting:
    """Finds the modules of HOOKS as ever, and changes them when they have been executed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in HOOKS:
            return None
        spec = PathFinder.find_spec(name, path)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            HOOKS[name](module)

        spec.loader.exec_module = execute_and_change
        return spec


if FAULTS:
    sys.meta_path.insert(0, Injecting)
