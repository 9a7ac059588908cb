"""The only folder that imports Ray: actors, the committee over actors, the cluster and the live progress."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what is heavy is loaded where it is needed: every actor loads this module
    from cvdd_ray.config import RuntimeConfig
    from cvdd_ray.data.storage import Store
    from cvdd_ray.stages.runtime import Runtime


def start_runtime(
    c: RuntimeConfig,
    store: Store,
    say: Callable[[str], None],
    on_event: Callable[[str, dict], None] = lambda event, facts: None,
) -> Runtime:
    """Return a runtime on Ray: a private cluster on this machine, or the one at `runtime.address`, once the nodes it is
    to wait for are there.

    `say` is told who is there, `on_event` of starts, checkpoints, finished pieces and failures (RayRuntime).

    Raises ConfigError when Ray does not start or answer, nodes do not come, or not all of them see the store.
    """
    if c.address is None:
        protect_private_cluster()
    from cvdd_ray.runner.nodes import gather
    from cvdd_ray.runner.runtime import RayRuntime

    runtime = RayRuntime(c, on_event)
    try:
        gather(c, store, say)
    except BaseException:
        runtime.close()
        raise
    return runtime


def protect_private_cluster() -> None:
    """Give the private cluster a token of its own, since every user of this machine reaches its ports.

    The token lives in this process's environment, which the workers inherit, and not in HOME, where Ray would keep its
    own and where it would lock out this user's other clusters. Ray reads the mode when it is imported: if it already
    has been, or the user has set a mode, that stands.
    """
    if "ray" not in sys.modules and "RAY_AUTH_MODE" not in os.environ:
        os.environ["RAY_AUTH_MODE"] = "token"
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
