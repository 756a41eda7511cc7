"""How the pods of other nodes are to be reached, worked out from Node objects: a pure function, no kernel.

In: who owns which network and address, and what the kernel says of the ways there. Out: a ``Plan``, with the reason for
each network that is left out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from enforcer.model.addresses import Address, Family, Network, family_of
from enforcer.nodes.ownership import Ownership

Routing = Literal["auto", "direct", "vxlan"]


def gateway(network: Network) -> Address:
    """The first host address of a pod network: the bridge's own."""
    first, last = network.interval
    return min(first + 1, last).to_bytes(network.family.bits // 8, "big")


@dataclass(frozen=True, slots=True)
class KernelState:
    """What the kernel says of the ways to other nodes.

    Attributes:
        links: the index of the link that another node's address is directly on; none for those on no segment of ours.
        networks: those to which another program has made a route.
    """

    links: Mapping[Address, int] = field(default_factory=dict)
    networks: frozenset[Network] = frozenset()


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
        unreachable: the pod networks of other nodes to which there is no way: what is sent there must go nowhere.
        refused: what is left out, and why, in words.
    """

    direct: Mapping[Network, tuple[Address, int]]
    tunnels: Mapping[Family, Tunnel]
    unreachable: frozenset[Network]
    refused: frozenset[str]


def tunnel_mac(node: str) -> bytes:
    """The hardware address of a node's VXLAN links: 46 bits of its name's digest, locally administered, unicast."""
    digest = hashlib.sha256(f"vxlan {node}".encode()).digest()
    return bytes((digest[0] & 0xFC | 0x02,)) + digest[1:6]


def plan(ownership: Ownership, *, own: str, routing: Routing, kernel: KernelState) -> Plan:
    """Say how the pods of all nodes but ``own`` are reached."""
    planner = _Planner(ownership, own, routing, kernel)
    for name, networks in ownership.networks.items():
        if name != own:
            planner.add(name, networks, _first_of_each_family(ownership.addresses[name]))
    return planner.plan()


class _Planner:
    """What is planned so far; ``add`` takes the next younger node."""

    def __init__(self, ownership: Ownership, own: str, routing: Routing, kernel: KernelState) -> None:
        self._networks, self._mac = ownership.networks.get(own, ()), tunnel_mac(own)
        self._routing, self._kernel = routing, kernel
        self._addresses = _first_of_each_family(ownership.addresses.get(own, ()))
        self._macs = {self._mac: own}
        self._direct: dict[Network, tuple[Address, int]] = {}
        self._peers: dict[Family, dict[Network, Peer]] = {}
        self._unreachable: set[Network] = set()
        self._refused = set(ownership.refused)

    def add(self, name: str, networks: Iterable[Network], addresses: Mapping[Family, Address]) -> None:
        for network in networks:
            if network in self._kernel.networks:
                reason: str | None = "has another's route on this node: remove that, or the pod network that made it"
            else:
                reason = self._route(name, addresses, network)
                # With direct routes only, a router of the network may know the way.
                if reason is not None and self._routing != "direct":
                    self._unreachable.add(network)
            if reason is not None:
                self._refused.add(f"{name}: pod network {network} {reason}")

    def plan(self) -> Plan:
        gateways = tuple(gateway(network) for network in self._networks)
        tunnels = {
            family: Tunnel(self._addresses[family], self._mac, gateways, peers) for family, peers in self._peers.items()
        }
        return Plan(self._direct, tunnels, frozenset(self._unreachable), frozenset(self._refused))

    def _route(self, node: str, addresses: Mapping[Family, Address], network: Network) -> str | None:
        """Enter how a network is reached; the reason if it cannot be."""
        at = addresses.get(network.family)
        link = self._kernel.links.get(at, 0) if at is not None else 0
        if at is not None and link and self._routing != "vxlan":
            self._direct[network] = (at, link)
            return None
        if self._routing == "direct":
            return "is not reached: the node has no address of the family on a segment with this one (routing: direct)"
        family = next((f for f in Family if f in self._addresses and f in addresses), None)
        if family is None:
            return "is not reached: the node and this one have no InternalIP of one family"
        mac = tunnel_mac(node)
        holder = self._macs.setdefault(mac, node)
        if holder != node:
            return f"is not reached: the node's tunnel address {mac.hex(':')} is that of {holder}: rename the node"
        self._peers.setdefault(family, {})[network] = Peer(mac, addresses[family])
        return None


def _first_of_each_family(addresses: Iterable[Address]) -> dict[Family, Address]:
    found: dict[Family, Address] = {}
    for address in addresses:
        found.setdefault(family_of(address), address)
    return found
