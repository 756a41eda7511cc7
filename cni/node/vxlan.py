"""The VXLAN links of this node and who is behind them, kept equal to a plan.

Nothing is learned and nothing flooded: a link has no default destination and does not learn, each other node is one
permanent forwarding entry, and each of its pod networks has its first address as a permanent neighbour, which is the
gateway of the route to it. Permanent entries and host addresses on our links are ours, so those that are not wanted are
removed.
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
from cni.node.bridge import link_settings
from cni.node.iproute import IPRoute, Link
from cni.node.topology import Tunnel
from enforcer.model.addresses import Address, Family, family_of, format_address, parse_address
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
    indexes: dict[Family, int] = {}
    failures: set[str] = set()
    with IPRoute() as ip:
        for family, name in LINKS.items():
            try:
                index = _sync_link(ip, name, tunnels.get(family), vxlan, uplink_mtu - OVERHEAD[family], failures)
                if index is not None:
                    _entries(nl, index, tunnels[family], failures)
                    indexes[family] = index
            except (NetlinkError, OSError) as error:
                way_out = _WAYS_OUT.get(error.errno or 0, "")
                failures.add(f"{error}{f': {way_out}' if way_out else ''}")
    return indexes, frozenset(failures)


def _sync_link(ip: IPRoute, name: str, wanted: Tunnel | None, vxlan: Vxlan, mtu: int, failures: set[str]) -> int | None:
    """Make one link as it is wanted; its index if it stands."""
    present = ip.find(name)
    if present is not None and not (present.kind == "vxlan" and present.group == LINK_GROUP):
        if wanted is not None:
            failures.add(f"link {name} is not ours (no VXLAN in group {LINK_GROUP}): remove or rename it")
        return None
    if wanted is not None:
        index = _link(ip, name, present, _Shape(vxlan.id, vxlan.port, wanted.local, wanted.mac, learning=False), mtu)
        _addresses(ip, index, wanted, failures)
        return index
    if present is not None:
        ip.remove_link(name, present.index)
    return None


@dataclass(frozen=True, slots=True)
class _Shape:
    """What cannot be changed of a link."""

    id: int
    port: int
    local: Address
    mac: bytes
    learning: bool


def _shape(link: Link) -> _Shape:
    local = link.data.get("IFLA_VXLAN_LOCAL") or link.data.get("IFLA_VXLAN_LOCAL6")
    return _Shape(
        id=link.data.get("IFLA_VXLAN_ID", 0),
        port=link.data.get("IFLA_VXLAN_PORT", 0),
        local=parse_address(local) if local else b"",
        mac=link.mac,
        learning=bool(link.data.get("IFLA_VXLAN_LEARNING")),
    )


def _link(ip: IPRoute, name: str, present: Link | None, shape: _Shape, mtu: int) -> int:
    """The index of the link, which is made, or made anew, where there is none of the shape; it is up."""
    if present is not None and _shape(present) != shape:
        ip.remove_link(name, present.index)
        present = None
    if present is None:
        log.info("tunnel link changed", link=name, id=shape.id, port=shape.port, local=format_address(shape.local))
        local = "vxlan_local" if family_of(shape.local) is Family.V4 else "vxlan_local6"
        index = ip.add_link(name, "vxlan", mac=shape.mac, mtu=mtu, group=LINK_GROUP, vxlan_id=shape.id,
                            vxlan_port=shape.port, vxlan_learning=shape.learning,
                            **{local: format_address(shape.local)})  # fmt: skip
        ip.forbid_link_local(name, index, mtu)
        for setting, value in link_settings(name).items():
            netns.write_sysctl(setting, value)
    else:
        index = present.index
    if present is None or not present.up or present.mtu != mtu:
        ip.raise_link(name, index, mtu)
    return index


def _addresses(ip: IPRoute, index: int, wanted: Tunnel, failures: set[str]) -> None:
    """Give a link the node's own addresses on the pod network, so that what the node sends comes back the same way."""
    present = ip.host_addresses(index)
    for address in present.symmetric_difference(wanted.addresses):
        try:
            (ip.remove_address if address in present else ip.add_address)(address, index)
        except NetlinkError as error:
            failures.add(str(error))


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
