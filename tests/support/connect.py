"""Connections between pods: made, taken over by another pod, and listed as the node's kernel tracks them."""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from enforcer.demo.lab import Lab, Pod
from enforcer.kernel import nfnetlink
from tests.support.flow import RECORD_SIZE, Datagrams, Errors, Flow, Kind, Stream, checksum

Ends = tuple[socket.socket, socket.socket]
"""The client's socket, and the server's."""

STAMP = 0xFF000000
"""The bits of a connection's mark that say by which epoch it was judged."""

_HELLO_SECONDS, _AGAIN_SECONDS = 5.0, 0.1
# tcp(7) and linux/tcp.h
_TCP_REPAIR, _TCP_REPAIR_QUEUE, _TCP_QUEUE_SEQ, _TCP_REPAIR_OPTIONS, _TCP_REPAIR_WINDOW = 19, 20, 21, 22, 29
_REPAIR_QUEUES, _REPAIR_OFF_WITHOUT_PROBE, _OPTION_WINDOW_SCALE, _INFO_SCALES = (1, 2), -1, 3, 6
# linux/netfilter/nfnetlink_conntrack.h
_CONNTRACK_GET, _ORIGINAL, _REPLY, _MARK = 1 << 8 | 1, 1, 2, 8


class Connector:
    """Makes connections between the pods of a node; a context manager that closes all that it made."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def udp(self, client: Pod, server: Pod, family: int, port: int, *, to: str | None = None) -> Ends:
        """A UDP connection on which each end has sent once.

        The client asks the port of the address ``to``; of the server's own if None.
        """
        near, far = (self._socket(end, family, socket.SOCK_DGRAM) for end in (client, server))
        far.bind((address_of(server, family), port))
        near.bind((address_of(client, family), 0))
        near.connect((to or address_of(server, family), port))
        far.connect(_greet(near, far))
        return near, far

    def tcp(self, client: Pod, server: Pod, family: int, port: int, *, to: str | None = None) -> Ends:
        """A TCP connection; ``to`` as for UDP."""
        near, waiting = (self._socket(end, family, socket.SOCK_STREAM) for end in (client, server))
        waiting.bind((address_of(server, family), port))
        waiting.listen()
        near.connect((to or address_of(server, family), port))
        far, _ = waiting.accept()
        self._open.callback(far.close)
        waiting.close()
        return near, far

    def connect(self, kind: Kind, client: Pod, server: Pod, family: int, port: int, *, to: str | None = None) -> Ends:
        """The connection that flows of a kind are of."""
        make = self.tcp if kind in {Kind.TCP_UP, Kind.TCP_DOWN} else self.udp
        return make(client, server, family, port, to=to)

    def flows(
        self, kind: Kind, client: Pod, server: Pod, family: int, port: int, *, name: str, to: str | None = None
    ) -> list[Flow]:
        """A connection, as the flows that are sent on it.

        Raises:
            OSError: it cannot be made.
        """
        ends = self.connect(kind, client, server, family, port, to=to)
        match kind:
            case Kind.ERRORS_UP:
                return [self._errors(name, kind, (client, server), ends, elicit=True)]
            case Kind.ERRORS_DOWN:
                return [self._errors(name, kind, (server, client), ends[::-1], elicit=True)]
        return flows_between(name, kind, family, ends)

    def idle_errors(self, client: Pod, server: Pod, family: int, port: int, *, name: str) -> list[Flow]:
        """Errors from either end about a connection on which nothing else is sent."""
        ends = self.udp(client, server, family, port)
        return [self._errors(name, Kind.ERRORS_UP, (client, server), ends, elicit=False),
                self._errors(name, Kind.ERRORS_DOWN, (server, client), ends[::-1], elicit=False)]  # fmt: skip

    def _errors(self, name: str, kind: Kind, pods: tuple[Pod, Pod], ends: Ends, *, elicit: bool) -> Flow:
        """Errors from the first pod to the second; ``ends`` are the sockets of their UDP connection in this order."""
        family = 4 if ends[0].family is socket.AF_INET else 6
        here, there = (end.getsockname()[:2] for end in ends)
        for end in ends:
            end.setblocking(False)
        quoted = _quoted(family, there, here)
        raw = self._raw(*pods, family)
        return Errors(name, kind, family, *raw, to=there[0], quoted=quoted, elicit=ends[1] if elicit else None)

    def stray_errors(self, sender: Pod, receiver: Pod, family: int, port: int) -> Flow:
        """ICMP errors about a connection that there is not."""
        here, there = (address_of(end, family) for end in (sender, receiver))
        quoted = _quoted(family, (there, port), (here, port))
        raw = self._raw(sender, receiver, family)
        return Errors("no connection", Kind.ERRORS_DOWN, family, *raw, to=there, quoted=quoted)

    def take_over(self, old: socket.socket, end: Pod) -> socket.socket:
        """A socket of another pod in the place of an idle one, with its address and port; TCP goes on where it was."""
        made = self._socket(end, 4 if old.family is socket.AF_INET else 6, old.type)
        if old.type is socket.SOCK_DGRAM:
            made.bind(old.getsockname()[:2])
            made.connect(old.getpeername()[:2])
            return made
        for one in (old, made):
            one.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, 1)
        made.bind(old.getsockname()[:2])
        for queue in _REPAIR_QUEUES:
            for one in (old, made):
                one.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_QUEUE, queue)
            made.setsockopt(socket.IPPROTO_TCP, _TCP_QUEUE_SEQ, old.getsockopt(socket.IPPROTO_TCP, _TCP_QUEUE_SEQ, 4))
        # Connected without a packet, since it is under repair.
        made.connect(old.getpeername()[:2])
        scales = old.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[_INFO_SCALES]
        scaling = struct.pack("=II", _OPTION_WINDOW_SCALE, scales & 15 | scales >> 4 << 16)
        made.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_OPTIONS, scaling)
        window = old.getsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_WINDOW, 20)
        made.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR_WINDOW, window)
        made.setsockopt(socket.IPPROTO_TCP, _TCP_REPAIR, _REPAIR_OFF_WITHOUT_PROBE)
        return made

    def _raw(self, sender: Pod, receiver: Pod, family: int) -> Ends:
        protocol = socket.IPPROTO_ICMP if family == 4 else socket.IPPROTO_ICMPV6
        here, there = (self._socket(end, family, socket.SOCK_RAW, protocol) for end in (sender, receiver))
        return here, there

    def _socket(self, end: Pod, family: int, kind: int, protocol: int = 0) -> socket.socket:
        with self._lab.inside(end.descriptor):
            made = socket.socket(net_of(family), kind, protocol)
        self._open.callback(made.close)
        made.settimeout(_HELLO_SECONDS)
        return made


def _greet(near: socket.socket, far: socket.socket) -> Any:
    """Have both ends heard, and return where the client is; a link that is just up loses what is sent at once."""
    for end in (near, far):
        end.settimeout(_AGAIN_SECONDS)
    for _ in range(int(_HELLO_SECONDS / _AGAIN_SECONDS)):
        near.send(b"hello")
        with contextlib.suppress(TimeoutError):
            who = far.recvfrom(64)[1]
            far.sendto(b"hello", who)
            near.recv(64)
            return who
    raise TimeoutError(f"{near} and {far} do not hear each other")


def flows_between(name: str, kind: Kind, family: int, ends: Ends) -> list[Flow]:
    """What is sent on a connection of TCP or UDP."""
    make = Stream if kind in {Kind.TCP_UP, Kind.TCP_DOWN} else Datagrams
    made: list[Flow] = [make(name, kind, family, *pair) for pair in (ends, ends[::-1])]
    up, down = made
    return {Kind.UDP_BOTH: [up, down], Kind.TCP_UP: [up], Kind.UDP_UP: [up]}.get(kind, [down])


def net_of(family: int) -> socket.AddressFamily:
    """AF_INET or AF_INET6."""
    return socket.AF_INET if family == 4 else socket.AF_INET6


def address_of(pod: Pod, family: int) -> str:
    """A pod's address of a family."""
    return next(address for address in pod.addresses if (":" in address) is (family == 6))


