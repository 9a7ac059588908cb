"""Live progress: a bar with rate, time left and the experts' losses on a terminal, plain lines elsewhere."""

import time

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

PLAIN_EVERY_S = 10.0


class LiveProgress:
    """Progress of one stage at a time, written to stderr; results belong to stdout."""

    def __init__(self, console: Console | None = None, plain_every_s: float = PLAIN_EVERY_S):
        self._console = console or Console(stderr=True, highlight=False)
        self._plain_every_s = plain_every_s
        self._live: Live | None = None
        self._title, self._total, self._unit = "", 1.0, ""
        self._started = self._printed = 0.0
        self._done = self._done_at_start = 0.0
        self._first = True

    def start(self, title: str, total: float, unit: str) -> None:
        self._title, self._total, self._unit = title, total, unit
        self._started = self._printed = time.monotonic()
        self._done = self._done_at_start = 0.0
        self._first = True
        if self._console.is_terminal:
            self._live = Live(self._line(""), console=self._console, transient=True, refresh_per_second=4)
            self._live.start()
        else:
            self._console.print(f"{title}: {total:.0f} {unit}", soft_wrap=True)

    def update(self, done: float, note: str = "", detail: str = "") -> None:
        if self._first:  # what was already there when the stage was entered does not count for the rate
            self._done_at_start, self._first = done if done > 0 else 0.0, False
        self._done = done
        if self._live:
            self._live.update(Group(self._line(note), Text(detail)) if detail else self._line(note))
        elif time.monotonic() - self._printed >= self._plain_every_s:
            self._printed = time.monotonic()
            self._console.print(self._line(note), soft_wrap=True)

    def finish(self, note: str = "") -> None:
        if self._live:
            self._live.stop()
            self._live = None
        took = time.monotonic() - self._started
        self._console.print(f"{self._title}: done in {clock(took)}{f' ({note})' if note else ''}", soft_wrap=True)

    def say(self, text: str) -> None:
        self._console.print(text, soft_wrap=True)

    def close(self) -> None:
        """Leave the terminal as it was, also after an error."""
        if self._live:
            self._live.stop()
            self._live = None

    def _line(self, note: str) -> Text:
        elapsed = time.monotonic() - self._started
        share = self._done / self._total if self._total else 1.0
        rate = (self._done - self._done_at_start) / elapsed if elapsed > 0 else 0.0
        left = f"{clock((self._total - self._done) / rate)} left" if rate > 0 else "time left unknown"
        speed = f"{rate:.1f}/s" if rate >= 1 else f"{60 * rate:.1f}/min"
        bar = ""
        if self._live is not None or self._console.is_terminal:
            filled = round(20 * min(share, 1.0))
            bar = f"{'━' * filled}{'╌' * (20 - filled)} "
        done = f"{self._done:.1f}" if self._total < 1000 else f"{self._done:.0f}"
        text = f"{self._title} {bar}{done}/{self._total:.0f} {self._unit} ({100 * share:.0f} %), {speed}, {left}"
        return Text(f"{text}\n  {note}" if note and bar else f"{text}; {note}" if note else text)


def clock(seconds: float) -> str:
    """Return a duration as m:ss or h:mm:ss."""
    whole = max(0, round(seconds))
    hours, rest = divmod(whole, 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}" if hours else f"{rest // 60}:{rest % 60:02d}"
