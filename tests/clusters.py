"""A Ray cluster in a process of its own, for tests that join one as a user would: its own token, nodes that come and go at
will."""

import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

from cvdd_ray.data.storage import Store

REPOSITORY = Path(__file__).parents[1]
HEAD = """
import json, sys
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args=json.loads(sys.argv[1]))
print("address", cluster.address, flush=True)
added = []
for line in sys.stdin:
    node = json.loads(line)
    if node is None:
        cluster.remove_node(added.pop(), allow_graceful=False)
    else:
        added.append(cluster.add_node(**node))
    print("done", added[-1].node_id if added else "", flush=True)
cluster.shutdown()
"""
NODE = {"num_cpus": 1, "object_store_memory": 100 << 20}


class RayCluster:
    """A head, and the nodes that `add` starts; all on this machine, with `env` besides. Use as a context."""

    def __init__(self, env: dict[str, str] | None = None, **head):
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_ADDRESS": ""}
        self.env = {**os.environ, **token, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'tests'}", **(env or {})}
        self._head = {**NODE, "include_dashboard": False, **head}

    def __enter__(self):
        words = [sys.executable, "-c", HEAD, json.dumps(self._head)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(words, **pipes, text=True, env=self.env)
        self.address = self._said("address ").split()[1]
        return self

    def __exit__(self, *error):
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def add(self, **node) -> None:
        """Start a node and wait until it is there."""
        self._tell({**NODE, **node})

    def lose(self) -> None:
        """End the node that was added last at once, as a machine that is switched off, and wait until it is gone."""
        self._tell(None)

    def announce(self, seconds: int = 120) -> None:
        """Let the node that `lose` would end be told that it will be taken away in so many seconds, as by a spot market."""
        words = [
            "drain-node",
            "--address",
            self.address,
            "--node-id",
            self._last,
            "--reason",
            "DRAIN_NODE_REASON_PREEMPTION",
        ]
        words += ["--reason-message", "it is wanted elsewhere", "--deadline-remaining-seconds", str(seconds)]
        ray = [sys.executable, "-m", "ray.scripts.scripts"]
        subprocess.run([*ray, *words], check=True, capture_output=True, text=True, env=self.env)

    def python(self, *words: str, timeout_s: float = 300, **env: str) -> subprocess.CompletedProcess:
        """Run Python with these words beside the cluster, with its token."""
        return subprocess.run(
            [sys.executable, *words], capture_output=True, text=True, timeout=timeout_s, env={**self.env, **env}
        )

    def driver(self, *words: str, **env: str) -> subprocess.CompletedProcess:
        """Run cluster/run.py on the cluster."""
        return self.python(str(REPOSITORY / "cluster" / "run.py"), *words, "--address", self.address, **env)

    def _tell(self, node: dict | None) -> None:
        self._process.stdin.write(json.dumps(node) + "\n")
        self._process.stdin.flush()
        self._last = self._said("done").split()[-1]

    def _said(self, start: str) -> str:
        for line in self._process.stdout:
            if line.startswith(start):
                return line
        raise RuntimeError(f"the cluster ended before it said {start!r}")


class OwnDisk(Store):
    """A path that leads to another disk on a node whose environment names one, as an ordinary directory would."""

    def __init__(self, root):
        super().__init__(root)
        self._base += os.environ.get("TEST_DISK", "")

    def __reduce__(self):
        return OwnDisk, (self.root,)


class NoRights(Store):
    """A bucket that a node with TEST_DISK may not read."""

    def __reduce__(self):
        return NoRights, (self.root,)

    def exists(self, name):
        if os.environ.get("TEST_DISK"):
            raise PermissionError("AWS Error ACCESS_DENIED during HeadObject operation")
        return super().exists(name)
