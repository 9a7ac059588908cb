"""Progress: plain lines where there is no terminal, one live line where there is."""

import io
import json
import re
from datetime import datetime

from rich.console import Console

from cvdd_ray.runner import progress as module
from cvdd_ray.runner.progress import JsonProgress, LiveProgress, clock, open_progress


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def test_plain_lines_say_done_rate_and_time_left(monkeypatch):
    time, stream = Clock(monkeypatch), io.StringIO()
    progress = LiveProgress(Console(file=stream, width=200, highlight=False), line_every_s=10)
    progress.start("synthesize ipc 10", 4000, "job iterations")
    time.now += 5
    progress.update(100)  # too soon for a line
    time.now += 15
    progress.update(1000, "resnet18 ce 1.20 bn 35")
    time.now += 20
    progress.update(2000)
    progress.finish()
    stamps, lines = zip(*(line.split(" synthesize", 1) for line in stream.getvalue().splitlines()), strict=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d", stamp) for stamp in stamps)
    assert lines == (
        " ipc 10: 4000 job iterations",
        " ipc 10 1000/4000 job iterations (25 %), 50.0/s, 1:00 left; resnet18 ce 1.20 bn 35",
        " ipc 10 2000/4000 job iterations (50 %), 50.0/s, 0:40 left",
        " ipc 10: done in 0:40, 2000 job iterations at 50.0/s",
    )


def test_work_found_finished_does_not_count_for_the_rate(monkeypatch):
    time, stream = Clock(monkeypatch), io.StringIO()
    progress = LiveProgress(Console(file=stream, width=200, highlight=False), line_every_s=10)
    progress.start("relabel", 10, "pieces")
    progress.update(8, "8 of 10 were already there")
    time.now += 60
    progress.update(9)
    assert "9.0/10 pieces (90 %), 1.0/min, 1:00 left" in stream.getvalue()


def test_the_time_until_workers_are_there_does_not_count_for_the_rate(monkeypatch):
    time, stream = Clock(monkeypatch), io.StringIO()
    progress = LiveProgress(Console(file=stream, width=200, highlight=False), line_every_s=10)
    progress.start("relabel", 10, "pieces")
    time.now += 600  # the cluster starts a node
    progress.event("waiting", {"stage": "relabel", "waited_s": 600.0})
    progress.event("task_started", {"what": "epochs00000", "host": "node7"})
    time.now += 60
    progress.event("task_started", {"what": "epochs00010", "host": "node7"})
    progress.update(1)
    assert "waiting for 10:00: no worker has begun" in stream.getvalue()
    assert "1.0/10 pieces (10 %), 1.0/min, 9:00 left" in stream.getvalue()


def test_no_rate_is_told_from_a_moment(monkeypatch):
    time, stream = Clock(monkeypatch), io.StringIO()
    progress = LiveProgress(Console(file=stream, width=200, highlight=False), line_every_s=0)
    progress.start("cut patches", 4, "pieces")
    time.now += 10
    progress.event("task_started", {"what": "00000", "host": "node7"})
    time.now += 0.0001
    progress.update(1)
    assert stream.getvalue().splitlines()[-1].endswith("1.0/4 pieces (25 %), 0.0/min, time left unknown")


def test_failures_are_said_once_and_counted_from_then_on(monkeypatch):
    time, stream = Clock(monkeypatch), io.StringIO()
    progress = LiveProgress(Console(file=stream, width=200, highlight=False), line_every_s=10)
    progress.start("synthesize", 10, "job iterations")
    progress.event("checkpoint", {"what": "set-group00000", "host": "node7"})
    for what in ("expert resnet18", "coordinator"):
        progress.event("failure", {"kind": "actor_restarted", "what": what, "host": "node7"})
    progress.event("failure", {"kind": "task_retried", "what": "[odd] name"})
    time.now += 10
    progress.update(5)
    told = [line.split(" ", 2)[2] for line in stream.getvalue().splitlines()[1:]]
    assert told == [
        "failure: actor restarted: expert resnet18 on node7",
        "failure: actor restarted: coordinator on node7",
        "failure: task retried: [odd] name",
        "synthesize 5.0/10 job iterations (50 %), 30.0/min, 0:10 left, 2 actor restarted, 1 task retried",
    ]


def test_json_lines_carry_the_same_numbers(monkeypatch):
    time, stream = Clock(monkeypatch), io.StringIO()
    progress = JsonProgress(stream, line_every_s=10)
    progress.start("synthesize ipc 10", 4000, "job iterations")
    progress.event("group_started", {"what": "set-group00000", "host": "node7", "jobs": 10})
    time.now += 5
    progress.update(100)  # too soon for a line
    progress.event("failure", {"kind": "actor_restarted", "what": "expert resnet18", "host": "node7"})
    time.now += 15
    progress.update(1000, "resnet18 ce 1.20 bn 35", "for terminals")
    progress.say("prior: resnet18 50.0 %")
    progress.finish("all well")
    progress.close()
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert all(datetime.fromisoformat(event.pop("time")).utcoffset() is not None for event in events)
    about = {"stage": "synthesize ipc 10", "total": 4000, "unit": "job iterations"}
    reached = {**about, "done": 1000, "rate_per_s": 50.0, "took_s": 20.0, "failures": {"actor_restarted": 1}}
    assert events == [
        {"event": "stage_started", **about},
        {"event": "group_started", "what": "set-group00000", "host": "node7", "jobs": 10},
        {"event": "failure", "kind": "actor_restarted", "what": "expert resnet18", "host": "node7"},
        {"event": "progress", **reached, "left_s": 60.0, "note": "resnet18 ce 1.20 bn 35"},
        {"event": "note", "text": "prior: resnet18 50.0 %"},
        {"event": "stage_done", **reached, "note": "all well"},
    ]


def test_the_setting_chooses():
    assert isinstance(open_progress("json"), JsonProgress)
    assert isinstance(open_progress("plain"), LiveProgress)


def test_a_terminal_gets_one_live_line_and_is_left_clean():
    stream = io.StringIO()
    progress = LiveProgress(Console(file=stream, force_terminal=True, width=100, highlight=False))
    progress.start("evaluate", 2, "pieces")
    progress.update(1, "half")
    progress.close()
    progress.close()
    assert "━" in stream.getvalue()
    assert "evaluate" in stream.getvalue()
    assert (
        stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1
    )  # cursor hidden, shown again


def test_clock():
    assert [clock(s) for s in (0, 59.6, 61, 3725)] == ["0:00", "1:00", "1:01", "1:02:05"]
