"""What workers tell the driver, and the actor where it lies until the driver asks for it; loads nothing heavy."""

import socket
from typing import Any


def tell(mailbox: Any, event: str, what: str, work: str, **facts: Any) -> None:
    """Tell the driver of an event: `what` it happened to, and Ray's id of the actor or task, which it keeps when it is
    started again after a failure."""
    mailbox.tell.remote({"event": event, "what": what, "work": work, "host": socket.gethostname(), **facts})


class Mailbox:
    """What workers tell the driver: the latest report of every piece of work, and all events in between."""

    def __init__(self):
        self._reports: dict[str, dict] = {}
        self._events: list[dict] = []

    def put(self, name: str, report: dict) -> None:
        unsaid = {"say": self._reports[name]["say"]} if "say" in self._reports.get(name, {}) else {}
        self._reports[name] = {**unsaid, **report}

    def tell(self, event: dict) -> None:
        self._events.append(event)

    def take(self) -> tuple[dict[str, dict], list[dict]]:
        """Return and forget the reports and events that have arrived since the last call."""
        taken = self._reports, self._events
        self._reports, self._events = {}, []
        return taken
