"""May a flow pass this node, told from the sets that are kept up to date: ``verdict`` at the speed of a look-up.

It reads what the kernel's rules read, groups and sets, so it judges an established flow as the kernel would judge it if
it began now.
"""

from __future__ import annotations

from enforcer.model.addresses import Address
from enforcer.model.objects import Direction, IPBlock, NetworkPolicy, Peer, PolicyPort, PolicyRule
from enforcer.policy.index import PolicyIndex
from enforcer.policy.sets import PodSelection, named_port
from enforcer.policy.verdict import Packet


def allows(index: PolicyIndex, packet: Packet) -> bool:
    """Whether the policies of this node's pods let a flow pass, judged by its first packet."""
    if packet.source == packet.destination:
        return True
    return _allows(index, packet, Direction.EGRESS, packet.source, packet.destination) and _allows(
        index, packet, Direction.INGRESS, packet.destination, packet.source
    )


def _allows(index: PolicyIndex, packet: Packet, direction: Direction, own: Address, peer: Address) -> bool:
    group = index.group(direction, own)
    if group is None:
        return True
    policies = () if group.closed else (index.cluster.policies[key] for key in group.policies)
    return any(
        _rule_matches(index, policy, rule, packet, direction, peer)
        for policy in policies
        for rule in policy.rules[direction]
    )


def _rule_matches(
    index: PolicyIndex, policy: NetworkPolicy, rule: PolicyRule, packet: Packet, direction: Direction, peer: Address
) -> bool:
    return (not rule.peers or any(_peer_matches(index, policy, entry, peer) for entry in rule.peers)) and (
        not rule.ports or any(_port_matches(index, policy, port, packet, direction) for port in rule.ports)
    )


def _peer_matches(index: PolicyIndex, policy: NetworkPolicy, peer: Peer, address: Address) -> bool:
    if isinstance(peer, IPBlock):
        return address in peer.cidr and not any(address in network for network in peer.excepts)
    return index.holds(PodSelection.of(peer, policy.namespace), address)


def _port_matches(
    index: PolicyIndex, policy: NetworkPolicy, port: PolicyPort, packet: Packet, direction: Direction
) -> bool:
    if packet.protocol != port.protocol.number:
        return False
    if port.port is None:
        return True
    if packet.port is None:
        return False
    if isinstance(port.port, str):
        of = named_port(direction, policy.namespace, port.port, port.protocol)
        return index.holds(of, (packet.destination, port.protocol, packet.port))
    return port.port <= packet.port <= (port.end_port or port.port)
