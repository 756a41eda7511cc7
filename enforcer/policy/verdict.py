"""The executable reading of the NetworkPolicy API: may this packet pass, and which policy says so?

Nothing here is fast and nothing is compiled: each branch stands beside the sentence of the API that it implements
(networking.k8s.io/v1, quoted). The compiled ruleset is tested against it, and ``drawbridge explain`` speaks with it.
"""

from __future__ import annotations

from dataclasses import dataclass

from enforcer.model.addresses import Address
from enforcer.model.objects import Direction, IPBlock, NetworkPolicy, Peer, PolicyPort, PolicyRule
from enforcer.policy.endpoints import Endpoint, Standing
from enforcer.policy.isolation import Group, group_of, group_of_address, selects
from enforcer.policy.resolve import Cluster
from enforcer.policy.sets import PodSelection


@dataclass(frozen=True, slots=True)
class Packet:
    """The first packet of a flow. ``protocol`` is the IP protocol's number, ``port`` the destination's."""

    source: Address
    destination: Address
    protocol: int
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """One direction's verdict on a packet.

    ``endpoints`` are the keys of those whose policies were asked (none: the address is no pod's).
    ``group`` is why they are isolated, None if they are not. ``policy`` and ``rule`` (an index) allowed the packet.
    """

    direction: Direction
    allowed: bool
    endpoints: tuple[str, ...] = ()
    group: Group | None = None
    policy: str | None = None
    rule: int | None = None


def verdict(cluster: Cluster, packet: Packet) -> tuple[Decision, Decision]:
    """Judge a packet at its source (egress), then at its destination (ingress).

    "For a connection from a source pod to a destination pod to be allowed, both the egress policy on the source pod
    and the ingress policy on the destination pod need to allow the connection."
    """
    return decide(cluster, packet, Direction.EGRESS), decide(cluster, packet, Direction.INGRESS)


def decide(cluster: Cluster, packet: Packet, direction: Direction) -> Decision:
    """Judge a packet in one direction, from the policies of the pod that has its address."""
    egress = direction is Direction.EGRESS
    own, peer = (packet.source, packet.destination) if egress else (packet.destination, packet.source)
    claimants = [endpoint for endpoint in cluster.endpoints.values() if own in endpoint.addresses]
    # A claim of this node's goes before one of another node's, which can only be an old status.
    claimants = [endpoint for endpoint in claimants if endpoint.local] or claimants
    keys = tuple(sorted(endpoint.key for endpoint in claimants))
    # "A pod cannot block access to itself."
    if not claimants or own == peer:
        return Decision(direction, allowed=True, endpoints=keys)
    selecting = {e.key: [p for p in cluster.policies.values() if selects(p, e)] for e in claimants}
    group = group_of_address([group_of(e, selecting[e.key], direction) for e in claimants], direction)
    # "By default, a pod is non-isolated […]; all connections are allowed."
    if group is None:
        return Decision(direction, allowed=True, endpoints=keys)
    if group.closed:
        return Decision(direction, allowed=False, endpoints=keys, group=group)
    # "Network policies do not conflict; they are additive": one rule of one policy is enough.
    for key in group.policies:
        policy = cluster.policies[key]
        for index, rule in enumerate(policy.rules[direction]):
            if _rule_matches(cluster, policy, rule, packet, direction=direction, peer=peer):
                return Decision(direction, allowed=True, endpoints=keys, group=group, policy=key, rule=index)
    return Decision(direction, allowed=False, endpoints=keys, group=group)


def _rule_matches(
    cluster: Cluster, policy: NetworkPolicy, rule: PolicyRule, packet: Packet, *, direction: Direction, peer: Address
) -> bool:
    # "If this field is empty or missing, this rule matches all sources" (or destinations); the same for ports.
    return (not rule.peers or any(_peer_matches(cluster, policy, entry, peer) for entry in rule.peers)) and (
        not rule.ports or any(_port_matches(cluster, port, packet) for port in rule.ports)
    )


def _peer_matches(cluster: Cluster, policy: NetworkPolicy, peer: Peer, address: Address) -> bool:
    if isinstance(peer, IPBlock):
        # "Except is a slice of CIDRs that should not be included within an IPBlock."
        return address in peer.cidr and not any(address in network for network in peer.excepts)
    selection = PodSelection.of(peer, policy.namespace)
    return any(
        selection.elements(endpoint, cluster.namespaces.get(endpoint.namespace))
        for endpoint in _pods_at(cluster, address)
    )


def _port_matches(cluster: Cluster, port: PolicyPort, packet: Packet) -> bool:
    if packet.protocol != port.protocol.number:
        return False
    match port.port:
        # "If this field is not provided, this matches all port names and numbers."
        case None:
            return True
        case str(name):
            # A name is looked up where the packet goes: the selected pod for ingress, the peer for egress.
            return any(
                (named.name, named.protocol, named.number) == (name, port.protocol, packet.port)
                for endpoint in _pods_at(cluster, packet.destination)
                for named in endpoint.ports
            )
        case int(number):
            # "endPort indicates that the range of ports from port to endPort, inclusive, should be allowed."
            return packet.port is not None and number <= packet.port <= (port.end_port or number)


def _pods_at(cluster: Cluster, address: Address) -> list[Endpoint]:
    return [e for e in cluster.endpoints.values() if address in e.addresses and e.standing is Standing.POD]
