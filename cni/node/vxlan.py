"""The VXLAN links of this node and who is behind them, kept equal to a plan.

Nothing is learned and nothing flooded: a link has no default destination and does not learn, each other node is one
permanent forwarding entry, and each of its pod networks has its first address as a permanent neighbour, which is the
gateway of the route to it. All that is on our links is ours, so what is not wanted there is removed.
"""

from __future__ import annotations

import errno
import socket
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from cni import netns
from cni.netlink import rtnetlink
from cni.netlink.rtnetlink import Flag, Message, Netlink, NetlinkError, Rtm
from cni.node.bridge import link_settings, no_link_local
from cni.node.topology import Tunnel
from enforcer.model.addresses import Address, Family, family_of, format_address
from enforcer.model.tunnel import LINK_GROUP, LINKS, OVERHEAD, Vxlan

log = structlog.get_logger()

_REPLACE = Flag.CREATE | Flag.REPLACE
_WAYS_OUT = {
    errno.EOPNOTSUPP: "the kernel has no VXLAN: load its module vxlan, or set routing: direct",
    errno.EEXIST: "another VXLAN link has the same vxlanId and vxlanPort: choose others on every node",
    errno.EADDRINUSE: "another program or link has the UDP port: choose another vxlanPort on every node",
}


def sync(
    nl: Netlink, tunnels: Mapping[Family, Tunnel], *, vxlan: Vxlan, uplink_mtu: int
) -> tuple[dict[Family, int], frozenset[str]]:
    """Make the links and their entries as they are wanted, and remove those that nobody needs.

    Returns:
        The index of each link that stands, and what went wrong with the others, in words.
    """
    indexes = {}
    failures = set()
    for family, name in LINKS.items():
        wanted = tunnels.get(family)
        try:
            present = _find(nl, name)
            if present is not None and not present.ours:
                if wanted is not None:
                    failures.add(f"link {name} is not ours (no VXLAN in group {LINK_GROUP}): remove or rename it")
            elif wanted is not None:
                shape = _Shape(vxlan.id, vxlan.port, wanted.local, wanted.mac, learning=False)
                mtu = uplink_mtu - OVERHEAD[family]
                indexes[family] = _link(nl, name, present, shape, mtu)
                _addresses(nl, indexes[family], wanted, failures)
                _entries(nl, indexes[family], wanted, failures)
            elif present is not None:
                _remove(nl, name, present)
        except (NetlinkError, OSError) as error:
            indexes.pop(family, None)
            way_out = _WAYS_OUT.get(error.errno or 0, "")
            failures.add(f"{error}{f': {way_out}' if way_out else ''}")
    return indexes, frozenset(failures)


@dataclass(frozen=True, slots=True)
class _Shape:
    """What cannot be changed of a link."""

    id: int
    port: int
    local: Address
    mac: bytes
    learning: bool


@dataclass(frozen=True, slots=True)
class _Present:
    """A link of our name; ``ours`` if it bears our mark."""

    index: int
    ours: bool
    up: bool
    mtu: int
    shape: _Shape


def _find(nl: Netlink, name: str) -> _Present | None:
    try:
        payload = nl.get(
            Message(
                f"look for {name}", Rtm.GETLINK, Flag(0), rtnetlink.link(rtnetlink.text(rtnetlink.Ifla.IFNAME, name))
            )
        )
    except NetlinkError as error:
        if error.errno == errno.ENODEV:
            return None
        raise
    _, _, index, flags, _ = rtnetlink.LINK_HEADER.unpack_from(payload)
    found = rtnetlink.attributes_of(payload[rtnetlink.LINK_HEADER.size :])
    info = rtnetlink.attributes_of(found.get(rtnetlink.Ifla.LINKINFO, b""))
    data = rtnetlink.attributes_of(info.get(rtnetlink.Info.DATA, b""))
    kind, field = info.get(rtnetlink.Info.KIND, b"").rstrip(b"\0"), rtnetlink.Vxlan
    shape = _Shape(
        id=_number(data.get(field.ID)),
        port=int.from_bytes(data.get(field.PORT, b""), "big"),
        local=data.get(field.LOCAL) or data.get(field.LOCAL6, b""),
        mac=found.get(rtnetlink.Ifla.ADDRESS, b""),
        learning=bool(_number(data.get(field.LEARNING))),
    )
    ours = kind == b"vxlan" and _number(found.get(rtnetlink.Ifla.GROUP)) == LINK_GROUP
    return _Present(index, ours, bool(flags & rtnetlink.IFF_UP), _number(found.get(rtnetlink.Ifla.MTU)), shape)


def _link(nl: Netlink, name: str, present: _Present | None, shape: _Shape, mtu: int) -> int:
    """The index of the link, which is made, or made anew, where there is none of the shape; it is up."""
    if present is not None and present.shape != shape:
        _remove(nl, name, present)
        present = None
    if present is None:
        log.info("tunnel link changed", link=name, id=shape.id, port=shape.port, local=format_address(shape.local))
        nl.run(Message(f"make link {name}", Rtm.NEWLINK, Flag.CREATE | Flag.EXCL, _vxlan(name, shape, mtu)))
        index = socket.if_nametoindex(name)
        nl.run(*no_link_local(f"set up link {name}", index, mtu))
        for setting, value in link_settings(name).items():
            netns.write_sysctl(setting, value)
    else:
        index = present.index
    if present is None or not present.up or present.mtu != mtu:
        raised = rtnetlink.link(rtnetlink.u32(rtnetlink.Ifla.MTU, mtu), index=index, up=True)
        nl.run(Message(f"raise link {name}", Rtm.NEWLINK, Flag(0), raised))
    return index


