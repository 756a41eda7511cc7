"""The base chains, and what they refer to: what every packet of a pod meets, whatever policies say."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from enforcer.model.addresses import Family, Network, merged
from enforcer.model.marks import ConnectionMark
from enforcer.model.objects import Direction
from enforcer.model.tunnel import LINK_PREFIX, Vxlan
from enforcer.ruleset.objects import PLAIN, Chain, Counter, Element, Hook, Set, Table, rule
from enforcer.translate import names
from enforcer.translate.rules import ALLOW, FIELDS

BRIDGE = "drawbridge0"
PORT_PREFIX = "dbr"
"""How the host side of a pod's veth pair is named, and what the bridge's own name does not begin with."""

DENIED = {direction: f"denied/{direction.value}" for direction in Direction}
NO_FLOW = "denied/no-flow"
UNKNOWN_SOURCE = "denied/unknown-source"
UNKNOWN_POD = "denied/unknown-pod"
FORGED = "denied/forged"
TUNNEL = "denied/tunnel"
DENIED_BY_NO_POLICY = {
    name: name.removeprefix("denied/")
    for name in (*DENIED.values(), NO_FLOW, UNKNOWN_SOURCE, UNKNOWN_POD, FORGED, TUNNEL)
}
"""Counters of what is denied for another reason than a policy, with that reason."""

_ALL = 0xFFFFFFFF
# Neighbour discovery and router messages are of the link, not of a connection that policy could mean (RFC 4861).
_DISCOVERY = "nd-router-solicit, nd-router-advert, nd-neighbor-solicit, nd-neighbor-advert, nd-redirect"
_WORDS = "ct original = the client, ct reply = the server and its port, ct mark = the epoch of the last verdict"
_CLIENT, _SERVER = "ct original {ip} saddr", "ct reply {ip} saddr"


@dataclass(frozen=True, slots=True)
class BaseSettings:
    """What a node's operator decides of the base chains.

    Attributes:
        pod_to_own_node: let pods reach their own node whatever their egress policy says.
        mark: the bits of the connection mark that say which connections were judged.
        masquerade: give what pods send out of the cluster an address of the node.
        not_masqueraded: networks outside the cluster that see the pods' own addresses.
        tunnel: what the packets of the tunnel between nodes are known by; None where there is none.
        close_own_networks: close the addresses of this node's pod networks that no pod is known for; for pods that
            another pod network attaches, of which nothing is known before their status says their address.
        secret: decides which policies of a large isolation group share a chain, so that nobody can choose names of
            policies that all fall to one.
    """

    pod_to_own_node: bool = False
    mark: ConnectionMark = field(default_factory=ConnectionMark)
    masquerade: bool = False
    not_masqueraded: tuple[Network, ...] = ()
    tunnel: Vxlan | None = None
    close_own_networks: bool = False
    secret: bytes = field(default=b"", repr=False)


EPOCH = names.epoch_set()


def stamp_chain(mark: ConnectionMark, epoch: int | None) -> Chain:
    """The chain that stamps a connection whose egress was allowed with an epoch; without one it does nothing."""
    stamp = None if epoch is None else (mark.mask, mark.egress_judged(epoch))
    rules = () if stamp is None else (f"ct mark set ct mark & 0x{~stamp[0] & _ALL | stamp[1]:08x} | 0x{stamp[1]:08x}",)
    comment = "allowed by egress in this epoch; its ingress is still to be judged"
    return Chain(Table.POLICY, "stamp", rules, comment, epoch=True, stamp=stamp)


def epoch_elements(mark: ConnectionMark, epoch: int) -> Mapping[bytes, Element]:
    """The element of ``EPOCH`` while an epoch lasts."""
    return {mark.judged(epoch).to_bytes(4, sys.byteorder): PLAIN}


def _verdict_chains(mark: ConnectionMark) -> Iterator[Chain]:
    """The chains that pass what was judged in this epoch, and those that allow.

    A connection that egress has allowed is stamped with the epoch and a bit that says that its ingress is still to be
    judged; ingress takes that bit away, if the epoch is the present one.
    """
    of_epoch, judged = f"ct mark & 0x{mark.epoch_mask:08x} == @epoch", f"ct mark & 0x{mark.mask:08x} == @epoch"
    pending = mark.mask & ~mark.epoch_mask
    for name, rules, comment in (
        ("fast", (f"{judged} accept",), "connections that both directions have allowed in this epoch"),
        ("fast-to-node", (f"{of_epoch} accept",), "connections that egress has allowed in this epoch"),
        (ALLOW[Direction.EGRESS], ("jump stamp", "accept"), "allowed by egress"),
        (
            ALLOW[Direction.INGRESS],
            (f"{of_epoch} ct mark set ct mark & 0x{~pending & _ALL:08x} accept", "accept"),
            "allowed by ingress: if egress has allowed it in this epoch, its next packets take the fast way",
        ),
    ):
        yield Chain(Table.POLICY, name, rules, comment)


def static_sets(settings: BaseSettings) -> Iterator[Set]:
    """The sets and maps that the base chains refer to."""
    yield EPOCH
    for family in Family:
        yield names.local_set(family)
        yield names.self_set(family)
        for direction in Direction:
            yield names.dispatch_map(direction, family)
            yield names.isolated_set(direction, family)
        yield names.port_set(family)
        if settings.masquerade:
            yield names.network_set(family)
        if settings.tunnel is not None:
            yield names.node_set(family)
        if settings.close_own_networks:
            yield names.own_network_set(family)


def static_counters(settings: BaseSettings) -> Iterator[Counter]:
    """The counters of what is dropped by no policy's chain."""
    for direction, name in DENIED.items():
        yield Counter(
            Table.POLICY, name, f"dropped because a pod is isolated for {direction.value}, and no chain decided"
        )
    yield Counter(Table.POLICY, NO_FLOW, "of no connection (INVALID or not tracked), from or to an isolated pod")
    yield Counter(Table.POLICY, UNKNOWN_SOURCE, "from a bridge port, with an address that is no pod's")
    if settings.tunnel is not None:
        yield Counter(Table.POLICY, TUNNEL, "VXLAN that is not from node to node, or has an address of our pods")
    if settings.close_own_networks:
        yield Counter(Table.POLICY, UNKNOWN_POD, "from or to an address of this node's pods that is no known pod's")
    yield Counter(Table.GUARD, FORGED, "sent by a pod from an address that is not its own, or to loopback")


