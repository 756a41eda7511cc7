"""rtnetlink: messages by the kernel's names, several in one send, every error with the step that it broke.

Goes in: messages made by ``link``, ``address``, ``Route`` and ``neighbour``. Comes out: nothing, or ``NetlinkError``.
Numbers and layouts are those of linux/rtnetlink.h, if_link.h, if_addr.h, neighbour.h and if_bridge.h. Why they are
packed here and not by pyroute2: docs/decisions/0001-netlink.md.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Self

_SOL_NETLINK, _EXT_ACK, _CAP_ACK, _GET_STRICT_CHK = 270, 11, 10, 12
_NLMSG_ERROR, _NLMSG_DONE = 2, 3
_NLMSGERR_ATTR_MSG = 1
_NLM_F_ACK_TLVS = 0x200
_NESTED, _KIND_MASK = 0x8000, 0x3FFF
_RECEIVE_BYTES, _DATAGRAMS = 1 << 17, 10_000
_GROUPS = 1 << 0 | 1 << 2 | 1 << 4 | 1 << 6 | 1 << 8 | 1 << 10
"""Links, neighbours, and the addresses and routes of IPv4 and IPv6."""

_header = struct.Struct("=IHHII")
_attribute_header = struct.Struct("=HH")
_u32 = struct.Struct("=I")
_next_hop = struct.Struct("=HBBi")
"""struct rtnexthop: length, flags, hops, index."""
LINK_HEADER = struct.Struct("=BxHiII")
"""struct ifinfomsg: family, type, index, flags, change mask."""
ADDRESS_HEADER = struct.Struct("=BBBBI")
"""struct ifaddrmsg: family, prefix length, flags, scope, index."""
ROUTE_HEADER = struct.Struct("=BBBBBBBBI")
"""struct rtmsg: family, destination length, source length, tos, table, protocol, scope, type, flags."""
NEIGHBOUR_HEADER = struct.Struct("=BxxxiHBB")
"""struct ndmsg: family, index, state, flags, type."""


class Rtm(IntEnum):
    """Message types."""

    NEWLINK = 16
    DELLINK = 17
    NEWADDR = 20
    DELADDR = 21
    GETADDR = 22
    NEWROUTE = 24
    DELROUTE = 25
    GETROUTE = 26
    NEWNEIGH = 28
    DELNEIGH = 29
    GETNEIGH = 30


class Flag(IntFlag):
    """NLM_F_*."""

    REQUEST = 0x1
    ACK = 0x4
    DUMP = 0x300
    REPLACE = 0x100
    EXCL = 0x200
    CREATE = 0x400


class Ifla(IntEnum):
    """Attributes of a link."""

    ADDRESS = 1
    IFNAME = 3
    MTU = 4
    MASTER = 10
    LINKINFO = 18
    AF_SPEC = 26
    NET_NS_FD = 28


class Info(IntEnum):
    """Attributes in IFLA_LINKINFO."""

    KIND = 1
    DATA = 2
    SLAVE_KIND = 4
    SLAVE_DATA = 5


class Port(IntEnum):
    """IFLA_BRPORT_*."""

    LEARNING = 8
    UNICAST_FLOOD = 9
    MCAST_FLOOD = 27
    BCAST_FLOOD = 30
    ISOLATED = 33


class Ifa(IntEnum):
    """Attributes of an address."""

    ADDRESS = 1
    LOCAL = 2
    FLAGS = 8


class Rta(IntEnum):
    """Attributes of a route."""

    DST = 1
    OIF = 4
    GATEWAY = 5
    MULTIPATH = 9
    VIA = 18


class Nda(IntEnum):
    """Attributes of a neighbour."""

    DST = 1
    LLADDR = 2
    IFINDEX = 8


IFF_UP = 1
VETH_INFO_PEER = 1
IFLA_INET6_ADDR_GEN_MODE = 8
IN6_ADDR_GEN_MODE_NONE = 1
IFA_F_NODAD, IFA_F_NOPREFIXROUTE = 0x02, 0x200
RT_TABLE_MAIN, RT_TABLE_LOCAL = 254, 255
RT_SCOPE_UNIVERSE, RT_SCOPE_LINK = 0, 253
RTN_UNICAST, RTN_LOCAL, RTN_UNREACHABLE = 1, 2, 7
RTNH_F_ONLINK = 4
NUD_NOARP, NUD_PERMANENT = 0x40, 0x80
NTF_SELF, NTF_MASTER = 0x02, 0x04


class NetlinkError(Exception):
    """The kernel refused a message.

    Attributes:
        step: what was attempted, for people.
        errno: the kernel's error number, positive.
    """

    def __init__(self, step: str, number: int, text: str = "") -> None:
        said = f" ({text})" if text else ""
        super().__init__(f"{step}: {os.strerror(number)}{said}")
        self.step = step
        self.errno = number


@dataclass(frozen=True, slots=True)
class Message:
    """A request. ``step`` says what it is for, and stands first in the error when the kernel refuses it."""

    step: str
    kind: Rtm
    flags: Flag
    payload: bytes


def attribute(kind: int, payload: bytes) -> bytes:
    """One attribute, padded to 4 bytes."""
    return _attribute_header.pack(len(payload) + 4, kind) + payload + bytes(-len(payload) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """An attribute of attributes."""
    return attribute(kind | _NESTED, b"".join(attributes))


def text(kind: int, value: str) -> bytes:
    """A zero-terminated string attribute."""
    return attribute(kind, value.encode() + b"\0")


def u8(kind: int, value: int) -> bytes:
    """An 8 bit attribute."""
    return attribute(kind, bytes((value,)))


def u32(kind: int, value: int) -> bytes:
    """A 32 bit attribute."""
    return attribute(kind, _u32.pack(value))


def link(*attributes: bytes, index: int = 0, up: bool | None = None) -> bytes:
    """A link's payload; ``up`` None leaves the administrative state alone."""
    flags, change = (0, 0) if up is None else (IFF_UP if up else 0, IFF_UP)
    return LINK_HEADER.pack(socket.AF_UNSPEC, 0, index, flags, change) + b"".join(attributes)


