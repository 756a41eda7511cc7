"""The names and comments that a person reads in ``nft list ruleset``, and the keys of elements.

Names are words first, with a digest where the words are too long or do not tell one object from another. Names of
namespaces, policies and ports are DNS names, so a ``_`` tells a digest from each of them.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from enforcer.model.addresses import Address, Family, Network, family_of
from enforcer.model.objects import Direction, IPBlock
from enforcer.model.selectors import LabelSelector, Operator
from enforcer.policy.isolation import Group
from enforcer.policy.sets import Element, NamedPort, PodSelection, PodSet
from enforcer.ruleset.objects import (
    CONTENT_DIGITS,
    NAME_CHARACTERS,
    Chain,
    KeyType,
    Set,
    Table,
    Use,
    comment_of,
    digest,
)
from enforcer.ruleset.text import format_ports

ADDRESS = {Family.V4: KeyType.IPV4_ADDR, Family.V6: KeyType.IPV6_ADDR}
_DENIED = re.compile(
    r"denied/(?P<closed>closed/)?(?P<direction>ingress|egress)/(?P<namespace>[^/]+)/(?P<policies>[^/]+)\Z"
)
_CUT = re.compile(r"_[0-9a-f]{32}\Z")
_PLAIN = re.compile(r"[A-Za-z0-9-]+\Z")
_NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9-]+")
_SELECTOR_CHARACTERS, _PORT_CHARACTERS = 40, 80


def policy_counter(key: str, direction: Direction) -> str:
    """The counter of what a policy's rules of one direction allow, and the stem of its chains' names."""
    return _cut(f"policy/{key}/{direction.value}")


def content_chain(stem: str, rules: tuple[str, ...], comment: str = "") -> Chain:
    """A chain that is named by a stem and a digest of its content, so that another content is another chain."""
    tail = "/" + digest("\n".join((comment, *rules)), CONTENT_DIGITS)
    return Chain(Table.POLICY, _cut(stem, len(tail)) + tail, rules, comment)


def group_stem(group: Group) -> str:
    """The words of an isolation group's chain: the direction, the namespace, and the policies that isolate."""
    closed = "closed/" if group.closed else ""
    if not group.policies:
        return f"{closed}{group.direction.value}"
    namespace = group.policies[0].partition("/")[0]
    # No policy has a "_" in its name.
    policies = "_".join(key.partition("/")[2] for key in group.policies)
    return f"{closed}{group.direction.value}/{namespace}/{policies}"


def part_stem(group: Group, part: str) -> str:
    """The words of a chain that jumps to some policies of an isolation group; groups of the namespace share it."""
    return f"part/{group.direction.value}/{group.policies[0].partition('/')[0]}/{part}"


@dataclass(frozen=True, slots=True)
class DeniedCounter:
    """The counter of what is denied to an isolation group; printed and parsed here alone."""

    direction: Direction
    policies: tuple[str, ...]
    closed: bool

    def __str__(self) -> str:
        return _cut(f"denied/{group_stem(Group(self.direction, self.policies, self.closed))}")

    @classmethod
    def parse(cls, name: str) -> DeniedCounter | None:
        """Read a counter's name; None if it is no group's, or was cut."""
        found = _DENIED.match(name)
        if found is None or (len(name) == NAME_CHARACTERS and _CUT.search(name)):
            return None
        keys = tuple(f"{found['namespace']}/{policy}" for policy in found["policies"].split("_"))
        return cls(Direction(found["direction"]), keys, found["closed"] is not None)


def denied_counter(group: Group) -> str:
    """The name of a group's ``DeniedCounter``."""
    return str(DeniedCounter(group.direction, group.policies, group.closed))


def group_comment(group: Group) -> str:
    """Why the pods of a group are isolated."""
    if not group.policies:
        return comment_of("closed: the pod is not known yet, or two claim its address")
    how = "closed by rejected" if group.closed else "isolated by"
    return comment_of(f"{how} {', '.join(group.policies)}")


def pod_set(wanted: PodSet, family: Family) -> Set:
    """The nftables set of one family for a set of pods or of named ports."""
    where = wanted.namespace or "_"
    match wanted:
        case PodSelection():
            spaces = "" if wanted.namespace is not None else f"{_selector_words(wanted.namespace_selector)}/"
            stem = f"peer/{where}/{spaces}{_selector_words(wanted.pod_selector)}"
            key: tuple[KeyType, ...] = (ADDRESS[family],)
        case NamedPort():
            # No port has a "_" in its name.
            stem = f"named/{where}/{'_'.join(wanted.names)}.{wanted.protocol.label}"
            key = (ADDRESS[family], KeyType.INET_SERVICE)
    tail = f"-{family.label}"
    return Set(Table.POLICY, _cut(stem, len(tail)) + tail, key, comment_of(str(wanted)), Use.PERMISSION)


def blocks_set(blocks: tuple[IPBlock, ...], family: Family) -> Set:
    """The interval set of an ipBlock that is no single prefix, or of many; the words are of the first."""
    words = "; ".join(
        f"{block.cidr} except {', '.join(map(str, _in_order(block.excepts)))}" if block.excepts else str(block.cidr)
        for block in blocks
    )
    stem = str(blocks[0].cidr).replace("/", "_").replace(":", ".")
    more = f"-and-{len(blocks) - 1}-more" if len(blocks) > 1 else ""
    name = f"cidr/{stem}{more}-{digest(words)}-{family.label}"
    return Set(Table.POLICY, name, (ADDRESS[family],), comment_of(words), Use.PERMISSION, interval=True)


