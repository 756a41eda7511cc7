"""The chains of policies and of isolation groups.

Rules speak of connections, so a packet of either direction is judged by what the connection is: ``ct original saddr``
is the client, ``ct reply saddr`` the server once a Service is translated, ``ct reply proto-src`` the server's port. The
rules of a policy grow with its size: the ports of an entry are one set, tested before its peers.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from enforcer.model.addresses import Family, format_interval, merged, subtract
from enforcer.model.objects import Direction, IPBlock, NetworkPolicy, Peer, PolicyPort, PolicyRule, Protocol
from enforcer.policy.budget import FEW_BLOCKS
from enforcer.policy.isolation import Group
from enforcer.policy.sets import PodSelection, named_port
from enforcer.ruleset.objects import Chain, Counter, Set, Table, rule
from enforcer.ruleset.text import format_ports
from enforcer.translate import names

FIELDS = {Family.V4: "ip", Family.V6: "ip6"}
ALLOW = {direction: f"allow-{direction.value}" for direction in Direction}

_PEER_WORD = {Direction.INGRESS: "from", Direction.EGRESS: "to"}
_CLIENT, _SERVER = "ct original {ip} saddr", "ct reply {ip} saddr"
_INLINE_RULES = 4
"""An entry of as many rules is not given a chain of its own."""
FEW_POLICIES = 32
"""An isolation group of as many policies jumps to each of them; one of more jumps to sixteen parts of them."""


@dataclass(frozen=True, slots=True)
class PolicyChains:
    """What one policy and direction put into the ruleset.

    Attributes:
        chains: each after those that it jumps to; the last is the policy's own.
        sets: the sets that no pod is in, with their elements.
    """

    chains: tuple[Chain, ...]
    counter: Counter
    sets: tuple[tuple[Set, tuple[bytes, ...]], ...]

    @property
    def entry(self) -> Chain:
        """The chain that groups jump to."""
        return self.chains[-1]


def policy_chains(policy: NetworkPolicy, direction: Direction, *, untracked: bool) -> PolicyChains:
    """The chains of a policy's rules of one direction; what none of them allows falls off the end.

    Args:
        policy: the policy.
        direction: one of its types.
        untracked: whether connections that are not tracked, which only reach the node itself, are judged, too.
    """
    writer = _Writer(policy, direction)
    lines = [*writer.packets(), *writer.errors()]
    if untracked and direction is Direction.EGRESS:
        lines += writer.untracked()
    writer.chains.append(names.content_chain(writer.counter, tuple(lines)))
    return PolicyChains(tuple(writer.chains), Counter(Table.POLICY, writer.counter), tuple(writer.sets.items()))


@dataclass(frozen=True, slots=True)
class _Words:
    """How rules tell the peer, the protocol (for one family, or for both), and a port number."""

    peer: str
    protocols: tuple[tuple[Family | None, str], ...]
    number: str


_PROTOCOL = ((None, "meta l4proto {protocol}"),)
# An ICMP error belongs to the connection that it is about, but is no packet of its protocol.
_ICMP = {Family.V4: "icmp", Family.V6: "ipv6-icmp"}
_PROTOCOL_OF_ERROR = tuple((family, f"meta l4proto {icmp} ct protocol {{protocol}}") for family, icmp in _ICMP.items())
_NUMBER = "{match} ct reply proto-src"


@dataclass(frozen=True, slots=True)
class _Match:
    """What a rule compares, and the one family (None: either) of the connections that can meet it.

    ``pods`` says that it looks up which pods listen on a named port.
    """

    text: str = ""
    family: Family | None = None
    all_of_family: bool = False
    pods: bool = False


_ANY = _Match()


class _Writer:
    """Writes the rules of one policy and direction, and gathers the chains and sets that they need."""

    def __init__(self, policy: NetworkPolicy, direction: Direction) -> None:
        self.counter = names.policy_counter(policy.key, direction)
        self.chains: list[Chain] = []
        self.sets: dict[Set, tuple[bytes, ...]] = {}
        self._block_sets: dict[tuple[IPBlock, ...], Set | None] = {}
        self._policy = policy
        self._direction = direction
        self._peer_words = _CLIENT if direction is Direction.INGRESS else _SERVER

    def packets(self) -> list[str]:
        """The rules for the packets of connections."""
        return self._all(self._policy.rules[self._direction], "", _Words(self._peer_words, _PROTOCOL, _NUMBER))

    def errors(self) -> list[str]:
        """The rules for ICMP errors about connections; entries without ports allow them as they are."""
        entries = [entry if entry.ports else None for entry in self._policy.rules[self._direction]]
        return self._branch(entries, "related", _Words(self._peer_words, _PROTOCOL_OF_ERROR, _NUMBER))

    def untracked(self) -> list[str]:
        """The rules for packets of no connection, by their headers: entries whose peer may be a node."""
        entries: list[PolicyRule | None] = []
        for entry in self._policy.rules[self._direction]:
            # A name stands for a pod's port, and a selector for pods: neither is a node.
            blocks = tuple(peer for peer in entry.peers if isinstance(peer, IPBlock))
            ports = tuple(port for port in entry.ports if not isinstance(port.port, str))
            node = bool(blocks) == bool(entry.peers) and bool(ports) == bool(entry.ports)
            entries.append(PolicyRule(blocks, ports) if node else None)
        return self._branch(entries, "untracked", _Words("{ip} daddr", _PROTOCOL, "{protocol} dport"))

    def _branch(self, entries: Sequence[PolicyRule | None], state: str, words: _Words) -> list[str]:
        """A rule that sends packets of a ``ct state`` to a chain of their own; none if nothing would be in it."""
        lines = self._all(entries, f"/{state}", words)
        if not lines:
            return []
        self.chains.append(names.content_chain(f"{self.counter}/{state}", tuple(lines)))
        return [f"ct state {state} goto {self.chains[-1].name}"]

    def _all(self, entries: Sequence[PolicyRule | None], stem: str, words: _Words) -> list[str]:
        return [
            line
            for index, entry in enumerate(entries)
            if entry is not None
            for line in self._rules(index, entry, f"{self.counter}{stem}/{index}", words)
        ]

    def _rules(self, index: int, entry: PolicyRule, stem: str, words: _Words) -> list[str]:
        place = f"{self._direction.value}[{index}]"
        peers = list(self._peers(entry, place, words)) if entry.peers else [(place, _ANY)]
        ports = list(self._ports(entry.ports, words)) if entry.ports else [_ANY]
        if len(peers) * len(ports) > _INLINE_RULES and entry.ports and entry.peers:
            inner = names.content_chain(stem, tuple(self._allow(where, peer) for where, peer in peers))
            self.chains.append(inner)
            return [rule(port.text, verdict=f"jump {inner.name}", comment=place) for port in ports]
        return [
            self._allow(where, peer, port)
            for where, peer in peers
            for port in ports
            # No connection is of both families.
            if None in {peer.family, port.family} or peer.family is port.family
        ]

    def _allow(self, place: str, peer: _Match, port: _Match = _ANY) -> str:
        # What a port says of the family, a peer that is all of the family need not say again: nft would not list it.
        wanted = [port.text] if peer.all_of_family and port.family else [peer.text, port.text]
        if port.pods:
            # A pod that leaves the peers as its port comes must not be seen in both.
            wanted.reverse()
        wanted = [text for text in wanted if text]
        return rule(*wanted, counter=self.counter, verdict=f"goto {ALLOW[self._direction]}", comment=place)

    def _peers(self, entry: PolicyRule, place: str, words: _Words) -> Iterator[tuple[str, _Match]]:
        """For each peer and family: where it stands in the object, and the match. Many ipBlocks are one set."""
        blocks = [peer for peer in entry.peers if isinstance(peer, IPBlock)]
        by_family = {family: tuple(block for block in blocks if block.cidr.family is family) for family in Family}
        many = {family: found for family, found in by_family.items() if len(found) > FEW_BLOCKS}
        list_place = f"{place}.{_PEER_WORD[self._direction]}"
        for index, peer in enumerate(entry.peers):
            for family in Family:
                if isinstance(peer, IPBlock) and family in many:
                    continue
                match = self._peer(peer, family, words)
                if match is not None:
                    yield f"{list_place}[{index}]", _Match(match, family, match.startswith("meta nfproto"))
        for family, found in many.items():
            if (nft_set := self._block_set(found, family)) is not None:
                yield list_place, _Match(f"{words.peer.format(ip=FIELDS[family])} @{nft_set.name}", family)

    def _peer(self, peer: Peer, family: Family, words: _Words) -> str | None:
        field = words.peer.format(ip=FIELDS[family])
        if not isinstance(peer, IPBlock):
            return f"{field} @{names.pod_set(PodSelection.of(peer, self._policy.namespace), family).name}"
        if peer.cidr.family is not family:
            return None
        if peer.excepts:
            nft_set = self._block_set((peer,), family)
            return None if nft_set is None else f"{field} @{nft_set.name}"
        if peer.cidr.length == 0:
            return f"meta nfproto ip{family.label}"
        return f"{field} {format_interval(peer.cidr.interval, family)}"

    def _block_set(self, blocks: tuple[IPBlock, ...], family: Family) -> Set | None:
        """The set of what ipBlocks of a family allow together, worked out once; None if nothing is left."""
        if blocks not in self._block_sets:
            intervals = merged(interval for block in blocks for interval in subtract(block.cidr, block.excepts))
            nft_set = names.blocks_set(blocks, family) if intervals else None
            if nft_set is not None:
                width = nft_set.key[0].width
                packed = (tuple(end.to_bytes(width, "big") for end in interval) for interval in intervals)
                self.sets[nft_set] = tuple(first + last for first, last in packed)
            self._block_sets[blocks] = nft_set
        return self._block_sets[blocks]

    def _ports(self, ports: Iterable[PolicyPort], words: _Words) -> Iterator[_Match]:
        """The matches of an entry's ports: at most one for numbers, and one a family for names, of each protocol."""
        for protocol in Protocol:
            wanted = [port for port in ports if port.protocol is protocol]
            for family, template in words.protocols if wanted else ():
                match = template.format(protocol=protocol.label)
                if any(port.port is None for port in wanted):
                    yield _Match(match, family)
                    continue
                number = words.number.format(match=match, protocol=protocol.label)
                numbers = merged((p.port, p.end_port or p.port) for p in wanted if isinstance(p.port, int))
                if len(numbers) == 1:
                    yield _Match(f"{number} {format_ports(numbers[0])}", family)
                elif numbers:
                    yield _Match(f"{number} @{self._number_set(numbers).name}", family)
                names_wanted = tuple(sorted({port.port for port in wanted if isinstance(port.port, str)}))
                yield from self._named(names_wanted, protocol, match, family)

    def _named(
        self, wanted: tuple[str, ...], protocol: Protocol, match: str, family: Family | None
    ) -> Iterator[_Match]:
        if not wanted:
            return
        ports = named_port(self._direction, self._policy.namespace, wanted, protocol)
        for one in Family if family is None else (family,):
            server = _SERVER.format(ip=FIELDS[one])
            yield _Match(f"{match} {server} . ct reply proto-src @{names.pod_set(ports, one).name}", one, pods=True)

    def _number_set(self, numbers: tuple[tuple[int, int], ...]) -> Set:
        nft_set = names.port_number_set(numbers)
        width = 2
        self.sets[nft_set] = tuple(
            first.to_bytes(width, "big") + (last.to_bytes(width, "big") if nft_set.interval else b"")
            for first, last in numbers
        )
        return nft_set