def veth(name: str, *, mtu: int, bridge: int, peer: str, mac: bytes, peer_netns: int) -> bytes:
    """The payload that makes a pair: a port of a bridge here, and its peer in the namespace of a descriptor."""
    there = link(
        text(Ifla.IFNAME, peer),
        attribute(Ifla.ADDRESS, mac),
        u32(Ifla.MTU, mtu),
        u32(Ifla.NET_NS_FD, peer_netns),
    )
    pair = nested(Info.DATA, attribute(VETH_INFO_PEER, there))
    return link(
        text(Ifla.IFNAME, name),
        u32(Ifla.MTU, mtu),
        u32(Ifla.MASTER, bridge),
        nested(Ifla.LINKINFO, text(Info.KIND, "veth"), pair),
    )


def isolated_port(*, index: int) -> bytes:
    """The payload that isolates a port of a bridge, which then neither learns nor floods."""
    off = (Port.LEARNING, Port.UNICAST_FLOOD, Port.MCAST_FLOOD, Port.BCAST_FLOOD)
    settings = nested(Info.SLAVE_DATA, u8(Port.ISOLATED, 1), *(u8(setting, 0) for setting in off))
    return link(nested(Ifla.LINKINFO, text(Info.SLAVE_KIND, "bridge"), settings), index=index)


def no_link_local(*, index: int) -> bytes:
    """The payload that keeps the kernel from giving a link an address of its own choice."""
    mode = u8(IFLA_INET6_ADDR_GEN_MODE, IN6_ADDR_GEN_MODE_NONE)
    return link(nested(Ifla.AF_SPEC, nested(socket.AF_INET6, mode)), index=index)


def address(value: bytes, *, index: int) -> bytes:
    """The payload of a host address (/32 or /128) that is usable at once: no prefix route, no duplicate detection."""
    family, bits = family_number(value), len(value) * 8
    flags = IFA_F_NOPREFIXROUTE | (IFA_F_NODAD if family == socket.AF_INET6 else 0)
    return (
        ADDRESS_HEADER.pack(family, bits, 0, RT_SCOPE_UNIVERSE, index)
        + attribute(Ifa.LOCAL, value)
        + attribute(Ifa.ADDRESS, value)
        + u32(Ifa.FLAGS, flags)
    )


