"""A private cluster gets a token before Ray is imported; a cluster that is joined keeps the user's mode."""

import json
import os
import subprocess
import sys

CODE = """
import json, os, sys
import cvdd_ray.runner
assert "ray" not in sys.modules
cvdd_ray.runner.protect_private_cluster()
print(json.dumps({k: v for k, v in os.environ.items() if k.startswith("RAY_AUTH")}))
"""


def environment_after(**given: str) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("RAY_AUTH")}
    done = subprocess.run(
        [sys.executable, "-c", CODE], env={**clean, **given}, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


def test_a_private_cluster_has_a_fresh_token():
    first, second = environment_after(), environment_after()
    assert first["RAY_AUTH_MODE"] == second["RAY_AUTH_MODE"] == "token"
    assert len(first["RAY_AUTH_TOKEN"]) == 64
    assert first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]


def test_the_users_own_mode_stands():
    assert environment_after(RAY_AUTH_MODE="disabled") == {"RAY_AUTH_MODE": "disabled"}
