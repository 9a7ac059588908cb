"""Votes over torch.distributed: the same as over Ray, and what becomes of errors, deaths, hanging and strangers."""

import os
import signal
import socket
import threading
import time
from dataclasses import replace

import pytest
import ray
import torch

from cvdd_ray.core.committee import Ballot
from cvdd_ray.core.experts import ExpertSpec
from cvdd_ray.core.models import build_seeded, save_weights
from cvdd_ray.errors import ConfigError, DataError
from cvdd_ray.runner import connection as module
from cvdd_ray.runner import wires
from cvdd_ray.runner.actors import ExpertActor
from cvdd_ray.runner.committee import RayCommittee
from cvdd_ray.runner.connection import ANSWER, ANSWERS, ASKS, FAILED, QUESTION, Connection, Meetings, answer_all
from cvdd_ray.stages.grouptask import VoterSettings
from cvdd_ray.stages.runtime import local_committee

HERE = "127.0.0.1"
VOTER = VoterSettings(0.1, 2.0)


def spec(name="resnet18", seed=0) -> ExpertSpec:
    return ExpertSpec(name, 10, 16, 0.125, save_weights(build_seeded(name, 10, 16, width=0.125, seed=seed)))


def ballot(groups=2) -> Ballot:
    draw = torch.Generator().manual_seed(1)
    return Ballot(torch.randn(groups, 4, 3, 16, 16, generator=draw), torch.randint(10, (groups, 4), generator=draw))


def same(votes, others) -> bool:
    pairs = [(vars(vote), vars(others[name])) for name, vote in votes.items()]
    return all(torch.equal(one[part], other[part]) for one, other in pairs for part in one if one[part] is not None)


# ------------------------------------------------------------------------------------------------- two ends


def connected(meetings, answer):
    """An asking end, and the thread of the one that answers."""
    meeting = meetings.new()
    thread = threading.Thread(target=answer_all, args=(meeting, HERE, answer), daemon=True)
    thread.start()
    return Connection(meeting, ASKS, HERE), thread


def test_tensors_of_all_kinds_arrive_and_an_error_is_one_message():
    def answer(*tensors):
        if not tensors:
            raise ZeroDivisionError
        return [tensor + 1 for tensor in tensors]

    meetings = Meetings(HERE)
    asking, thread = connected(meetings, answer)
    kinds = [torch.arange(6).view(1, 2, 3).to(dtype) for dtype in module.DTYPES]
    for question in (
        kinds[:1],
        kinds,
        [],
        [torch.zeros(2, 0), torch.rand(2, 3, 4, 5, 6).transpose(0, 4)],
        [torch.tensor(1.5)],
    ):
        asking.send(QUESTION, question)
        kind, answered = asking.receive(60)
        assert kind == (ANSWER if question else FAILED)
        assert [(t.dtype, t.shape) for t in answered] == [(t.dtype, t.shape) for t in question]
        assert all(torch.equal(after, before + 1) for after, before in zip(answered, question, strict=True))
    del asking
    thread.join(60)
    assert not thread.is_alive()


def test_a_stranger_is_not_answered():
    asked, meetings = [], Meetings(HERE)
    asking, thread = connected(meetings, asked.append)
    asking._secret = [word ^ 1 for word in asking._secret]
    asking.send(QUESTION, [torch.zeros(1)])
    with pytest.raises(ConnectionError):
        asking.receive(60)
    thread.join(60)
    assert not thread.is_alive()
    assert asked == []


def test_only_its_own_address_listens(monkeypatch):
    monkeypatch.setattr(module, "MEET_S", 1.0)
    meetings = Meetings(HERE)
    meeting = meetings.new()
    socket.create_connection((HERE, meeting.port), timeout=10).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.2", meeting.port), timeout=10)
    with pytest.raises(ConnectionError):  # nobody comes
        Connection(meeting, ANSWERS, HERE)


# ------------------------------------------------------------------------------------------------- expert actors


@pytest.fixture
def expert(ray_runtime):
    """Starts an expert actor, restarted when it dies, of `kind`."""
    started = []

    def start(about, kind=ExpertActor, *more):
        remote = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(kind)
        started.append(remote.remote(about, VOTER, 1, None, *more))
        return started[-1]

    yield start
    for actor in started:
        ray.kill(actor)


