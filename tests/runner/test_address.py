"""Joining a cluster that is already there, as a user and as cluster/run.py do it."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from cvdd_ray.recipes import dump_config

TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4, "RAY_ADDRESS": ""}
REPOSITORY = Path(__file__).parents[2]
HEAD = """
import ray, sys
node = ray.init(address="local", num_cpus=2, object_store_memory=100 << 20, include_dashboard=False, log_to_driver=False)
print("address", node.address_info["gcs_address"], flush=True)
sys.stdin.read()
"""


@pytest.fixture
def cluster():
    """A Ray of its own process, with a token of its own; yields its address."""
    head = subprocess.Popen(
        [sys.executable, "-c", HEAD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, **TOKEN},
    )
    for line in head.stdout:
        if line.startswith("address "):
            yield line.split()[1]
            break
    head.stdin.close()
    head.wait(timeout=60)


def test_the_driver_joins_a_running_cluster(cluster, make_config, tmp_path):
    (tmp_path / "tiny.yaml").write_text(dump_config(make_config(evaluate={"seeds": 1, "baselines": []})))
    words = ["--recipe", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), "--address", cluster]
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "cluster" / "run.py"), *words],
        capture_output=True, text=True, timeout=300, env={**os.environ, **TOKEN},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "distilled, soft labels" in done.stdout
    assert (tmp_path / "run" / "evaluate" / "ipc2" / "manifest.json").exists()


def test_no_cluster_at_the_address_is_one_line(make_config, tmp_path):
    (tmp_path / "tiny.yaml").write_text(dump_config(make_config()))
    words = ["run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), "--address", "127.0.0.1:1"]
    done = subprocess.run([sys.executable, "-m", "cvdd_ray.cli", *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: runtime.address: no Ray cluster at '127.0.0.1:1'")


def test_the_driver_needs_recipe_and_out():
    command = runpy.run_path(str(REPOSITORY / "cluster" / "run.py"))["command"]
    assert command(["--recipe", "r", "--out", "o", "--set", "a=1"]) == [
        "cvdd", "run", "r", "--out", "o", "--address", "auto", "--set", "a=1",
    ]  # fmt: skip
    with pytest.raises(SystemExit):
        command(["--recipe", "r"])
