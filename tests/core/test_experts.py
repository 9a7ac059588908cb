"""How a process is set up for work."""

import subprocess
import sys

import pytest

FAULTS = """
import resource, torch
from cvdd_ray.core.experts import prepare_torch
prepare_torch(1, keep_memory={keep})
for _ in range(10):  # until the heap has room for both; blocks larger than what the allocator takes from the heap by itself
    torch.ones(2**25), torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**25), torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator alone can be told to keep memory")
def test_freed_memory_is_kept_and_not_zeroed_again():
    kept, given_back = (
        int(subprocess.run([sys.executable, "-c", FAULTS.format(keep=keep)], check=True, capture_output=True).stdout)
        for keep in (True, False)
    )
    assert kept < 1000 < given_back
