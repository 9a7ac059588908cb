"""Two processes that exchange tensors over torch.distributed: a process group of gloo for each pair of them.

Groups are made one by one and none is the default group, so that a process may have any number of them, and torch.distributed
may be used for other things beside. A message is a header, int64, and the tensors that it tells of: dtype and shape.
"""

import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroupGloo, TCPStore

ASKS, ANSWERS = 0, 1  # the two ranks of a group
HELLO, QUESTION, ANSWER, FAILED = range(4)  # what a message is
DTYPES = (torch.float32, torch.int64, torch.float64, torch.float16, torch.bfloat16, torch.uint8)
MOST_TENSORS, MOST_DIMENSIONS, SECRET_WORDS = 8, 6, 4
HEADER = SECRET_WORDS + 2 + MOST_TENSORS * (2 + MOST_DIMENSIONS)
MEET_S = 60.0  # how long two that have been told of each other may take to meet
IDLE_S = 1800.0  # a connection that is not used for so long ends; who asks opens another one


@dataclass(frozen=True)
class Meeting:
    """Where two processes meet: the TCPStore at an address, a name of their own in it, and int64 words that each shows
    the other in every message, since whoever reaches a port of torch.distributed may connect to it."""

    address: str
    port: int
    name: str
    secret: tuple[int, ...]


class Meetings:
    """Lets others meet this process at `address`, a port of the system's choice, and at no other of its addresses."""

    def __init__(self, address: str):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        listener = socket.create_server((address, 0), family=family, backlog=512)
        self._address, self._port = address, listener.getsockname()[1]
        self._store = TCPStore(
            address, self._port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def new(self) -> Meeting:
        """Return a meeting of two."""
        secret = tuple(secrets.randbits(63) for _ in range(SECRET_WORDS))
        return Meeting(self._address, self._port, secrets.token_hex(16), secret)


class Connection:
    """One end of a pair, `rank` ASKS or ANSWERS, whose own address is `here`; for one thread at a time.

    Raises ConnectionError, as its methods do, when the other side is not there or no longer.
    """

    def __init__(self, meeting: Meeting, rank: int, here: str):
        self._secret, self._other = list(meeting.secret), 1 - rank
        self._sent: list = []
        options = ProcessGroupGloo._Options()
        options._timeout, options._threads = timedelta(seconds=MEET_S), 1
        try:
            store = TCPStore(meeting.address, meeting.port, is_master=False, timeout=timedelta(seconds=MEET_S))
            options._devices = [_device(here)]
            self._group = ProcessGroupGloo(PrefixStore(meeting.name, store), rank, 2, options)
        except RuntimeError as error:
            raise ConnectionError(_first_line(error)) from None
        if rank == ANSWERS:  # who asks has an end as soon as the other's address is known, whatever becomes of it
            self.send(HELLO)
        else:
            self.receive(MEET_S)

    def send(self, kind: int, tensors: Sequence[Tensor] = ()) -> None:
        """Begin to send tensors on the CPU, which must not be changed before the other side has answered."""
        header = [*self._secret, kind, len(tensors)]
        for tensor in tensors:
            unused = [0] * (MOST_DIMENSIONS - tensor.dim())
            header += [DTYPES.index(tensor.dtype), tensor.dim(), *tensor.shape, *unused]
        header += [0] * (HEADER - len(header))
        messages = [torch.tensor(header), *(tensor.contiguous() for tensor in tensors)]
        try:
            self._sent = [self._group.send([m], self._other, tag) for tag, m in enumerate(messages) if m.numel()]
        except RuntimeError as error:
            raise ConnectionError(_first_line(error)) from None

    def receive(self, patience_s: float) -> tuple[int, list[Tensor]]:
        """Return what a message is and its tensors; it may take `patience_s` to begin, and each tensor as long again."""
        patience, header = timedelta(seconds=patience_s), torch.empty(HEADER, dtype=torch.int64)
        try:
            self._group.recv([header], self._other, 0).wait(patience)
            words = header.tolist()
            if words[:SECRET_WORDS] != self._secret:
                raise ConnectionError("a stranger has connected")
            (kind, number), words = words[SECRET_WORDS : SECRET_WORDS + 2], words[SECRET_WORDS + 2 :]
            rows = [words[k * (2 + MOST_DIMENSIONS) :] for k in range(number)]
            tensors = [torch.empty(row[2 : 2 + row[1]], dtype=DTYPES[row[0]]) for row in rows]
            coming = [self._group.recv([t], self._other, tag) for tag, t in enumerate(tensors, 1) if t.numel()]
            for work in (*coming, *self._sent):  # what was sent has arrived, or there would be no answer
                work.wait(patience)
            self._sent = []
        except RuntimeError as error:
            raise ConnectionError(_first_line(error)) from None
        return kind, tensors


def answer_all(meeting: Meeting, here: str, answer: Callable[..., Sequence[Tensor]]) -> None:
    """Answer the questions of who asks at a meeting with `answer(*tensors)`, until that process or this connection is gone. An
    error of `answer` is not sent, only that there was one: who asks can ask in another way, and gets it as itself."""
    try:
        connection = Connection(meeting, ANSWERS, here)
        while True:
            _, question = connection.receive(IDLE_S)
            try:
                kind, tensors = ANSWER, answer(*question)
            except Exception:  # whatever it is
                kind, tensors = FAILED, ()
            connection.send(kind, tensors)
    except ConnectionError:
        pass


_devices: dict[str, ProcessGroupGloo.Device] = {}
_devices_lock = threading.Lock()


def _device(address: str) -> ProcessGroupGloo.Device:
    """Return this process' listener and thread of gloo at one of its addresses, one for all connections."""
    with _devices_lock:
        if address not in _devices:
            _devices[address] = ProcessGroupGloo.create_device(hostname=address)
        return _devices[address]


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
