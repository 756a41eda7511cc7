"""The names and comments that a person reads in ``nft list ruleset``, and the keys of elements.

A digest never stands alone: the object that carries it has a comment with the words that it was made of. Names of
namespaces, policies and ports are DNS names, so a ``_`` tells a digest from each of them.
"""

from __future__ import annotations

from enforcer.model.addresses import Address, Family, family_of
from enforcer.model.objects import Direction, IPBlock
from enforcer.policy.isolation import Group
from enforcer.policy.sets import Element, NamedPort, PodSelection, PodSet
from enforcer.ruleset.objects import NAME_CHARACTERS, KeyType, Set, Table, comment_of, digest

ADDRESS = {Family.V4: KeyType.IPV4_ADDR, Family.V6: KeyType.IPV6_ADDR}


def policy_chain(key: str, direction: Direction) -> str:
    """The chain, and the counter, of a policy's rules of one direction."""
    name = f"policy/{key}/{direction.value}"
    if len(name) > NAME_CHARACTERS:
        tail = f"_{digest(key)}/{direction.value}"
        name = name[: NAME_CHARACTERS - len(tail)] + tail
    return name


def group_chain(group: Group) -> str:
    """The chain that decides for a group: named after its policy, or by a digest of several."""
    if not group.policies:
        return f"{group.direction.value}/_closed"
    namespace, _, policy = group.policies[0].partition("/")
    if len(group.policies) > 1 or group.closed:
        policy = f"{'_closed-' if group.closed else '_'}{digest(' '.join(group.policies))}"
    name = f"{group.direction.value}/{namespace}/{policy}"
    if len(name) > NAME_CHARACTERS:
        tail = f"_{digest(group.policies[0])}"
        name = name[: NAME_CHARACTERS - len(tail)] + tail
    return name


def group_comment(group: Group) -> str:
    """Why the pods of a group are isolated."""
    if not group.policies:
        return comment_of("closed: the pod is not known yet, or two claim its address")
    how = "closed: rejected, or with a rejected one:" if group.closed else "isolated by"
    return comment_of(f"{how} {', '.join(group.policies)}")


def pod_set(of: PodSet, family: Family) -> Set:
    """The nftables set of one family for a set of pods or of named ports."""
    match of:
        case PodSelection():
            where = of.namespace or "_"
            name = f"peer/{where}/{digest(str(of))}-{family.label}"
            return Set(Table.POLICY, name, (ADDRESS[family],), comment_of(str(of)))
        case NamedPort():
            where = f"{of.direction.value}/{of.namespace}" if of.namespace else of.direction.value
            name = f"named/{where}/{of.name}/{of.protocol.label}-{family.label}"
            key = (ADDRESS[family], KeyType.INET_PROTO, KeyType.INET_SERVICE)
            return Set(Table.POLICY, name, key, comment_of(str(of)))


def block_set(block: IPBlock) -> Set:
    """The interval set of an ipBlock that is no single prefix."""
    family = block.cidr.family
    words = f"{block.cidr} except {', '.join(map(str, sorted(set(block.excepts))))}"
    return Set(
        Table.POLICY,
        f"cidr/{digest(words)}-{family.label}",
        (ADDRESS[family],),
        comment_of(words),
        interval=True,
    )


def set_element(of: Set, element: Element) -> bytes:
    """The packed key of an element of a ``pod_set``."""
    if isinstance(element, bytes):
        return element
    address, protocol, number = element
    return of.pack(address, bytes([protocol.number]), number.to_bytes(2, "big"))


def element_family(element: Element) -> Family:
    """The family whose set an element belongs in."""
    return family_of(element if isinstance(element, bytes) else element[0])


def dispatch_map(direction: Direction, family: Family) -> Set:
    """The verdict map from the addresses of this node's pods to the chains that decide."""
    return Set(
        Table.POLICY,
        f"{direction.value}-{family.label}",
        (ADDRESS[family],),
        _DISPATCH_COMMENTS[direction],
        verdicts=True,
    )


_DISPATCH_COMMENTS = {
    Direction.INGRESS: "pods isolated for ingress, and the chain that decides",
    Direction.EGRESS: "pods isolated for egress, and the chain that decides",
}


def local_set(family: Family) -> Set:
    """The addresses of this node's pods."""
    return Set(Table.POLICY, f"local-{family.label}", (ADDRESS[family],), "pods of this node")


def network_set(family: Family) -> Set:
    """The networks that pods are seen by with their own addresses."""
    comment = "pod networks of the cluster, and what is not masqueraded"
    return Set(Table.POLICY, f"pod-networks-{family.label}", (ADDRESS[family],), comment, interval=True)


def node_set(family: Family) -> Set:
    """The nodes' own addresses: who may send into the tunnel."""
    return Set(Table.POLICY, f"nodes-{family.label}", (ADDRESS[family],), "nodes of the cluster")


def own_network_set(family: Family) -> Set:
    """The pod networks of this node."""
    return Set(
        Table.POLICY, f"own-networks-{family.label}", (ADDRESS[family],), "pod networks of this node", interval=True
    )


def self_set(family: Family) -> Set:
    """Each address of this node's pods with itself: a pod is never cut off from itself."""
    return Set(Table.POLICY, f"self-{family.label}", (ADDRESS[family], ADDRESS[family]), "a pod and itself")


def port_set(family: Family) -> Set:
    """What each bridge port may send with: its interface, hardware address and address."""
    key = (KeyType.IFNAME, KeyType.ETHER_ADDR, ADDRESS[family])
    return Set(Table.GUARD, f"port-{family.label}", key, "bridge port, hardware address and address of each pod")


def address_comment(keys: tuple[str, ...]) -> str:
    """Whose an address is."""
    return comment_of(", ".join(keys))


def packed_self(address: Address) -> bytes:
    """The packed key of a ``self_set`` element; both fields fill whole registers."""
    return address + address
