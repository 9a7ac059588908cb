"""A result that lies in the memory of a node when that node is lost is made again."""

import hashlib
import subprocess
import sys

import numpy as np
from clusters import RayCluster

DRIVER = """
import hashlib, sys
import ray
from cvdd_ray.config import RuntimeConfig
from cvdd_ray.runner.runtime import RayRuntime

def make(item, report):
    import numpy as np
    return np.random.default_rng(item).bytes(4 << 20)  # more than travels inside a call

wait = ray.wait
ray.wait = lambda refs, **words: wait(refs, **{**words, "fetch_local": False})  # it stays where it was made
runtime = RayRuntime(RuntimeConfig(address=sys.argv[1]))
get = runtime._get

def late(ref, name, *rest):
    print("made", name, flush=True)
    sys.stdin.readline()
    return get(ref, name, *rest)

runtime._get = late
for name, result in runtime.map(make, {"piece": 7}):
    print("result", hashlib.sha256(result).hexdigest(), flush=True)
"""


def test_it_is_made_again_elsewhere():
    with RayCluster(num_cpus=0) as cluster:  # the head makes nothing
        cluster.add()
        words = [sys.executable, "-c", DRIVER, cluster.address]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        driver = subprocess.Popen(words, **pipes, text=True, env=cluster.env)
        assert driver.stdout.readline() == "made piece\n"
        cluster.lose()
        cluster.add()
        out, err = driver.communicate("go on\n", timeout=120)
    assert driver.returncode == 0, err
    assert out.splitlines()[-1] == f"result {hashlib.sha256(np.random.default_rng(7).bytes(4 << 20)).hexdigest()}"
