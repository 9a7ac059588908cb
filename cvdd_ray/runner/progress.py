"""Progress on stderr: a bar with rate, time left and the experts' losses on a terminal, plain lines elsewhere (`ray job
logs`), or JSON lines for programs."""

import json
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from typing import Any, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

LINE_EVERY_S = 10.0
BEGINNINGS = ("task_started", "group_started")
FOUND_WITHIN_S = 0.1  # what a stage reports so soon was there when it was entered; no rate is told from so short a time


def open_progress(log_format: str) -> "LiveProgress | JsonProgress":
    """Return the progress that `runtime.log_format` asks for."""
    return JsonProgress() if log_format == "json" else LiveProgress()


class Pace:
    """How far one stage is: `done` of `total`, the rate per second since work began, seconds left (None when unknown) and
    so far."""

    def __init__(self, total: float):
        self.total, self.done = total, 0.0
        self._found = 0.0
        self._started = time.monotonic()
        self._began: float | None = None

    def reach(self, done: float) -> None:
        if self.done == 0 and self.took_s < FOUND_WITHIN_S:
            self._found = max(done, 0.0)
        self.done = done

    def begin(self) -> None:
        """A worker has begun: the time until the first of them was there does not count for the rate."""
        if self._began is None:
            self._began = time.monotonic()

    @property
    def took_s(self) -> float:
        return time.monotonic() - self._started

    @property
    def rate(self) -> float:
        worked_s = time.monotonic() - (self._began or self._started)
        return (self.done - self._found) / worked_s if worked_s > FOUND_WITHIN_S else 0.0

    @property
    def left_s(self) -> float | None:
        return (self.total - self.done) / self.rate if self.rate > 0 else None


class LiveProgress:
    """Progress of one stage at a time for people, written to stderr; results belong to stdout."""

    def __init__(self, console: Console | None = None, line_every_s: float = LINE_EVERY_S):
        self._console = console or Console(stderr=True, highlight=False)
        self._line_every_s = line_every_s
        self._live: Live | None = None
        self._title, self._unit, self._pace = "", "", Pace(1.0)
        self._printed = 0.0
        self._failures: Counter[str] = Counter()

    def start(self, title: str, total: float, unit: str) -> None:
        self._title, self._unit, self._pace = title, unit, Pace(total)
        self._printed = time.monotonic()
        if self._console.is_terminal:
            self._live = Live(self._line(""), console=self._console, transient=True, refresh_per_second=4)
            self._live.start()
        else:
            self.say(f"{title}: {total:.0f} {unit}")

    def update(self, done: float, note: str = "", detail: str = "") -> None:
        self._pace.reach(done)
        if self._live:
            self._live.update(Group(self._line(note), Text(detail)) if detail else self._line(note))
        elif time.monotonic() - self._printed >= self._line_every_s:
            self._printed = time.monotonic()
            self.say(self._line(note).plain)

    def finish(self, note: str = "") -> None:
        self.close()
        pace = self._pace
        amount = f", {pace.done:.0f} {self._unit} at {speed(pace.rate)}" if pace.rate > 0 else ""
        self.say(f"{self._title}: done in {clock(pace.took_s)}{amount}{f' ({note})' if note else ''}")

    def say(self, text: str) -> None:
        stamp = "" if self._console.is_terminal else f"{datetime.now():%Y-%m-%d %H:%M:%S} "
        self._console.print(Text(f"{stamp}{text}"), soft_wrap=True)

    def event(self, event: str, facts: dict[str, Any]) -> None:
        """Show a failure and count it from now on, and that nothing has begun; other events are for JsonProgress."""
        if event in BEGINNINGS:
            self._pace.begin()
        elif event == "waiting":
            self.say(
                f"waiting for {clock(facts['waited_s'])}: no worker has begun (no free place, or it is still loading)"
            )
        elif event == "failure":
            self._failures[facts["kind"]] += 1
            place = f" on {facts['host']}" if "host" in facts else ""
            self.say(f"failure: {facts['kind'].replace('_', ' ')}: {facts['what']}{place}")

    def close(self) -> None:
        """Leave the terminal as it was, also after an error."""
        if self._live:
            self._live.stop()
            self._live = None

    def _line(self, note: str) -> Text:
        pace = self._pace
        share = pace.done / pace.total if pace.total else 1.0
        left = "time left unknown" if pace.left_s is None else f"{clock(pace.left_s)} left"
        bar = ""
        if self._console.is_terminal:
            filled = round(20 * min(share, 1.0))
            bar = f"{'━' * filled}{'╌' * (20 - filled)} "
        done = f"{pace.done:.1f}" if pace.total < 1000 else f"{pace.done:.0f}"
        failed = "".join(f", {number} {kind.replace('_', ' ')}" for kind, number in self._failures.items())
        text = (
            f"{self._title} {bar}{done}/{pace.total:.0f} {self._unit} ({100 * share:.0f} %), {speed(pace.rate)}, {left}"
        )
        between = "\n  " if bar else "; "
        return Text(f"{text}{failed}{between}{note}" if note else f"{text}{failed}")


class JsonProgress:
    """The same for programs: one JSON object per line, with `time` (ISO 8601) and `event`: stage_started, progress,
    stage_done, note, and those of RayRuntime."""

    def __init__(self, stream: TextIO | None = None, line_every_s: float = LINE_EVERY_S):
        self._stream, self._line_every_s = stream, line_every_s
        self._title, self._unit, self._pace = "", "", Pace(1.0)
        self._printed = 0.0
        self._failures: Counter[str] = Counter()

    def start(self, title: str, total: float, unit: str) -> None:
        self._title, self._unit, self._pace = title, unit, Pace(total)
        self._printed = time.monotonic()
        self.event("stage_started", {"stage": title, "total": total, "unit": unit})

    def update(self, done: float, note: str = "", detail: str = "") -> None:
        self._pace.reach(done)
        if time.monotonic() - self._printed >= self._line_every_s:
            self._printed = time.monotonic()
            self.event("progress", {**self._facts(), "left_s": self._pace.left_s, "note": note})

    def finish(self, note: str = "") -> None:
        self.event("stage_done", {**self._facts(), "note": note})

    def say(self, text: str) -> None:
        self.event("note", {"text": text})

    def event(self, event: str, facts: dict[str, Any]) -> None:
        if event in BEGINNINGS:
            self._pace.begin()
        elif event == "failure":
            self._failures[facts["kind"]] += 1
        rounded = {name: round(fact, 3) if isinstance(fact, float) else fact for name, fact in facts.items()}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        print(json.dumps({"time": now, "event": event, **rounded}), file=self._stream or sys.stderr, flush=True)

    def close(self) -> None: ...

    def _facts(self) -> dict[str, Any]:
        pace = self._pace
        return {
            "stage": self._title,
            "done": pace.done,
            "total": pace.total,
            "unit": self._unit,
            "rate_per_s": pace.rate,
            "took_s": pace.took_s,
            "failures": dict(self._failures),
        }


def speed(rate: float) -> str:
    """Return a rate as n/s, or n/min where it is slow."""
    return f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min"


def clock(seconds: float) -> str:
    """Return a duration as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
