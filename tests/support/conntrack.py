"""Fills the connection table of a network namespace, and says which marks are in it.

Entries are made over ctnetlink, as conntrackd makes those of another machine: no packets and no rules are needed.
Each function works in the network namespace of the calling thread, and needs root.

A namespace holds ``net.netfilter.nf_conntrack_max`` entries: 262,144 by default on a machine with more than 4 GB. The
setting can be read in each namespace, and written only in the first one; the hash table is one for all of them.

Message and attribute numbers are those of linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import itertools
import os
import socket
import struct
from collections import Counter
from collections.abc import Iterator

from enforcer.kernel import nfnetlink
from enforcer.kernel.nfnetlink import attr, nest

TCP, UDP, SCTP = socket.IPPROTO_TCP, socket.IPPROTO_UDP, socket.IPPROTO_SCTP
ICMP, ICMPV6, GENERIC = socket.IPPROTO_ICMP, socket.IPPROTO_ICMPV6, 253
"""Protocols for ``fill``; the last is one that the kernel knows nothing of, and that has no ports."""

_NEW, _GET, _DELETE = 0x100, 0x101, 0x102
_EXCLUSIVE = 0x200
_TUPLE_ORIG, _TUPLE_REPLY, _STATUS, _PROTOINFO, _TIMEOUT, _MARK, _ZONE = 1, 2, 3, 4, 7, 8, 18
_TUPLE_IP, _TUPLE_PROTO, _TUPLE_ZONE = 1, 2, 3
_IP_SOURCE: dict[int, int] = {socket.AF_INET: 1, socket.AF_INET6: 3}
_PROTO_NUMBER, _PROTO_SOURCE_PORT, _PROTO_DESTINATION_PORT = 1, 2, 3
_PROTO_ECHO = {ICMP: (4, 5, 6, 8, 0), ICMPV6: (7, 8, 9, 128, 129)}
"""Attributes of identifier, type and code; the types of an echo request and of its reply."""
_ASSURED = 1 << 1 | 1 << 2 | 1 << 3
"""IPS_SEEN_REPLY, IPS_ASSURED and IPS_CONFIRMED: such an entry is not dropped early when the table is full."""
_ESTABLISHED = {
    TCP: nest(1, attr(1, b"\x03"), attr(4, b"\x0a\x0a"), attr(5, b"\x0a\x0a")),
    SCTP: nest(3, attr(1, b"\x04"), attr(2, b"\0\0\0\1"), attr(3, b"\0\0\0\2")),
}
"""The state of a connection that is up; IP_CT_TCP_FLAG_BE_LIBERAL has TCP take any sequence number."""
_SECONDS = 86_400
_BATCH = 500


def fill(
    count: int,
    *,
    mark: int = 0,
    family: int = socket.AF_INET,
    protocol: int = TCP,
    zone: int = 0,
    zone_of: str = "both",
    first: int = 0,
) -> None:
    """Add established connections, with an entry each, that differ in the client.

    Their clients are addresses of 10.128.0.0/9 or fd10::/64, their server is port 80 of 10.127.0.1 or fd7f::1. ICMP has
    echo requests. 200,000 entries take 2 seconds.

    Args:
        count: How many, at most 8,388,608.
        mark: Their connection mark.
        family: ``socket.AF_INET`` or ``socket.AF_INET6``.
        protocol: One of the constants of this module.
        zone: The conntrack zone, 0 to 65,535.
        zone_of: The direction that the zone is of: "both", "original" or "reply".
        first: The number of the first one. A second call with the same family, protocol and zone needs another.

    Raises:
        OSError: a connection exists already (EEXIST), the table is full (ENOMEM), …
    """
    constant = [attr(_TIMEOUT, struct.pack(">I", _SECONDS)), attr(_MARK, struct.pack(">I", mark))]
    constant.append(attr(_STATUS, struct.pack(">I", _ASSURED)))
    if protocol in _ESTABLISHED:
        constant.append(nest(_PROTOINFO, _ESTABLISHED[protocol]))
    zones = dict.fromkeys(("both", "original", "reply"), b"")
    if zone:
        zones[zone_of] = attr(_ZONE if zone_of == "both" else _TUPLE_ZONE, struct.pack(">H", zone))
    constant.append(zones["both"])

    def new(number: int) -> bytes:
        original, reply = _tuples(number, family, protocol)
        tuples = (nest(_TUPLE_ORIG, original, zones["original"]), nest(_TUPLE_REPLY, reply, zones["reply"]))
        return nfnetlink.message(_NEW, nfnetlink.CREATE | _EXCLUSIVE, family, b"".join((*tuples, *constant)))

    _send(new(number) for number in range(first, first + count))


def end(count: int, *, family: int = socket.AF_INET, protocol: int = TCP, first: int = 0) -> None:
    """Remove connections that ``fill`` added, without a zone.

    Raises:
        OSError: a connection does not exist (ENOENT), …
    """

    def delete(number: int) -> bytes:
        return nfnetlink.message(_DELETE, 0, family, nest(_TUPLE_ORIG, _tuples(number, family, protocol)[0]))

    _send(delete(number) for number in range(first, first + count))


def marks() -> Counter[int]:
    """How many connections have which mark, of all families, protocols and zones."""
    found: Counter[int] = Counter()
    with nfnetlink.open_socket() as opened:
        opened.send(nfnetlink.message(_GET, nfnetlink.DUMP, socket.AF_UNSPEC, b""))
        while True:
            for kind, payload in nfnetlink.messages(opened.recv(1 << 18)):
                if kind == nfnetlink.DONE:
                    return found
                _raise(kind, payload)
                found[int.from_bytes(nfnetlink.attributes(payload[4:]).get(_MARK, b""), "big")] += 1


def _tuples(number: int, family: int, protocol: int) -> tuple[bytes, bytes]:
    """What CTA_TUPLE_ORIG and CTA_TUPLE_REPLY of a connection hold, without zones."""
    if family == socket.AF_INET:
        client, server = struct.pack(">I", 0x0A800000 + number), b"\x0a\x7f\0\x01"
    else:
        client, server = struct.pack(">QQ", 0xFD10 << 48, number), struct.pack(">QQ", 0xFD7F << 48, 1)
    port = 1024 + number % 60_000
    kind = _IP_SOURCE[family]
    original = nest(_TUPLE_IP, attr(kind, client), attr(kind + 1, server)) + _proto(protocol, port, 80, reply=False)
    reply = nest(_TUPLE_IP, attr(kind, server), attr(kind + 1, client)) + _proto(protocol, 80, port, reply=True)
    return original, reply


def _proto(protocol: int, source: int, destination: int, *, reply: bool) -> bytes:
    inner = [attr(_PROTO_NUMBER, bytes([protocol]))]
    if protocol in _PROTO_ECHO:
        identifier, kind, code, request, answer = _PROTO_ECHO[protocol]
        inner.append(attr(identifier, struct.pack(">H", destination if reply else source)))
        inner.extend((attr(kind, bytes([answer if reply else request])), attr(code, b"\0")))
    elif protocol != GENERIC:
        inner.append(attr(_PROTO_SOURCE_PORT, struct.pack(">H", source)))
        inner.append(attr(_PROTO_DESTINATION_PORT, struct.pack(">H", destination)))
    return nest(_TUPLE_PROTO, *inner)


def _send(messages: Iterator[bytes]) -> None:
    """Send requests, many at a time; the kernel has taken in all of them on return, and answers only errors."""
    with nfnetlink.open_socket() as opened:
        opened.setblocking(False)
        while batch := list(itertools.islice(messages, _BATCH)):
            opened.send(b"".join(batch))
            try:
                answers = opened.recv(1 << 16)
            except BlockingIOError:
                continue
            for kind, payload in nfnetlink.messages(answers):
                _raise(kind, payload)


def _raise(kind: int, payload: bytes) -> None:
    if kind == nfnetlink.ERROR and (number := nfnetlink.error_of(payload)):
        raise OSError(number, os.strerror(number))