@dataclass(frozen=True, slots=True)
class Route:
    """A route of the main table. ``index`` 0 is no device: an unreachable route."""

    destination: bytes
    length: int
    protocol: int
    index: int = 0
    gateway: bytes | None = None

    def payload(self) -> bytes:
        """The message's payload. A route with a gateway is "onlink": the gateway need not lie in a known network."""
        reach = RTN_UNICAST if self.index else RTN_UNREACHABLE
        scope = RT_SCOPE_LINK if self.index and self.gateway is None else RT_SCOPE_UNIVERSE
        flags = RTNH_F_ONLINK if self.gateway is not None else 0
        head = ROUTE_HEADER.pack(
            family_number(self.destination), self.length, 0, 0, RT_TABLE_MAIN, self.protocol, scope, reach, flags
        )
        attributes = attribute(Rta.DST, self.destination) if self.length else b""
        if self.gateway is not None:
            attributes += attribute(Rta.GATEWAY, self.gateway)
        if self.index:
            attributes += u32(Rta.OIF, self.index)
        return head + attributes


def neighbour(value: bytes, mac: bytes, *, index: int) -> bytes:
    """The payload of a permanent neighbour entry."""
    head = NEIGHBOUR_HEADER.pack(family_number(value), index, NUD_PERMANENT, 0, 0)
    return head + attribute(Nda.DST, value) + attribute(Nda.LLADDR, mac)


def forwarding_entry(mac: bytes, *, index: int) -> bytes:
    """The payload of a bridge's static forwarding entry: ``mac`` is behind port ``index``.

    NUD_NOARP is what ``bridge fdb`` calls static; NUD_PERMANENT would make the address the bridge's own.
    """
    return NEIGHBOUR_HEADER.pack(socket.AF_BRIDGE, index, NUD_NOARP, NTF_MASTER, 0) + attribute(Nda.LLADDR, mac)


def tunnel_entry(mac: bytes, destination: bytes, *, index: int) -> bytes:
    """The payload of a VXLAN link's permanent forwarding entry: ``mac`` is behind the host ``destination``."""
    head = NEIGHBOUR_HEADER.pack(socket.AF_BRIDGE, index, NUD_PERMANENT, NTF_SELF, 0)
    return head + attribute(Nda.LLADDR, mac) + attribute(Nda.DST, destination)


