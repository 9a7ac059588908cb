"""Joining a cluster that is already there, as a user does it; cluster/run.py: see tests/cluster."""

import subprocess
import sys

from cvdd_ray.recipes import dump_config


def test_no_cluster_at_the_address_is_one_line(make_config, tmp_path):
    (tmp_path / "tiny.yaml").write_text(dump_config(make_config()))
    words = ["run", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "run"), "--address", "127.0.0.1:1"]
    done = subprocess.run([sys.executable, "-m", "cvdd_ray.cli", *words], capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: runtime.address: no Ray cluster at '127.0.0.1:1'")
