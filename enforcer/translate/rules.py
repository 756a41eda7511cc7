"""The chains: a policy's rules, a group's decision, and the base chains that every packet of a pod meets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from enforcer.model.addresses import Family, Network, format_interval, subtract
from enforcer.model.objects import Direction, IPBlock, NetworkPolicy, Peer, PolicyRule, Protocol
from enforcer.model.tunnel import LINK_PREFIX, Vxlan
from enforcer.policy.isolation import Group
from enforcer.policy.sets import PodSelection, named_port
from enforcer.ruleset.objects import Chain, Counter, Hook, Set, Table, rule
from enforcer.translate import names

BRIDGE = "drawbridge0"
PORT_PREFIX = "dbr"
"""How the host side of a pod's veth pair is named, and what the bridge's own name does not begin with."""

DENIED = {direction: f"denied/{direction.value}" for direction in Direction}
UNKNOWN_SOURCE = "denied/unknown-source"
UNKNOWN_POD = "denied/unknown-pod"
REVOKED = "denied/revoked"
FORGED = "denied/forged"
TUNNEL = "denied/tunnel"


@dataclass(frozen=True, slots=True)
class BaseSettings:
    """What a node's operator decides of the base chains.

    Attributes:
        pod_to_own_node: let pods reach their own node whatever their egress policy says.
        revoked_mark: the bit of the conntrack mark that flows have which policy does not allow any more; 0 for none.
        masquerade: give what pods send out of the cluster an address of the node.
        not_masqueraded: networks outside the cluster that see the pods' own addresses.
        tunnel: what the packets of the tunnel between nodes are known by; None where there is none.
        close_own_networks: close the addresses of this node's pod networks that no pod is known for; for pods that
            another pod network attaches, of which nothing is known before their status says their address.
    """

    pod_to_own_node: bool = False
    revoked_mark: int = 0x02000000
    masquerade: bool = False
    not_masqueraded: tuple[Network, ...] = ()
    tunnel: Vxlan | None = None
    close_own_networks: bool = False


_FIELDS = {Family.V4: "ip", Family.V6: "ip6"}
_PEER_SIDE = {Direction.INGRESS: "saddr", Direction.EGRESS: "daddr"}
_PEER_WORD = {Direction.INGRESS: "from", Direction.EGRESS: "to"}


def policy_chains(policy: NetworkPolicy) -> Iterator[tuple[Chain, Counter]]:
    """A chain of accepting rules and its counter for each direction of a policy; what no rule accepts falls through."""
    for direction, rules in policy.rules.items():
        name = names.policy_chain(policy.key, direction)
        lines = tuple(
            line for index, entry in enumerate(rules) for line in _rule_lines(policy, entry, direction, index)
        )
        yield Chain(Table.POLICY, name, lines), Counter(Table.POLICY, name)


def blocks_of(policy: NetworkPolicy) -> frozenset[IPBlock]:
    """The ipBlocks of a policy that need an interval set: those with excepts that leave anything."""
    return frozenset(
        peer
        for rules in policy.rules.values()
        for entry in rules
        for peer in entry.peers
        if isinstance(peer, IPBlock) and peer.excepts and subtract(peer.cidr, peer.excepts)
    )


def block_elements(block: IPBlock) -> Iterator[bytes]:
    """The elements of an ipBlock's set: first and last address of each interval that the excepts leave."""
    width = block.cidr.family.bits // 8
    for first, last in subtract(block.cidr, block.excepts):
        yield first.to_bytes(width, "big") + last.to_bytes(width, "big")


def _rule_lines(policy: NetworkPolicy, entry: PolicyRule, direction: Direction, index: int) -> Iterator[str]:
    counter = names.policy_chain(policy.key, direction)
    place = f"{direction.value}[{index}]"
    for peer_place, family, peer_match in _peer_matches(policy, entry, direction, place):
        for port_match in _port_matches(policy, entry, direction, family):
            yield rule(*peer_match, *port_match, counter=counter, verdict="accept", comment=peer_place)


def _peer_matches(
    policy: NetworkPolicy, entry: PolicyRule, direction: Direction, place: str
) -> Iterator[tuple[str, Family | None, list[str]]]:
    """For each peer and family: where it stands in the object, its family (None: both), and the match."""
    if not entry.peers:
        yield place, None, []
    for index, peer in enumerate(entry.peers):
        where = f"{place}.{_PEER_WORD[direction]}[{index}]"
        for family in Family:
            match = _address_match(policy, peer, direction, family)
            if match is not None:
                yield where, family, match