def stamps(lab: Lab, ports: range) -> list[int]:
    """The stamps of the connections to some ports of servers: the bits of their marks that say what was judged."""
    return [mark & STAMP for *_, port, mark in tracked(lab) if port in ports]


def tracked(lab: Lab) -> Iterator[tuple[str, str, int, int]]:
    """The connections that a node tracks: client's and server's address, the server's port, and the mark."""
    with lab.inside(lab.descriptor):
        asked = nfnetlink.open_socket()
    with asked:
        asked.send(nfnetlink.message(_CONNTRACK_GET, nfnetlink.DUMP, socket.AF_UNSPEC, b""))
        while True:
            for kind, body in nfnetlink.messages(asked.recv(1 << 18)):
                if kind == nfnetlink.DONE:
                    return
                assert kind != nfnetlink.ERROR, nfnetlink.error_of(body)
                attributes = nfnetlink.attributes(body[4:])
                (client, _), (server, port) = (_source(attributes[direction]) for direction in (_ORIGINAL, _REPLY))
                yield client, server, port, int.from_bytes(attributes.get(_MARK, b""), "big")


def _source(direction: bytes) -> tuple[str, int]:
    """The source address and port of a direction; port 0 where the protocol has none."""
    parts = nfnetlink.attributes(direction)
    addresses = nfnetlink.attributes(parts[1])
    packed = addresses.get(1) or addresses[3]
    port = nfnetlink.attributes(parts[2]).get(2, b"")
    return socket.inet_ntop(net_of(4 if len(packed) == 4 else 6), packed), int.from_bytes(port, "big")


def _quoted(family: int, source: tuple[str, int], destination: tuple[str, int]) -> bytes:
    """The IP and UDP header of a packet that carried a record."""
    addresses = b"".join(socket.inet_pton(net_of(family), address) for address, _ in (source, destination))
    udp = struct.pack("!HHHH", source[1], destination[1], 8 + RECORD_SIZE, 0)
    if family == 6:
        return struct.pack("!IHBB", 6 << 28, 8 + RECORD_SIZE, socket.IPPROTO_UDP, 64) + addresses + udp
    head = struct.pack("!BBHHHBB", 0x45, 0, 28 + RECORD_SIZE, 1, 0, 64, socket.IPPROTO_UDP)
    return head + checksum(head + bytes(2) + addresses) + addresses + udp
