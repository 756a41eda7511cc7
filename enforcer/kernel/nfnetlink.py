"""The framing of nfnetlink: messages, attributes and sockets.

Numbers are those of linux/netlink.h and linux/netfilter/nfnetlink.h.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator

ACK, DUMP, CREATE, APPEND = 0x004, 0x300, 0x400, 0x800
ERROR, DONE = 2, 3
"""Message types: an error or acknowledgement, the end of a dump."""

_REQUEST = 0x001
_NETLINK_NETFILTER = 12
_SOL_NETLINK, _NETLINK_CAP_ACK = 270, 10
_SO_SNDBUFFORCE, _SO_RCVBUFFORCE = 32, 33
_BUFFER = 16 << 20
_NESTED = 0x8000

_header = struct.Struct("=IHHII")
_attribute = struct.Struct("=HH")
HEADER = _attribute.size
"""Bytes before the payload of an attribute."""


def attr(kind: int, payload: bytes) -> bytes:
    """An attribute."""
    return _attribute.pack(len(payload) + 4, kind) + payload + bytes(-len(payload) % 4)


def nest(kind: int, *inner: bytes) -> bytes:
    """An attribute that holds attributes."""
    return attr(kind | _NESTED, b"".join(inner))


def attributes(data: bytes) -> dict[int, bytes]:
    """Attributes by kind, undone of ``attr`` or ``nest``."""
    found = {}
    offset = 0
    while offset + 4 <= len(data):
        length, kind = _attribute.unpack_from(data, offset)
        found[kind & ~_NESTED] = data[offset + 4 : offset + length]
        offset += max(-(-length // 4) * 4, 4)
    return found


def text(kind: int, value: str) -> bytes:
    """An attribute that is a string."""
    return attr(kind, value.encode() + b"\0")


def message(kind: int, flags: int, family: int, payload: bytes, *, resource: int = 0) -> bytes:
    """A request to a subsystem of nfnetlink."""
    body = struct.pack(">BBH", family, 0, resource) + payload
    return _header.pack(len(body) + 16, kind, _REQUEST | flags, 0, 0) + body


def open_socket(groups: int = 0) -> socket.socket:
    """A nfnetlink socket of the calling thread's network namespace."""
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER)
    opened.setsockopt(_SOL_NETLINK, _NETLINK_CAP_ACK, 1)
    opened.setsockopt(socket.SOL_SOCKET, _SO_SNDBUFFORCE, _BUFFER)
    opened.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER)
    opened.bind((0, groups))
    return opened


def error_of(payload: bytes) -> int:
    """The error number of an NLMSG_ERROR; 0 is an acknowledgement."""
    return -int(struct.unpack_from("=i", payload)[0])


def messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Type and payload of each netlink message of a datagram."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind = struct.unpack_from("=IH", data, offset)
        yield kind, data[offset + 16 : offset + length]
        offset += -(-length // 4) * 4