def test_votes_are_the_local_ones_also_after_a_death(expert):
    specs = {"a": spec(), "b": spec("shufflenet_v2")}
    actors = {name: [expert(about)] for name, about in specs.items()}
    asked = {"a": ballot(2), "b": ballot(1)}
    local = local_committee(specs, VOTER, torch.device("cpu")).vote(asked)
    committee = RayCommittee(actors, wire="torch")
    by_ray = []
    committee._wire._ray.ask = lambda rest, ballots, ask=committee._wire._ray.ask: (
        by_ray.append(set(rest)) or ask(rest, ballots)
    )
    answers = [None] * 3

    def one(k):
        answers[k] = committee.vote(asked)

    threads = [threading.Thread(target=one, args=(k,)) for k in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(local, votes) for votes in answers)
    assert by_ray == []
    assert [len(committee._wire._free[actors[name][0]]) for name in actors] == [3, 3]  # one for each question at once
    ray.kill(actors["a"][0], no_restart=False)
    assert same(local, committee.vote(asked))
    assert by_ray == [{"a"}]  # waits until it is there again
    assert same(local, committee.vote(asked))
    assert by_ray == [{"a"}]
    assert list(committee.vote(dict(reversed(asked.items())))) == ["b", "a"]


def test_an_expert_that_dies_or_hangs_while_it_votes_is_asked_again(expert, tmp_path):
    class Failing(ExpertActor):  # inside the test, so that the worker need not import this file
        """An expert that is killed when it is first asked, and in its second life hangs at the second question."""

        def __init__(self, *given):
            *given, marks = given
            super().__init__(*given)
            self._life, self._questions = len(os.listdir(marks)), 0
            open(f"{marks}/{self._life}", "w").close()

        def _answer(self, *question):
            self._questions += 1
            if self._life == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if (self._life, self._questions) == (1, 2):
                time.sleep(1000)
            return super()._answer(*question)

    actor, failures = expert(spec(), Failing, str(tmp_path)), []
    ray.get(actor.ready.remote())
    committee = RayCommittee(
        {"a": [actor]}, hung_s=120.0, on_failure=lambda kind, name: failures.append((kind, name)), wire="torch"
    )
    committee._wire._hung_s = 10.0  # not of what is asked over Ray, which may have to start the actor first
    local = local_committee({"a": spec()}, VOTER, torch.device("cpu")).vote({"a": ballot()})
    for told in ([("connection_lost", "a")], [("connection_lost", "a"), ("expert_hung", "a")]):
        assert same(local, committee.vote({"a": ballot()}))
        assert failures == told
    assert len(list(tmp_path.iterdir())) == 3  # lives


def test_an_error_of_an_expert_comes_as_itself(expert):
    damaged = replace(spec(), weights=b"nothing")
    committee = RayCommittee({"a": [expert(damaged)]}, wire="torch")
    for _ in range(2):
        with pytest.raises(DataError):
            committee.vote({"a": ballot()})
    assert len(next(iter(committee._wire._free.values()))) == 1  # the connection outlives it


def test_an_actor_whose_process_is_gone_is_known_to_ray(expert):
    actor, wire = expert(spec()), wires.TorchWire()
    ray.get(actor.ready.remote())
    pings = {}
    assert not wire._gone(actor, pings)
    ray.kill(actor)
    pings.clear()
    until = time.monotonic() + 60
    while not wire._gone(actor, pings):
        assert time.monotonic() < until
        time.sleep(0.1)


def test_an_actor_that_cannot_be_met_is_asked_by_ray_and_then_said(expert, monkeypatch):
    monkeypatch.setattr(module, "MEET_S", 0.5)
    monkeypatch.setattr(wires.Meetings, "new", lambda self, new=wires.Meetings.new: replace(new(self), port=1))
    committee = RayCommittee({"a": [expert(spec())]}, wire="torch")
    for _ in range(wires.TRIES - 1):
        committee.vote({"a": ballot()})
    with pytest.raises(ConfigError, match=r"open the ports between nodes, or set runtime\.wire=ray"):
        committee.vote({"a": ballot()})
