"""Progress: plain lines where there is no terminal, one live line where there is."""

import io

from rich.console import Console

from cvdd_ray.runner import progress as module
from cvdd_ray.runner.progress import LiveProgress, clock


class Clock:
    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)


def test_plain_lines_say_done_rate_and_time_left(monkeypatch):
    time, stream = Clock(monkeypatch), io.StringIO()
    progress = LiveProgress(Console(file=stream, width=200, highlight=False), plain_every_s=10)
    progress.start("synthesize ipc 10", 4000, "job iterations")
    time.now += 5
    progress.update(100)  # too soon for a line
    time.now += 15
    progress.update(1000, "resnet18 ce 1.20 bn 35")
    time.now += 20
    progress.update(2000)
    progress.finish()
    lines = stream.getvalue().splitlines()
    assert lines[0] == "synthesize ipc 10: 4000 job iterations"
    assert "1000/4000 job iterations (25 %)" in lines[1]
    assert lines[1].endswith("; resnet18 ce 1.20 bn 35")
    assert "2000/4000 job iterations (50 %), 47.5/s, 0:42 left" in lines[2]
    assert lines[3] == "synthesize ipc 10: done in 0:40"
    assert len(lines) == 4


def test_work_found_finished_does_not_count_for_the_rate(monkeypatch):
    time, stream = Clock(monkeypatch), io.StringIO()
    progress = LiveProgress(Console(file=stream, width=200, highlight=False), plain_every_s=10)
    progress.start("relabel", 10, "pieces")
    progress.update(8, "8 of 10 were already there")
    time.now += 60
    progress.update(9)
    assert "9.0/10 pieces (90 %), 1.0/min, 1:00 left" in stream.getvalue()


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
