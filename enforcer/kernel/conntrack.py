"""Established flows over ctnetlink: listed by address, and marked so that the base chains drop them.

Message and attribute numbers are those of linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from enforcer.kernel import nfnetlink
from enforcer.model.addresses import Address, Family, family_of

_SUBSYSTEM = 1
_NEW, _GET = (_SUBSYSTEM << 8 | n for n in (0, 1))
_TUPLE_ORIG, _TUPLE_REPLY, _MARK, _ZONE, _MARK_MASK, _FILTER = 1, 2, 8, 18, 21, 25
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SOURCE = {Family.V4: 1, Family.V6: 3}
_PROTO_NUMBER, _PROTO_SOURCE_PORT = 1, 2
_FILTER_ORIG, _FILTER_REPLY, _FILTER_BY_SOURCE = 1, 2, struct.pack("=I", 1)
_FAMILIES = {Family.V4: socket.AF_INET, Family.V6: socket.AF_INET6}
_WITH_PORTS = {6, 17, 132}


@dataclass(frozen=True, slots=True)
class Flow:
    """A flow as the forward hook sees its first packet: after DNAT, before SNAT.

    ``port`` is the destination's, None where the protocol has none. ``identity`` is what the kernel knows it by.
    """

    source: Address
    destination: Address
    protocol: int
    port: int | None
    mark: int
    identity: bytes


class Conntrack:
    """The flows of the network namespace that it was made in. For one thread.

    Raises:
        OSError: from any method: the kernel has no ctnetlink, or does not answer.
    """

    def __init__(self) -> None:
        self._socket = nfnetlink.open_socket()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def flows(self, address: Address | None = None) -> Iterator[Flow]:
        """The flows that begin at an address, or lead to it, as far as they are confirmed; of None, all flows."""
        if address is None:
            yield from self._dump(socket.AF_UNSPEC, b"")
            return
        family = _FAMILIES[family_of(address)]
        source = nfnetlink.nest(_TUPLE_IP, nfnetlink.attr(_IP_SOURCE[family_of(address)], address))
        for tuple_kind, flags_kind, other in (
            (_TUPLE_ORIG, _FILTER_ORIG, _FILTER_REPLY),
            (_TUPLE_REPLY, _FILTER_REPLY, _FILTER_ORIG),
        ):
            flags = (nfnetlink.attr(flags_kind, _FILTER_BY_SOURCE), nfnetlink.attr(other, bytes(4)))
            yield from self._dump(family, nfnetlink.nest(tuple_kind, source) + nfnetlink.nest(_FILTER, *flags))

    def mark(self, flow: Flow, value: int, mask: int) -> bool:
        """Set the bits ``mask`` of a flow's mark to those of ``value``; False if the flow has ended."""
        family = _FAMILIES[family_of(flow.source)]
        bits = nfnetlink.attr(_MARK, struct.pack(">I", value)) + nfnetlink.attr(_MARK_MASK, struct.pack(">I", mask))
        self._socket.send(nfnetlink.message(_NEW, nfnetlink.ACK, family, flow.identity + bits))
        for kind, payload in nfnetlink.messages(self._socket.recv(1 << 16)):
            if kind == nfnetlink.ERROR:
                number = nfnetlink.error_of(payload)
                if number not in {0, errno.ENOENT}:
                    raise OSError(number, os.strerror(number))
                return number == 0
        raise OSError(errno.EPROTO, os.strerror(errno.EPROTO))

    def _dump(self, family: int, payload: bytes) -> Iterator[Flow]:
        self._socket.send(nfnetlink.message(_GET, nfnetlink.DUMP, family, payload))
        while True:
            for kind, body in nfnetlink.messages(self._socket.recv(1 << 18)):
                if kind == nfnetlink.DONE:
                    return
                if kind == nfnetlink.ERROR:
                    number = nfnetlink.error_of(body)
                    raise OSError(number, os.strerror(number))
                flow = _flow(body)
                if flow is not None:
                    yield flow


def _flow(body: bytes) -> Flow | None:
    """A flow from IPCTNL_MSG_CT_NEW; None for one that is neither IPv4 nor IPv6."""
    attributes = nfnetlink.attributes(body[4:])
    original, reply = (nfnetlink.attributes(attributes[kind]) for kind in (_TUPLE_ORIG, _TUPLE_REPLY))
    begin, answer = (nfnetlink.attributes(found[_TUPLE_IP]) for found in (original, reply))
    source = begin.get(_IP_SOURCE[Family.V4]) or begin.get(_IP_SOURCE[Family.V6])
    destination = answer.get(_IP_SOURCE[Family.V4]) or answer.get(_IP_SOURCE[Family.V6])
    if source is None or destination is None:
        return None
    protocol = nfnetlink.attributes(reply[_TUPLE_PROTO])
    number = protocol[_PROTO_NUMBER][0]
    identity = nfnetlink.nest(_TUPLE_ORIG, attributes[_TUPLE_ORIG])
    if _ZONE in attributes:
        identity += nfnetlink.attr(_ZONE, attributes[_ZONE])
    return Flow(
        source,
        destination,
        number,
        int.from_bytes(protocol[_PROTO_SOURCE_PORT], "big") if number in _WITH_PORTS else None,
        int.from_bytes(attributes.get(_MARK, b""), "big"),
        identity,
    )