def _remove(nl: Netlink, name: str, present: _Present) -> None:
    nl.run(Message(f"remove link {name}", Rtm.DELLINK, Flag(0), rtnetlink.link(index=present.index)))


def _vxlan(name: str, shape: _Shape, mtu: int) -> bytes:
    field = rtnetlink.Vxlan
    local = field.LOCAL if family_of(shape.local) is Family.V4 else field.LOCAL6
    data = rtnetlink.nested(
        rtnetlink.Info.DATA,
        rtnetlink.u32(field.ID, shape.id),
        rtnetlink.attribute(local, shape.local),
        rtnetlink.attribute(field.PORT, shape.port.to_bytes(2, "big")),
        rtnetlink.u8(field.LEARNING, shape.learning),
    )
    return rtnetlink.link(
        rtnetlink.text(rtnetlink.Ifla.IFNAME, name),
        rtnetlink.attribute(rtnetlink.Ifla.ADDRESS, shape.mac),
        rtnetlink.u32(rtnetlink.Ifla.MTU, mtu),
        rtnetlink.u32(rtnetlink.Ifla.GROUP, LINK_GROUP),
        rtnetlink.nested(rtnetlink.Ifla.LINKINFO, rtnetlink.text(rtnetlink.Info.KIND, "vxlan"), data),
    )


def _addresses(nl: Netlink, index: int, wanted: Tunnel, failures: set[str]) -> None:
    """Give a link the node's own addresses on the pod network, so that what the node sends comes back the same way."""
    present = set()
    for payload in nl.dump(
        Message("list addresses", Rtm.GETADDR, Flag(0), rtnetlink.ADDRESS_HEADER.pack(0, 0, 0, 0, 0))
    ):
        if rtnetlink.ADDRESS_HEADER.unpack_from(payload)[4] == index:
            found = rtnetlink.attributes_of(payload[rtnetlink.ADDRESS_HEADER.size :])
            present.add(found.get(rtnetlink.Ifa.LOCAL) or found[rtnetlink.Ifa.ADDRESS])
    for address in present.symmetric_difference(wanted.addresses):
        step = f"address {format_address(address)} of the tunnel"
        kind, flags = (Rtm.DELADDR, Flag(0)) if address in present else (Rtm.NEWADDR, _REPLACE)
        _try(nl, Message(step, kind, flags, rtnetlink.address(address, index=index)), failures)


def _entries(nl: Netlink, index: int, wanted: Tunnel, failures: set[str]) -> None:
    """Make forwarding entries and neighbours those of the plan: one that is refused harms no other."""
    forwarding = {(peer.mac, peer.address) for peer in wanted.peers.values()}
    neighbours = {(network.first, peer.mac) for network, peer in wanted.peers.items()}
    present = _listed(nl, socket.AF_BRIDGE, index, rtnetlink.Nda.LLADDR, rtnetlink.Nda.DST)
    known = {
        pair
        for family in (socket.AF_INET, socket.AF_INET6)
        for pair in _listed(nl, family, index, rtnetlink.Nda.DST, rtnetlink.Nda.LLADDR)
    }
    # What is to go goes first: an entry with several destinations would send to all of them.
    for kind, flags, entries, neighbour_pairs in (
        (Rtm.DELNEIGH, Flag(0), present - forwarding, known - neighbours),
        (Rtm.NEWNEIGH, _REPLACE, forwarding - present, neighbours - known),
    ):
        for mac, destination in entries:
            step = f"forwarding entry {mac.hex(':')} at {format_address(destination)}"
            _try(nl, Message(step, kind, flags, rtnetlink.tunnel_entry(mac, destination, index=index)), failures)
        for address, mac in neighbour_pairs:
            step = f"neighbour {format_address(address)} at {mac.hex(':')}"
            _try(nl, Message(step, kind, flags, rtnetlink.neighbour(address, mac, index=index)), failures)


def _listed(nl: Netlink, family: int, index: int, key: int, value: int) -> set[tuple[bytes, bytes]]:
    """Two attributes of each permanent entry of a link."""
    head = rtnetlink.NEIGHBOUR_HEADER.pack(family, 0, 0, 0, 0) + rtnetlink.u32(rtnetlink.Nda.IFINDEX, index)
    listed = set()
    for payload in nl.dump(Message("list entries", Rtm.GETNEIGH, Flag(0), head)):
        _, link, state, _, _ = rtnetlink.NEIGHBOUR_HEADER.unpack_from(payload)
        found = rtnetlink.attributes_of(payload[rtnetlink.NEIGHBOUR_HEADER.size :])
        if link == index and state & rtnetlink.NUD_PERMANENT and key in found and value in found:
            listed.add((found[key], found[value]))
    return listed


def _try(nl: Netlink, message: Message, failures: set[str]) -> None:
    try:
        nl.run(message)
    except NetlinkError as error:
        failures.add(str(error))


def _number(value: bytes | None) -> int:
    return int.from_bytes(value or b"", "little")
