"""Which node owns which pod network and address, worked out from all Node objects. Pure.

Nodes are taken in the order of their age, this node first: of two pod networks that overlap, the older Node owns its
own. An address in a pod network is a pod's, whatever a Node says, since a kubelet may write its own Node's addresses at
any time. A pod network does not take the last address of a family that an older Node has left: a new Node that claims
the network that nodes are on gets nothing.
"""

from __future__ import annotations

import ipaddress
from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from enforcer.model.addresses import Address, Family, Network, family_of, format_address
from enforcer.model.objects import Node


@dataclass(frozen=True, slots=True)
class Machine:
    """What the kernel says of this machine: its own addresses, and the gateways of routes that are not ours."""

    addresses: frozenset[Address] = frozenset()
    gateways: frozenset[Address] = frozenset()


@dataclass(frozen=True, slots=True)
class Ownership:
    """Who owns what; by node name, in the order of age, this node first.

    Attributes:
        networks: pod networks; none overlaps another, is every address, or holds an address of this machine.
        addresses: the nodes' own, in their order; none lies in one of the networks, but for this node's own.
        refused: what is left out, and why, in words.
        pod_cidrs: this node's networks as its Node has them; None while there is no such Node.
        machine: what was known of this machine.
    """

    networks: Mapping[str, tuple[Network, ...]] = field(default_factory=dict)
    addresses: Mapping[str, tuple[Address, ...]] = field(default_factory=dict)
    refused: frozenset[str] = frozenset()
    pod_cidrs: tuple[Network, ...] | None = None
    machine: Machine = Machine()


def resolve_ownership(nodes: Mapping[str, Node], *, own: str, machine: Machine | None = None) -> Ownership:
    """Work out who owns what; ``own`` is this node's name."""
    machine = machine or Machine()
    this = nodes.get(own, Node(own))
    ours = machine.addresses | set(this.addresses)
    taken = _Taken(ours | machine.gateways)
    # The widest first: one within another adds nothing.
    for network in sorted(this.pod_cidrs, key=lambda network: network.length):
        if network.length:
            taken.add_network(network, own)
    others = sorted((node for node in nodes.values() if node.name != own), key=lambda node: (node.created, node.name))
    networks = {own: tuple(network for network in this.pod_cidrs if network.length)}
    addresses = {own: this.addresses}
    refused = set()
    for node in others:
        taken.add_addresses(node.name, [a for a in node.addresses if _unicast(a) and a not in ours])
        networks[node.name] = ()
        for network in node.pod_cidrs:
            reason = taken.refusal(network)
            if reason is None:
                taken.add_network(network, node.name)
                networks[node.name] += (network,)
            else:
                refused.add(f"{node.name}: pod network {network} {reason}")
    for node in others:
        reasons = {address: _unusable(address, ours, taken) for address in node.addresses}
        addresses[node.name] = tuple(address for address, reason in reasons.items() if reason is None)
        refused |= {
            f"{node.name}: address {format_address(address)} {reason}" for address, reason in reasons.items() if reason
        }
    pod_cidrs = this.pod_cidrs if own in nodes else None
    return Ownership(networks, addresses, frozenset(refused), pod_cidrs, machine)


def _unusable(address: Address, ours: AbstractSet[Address], taken: _Taken) -> str | None:
    if not _unicast(address):
        return "is no unicast address of a node"
    if address in ours:
        return "is this node's own"
    holder = taken.network_with(address)
    return f"lies in a pod network of {holder}" if holder else None


class _Taken:
    """Networks that never overlap, and addresses: each question is a binary search.

    ``fixed`` are the addresses that no network may hold.
    """

    def __init__(self, fixed: AbstractSet[Address]) -> None:
        self._networks: dict[Family, list[tuple[int, int, str]]] = {family: [] for family in Family}
        self._addresses: dict[Family, list[tuple[int, str]]] = {family: [] for family in Family}
        self._of: dict[str, list[Address]] = {}
        self.add_addresses("", fixed)

    def add_addresses(self, holder: str, addresses: AbstractSet[Address] | list[Address]) -> None:
        self._of[holder] = list(addresses)
        for address in addresses:
            insort(self._addresses[family_of(address)], (int.from_bytes(address, "big"), holder))

    def add_network(self, network: Network, holder: str) -> None:
        """Take a network in, unless it overlaps one that is there."""
        if not self._holder(network.family, *network.interval):
            insort(self._networks[network.family], (*network.interval, holder))

    def refusal(self, network: Network) -> str | None:
        """Why a network is not believed."""
        last = network.interval[1].to_bytes(len(network.first), "big")
        if network.length == 0 or not (_unicast(network.first) and _unicast(last)):
            return "is no network of hosts"
        holder = self._holder(network.family, *network.interval)
        if holder:
            return f"overlaps one of {holder}, which is older or this node: give the Nodes podCIDRs of their own"
        for node in self._with_address_in(network):
            if not node:
                return "holds an address of this node, of this machine or of a gateway"
            if not any(self._is_left(address, network) for address in self._of[node]):
                return f"holds an address of {node}, which has no other"
        return None

    def network_with(self, address: Address) -> str:
        number = int.from_bytes(address, "big")
        return self._holder(family_of(address), number, number)

    def _is_left(self, address: Address, network: Network) -> bool:
        """Whether an address would still be a node's with a network."""
        return family_of(address) is network.family and address not in network and not self.network_with(address)

    def _with_address_in(self, network: Network) -> Iterator[str]:
        first, last = network.interval
        held = self._addresses[network.family]
        found = held[bisect_left(held, (first,)) : bisect_right(held, (last, "\U0010ffff"))]
        return iter(sorted({holder for _, holder in found}))

    def _holder(self, family: Family, first: int, last: int) -> str:
        """Who has a network in an interval; empty if nobody does. The last that starts before its end tells."""
        held = self._networks[family]
        at = bisect_left(held, (last + 1,))
        return held[at - 1][2] if at and held[at - 1][1] >= first else ""


def _unicast(address: Address) -> bool:
    value = ipaddress.ip_address(address)
    special = value.is_multicast or value.is_unspecified or value.is_loopback or value.is_link_local
    return not special and address != b"\xff\xff\xff\xff"
