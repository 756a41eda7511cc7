"""Packets that say when they were sent, so that a test can say which of them policy let through.

The sender's clock decides: a packet is stamped before it is sent, so that one which is stamped after a commit and
arrives was let through after that commit, however late the receiver looks. TCP's stream is cut into such packets, too.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import socket
import struct
import threading
import time
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Self

FAMILIES = (4, 6)
SECONDS = 10.0
_LAST_SECONDS = 1.0
_POLL_SECONDS = 0.005
_BUFFER = 8 << 20
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
# struct tcp_info of linux/tcp.h: what a receiver had to put in order, because a segment before it had not come.
_TCP_INFO, _OUT_OF_ORDER = 11, 224
_record = struct.Struct("!IIQ")
RECORD_SIZE = _record.size
_identities = itertools.count(1)


class Kind(Enum):
    """What a connection is, and who sends on it once it is made."""

    TCP_UP = "tcp, client sends"
    TCP_DOWN = "tcp, server sends"
    UDP_UP = "udp, client sends"
    UDP_DOWN = "udp, server sends"
    UDP_BOTH = "udp, both send"
    ERRORS_UP = "icmp errors, client sends"
    ERRORS_DOWN = "icmp errors, server sends"


ERRORS = {Kind.ERRORS_UP, Kind.ERRORS_DOWN}


@dataclass(frozen=True, slots=True)
class Packet:
    """A packet that arrived: its number, from 0, and when it was sent, in nanoseconds of the monotonic clock."""

    number: int
    sent: int


class Flow(ABC):
    """One direction of a connection. ``send`` is for one thread, the others for another one."""

    def __init__(self, name: str, kind: Kind, family: int, sender: socket.socket, receiver: socket.socket) -> None:
        self.name = name
        self.kind = kind
        self.family = family
        self.sent = 0
        self._sender = sender
        self._receiver = receiver
        self._arrived: list[Packet] = []
        self._identity = next(_identities)
        for end, option in ((sender, _SO_SNDBUFFORCE), (receiver, _SO_RCVBUFFORCE)):
            end.setsockopt(socket.SOL_SOCKET, option, _BUFFER)
            end.setblocking(False)

    def __repr__(self) -> str:
        return f"{self.name}, {self.kind.value}, IPv{self.family}"

    def send(self) -> None:
        """Send the next packet; where the sender's own kernel does not take it, nothing is sent."""
        with contextlib.suppress(OSError):
            self._send(_record.pack(self._identity, self.sent, time.monotonic_ns()))
            self.sent += 1

    def arrived(self, *, after: int = 0) -> list[Packet]:
        """The packets that have arrived by now, in their order, and were sent after a moment."""
        try:
            while data := self._receiver.recv(1 << 16):
                self._take(data)
        except OSError as error:
            # An ICMP error about the connection, or a reset, is a socket's error, too.
            if error.errno not in {errno.EAGAIN, errno.ECONNREFUSED, errno.ECONNRESET}:
                raise
        return self._arrived[bisect_right(self._arrived, after, key=lambda packet: packet.sent) :]

    def lost(self) -> int:
        """How many packets were sent and have not arrived by now; of TCP, also those that overtook a missing one."""
        return self.sent - len(self.arrived())

    def close(self) -> None:
        """Close both ends."""
        self._sender.close()
        self._receiver.close()

    def _record(self, data: bytes) -> None:
        identity, number, sent = _record.unpack(data)
        if identity == self._identity:
            self._arrived.append(Packet(number, sent))

    @abstractmethod
    def _send(self, record: bytes) -> None: ...

    @abstractmethod
    def _take(self, data: bytes) -> None: ...


class Datagrams(Flow):
    """UDP, over two connected sockets."""

    def _send(self, record: bytes) -> None:
        self._sender.send(record)

    def _take(self, data: bytes) -> None:
        if len(data) == RECORD_SIZE:
            self._record(data)