def group_counter(group: Group) -> Counter:
    """The counter of what is denied to an isolation group."""
    return Counter(Table.POLICY, names.denied_counter(group), names.group_comment(group))


def group_chains(group: Group, entries: Mapping[str, str], secret: bytes) -> tuple[Chain, ...]:
    """The chains that decide for an isolation group: those of its policies in turn, then a counted drop.

    Above ``FEW_POLICIES`` the policies are in parts by a keyed digest of their names. Groups that differ in one policy
    share all other parts, and an edit of a policy writes one part of a group again.

    Args:
        group: the isolation group.
        entries: the name of each policy's chain, by the policy's key; in the group's order.
        secret: the digest's key; who knows it can choose names that all fall to one part.

    Returns:
        Each chain after those that it jumps to; the last is the group's own.
    """
    parts = () if len(entries) <= FEW_POLICIES else _parts(group, entries, secret)
    targets = [part.name for part in parts] or list(entries.values())
    lines = (*(f"jump {target}" for target in targets), rule(counter=names.denied_counter(group), verdict="drop"))
    return (*parts, names.content_chain(names.group_stem(group), lines, names.group_comment(group)))


def _parts(group: Group, entries: Mapping[str, str], secret: bytes) -> tuple[Chain, ...]:
    parts: dict[str, list[str]] = {}
    for key, name in entries.items():
        part = hashlib.blake2b(key.encode(), key=secret, digest_size=1).hexdigest()[0]
        parts.setdefault(part, []).append(f"jump {name}")
    return tuple(
        names.content_chain(names.part_stem(group, part), tuple(jumps)) for part, jumps in sorted(parts.items())
    )
