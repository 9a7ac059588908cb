"""How a committee's questions reach expert actors and the votes come back, by name: `runtime.wire`."""

import time
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent import futures
from threading import Lock
from typing import Any, Protocol

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayError

from cvdd_ray.core.committee import Ballot, Vote, parts
from cvdd_ray.errors import ConfigError
from cvdd_ray.runner.connection import ANSWER, ASKS, IDLE_S, MEET_S, QUESTION, Connection, Meetings
from cvdd_ray.runner.metrics import record

PING_S = 10.0  # Ray is asked for an actor that has not answered for so long
TRIES = 3  # to meet an actor that Ray reaches
MOST_WAITING = 256  # threads that wait for answers

OnFailure = Callable[[str, str], None]  # is told of a failure's kind and the expert's name


class Wire(Protocol):
    """Asks `actors` of the experts of all ballots at once and returns their votes; several threads may ask."""

    def ask(self, actors: Mapping[str, Any], ballots: Mapping[str, Ballot]) -> dict[str, Vote]: ...


class RayWire:
    """Ray's calls. An actor that dies is started again and asked again by Ray; one that has not answered after `hung_s` seconds
    is ended, which is told (`expert_hung`)."""

    def __init__(self, hung_s: float | None = None, on_failure: OnFailure = lambda kind, name: None):
        self._hung_s, self._on_failure = hung_s, on_failure

    def ask(self, actors: Mapping[str, Any], ballots: Mapping[str, Ballot]) -> dict[str, Vote]:
        votes_ref = {}
        for name, actor in actors.items():
            question = [part.cpu().numpy() for part in parts(ballots[name])]
            votes_ref[name] = actor.vote.remote(*question)
            _count("views", name, question)
        self._wait(votes_ref, actors)
        answers = dict(zip(votes_ref, ray.get(list(votes_ref.values())), strict=True))
        for name, answer in answers.items():
            _count("gradients", name, answer)
        return {
            name: Vote(*(torch.from_numpy(np.array(part)).to(ballots[name].views_GBCHW.device) for part in answer))
            for name, answer in answers.items()
        }

    def _wait(self, votes_ref: Mapping[str, Any], actors: Mapping[str, Any]) -> None:
        """Return when all votes are there or have failed."""
        refs = list(votes_ref.values())
        while True:
            _, missing = ray.wait(refs, num_returns=len(refs), timeout=self._hung_s, fetch_local=False)
            if not missing:
                return
            for name in (name for name, ref in votes_ref.items() if ref in missing):
                self._on_failure("expert_hung", name)
                ray.kill(actors[name], no_restart=False)