class Stream(Flow):
    """TCP: a stream of records, each in a segment of its own unless they are sent again."""

    def __init__(self, name: str, kind: Kind, family: int, sender: socket.socket, receiver: socket.socket) -> None:
        super().__init__(name, kind, family, sender, receiver)
        sender.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""

    def lost(self) -> int:
        info = self._receiver.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, 256)
        return super().lost() + int(struct.unpack_from("=I", info, _OUT_OF_ORDER)[0])

    def _send(self, record: bytes) -> None:
        self._sender.send(record)

    def _take(self, data: bytes) -> None:
        data = self._rest + data
        whole = len(data) - len(data) % RECORD_SIZE
        for offset in range(0, whole, RECORD_SIZE):
            self._record(data[offset : offset + RECORD_SIZE])
        self._rest = data[whole:]


class Errors(Flow):
    """ICMP errors, "port unreachable", over raw sockets.

    Each quotes a packet of UDP that went the other way; ``quoted`` is how that began: its IP and its UDP header. Where
    there is a socket that sends such packets, ``elicit``, one goes before each error.
    """

    def __init__(
        self,
        name: str,
        kind: Kind,
        family: int,
        sender: socket.socket,
        receiver: socket.socket,
        *,
        to: str,
        quoted: bytes,
        elicit: socket.socket | None = None,
    ) -> None:
        super().__init__(name, kind, family, sender, receiver)
        self._elicit = elicit
        self._to = to
        self._quoted = quoted

    def _send(self, record: bytes) -> None:
        kind, code = (3, 3) if self.family == 4 else (1, 4)
        rest = bytes(4) + self._quoted + record
        if self._elicit is not None:
            try:
                self._elicit.send(b"")
            except ConnectionRefusedError:
                # That is the error before this one; nothing was sent.
                self._elicit.send(b"")
        # The kernel writes ICMPv6's checksum, and leaves ICMP's to the sender.
        self._sender.sendto(bytes([kind, code]) + checksum(bytes([kind, code, 0, 0]) + rest) + rest, (self._to, 0))

    def _take(self, data: bytes) -> None:
        head = 20 + 8 if self.family == 4 else 8
        if data[head : head + len(self._quoted)] == self._quoted:
            self._record(data[head + len(self._quoted) :][:RECORD_SIZE])


def checksum(data: bytes) -> bytes:
    """The checksum of the internet protocols (RFC 1071)."""
    total = sum(struct.unpack(f"!{len(data) // 2}H", data))
    total = (total & 0xFFFF) + (total >> 16)
    return struct.pack("!H", 0xFFFF - ((total & 0xFFFF) + (total >> 16)))


class Source:
    """Sends a packet of each flow in turn, all of them each ``interval`` seconds, in a thread of its own.

    A context manager; it closes the flows.
    """

    def __init__(self, *flows: Flow, interval: float = 0.002) -> None:
        self._flows = flows
        self._interval = interval
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="source")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()
        for flow in self._flows:
            flow.close()

    def stop(self) -> None:
        """Send nothing more."""
        self._done.set()
        self._thread.join()

    def losses(self, flows: Iterable[Flow]) -> dict[Flow, int]:
        """Send nothing more, and return how many packets each flow lost, of those that lost any."""
        self.stop()
        of = list(flows)
        with contextlib.suppress(TimeoutError):
            wait_for(lambda: not any(flow.lost() for flow in of), "all has arrived", seconds=_LAST_SECONDS)
        return {flow: lost for flow in of if (lost := flow.lost())}

    def _run(self) -> None:
        due = time.monotonic()
        while not self._done.wait(max(0.0, due - time.monotonic())):
            for flow in self._flows:
                flow.send()
            due = max(due, time.monotonic() - self._interval) + self._interval


def wait_for(condition: Callable[[], bool], what: str, *, seconds: float = SECONDS) -> None:
    """Poll until a condition holds.

    Raises:
        TimeoutError: it does not within ``seconds``; its text is ``what``.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(what)
        time.sleep(_POLL_SECONDS)


def silent(flows: Iterable[Flow], moment: int, *, seconds: float = SECONDS) -> list[Flow]:
    """The flows of which no packet comes that was sent after a moment; returns when there are none, or after a time."""
    waiting = list(flows)

    def all_came() -> bool:
        waiting[:] = [flow for flow in waiting if not flow.arrived(after=moment)]
        return not waiting

    with contextlib.suppress(TimeoutError):
        wait_for(all_came, "packets", seconds=seconds)
    return waiting