def _address_match(policy: NetworkPolicy, peer: Peer, direction: Direction, family: Family) -> list[str] | None:
    field = f"{_FIELDS[family]} {_PEER_SIDE[direction]}"
    if not isinstance(peer, IPBlock):
        return [f"{field} @{names.pod_set(PodSelection.of(peer, policy.namespace), family).name}"]
    intervals = subtract(peer.cidr, peer.excepts)
    if peer.cidr.family is not family or not intervals:
        return None
    if peer.excepts:
        return [f"{field} @{names.block_set(peer).name}"]
    if peer.cidr.length == 0:
        return [f"meta nfproto ip{family.label}"]
    return [f"{field} {format_interval(intervals[0], family)}"]


def _port_matches(
    policy: NetworkPolicy, entry: PolicyRule, direction: Direction, family: Family | None
) -> Iterator[list[str]]:
    """The match of each group of ports that nft can say in one rule."""
    if not entry.ports:
        yield []
    for protocol in Protocol:
        ports = [port for port in entry.ports if port.protocol is protocol]
        if any(port.port is None for port in ports):
            yield [f"meta l4proto {protocol.label}"]
            continue
        ranges = [(p.port, p.end_port or p.port) for p in ports if isinstance(p.port, int)]
        if ranges:
            yield [f"{protocol.label} dport {_range_text(_merged(ranges))}"]
        for name in dict.fromkeys(port.port for port in ports if isinstance(port.port, str)):
            of = named_port(direction, policy.namespace, name, protocol)
            for one in Family if family is None else (family,):
                key = f"{_FIELDS[one]} daddr . meta l4proto . th dport"
                yield [f"{key} @{names.pod_set(of, one).name}"]


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ranges of ports in order, those that overlap or touch made one: nft prints them so."""
    merged: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(merged[-1][1], last))
        else:
            merged.append((first, last))
    return merged


def _range_text(ranges: list[tuple[int, int]]) -> str:
    words = [str(first) if first == last else f"{first}-{last}" for first, last in ranges]
    return words[0] if len(words) == 1 else f"{{ {', '.join(words)} }}"


def group_chain(group: Group) -> Chain:
    """The chain of an isolation group: the policies' rules in turn, then a counted drop."""
    jumps = () if group.closed else tuple(f"jump {names.policy_chain(key, group.direction)}" for key in group.policies)
    return Chain(
        Table.POLICY,
        names.group_chain(group),
        (*jumps, rule(counter=DENIED[group.direction], verdict="drop")),
        names.group_comment(group),
    )


def network_elements(networks: Iterable[Network], family: Family) -> Iterator[bytes]:
    """The elements of a set of networks: first and last address of each interval; those that touch are made one."""
    width = family.bits // 8
    for first, last in _merged([network.interval for network in networks if network.family is family]):
        yield first.to_bytes(width, "big") + last.to_bytes(width, "big")


def static_sets(settings: BaseSettings) -> Iterator[Set]:
    """The sets and maps that the base chains refer to."""
    for family in Family:
        yield names.local_set(family)
        yield names.self_set(family)
        for direction in Direction:
            yield names.dispatch_map(direction, family)
        yield names.port_set(family)
        if settings.masquerade:
            yield names.network_set(family)
        if settings.tunnel is not None:
            yield names.node_set(family)
        if settings.close_own_networks:
            yield names.own_network_set(family)


def static_counters(settings: BaseSettings) -> Iterator[Counter]:
    """The counters of what is dropped."""
    for direction, name in DENIED.items():
        yield Counter(Table.POLICY, name, f"dropped by the {direction.value} isolation of a pod")
    yield Counter(Table.POLICY, REVOKED, "of established flows that policy does not allow any more")
    yield Counter(Table.POLICY, UNKNOWN_SOURCE, "from a bridge port, with an address that is no pod's")
    if settings.tunnel is not None:
        yield Counter(Table.POLICY, TUNNEL, "VXLAN that is not from node to node, or has an address of our pods")
    if settings.close_own_networks:
        yield Counter(Table.POLICY, UNKNOWN_POD, "from or to an address of this node's pods that is no known pod's")
    yield Counter(Table.GUARD, FORGED, "sent by a pod from an address that is not its own, or to loopback")


