"""Which group of synthesis jobs goes to which worker when, and how many actors an expert gets.

Pure policy: the runtime on Ray and the simulation of `cvdd plan` ask the same objects. What a group makes is a function of
its jobs alone, so results never depend on what is decided here.
"""

import time
from bisect import insort
from collections.abc import Callable, Hashable, Mapping

# Questions per expert actor that are on their way or wait for it. In simulations of ImageNet-1K with 5 to 64 actors free
# messages then cost at most 7 % of what the actors could do, with 2 up to 40 %.
VOTES_AHEAD = 4


class Scheduler:
    """Hands out groups to workers that have room, the longest expected first.

    `flops` maps every group to its work by network. The expected time of a group is that work, until groups have been
    timed: then those asked of the same networks are expected to take what their like took per FLOP, others what all took.
    `mixed` is for workers that share expert actors: of groups that ask different experts, those of which the smallest part
    has been handed out come first, so that at any moment the groups at work ask the experts for what the whole set does.

    Equal calls in equal order give equal decisions.
    """

    def __init__(self, flops: Mapping[str, Mapping[str, float]], *, mixed: bool = False):
        self._mixed = mixed
        self._cost = {name: float(sum(work.values())) for name, work in flops.items()}
        self._kind: dict[str, Hashable] = {name: tuple(sorted(work)) for name, work in flops.items()}
        self._place = {name: number for number, name in enumerate(flops)}
        self._waiting: dict[Hashable, list[str]] = {}
        for name in flops:
            self._put(name)
        self._total = {kind: len(names) for kind, names in self._waiting.items()}
        self._running: dict[str, str] = {}
        self._room: dict[str, int] = {}
        self._timed: dict[Hashable, tuple[float, float]] = {}  # seconds and FLOPs of the groups that were timed

    @property
    def waiting(self) -> int:
        """Groups that no worker has."""
        return sum(map(len, self._waiting.values()))

    @property
    def unfinished(self) -> int:
        """Groups that are not finished."""
        return self.waiting + len(self._running)

    def join(self, worker: str, slots: int = 1) -> None:
        """A worker is there, new or after it was lost, and has room for `slots` groups at once."""
        self._room[worker] = slots

    def lose(self, worker: str) -> list[str]:
        """A worker is gone: its groups wait again. Return them; none for one that has never joined or is lost already."""
        self._room.pop(worker, None)
        groups = [name for name, owner in self._running.items() if owner == worker]
        for name in groups:
            del self._running[name]
            self._put(name)
        return groups

    def assign(self) -> list[tuple[str, str]]:
        """Return (group, worker) for everything that can begin now: no worker has room while a group waits."""
        begun = []
        while self.waiting and any(self._room.values()):
            worker = max(self._room, key=self._room.__getitem__)  # among equals the one that joined first
            name = self._next()
            self._room[worker] -= 1
            self._running[name] = worker
            begun.append((name, worker))
        return begun

    def give_back(self, name: str) -> None:
        """A group has failed and waits again; its worker has room."""
        self._room[self._running.pop(name)] += 1
        self._put(name)

    def give_up(self, name: str) -> None:
        """A group has failed and will not be tried again; its worker has room."""
        self._room[self._running.pop(name)] += 1

    def finish(self, name: str, seconds: float | None = None) -> None:
        """A group is finished; `seconds` is what the whole of it took, None where that is not known."""
        self._room[self._running.pop(name)] += 1
        if seconds is not None:
            for kind in (self._kind[name], None):
                took_s, flops = self._timed.get(kind, (0.0, 0.0))
                self._timed[kind] = took_s + seconds, flops + self._cost[name]

    def expected(self, name: str) -> float:
        """Return the expected time of a group: seconds once a group has been timed, before that its FLOPs."""
        took_s, flops = self._timed.get(self._kind[name]) or self._timed.get(None) or (1.0, 1.0)
        return self._cost[name] * took_s / flops if flops else 0.0

    def _next(self) -> str:
        def urgency(kind: Hashable) -> tuple:
            name = self._waiting[kind][0]
            untouched = len(self._waiting[kind]) / self._total[kind] if self._mixed else 0.0
            return untouched, self.expected(name), -self._place[name]

        kind = max((kind for kind, names in self._waiting.items() if names), key=urgency)
        return self._waiting[kind].pop(0)

    def _put(self, name: str) -> None:
        names = self._waiting.setdefault(self._kind[name], [])
        insort(names, name, key=lambda name: (-self._cost[name], self._place[name]))