def base_chains(settings: BaseSettings) -> Iterator[Chain]:
    """The base chains, and those that they refer to whatever policies say.

    Egress and ingress are two base chains, so an accept in the first still meets the second.
    """
    backstop = {
        direction: (
            *_of_families(f"{field} vmap @{direction.value}-{{v}}"),
            *_of_families(f'{field} @isolated-{direction.value}-{{v}} counter name "{DENIED[direction]}" drop'),
        )
        for direction, field in ((Direction.EGRESS, _CLIENT), (Direction.INGRESS, _SERVER))
    }

    def to_itself(direction: Direction) -> tuple[str, ...]:
        return _of_families(f"{_CLIENT} . {_SERVER} @self-{{v}} goto {ALLOW[direction]}")

    def closed(side: str, first: str = "") -> tuple[str, ...]:
        line = (
            f'{first}{{ip}} {side} @own-networks-{{v}} {{ip}} {side} != @local-{{v}} counter name "{UNKNOWN_POD}" drop'
        )
        return _of_families(line) if settings.close_own_networks else ()

    unknown = f'iifname "{BRIDGE}" {{ip}} saddr != @local-{{v}} counter name "{UNKNOWN_SOURCE}" drop'
    yield Chain(
        Table.POLICY,
        "from-pod",
        (
            "jump fast",
            *_of_families(unknown),
            *closed("saddr"),
            "ct state invalid,untracked goto no-flow",
            *to_itself(Direction.EGRESS),
            *backstop[Direction.EGRESS],
            # Only what has an end here is stamped: other connections that this node forwards are not ours to mark.
            *_of_families(f"{_CLIENT} @local-{{v}} goto {ALLOW[Direction.EGRESS]}"),
            *_of_families(f"{_SERVER} @local-{{v}} goto {ALLOW[Direction.EGRESS]}"),
        ),
        f"egress: {_WORDS}",
        Hook("forward", "filter - 1", -1),
    )
    yield Chain(
        Table.POLICY,
        "to-pod",
        (
            "jump fast",
            *closed("daddr"),
            "ct state invalid,untracked goto no-flow",
            *to_itself(Direction.INGRESS),
            *backstop[Direction.INGRESS],
            f"goto {ALLOW[Direction.INGRESS]}",
        ),
        f"ingress: {_WORDS}",
        Hook("forward", "filter", 0),
    )
    yield Chain(
        Table.POLICY,
        "to-node",
        ()
        if settings.pod_to_own_node
        else (
            "jump fast-to-node",
            f"icmpv6 type {{ {_DISCOVERY} }} accept",
            # The node itself has addresses of its pod networks, too.
            *closed("saddr", 'iifname != "lo" '),
            *_of_families("ct state untracked {ip} saddr vmap @egress-{v}"),
            *_of_families(
                f'ct state invalid,untracked {{ip}} saddr @isolated-egress-{{v}} counter name "{NO_FLOW}" drop'
            ),
            *backstop[Direction.EGRESS],
        ),
        "egress of pods to this node itself; what the node began is not judged, and not stamped",
        Hook("input", "filter", 0),
    )
    yield from _verdict_chains(settings.mark)
    isolated = [f"@isolated-{direction.value}-{{v}}" for direction in Direction]
    yield Chain(
        Table.POLICY,
        "no-flow",
        (
            # A bridge that hands its frames to this hook hands on the discovery of its own link; what was routed has a
            # smaller hop limit (RFC 4861, section 7.1).
            f"icmpv6 type {{ {_DISCOVERY} }} ip6 hoplimit 255 accept",
            *(
                line
                for side in ("saddr", "daddr")
                for nft_set in isolated
                for line in _of_families(f'{{ip}} {side} {nft_set} counter name "{NO_FLOW}" drop')
            ),
        ),
        "what belongs to no connection (INVALID or not tracked) passes no isolated pod",
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


def network_elements(networks: Iterable[Network], family: Family) -> Iterator[bytes]:
    """The elements of a set of networks: first and last address of each interval; those that touch are made one."""
    width = family.bits // 8
    for first, last in merged(network.interval for network in networks if network.family is family):
        yield first.to_bytes(width, "big") + last.to_bytes(width, "big")


def _of_families(line: str) -> tuple[str, ...]:
    return tuple(line.format(ip=FIELDS[family], v=family.label) for family in Family)


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