class TorchWire:
    """torch.distributed with gloo between processes that Ray has placed: connections stay open, a question and its answer are
    no calls of Ray. Tensors of a GPU go by way of the CPU; NCCL, which wants a GPU of its own for either side, is of no use
    here, where coordinators have none.

    One question at a time is on a connection, and there are as many to an actor as questions were open at once. Whatever
    goes wrong, which is told (`connection_lost`) but for an expert's own errors, the same question is asked once more over
    Ray: that waits for an actor that has died, raises an expert's error as itself, and ends what hangs. The next question
    opens a new connection.
    """

    def __init__(self, hung_s: float | None = None, on_failure: OnFailure = lambda kind, name: None):
        self._ray, self._hung_s, self._on_failure = RayWire(hung_s, on_failure), hung_s, on_failure
        self._lock, self._meetings = Lock(), None
        self._free: dict[Any, list[Connection]] = {}
        self._missed: Counter[Any] = Counter()
        self._pool = futures.ThreadPoolExecutor(MOST_WAITING, "votes")

    def ask(self, actors: Mapping[str, Any], ballots: Mapping[str, Ballot]) -> dict[str, Vote]:
        """Raises ConfigError when an actor that Ray reaches cannot be met."""
        connections = {name: self._take(name, actor) for name, actor in actors.items()}
        asked = {}
        for name, connection in connections.items():
            question = [part.cpu() for part in parts(ballots[name])]
            if connection is not None:
                try:
                    connection.send(QUESTION, question)
                except ConnectionError:
                    self._lost(name, actors[name])
                    continue
                asked[name] = connection
                _count("views", name, question)
        answers = self._answers(asked, actors)
        for name, answer in answers.items():
            _count("gradients", name, answer)
        rest = {name: actor for name, actor in actors.items() if name not in answers}
        by_ray = self._ray.ask(rest, ballots) if rest else {}
        return {
            name: by_ray[name] if name in by_ray else Vote(*(part.to(b.views_GBCHW.device) for part in answers[name]))
            for name, b in ballots.items()
        }

    def _answers(self, asked: Mapping[str, Connection], actors: Mapping[str, Any]) -> dict[str, list[torch.Tensor]]:
        """Return the answers that come; of others the expert failed, or its actor is gone, or hung and is ended."""
        # a thread that gloo does not wake, since its node was lost, ends some time after who hangs would
        coming = {
            self._pool.submit(one.receive, (self._hung_s or IDLE_S) + MEET_S): name for name, one in asked.items()
        }
        began, answers, pings = time.monotonic(), {}, {}
        while coming:
            left_s = PING_S if self._hung_s is None else max(0.0, began + self._hung_s - time.monotonic())
            done, _ = futures.wait(coming, timeout=min(PING_S, left_s))
            for future in done:
                name = coming.pop(future)
                try:
                    kind, tensors = future.result()
                except ConnectionError:
                    self._lost(name, actors[name])
                    continue
                self._give_back(actors[name], asked[name])
                if kind == ANSWER:
                    answers[name] = tensors
            for future, name in list(coming.items()):
                if left_s == 0.0:
                    self._on_failure("expert_hung", name)
                    ray.kill(actors[name], no_restart=False)
                    self._forget(actors[name])
                elif self._gone(actors[name], pings):
                    self._lost(name, actors[name])
                else:
                    continue
                del coming[future]
        return answers

    def _take(self, name: str, actor: Any) -> Connection | None:
        """Return a connection to an actor that is free, or a new one; None when it is not there."""
        with self._lock:
            if free := self._free.get(actor):
                return free.pop()
            here = ray.util.get_node_ip_address()
            if self._meetings is None:
                try:
                    self._meetings = Meetings(here)
                except (OSError, RuntimeError) as error:
                    raise ConfigError(
                        f"runtime.wire: torch.distributed cannot listen at {here} ({error}); set runtime.wire=ray"
                    ) from None
            meeting = self._meetings.new()
        serving_ref = actor.serve.remote(meeting)
        ready, _ = ray.wait([serving_ref], timeout=self._hung_s)
        try:
            if not ready:
                return None
            ray.get(serving_ref)
            connection = Connection(meeting, ASKS, here)
        except RayError:
            return None
        except ConnectionError as error:
            self._on_failure("connection_lost", name)
            self._missed[actor] += 1
            if self._missed[actor] == TRIES:
                raise ConfigError(
                    f"runtime.wire: torch.distributed does not connect {here} with a node that Ray reaches ({error}); open "
                    f"the ports between nodes, or set runtime.wire=ray"
                ) from None
            return None
        self._missed[actor] = 0
        return connection

    def _give_back(self, actor: Any, connection: Connection) -> None:
        with self._lock:
            self._free.setdefault(actor, []).append(connection)

    def _lost(self, name: str, actor: Any) -> None:
        self._on_failure("connection_lost", name)
        self._forget(actor)

    def _forget(self, actor: Any) -> None:
        """Let go of the free connections to an actor, whose process is another one now."""
        with self._lock:
            self._free.pop(actor, None)

    def _gone(self, actor: Any, pings: dict[Any, Any]) -> bool:
        """Return whether Ray knows that an actor's process is gone: a node that is lost closes no connection."""
        if actor not in pings:
            pings[actor] = actor.ready.options(max_task_retries=0).remote()
        ready, _ = ray.wait([pings[actor]], timeout=0)
        if not ready:
            return False
        try:
            ray.get(pings.pop(actor))
        except RayActorError:
            return True
        return False


WIRES: dict[str, Callable[..., Wire]] = {"ray": RayWire, "torch": TorchWire}


def _count(direction: str, name: str, tensors: Any) -> None:
    record("cvdd_wire_bytes", sum(part.nbytes for part in tensors), direction=direction, expert=name)