def attributes_of(payload: bytes) -> dict[int, bytes]:
    """The attributes of a payload whose header is cut off, or of a nested attribute."""
    found = {}
    offset = 0
    while offset + 4 <= len(payload):
        length, kind = _attribute_header.unpack_from(payload, offset)
        found[kind & _KIND_MASK] = payload[offset + 4 : offset + length]
        offset += max(-(-length // 4) * 4, 4)
    return found


def gateways_of(attributes: Mapping[int, bytes]) -> frozenset[bytes]:
    """The gateways in the attributes of a route, those of each of its next hops (RTA_MULTIPATH) too."""
    found = {attributes[Rta.GATEWAY]} if Rta.GATEWAY in attributes else set()
    if Rta.VIA in attributes:
        # struct rtvia: an address after its family.
        found.add(attributes[Rta.VIA][2:])
    hops = attributes.get(Rta.MULTIPATH, b"")
    while len(hops) >= _next_hop.size:
        length = max(_next_hop.unpack_from(hops)[0], _next_hop.size)
        found |= gateways_of(attributes_of(hops[_next_hop.size : length]))
        hops = hops[-(-length // 4) * 4 :]
    return frozenset(found)


def family_number(value: bytes) -> int:
    """AF_INET or AF_INET6, told by the length of an address."""
    return socket.AF_INET if len(value) == 4 else socket.AF_INET6  # noqa: PLR2004 - the width of an IPv4 address


class Netlink:
    """A rtnetlink socket of the network namespace that the calling thread is in at construction. For one thread."""

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        for option in (_EXT_ACK, _CAP_ACK, _GET_STRICT_CHK):
            self._socket.setsockopt(_SOL_NETLINK, option, 1)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def run(self, *messages: Message) -> None:
        """Do all messages in order, in one send. The kernel goes on after one that it refuses.

        Raises:
            NetlinkError: the first that was refused.
        """
        self._socket.send(
            b"".join(
                _header.pack(len(m.payload) + 16, m.kind, m.flags | Flag.REQUEST | Flag.ACK, sequence, 0) + m.payload
                for sequence, m in enumerate(messages)
            )
        )
        failure: NetlinkError | None = None
        waiting = len(messages)
        while waiting:
            for kind, flags, sequence, payload in self._receive():
                if kind != _NLMSG_ERROR:
                    continue
                waiting -= 1
                number = -int.from_bytes(payload[:4], "little", signed=True)
                if number and failure is None:
                    failure = NetlinkError(messages[sequence].step, number, _said(flags, payload))
        if failure is not None:
            raise failure

    def get(self, message: Message) -> bytes:
        """The payload of the one object that a request names.

        Raises:
            NetlinkError: it is not there.
        """
        for payload in self._replies(message, message.flags | Flag.REQUEST):
            return payload
        raise NetlinkError(message.step, errno.ENOENT)

    def dump(self, message: Message) -> list[bytes]:
        """The payloads of all objects of a kind.

        Raises:
            NetlinkError: the kernel refused.
        """
        return list(self._replies(message, message.flags | Flag.REQUEST | Flag.DUMP))

    def _replies(self, message: Message, flags: int) -> Iterator[bytes]:
        self._socket.send(_header.pack(len(message.payload) + 16, message.kind, flags, 0, 0) + message.payload)
        while True:
            for kind, reply_flags, _, payload in self._receive():
                if kind == _NLMSG_DONE:
                    return
                if kind == _NLMSG_ERROR:
                    number = -int.from_bytes(payload[:4], "little", signed=True)
                    raise NetlinkError(message.step, number, _said(reply_flags, payload))
                yield payload
            if not flags & Flag.DUMP:
                return

    def _receive(self) -> Iterator[tuple[int, int, int, bytes]]:
        return _split(self._socket.recv(_RECEIVE_BYTES))


class Events:
    """What happens to links, addresses, neighbours and routes in the network namespace in which this was made.

    For one thread, but ``wake``.
    """

    def __init__(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, socket.NETLINK_ROUTE)
        self._socket.bind((0, _GROUPS))
        self._socket.setblocking(False)
        self._woken = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._poller = select.poll()
        self._poller.register(self._socket, select.POLLIN)
        self._poller.register(self._woken, select.POLLIN)

    def wake(self) -> None:
        """Have ``wait`` return; any thread."""
        os.eventfd_write(self._woken, 1)

    def wait(self, seconds: float | None = None) -> list[tuple[int, bytes]]:
        """Types and payloads of what has happened since the last call; blocks until there is something, or ``wake``.

        Raises:
            TimeoutError: nothing has happened for that long.
            OSError: events were lost.
        """
        if not self._poller.poll(None if seconds is None else seconds * 1000):
            raise TimeoutError
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._woken)
        datagrams: list[bytes] = []
        with contextlib.suppress(BlockingIOError):
            # All that is there already, up to a bound: who acts on it acts once.
            while len(datagrams) < _DATAGRAMS:
                datagrams.append(self._socket.recv(_RECEIVE_BYTES))
        return [(kind, payload) for datagram in datagrams for kind, _, _, payload in _split(datagram)]


def _split(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Type, flags, sequence number and payload of each message of a datagram."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags, sequence, _ = _header.unpack_from(data, offset)
        yield kind, flags, sequence, data[offset + 16 : offset + length]
        offset += -(-length // 4) * 4


def _said(flags: int, payload: bytes) -> str:
    """The kernel's own words in an error (NLMSGERR_ATTR_MSG), if it gave any."""
    if not flags & _NLM_F_ACK_TLVS:
        return ""
    # With NETLINK_CAP_ACK the request is cut to its header.
    words = attributes_of(payload[20:]).get(_NLMSGERR_ATTR_MSG, b"")
    return words.rstrip(b"\0").decode(errors="replace")