def base_chains(settings: BaseSettings) -> Iterator[Chain]:
    """The base chains. Egress and ingress are two, so an accept in the first still meets the second."""
    mark = f"0x{settings.revoked_mark:08x}"
    revoked = f'ct mark & {mark} == {mark} counter name "{REVOKED}" drop'
    # What answers a connection of the node itself comes in here, too, and is not judged: only what pods began.
    revoked_to_node = f"ct direction original {revoked}"
    established = "ct state established,related accept"
    # Neighbour discovery and router messages are of the link, not of a flow that policy could mean (RFC 4861).
    types = "nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, nd-redirect"
    discovery = f"icmpv6 type {{ {types} }} accept"
    first = (*((revoked,) if settings.revoked_mark else ()), established, discovery)
    first_to_node = (*((revoked_to_node,) if settings.revoked_mark else ()), established, discovery)

    to_itself = _of_families("{ip} saddr . {ip} daddr @self-{v} accept")
    egress = _of_families("{ip} saddr vmap @egress-{v}")
    unknown = f'iifname "{BRIDGE}" {{ip}} saddr != @local-{{v}} counter name "{UNKNOWN_SOURCE}" drop'

    def closed(side: str, first: str = "") -> tuple[str, ...]:
        line = (
            f'{first}{{ip}} {side} @own-networks-{{v}} {{ip}} {side} != @local-{{v}} counter name "{UNKNOWN_POD}" drop'
        )
        return _of_families(line) if settings.close_own_networks else ()

    yield Chain(
        Table.POLICY,
        "from-pod",
        (*first, *_of_families(unknown), *closed("saddr"), *to_itself, *egress),
        "what pods send through this node, by their egress policies",
        Hook("forward", "filter - 1", -1),
    )
    yield Chain(
        Table.POLICY,
        "to-pod",
        (*first, *closed("daddr"), *to_itself, *_of_families("{ip} daddr vmap @ingress-{v}")),
        "what reaches pods through this node, by their ingress policies",
        Hook("forward", "filter", 0),
    )
    # The node itself has addresses of its pod networks, too.
    to_node = (*first_to_node, *closed("saddr", 'iifname != "lo" '), *egress)
    yield Chain(
        Table.POLICY,
        "to-node",
        (established, discovery) if settings.pod_to_own_node else to_node,
        "what pods send to this node itself, by their egress policies",
        Hook("input", "filter", 0),
    )
    if settings.masquerade:
        yield Chain(
            Table.POLICY,
            "to-outside",
            _of_families(
                "{ip} saddr @local-{v} {ip} saddr @pod-networks-{v} "
                "{ip} daddr != @pod-networks-{v} masquerade fully-random"
            ),
            "what pods send out of the cluster gets an address of the node",
            Hook("postrouting", "srcnat", 100, "nat"),
        )
    if settings.tunnel is not None:
        yield from _tunnel_chains(settings.tunnel)
    yield _guard()


def _of_families(line: str) -> tuple[str, ...]:
    return tuple(line.format(ip=_FIELDS[family], v=family.label) for family in Family)


def _tunnel_chains(vxlan: Vxlan) -> Iterator[Chain]:
    """Who may send into the tunnel: a node, to a node, at its own word; and no address of our pods comes out of it.

    A pod is masqueraded as its node, so a source alone says little. A node passes on nothing that would be the tunnel's
    at another; and what was sent to another address or port than a tunnel's, and comes here, is no node's. The packets
    are told by their VNI, too: the port may be another VXLAN's as well.
    """
    ours = f"udp dport {vxlan.port} @th,96,24 0x{vxlan.id:x}"
    drop = rule(counter=TUNNEL, verdict="drop")
    inner = _of_families(f'iifname "{LINK_PREFIX}*" {{ip}} saddr @local-{{v}} {drop}')
    from_none, to_none = (_of_families(f"{{ip}} {side} != @nodes-{{v}} {ours} {drop}") for side in ("saddr", "daddr"))
    yield Chain(
        Table.POLICY,
        "tunnel-input",
        (*from_none, *to_none, f"{ours} ct status dnat {drop}", *inner),
        "what comes by the tunnel, and out of it to this node",
        Hook("input", "filter - 1", -1),
    )
    yield Chain(
        Table.POLICY,
        "tunnel-forward",
        (f"{ours} {drop}", *inner),
        "what would get into a tunnel through this node, and out of ours to pods",
        Hook("forward", "filter - 2", -2),
    )


def _guard() -> Chain:
    """What a bridge port may send: frames of IPv4, ARP and IPv6 with the pod's own addresses, without a VLAN tag.

    Where others set ``route_localnet``, as portmap does on the bridge, the node's loopback would be reached.
    Neighbour advertisements, router advertisements and redirects have no use on a port whose neighbours are all
    permanent, so they need no check of their target: they are dropped.
    """
    own_arp = "iifname . {field} . arp saddr ip @port-v4"
    drop = rule(counter=FORGED, verdict="drop")
    return Chain(
        Table.GUARD,
        "from-port",
        (
            f'iifname != "{PORT_PREFIX}*" accept',
            f"ether type {{ 8021q, 8021ad }} {drop}",
            f"ip daddr 127.0.0.0/8 {drop}",
            "iifname . ether saddr . ip saddr @port-v4 accept",
            f"{own_arp.format(field='ether saddr')} {own_arp.format(field='arp saddr ether')} accept",
            f"icmpv6 type {{ nd-router-advert, nd-neighbor-advert, nd-redirect }} {drop}",
            "iifname . ether saddr . ip6 saddr @port-v6 accept",
            drop,
        ),
        "frames from the bridge ports of pods",
        Hook("prerouting", "dstnat", -300),
    )
