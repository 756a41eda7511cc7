"""How the pods of other nodes are to be reached, worked out from Node objects: a pure function, no kernel.

In: Node objects, and what of this node's surroundings matters. Out: a ``Plan``, with the reason for each network that
is left out. Nodes are heard in the order of their age, this node first; what two claim, the older has. So a new Node
can take neither a network nor an address away from one that is there.
"""

from __future__ import annotations

import hashlib
import ipaddress
from bisect import bisect_left, insort
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from cni.ipam import gateway
from enforcer.model.addresses import Address, Family, Network, family_of, format_address
from enforcer.model.objects import Node

Routing = Literal["auto", "direct", "vxlan"]


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the kernel says.

    Attributes:
        links: the index of the link that another node's address is directly on; none for those on no segment of ours.
        networks: those to which another than us has made a route.
        addresses: this machine's own.
        gateways: of others' routes.
    """

    links: Mapping[Address, int] = field(default_factory=dict)
    networks: frozenset[Network] = frozenset()
    addresses: frozenset[Address] = frozenset()
    gateways: frozenset[Address] = frozenset()


@dataclass(frozen=True, slots=True)
class Peer:
    """The other end of the tunnel: the hardware address of the node's VXLAN link, and the node's own address."""

    mac: bytes
    address: Address


@dataclass(frozen=True, slots=True)
class Tunnel:
    """A VXLAN link that is needed.

    Attributes:
        local: this node's address, from which it sends.
        mac: the link's own hardware address.
        addresses: the link's own addresses, by which other nodes' pods see this node.
        peers: who is behind it, by pod network.
    """

    local: Address
    mac: bytes
    addresses: tuple[Address, ...]
    peers: Mapping[Network, Peer]


@dataclass(frozen=True, slots=True)
class Plan:
    """What is wanted.

    Attributes:
        direct: the gateway to each network that is routed directly, and the index of the link that it is on.
        tunnels: the VXLAN links, by the family of the nodes' own addresses.
        refused: what is left out, and why, in words.
    """

    direct: Mapping[Network, tuple[Address, int]]
    tunnels: Mapping[Family, Tunnel]
    refused: frozenset[str]


def tunnel_mac(node: str) -> bytes:
    """The hardware address of a node's VXLAN links: 46 bits of its name's digest, locally administered, unicast."""
    digest = hashlib.sha256(f"vxlan {node}".encode()).digest()
    return bytes((digest[0] & 0xFC | 0x02,)) + digest[1:6]


def plan(nodes: Mapping[str, Node], *, own: str, routing: Routing, around: Surroundings) -> Plan:
    """Say how the pods of all nodes but ``own`` are reached."""
    planner = _Planner(nodes.get(own, Node(own)), routing, around)
    for node in sorted(nodes.values(), key=lambda node: (node.created, node.name)):
        if node.name != own:
            planner.hear(node)
    return planner.plan()


class _Planner:
    """What is settled so far; ``hear`` adds the next younger node."""

    def __init__(self, this: Node, routing: Routing, around: Surroundings) -> None:
        self._this, self._routing, self._around = this, routing, around
        self._addresses = _first_of_each_family(this.addresses)
        self._macs = {tunnel_mac(this.name): this.name}
        self._own = around.addresses | set(this.addresses)
        self._taken = _Taken()
        for address in self._own | around.gateways:
            self._taken.add_address(address)
        for network in this.pod_cidrs:
            self._taken.add_network(network, this.name)
        self._direct: dict[Network, tuple[Address, int]] = {}
        self._peers: dict[Family, dict[Network, Peer]] = {}
        self._refused: set[str] = set()

    def hear(self, node: Node) -> None:
        usable = []
        for address in node.addresses:
            reason = self._unusable(address)
            if reason is None:
                usable.append(address)
                self._taken.add_address(address)
            else:
                self._refused.add(f"{node.name}: address {format_address(address)} {reason}")
        addresses = _first_of_each_family(usable)
        for network in node.pod_cidrs:
            reason = self._unroutable(network)
            if reason is None:
                self._taken.add_network(network, node.name)
                reason = self._route(node, addresses, network)
            if reason is not None:
                self._refused.add(f"{node.name}: pod network {network} {reason}")

    def plan(self) -> Plan:
        mac = tunnel_mac(self._this.name)
        gateways = tuple(gateway(network) for network in self._this.pod_cidrs)
        tunnels = {
            family: Tunnel(self._addresses[family], mac, gateways, peers) for family, peers in self._peers.items()
        }
        return Plan(self._direct, tunnels, frozenset(self._refused))

    def _unusable(self, address: Address) -> str | None:
        if not _unicast(address):
            return "is no unicast address of a node"
        if address in self._own:
            return "is this node's own"
        holder = self._taken.network_with(address)
        return f"lies in a pod network of {holder}" if holder else None

    def _unroutable(self, network: Network) -> str | None:
        if network.length == 0 or not _unicast(network.first):
            return "is no network of hosts"
        if network in self._around.networks:
            return "has another's route on this node: remove that, or the pod network that made it"
        holder = self._taken.overlapping(network)
        if holder:
            return f"overlaps one of {holder}, which is older or this node: give the Nodes podCIDRs of their own"
        if self._taken.holds_address(network):
            return "holds an address of a node, of this machine or of a gateway"
        return None

    def _route(self, node: Node, addresses: Mapping[Family, Address], network: Network) -> str | None:
        """Enter how a network is reached; the reason if it cannot be."""
        at = addresses.get(network.family)
        link = self._around.links.get(at, 0) if at is not None else 0
        if at is not None and link and self._routing != "vxlan":
            self._direct[network] = (at, link)
            return None
        if self._routing == "direct":
            return "is not reached: the node has no address of the family on a segment with this one (routing: direct)"
        family = next((f for f in Family if f in self._addresses and f in addresses), None)
        if family is None:
            return "is not reached: the node and this one have no InternalIP of one family"
        mac = tunnel_mac(node.name)
        holder = self._macs.setdefault(mac, node.name)
        if holder != node.name:
            return f"is not reached: the node's tunnel address {mac.hex(':')} is that of {holder}: rename the node"
        self._peers.setdefault(family, {})[network] = Peer(mac, addresses[family])
        return None


class _Taken:
    """Networks that never overlap, and addresses: each question is a binary search."""

    def __init__(self) -> None:
        self._networks: dict[Family, list[tuple[int, int, str]]] = {family: [] for family in Family}
        self._addresses: dict[Family, list[int]] = {family: [] for family in Family}

    def add_address(self, address: Address) -> None:
        insort(self._addresses[family_of(address)], int.from_bytes(address, "big"))

    def add_network(self, network: Network, holder: str) -> None:
        insort(self._networks[network.family], (*network.interval, holder))

    def holds_address(self, network: Network) -> bool:
        first, last = network.interval
        of = self._addresses[network.family]
        at = bisect_left(of, first)
        return at < len(of) and of[at] <= last

    def overlapping(self, network: Network) -> str:
        return self._holder(network.family, *network.interval)

    def network_with(self, address: Address) -> str:
        number = int.from_bytes(address, "big")
        return self._holder(family_of(address), number, number)

    def _holder(self, family: Family, first: int, last: int) -> str:
        """Who has a network in an interval; empty if nobody does. The last that starts before its end tells."""
        of = self._networks[family]
        at = bisect_left(of, (last + 1,))
        return of[at - 1][2] if at and of[at - 1][1] >= first else ""


def _first_of_each_family(addresses: Iterable[Address]) -> dict[Family, Address]:
    found: dict[Family, Address] = {}
    for address in addresses:
        found.setdefault(family_of(address), address)
    return found


def _unicast(address: Address) -> bool:
    value = ipaddress.ip_address(address)
    special = value.is_multicast or value.is_unspecified or value.is_loopback or value.is_link_local
    return not special and address != b"\xff\xff\xff\xff"
