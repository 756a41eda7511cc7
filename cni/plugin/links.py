"""A pod's link: a veth pair whose node side is an isolated port of the bridge.

Nothing has to be learned, asked for or waited for: forwarding entry, neighbours and routes are permanent, and the node
side stays down until the pod's policy is in the kernel.
"""

from __future__ import annotations

import errno
import hashlib
import socket
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from cni import netns
from cni.netlink import rtnetlink
from cni.netlink.rtnetlink import Flag, Message, Netlink, NetlinkError, Rtm
from cni.node.bridge import BRIDGE_MAC, PORT_PREFIX, ROUTE_PROTOCOL, Bridge
from cni.node.iproute import has_ipv6
from enforcer.model.addresses import Address, Family, family_of, format_address
from enforcer.model.objects import Attachment

_NEW = Flag.CREATE | Flag.EXCL
_GONE = {errno.ENODEV, errno.ENOENT, errno.ESRCH, errno.EADDRNOTAVAIL}


def port_name(container_id: str, ifname: str) -> str:
    """The node side's name: what the guard knows as a pod's port, and 44 bits of the attachment's identity."""
    return PORT_PREFIX + hashlib.sha256(f"{container_id}/{ifname}".encode()).hexdigest()[:11]


def default_mac(container_id: str, ifname: str) -> bytes:
    """A locally administered unicast hardware address for an attachment."""
    return b"\x0a" + hashlib.sha256(f"mac {container_id}/{ifname}".encode()).digest()[:5]


@dataclass(frozen=True, slots=True)
class Link:
    """Where a link is made: the pod's namespace and the thread's own, as descriptors."""

    bridge: Bridge
    pod_netns: int
    own_netns: int

    def make(self, attachment: Attachment, gateways: Mapping[Family, Address]) -> None:
        """Make both sides; the node side stays down.

        Raises:
            NetlinkError: a step was refused; what was made before stays, for ``remove``.
            OSError: the pod's namespace cannot be entered.
        """
        with Netlink() as nl:
            pair = rtnetlink.veth(
                attachment.host_interface,
                mtu=self.bridge.mtu,
                bridge=self.bridge.bridge_index,
                peer=attachment.ifname,
                mac=attachment.mac,
                peer_netns=self.pod_netns,
            )
            nl.run(Message(f"make veth {attachment.host_interface}", Rtm.NEWLINK, _NEW, pair))
            port_index = socket.if_nametoindex(attachment.host_interface)
            nl.run(*self._port(attachment, port_index))
        with netns.visit(self.pod_netns, home=self.own_netns):
            index = socket.if_nametoindex(attachment.ifname)
            netns.write_sysctl(f"net/ipv6/conf/{attachment.ifname}/accept_ra", "0")
            with Netlink() as nl:
                nl.run(
                    *self._no_link_local("set up the pod's side", index),
                    *_pod_side(attachment, gateways, index),
                )

    def missing(self, attachment: Attachment, gateways: Mapping[Family, Address]) -> list[str]:
        """What a pod has not, of what ``make`` gave it, in words.

        Raises:
            NetlinkError: the kernel does not tell.
            OSError: the pod's namespace cannot be entered.
        """
        with netns.visit(self.pod_netns, home=self.own_netns):
            try:
                index = socket.if_nametoindex(attachment.ifname)
            except OSError:
                return [f"interface {attachment.ifname}"]
            with Netlink() as nl:
                return _missing(nl, attachment, gateways, index)

    def _no_link_local(self, step: str, index: int) -> list[Message]:
        payload = rtnetlink.no_link_local(index=index)
        return [Message(step, Rtm.NEWLINK, Flag(0), payload)] if has_ipv6(self.bridge.mtu) else []

    def _port(self, attachment: Attachment, index: int) -> list[Message]:
        forwarding = rtnetlink.forwarding_entry(attachment.mac, index=index)
        bridge = self.bridge.bridge_index
        isolated = rtnetlink.isolated_port(index=index)
        messages = [
            *self._no_link_local(f"set up port {attachment.host_interface}", index),
            Message(f"isolate port {attachment.host_interface}", Rtm.NEWLINK, Flag(0), isolated),
            Message("forwarding entry", Rtm.NEWNEIGH, Flag.CREATE | Flag.REPLACE, forwarding),
        ]
        for address in attachment.addresses:
            route = rtnetlink.Route(address, len(address) * 8, ROUTE_PROTOCOL, index=bridge)
            neighbour = rtnetlink.neighbour(address, attachment.mac, index=bridge)
            messages += [
                Message("neighbour of the pod", Rtm.NEWNEIGH, Flag.CREATE | Flag.REPLACE, neighbour),
                Message("route to the pod", Rtm.NEWROUTE, Flag.CREATE | Flag.REPLACE, route.payload()),
            ]
        return messages