class GroupClock:
    """Times groups by their reports of the share that is done: from the first one on, since a group may go on from a
    checkpoint and its worker may still be loading. Passes reports on to `on_report`."""

    def __init__(self, on_report: Callable[[str, dict], None], clock: Callable[[], float] = time.monotonic):
        self._on_report, self._clock = on_report, clock
        self._since: dict[str, tuple[float, float]] = {}  # time and share done: when it began, then at the first report
        self._heard: set[str] = set()
        self._last: dict[str, float] = {}

    def begin(self, name: str) -> None:
        """A worker has been given the group."""
        self._last[name] = self._clock()
        self._since[name] = self._clock(), 0.0
        self._heard.discard(name)

    def report(self, name: str, report: dict) -> None:
        """Something was reported of a group."""
        self._last[name] = self._clock()
        if name not in self._heard:
            self._heard.add(name)
            self._since[name] = self._clock(), float(report.get("done", 0.0))
        self._on_report(name, report)

    def silent_s(self, name: str) -> float:
        """Return the seconds since a group was begun or something was reported of it."""
        return self._clock() - self._last[name]

    def took_s(self, name: str) -> float | None:
        """Return the seconds that the whole of a group takes that is finished now; None where all of it had been done when
        it was first heard of."""
        since, done = self._since[name]
        return (self._clock() - since) / (1 - done) if done < 1 else None


class LeastBusy:
    """Picks among the actors of each expert the one with the fewest questions that are not answered yet; among equals the
    one that was asked the fewest times. `first` rotates where the count begins, so that several who ask, each with a count
    of its own, do not all begin at the same actor."""

    def __init__(self, first: int = 0):
        self._first = first
        self._asked: dict[tuple[str, int], int] = {}
        self._open: dict[tuple[str, int], int] = {}

    def pick(self, expert: str, actors: int) -> int:
        """Return which of an expert's `actors` actors is asked next, and count the question."""

        def burden(actor: int) -> tuple:
            at = expert, actor
            return self._open.get(at, 0), self._asked.get(at, 0), (actor - self._first) % actors

        actor = min(range(actors), key=burden)
        at = expert, actor
        self._open[at] = self._open.get(at, 0) + 1
        self._asked[at] = self._asked.get(at, 0) + 1
        return actor

    def answered(self, expert: str, actor: int) -> None:
        """The actor has answered one question, or will not any more."""
        self._open[expert, actor] -= 1


def replicas(work: Mapping[str, float], places: int, most: Mapping[str, int]) -> dict[str, int]:
    """Return how many actors every expert gets when there are so many places: at least one each, then one more for the
    expert whose actors have the most work each (FLOPs or seconds, `work`), at most `most`, the groups that ask it."""
    actors = dict.fromkeys(work, 1)
    for _ in range(places - len(actors)):
        short = [name for name in work if actors[name] < most[name]]
        if not short:
            break
        actors[max(short, key=lambda name: work[name] / actors[name])] += 1
    return actors


def coordinators(at_once: int, voters: int, in_flight: int, groups: int) -> int:
    """Return how many coordinators with `in_flight` groups each keep expert actors busy of which `at_once` can work at the
    same time, when a group asks `voters` of them: as many groups at work as give each `VOTES_AHEAD` questions, and no more
    than there are."""
    wanted = max(in_flight, -(-VOTES_AHEAD * at_once // voters))
    return -(-min(wanted, groups) // in_flight)