def _in_order(networks: Iterable[Network]) -> list[Network]:
    return sorted(set(networks), key=lambda network: (network.first, network.length))


def port_number_set(ports: tuple[tuple[int, int], ...]) -> Set:
    """The set of ranges of port numbers, in order and disjoint; plain if each is a single number."""
    words = [format_ports(entry) for entry in ports]
    return Set(
        Table.POLICY,
        _cut(f"ports/{'_'.join(words)}", 0, _PORT_CHARACTERS),
        (KeyType.INET_SERVICE,),
        comment_of(f"ports {', '.join(words)}"),
        Use.PERMISSION,
        interval=any(first != last for first, last in ports),
    )


def _selector_words(selector: LabelSelector) -> str:
    """A selector in a name: ``app.api_tier.db`` for labels of plain words, else with a digest."""
    if not selector.requirements:
        return "all"
    plain = [
        (requirement.key, requirement.values[0])
        for requirement in selector.requirements
        if requirement.operator is Operator.IN and len(requirement.values) == 1
    ]
    if len(plain) == len(selector.requirements) and all(_PLAIN.match(word) for pair in plain for word in pair):
        # Neither a "." nor a "_" is in any of the words, so no other selector has this name.
        return "_".join(f"{key}.{value}" for key, value in plain)
    text = str(selector)
    words = _NOT_IN_NAMES.sub(".", text)[:_SELECTOR_CHARACTERS].strip(".")
    return f"{words}_{digest(text)}"


def _cut(name: str, reserved: int = 0, limit: int = NAME_CHARACTERS) -> str:
    """A name within the limit: one that is cut ends in a digest of the whole."""
    if len(name) + reserved <= limit:
        return name
    tail = f"_{digest(name)}"
    return name[: limit - reserved - len(tail)] + tail


def set_element(nft_set: Set, element: Element) -> bytes:
    """The packed key of an element of a ``pod_set``."""
    if isinstance(element, bytes):
        return element
    address, number = element
    return nft_set.pack(address, number.to_bytes(2, "big"))


def element_family(element: Element) -> Family:
    """The family whose set an element belongs in."""
    return family_of(element if isinstance(element, bytes) else element[0])


def dispatch_map(direction: Direction, family: Family) -> Set:
    """The verdict map from the addresses of this node's isolated pods to the chains that decide."""
    comment = f"pods isolated for {direction.value}, and the chain that decides"
    name = f"{direction.value}-{family.label}"
    return Set(Table.POLICY, name, (ADDRESS[family],), comment, Use.DISPATCH, verdicts=True)


def isolated_set(direction: Direction, family: Family) -> Set:
    """The addresses in ``dispatch_map``: whatever leaves the chain that decides without a verdict is dropped."""
    name = f"isolated-{direction.value}-{family.label}"
    return Set(Table.POLICY, name, (ADDRESS[family],), f"pods isolated for {direction.value}", Use.DISPATCH)


def local_set(family: Family) -> Set:
    """The addresses of this node's pods."""
    return Set(Table.POLICY, f"local-{family.label}", (ADDRESS[family],), "pods of this node", Use.LOCAL)


def network_set(family: Family) -> Set:
    """The networks that pods are seen by with their own addresses."""
    comment = "pod networks of the cluster, and what is not masqueraded"
    return Set(Table.POLICY, f"pod-networks-{family.label}", (ADDRESS[family],), comment, interval=True)


def node_set(family: Family) -> Set:
    """The nodes' own addresses: who may send into the tunnel."""
    return Set(Table.POLICY, f"nodes-{family.label}", (ADDRESS[family],), "nodes of the cluster")


def own_network_set(family: Family) -> Set:
    """The pod networks of this node."""
    name, comment = f"own-networks-{family.label}", "pod networks of this node"
    return Set(Table.POLICY, name, (ADDRESS[family],), comment, Use.DISPATCH, interval=True)


def self_set(family: Family) -> Set:
    """Each address of this node's pods with itself: a pod is never cut off from itself."""
    key = (ADDRESS[family], ADDRESS[family])
    return Set(Table.POLICY, f"self-{family.label}", key, "a pod and itself", Use.PERMISSION)


def port_set(family: Family) -> Set:
    """What each bridge port may send with: its interface, hardware address and address."""
    key = (KeyType.IFNAME, KeyType.ETHER_ADDR, ADDRESS[family])
    return Set(Table.GUARD, f"port-{family.label}", key, "bridge port, hardware address and address of each pod")


def address_comment(keys: tuple[str, ...]) -> str:
    """Whose an address is."""
    return comment_of(", ".join(keys))


def epoch_set() -> Set:
    """The stamp of the present epoch; empty while one has ended and the next has not begun."""
    comment = "the stamp of connections that were allowed in the present epoch; none: each packet is judged"
    return Set(Table.POLICY, "epoch", (KeyType.MARK,), comment, Use.EPOCH)


def packed_self(address: Address) -> bytes:
    """The packed key of a ``self_set`` element; both fields fill whole registers."""
    return address + address