def _pod_side(attachment: Attachment, gateways: Mapping[Family, Address], index: int) -> list[Message]:
    up = rtnetlink.link(index=index, up=True)
    messages = [
        Message("raise lo", Rtm.NEWLINK, Flag(0), rtnetlink.link(index=1, up=True)),
        *(
            Message("address of the pod", Rtm.NEWADDR, _NEW, rtnetlink.address(address, index=index))
            for address in attachment.addresses
        ),
        Message(f"raise {attachment.ifname} in the pod", Rtm.NEWLINK, Flag(0), up),
    ]
    for family in {family_of(address) for address in attachment.addresses} & gateways.keys():
        gateway = gateways[family]
        width = family.bits // 8
        to_gateway = rtnetlink.Route(gateway, family.bits, ROUTE_PROTOCOL, index=index)
        default = rtnetlink.Route(bytes(width), 0, ROUTE_PROTOCOL, index=index, gateway=gateway)
        messages += [
            Message(
                "neighbour of the gateway",
                Rtm.NEWNEIGH,
                Flag.CREATE | Flag.REPLACE,
                rtnetlink.neighbour(gateway, BRIDGE_MAC, index=index),
            ),
            Message("route to the gateway", Rtm.NEWROUTE, _NEW, to_gateway.payload()),
            Message("default route of the pod", Rtm.NEWROUTE, _NEW, default.payload()),
        ]
    return messages


def _missing(nl: Netlink, attachment: Attachment, gateways: Mapping[Family, Address], index: int) -> list[str]:
    addresses, defaults, neighbours = set(), set(), set()
    for family in (socket.AF_INET, socket.AF_INET6):
        head = rtnetlink.ADDRESS_HEADER.pack(family, 0, 0, 0, 0)
        for payload in nl.dump(Message("list addresses", Rtm.GETADDR, Flag(0), head)):
            found = rtnetlink.attributes_of(payload[rtnetlink.ADDRESS_HEADER.size :])
            if rtnetlink.ADDRESS_HEADER.unpack_from(payload)[4] == index:
                addresses.add(found.get(rtnetlink.Ifa.LOCAL) or found[rtnetlink.Ifa.ADDRESS])
        head = rtnetlink.ROUTE_HEADER.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        for payload in nl.dump(Message("list routes", Rtm.GETROUTE, Flag(0), head)):
            found = rtnetlink.attributes_of(payload[rtnetlink.ROUTE_HEADER.size :])
            if rtnetlink.Rta.DST not in found and found.get(rtnetlink.Rta.OIF) == index.to_bytes(4, sys.byteorder):
                defaults.add(found.get(rtnetlink.Rta.GATEWAY))
        head = rtnetlink.NEIGHBOUR_HEADER.pack(family, 0, 0, 0, 0)
        for payload in nl.dump(Message("list neighbours", Rtm.GETNEIGH, Flag(0), head)):
            found = rtnetlink.attributes_of(payload[rtnetlink.NEIGHBOUR_HEADER.size :])
            if found.get(rtnetlink.Nda.LLADDR) == BRIDGE_MAC:
                neighbours.add(found.get(rtnetlink.Nda.DST))
    return [
        *(f"address {format_address(a)}" for a in attachment.addresses if a not in addresses),
        *(f"default route by {format_address(g)}" for g in gateways.values() if g not in defaults),
        *(f"neighbour {format_address(g)}" for g in gateways.values() if g not in neighbours),
    ]


def up(attachment: Attachment) -> None:
    """Raise the node side: from here on packets flow."""
    with Netlink() as nl:
        payload = rtnetlink.link(rtnetlink.text(rtnetlink.Ifla.IFNAME, attachment.host_interface), up=True)
        nl.run(Message(f"raise {attachment.host_interface}", Rtm.NEWLINK, Flag(0), payload))


def exists(port: str) -> bool:
    """Whether a port's link is there."""
    try:
        socket.if_nametoindex(port)
    except OSError:
        return False
    return True


def remove(attachment: Attachment, *, bridge_index: int) -> None:
    """Remove a link with its routes and neighbours; what is gone already is no mistake.

    Raises:
        NetlinkError: the kernel refused.
    """
    messages = [_delete_link(attachment)]
    for address in attachment.addresses:
        route = rtnetlink.Route(address, len(address) * 8, ROUTE_PROTOCOL, index=bridge_index)
        neighbour = rtnetlink.neighbour(address, attachment.mac, index=bridge_index)
        messages += [
            Message("remove the route to the pod", Rtm.DELROUTE, Flag(0), route.payload()),
            Message("remove the neighbour of the pod", Rtm.DELNEIGH, Flag(0), neighbour),
        ]
    with Netlink() as nl:
        _run_all(nl, messages)


def _delete_link(attachment: Attachment) -> Message:
    name = rtnetlink.text(rtnetlink.Ifla.IFNAME, attachment.host_interface)
    return Message(f"remove link {attachment.host_interface}", Rtm.DELLINK, Flag(0), rtnetlink.link(name))


def _run_all(nl: Netlink, messages: Iterable[Message]) -> None:
    for message in messages:
        try:
            nl.run(message)
        except NetlinkError as error:
            if error.errno not in _GONE:
                raise
