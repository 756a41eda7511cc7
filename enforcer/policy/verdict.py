"""The executable reading of the NetworkPolicy API: may this connection be, and which policy says so?

Nothing here is fast and nothing is compiled: each branch stands beside the sentence of the API that it implements
(networking.k8s.io/v1, quoted). The compiled ruleset is tested against it, and ``drawbridge explain`` speaks with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from enforcer.model.addresses import Address
from enforcer.model.objects import Direction, IPBlock, NetworkPolicy, Peer, PolicyPort, PolicyRule
from enforcer.policy.endpoints import Endpoint, Standing
from enforcer.policy.isolation import Group, group_of, group_of_address, selects
from enforcer.policy.resolve import Cluster
from enforcer.policy.sets import PodSelection


@dataclass(frozen=True, slots=True)
class Connection:
    """Who began it and who answers, once a Service is translated: packets of either direction are judged by it.

    ``protocol`` is the IP protocol's number, ``port`` the server's, None where the protocol has none.
    """

    client: Address
    server: Address
    protocol: int
    port: int | None = None


@dataclass(frozen=True, slots=True)
class Decision:
    """One direction's verdict on a connection.

    ``endpoints`` are the keys of those whose policies were asked (none: the address is no pod's).
    ``group`` is why they are isolated, None if they are not. ``policy`` and ``rule`` (an index) allowed the connection.
    """

    direction: Direction
    allowed: bool
    endpoints: tuple[str, ...] = ()
    group: Group | None = None
    policy: str | None = None
    rule: int | None = None


def verdict(cluster: Cluster, connection: Connection) -> tuple[Decision, Decision]:
    """Judge a connection at its client (egress), then at its server (ingress).

    "For a connection from a source pod to a destination pod to be allowed, both the egress policy on the source pod
    and the ingress policy on the destination pod need to allow the connection."
    """
    return decide(cluster, connection, Direction.EGRESS), decide(cluster, connection, Direction.INGRESS)


def decide(cluster: Cluster, connection: Connection, direction: Direction) -> Decision:
    """Judge a connection in one direction, from the policies of the pod that has its address."""
    egress = direction is Direction.EGRESS
    own, peer = (connection.client, connection.server) if egress else (connection.server, connection.client)
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
    # A name is looked up where the connection goes: the selected pod for ingress, the peer for egress.
    servers = _pods_at(cluster, connection.server) if egress else claimants
    # "Network policies do not conflict; they are additive": one rule of one policy is enough.
    for key in group.policies:
        policy = cluster.policies[key]
        for index, rule in enumerate(policy.rules[direction]):
            if _peers_match(cluster, policy, rule, peer) and _ports_match(rule, connection, servers):
                return Decision(direction, allowed=True, endpoints=keys, group=group, policy=key, rule=index)
    return Decision(direction, allowed=False, endpoints=keys, group=group)


def _peers_match(cluster: Cluster, policy: NetworkPolicy, rule: PolicyRule, address: Address) -> bool:
    # "If this field is empty or missing, this rule matches all sources" (or destinations).
    return not rule.peers or any(_peer_matches(cluster, policy, peer, address) for peer in rule.peers)


def _peer_matches(cluster: Cluster, policy: NetworkPolicy, peer: Peer, address: Address) -> bool:
    if isinstance(peer, IPBlock):
        # "Except is a slice of CIDRs that should not be included within an IPBlock."
        return address in peer.cidr and not any(address in network for network in peer.excepts)
    selection = PodSelection.of(peer, policy.namespace)
    return any(
        selection.elements(endpoint, cluster.namespaces.get(endpoint.namespace))
        for endpoint in _pods_at(cluster, address)
    )


def _ports_match(rule: PolicyRule, connection: Connection, servers: Sequence[Endpoint]) -> bool:
    # "If this field is empty or missing, this rule matches all ports."
    return not rule.ports or any(_port_matches(port, connection, servers) for port in rule.ports)


def _port_matches(port: PolicyPort, connection: Connection, servers: Sequence[Endpoint]) -> bool:
    if connection.protocol != port.protocol.number:
        return False
    match port.port:
        # "If this field is not provided, this matches all port names and numbers."
        case None:
            return True
        case str(name):
            return any(
                (named.name, named.protocol, named.number) == (name, port.protocol, connection.port)
                for endpoint in servers
                for named in endpoint.ports
            )
        case int(number):
            # "endPort indicates that the range of ports from port to endPort, inclusive, should be allowed."
            return connection.port is not None and number <= connection.port <= (port.end_port or number)


def _pods_at(cluster: Cluster, address: Address) -> list[Endpoint]:
    return [e for e in cluster.endpoints.values() if address in e.addresses and e.standing is Standing.POD]
