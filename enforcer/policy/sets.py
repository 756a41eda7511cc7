"""The sets of pods that rules refer to, described by value so that equal descriptions are one set.

``str()`` of a set is its description in words. It is unique to the set (labels, namespaces and port names are of
restricted alphabets), so it also serves to name it.
"""

from __future__ import annotations

from dataclasses import dataclass

from enforcer.model.addresses import Address
from enforcer.model.objects import Direction, NetworkPolicy, PodPeer, Protocol
from enforcer.model.selectors import Labels, LabelSelector
from enforcer.policy.endpoints import Endpoint, Standing

Element = Address | tuple[Address, int]
"""What a set holds: addresses (PodSelection), or address and port number (NamedPort)."""


@dataclass(frozen=True, slots=True)
class PodSelection:
    """The pods of a selector peer: in one ``namespace``, or (None) in those that ``namespace_selector`` matches."""

    namespace: str | None
    namespace_selector: LabelSelector
    pod_selector: LabelSelector

    @classmethod
    def of(cls, peer: PodPeer, namespace: str) -> PodSelection:
        """The selection of a peer that stands in a policy of ``namespace``."""
        if peer.namespace_selector is None:
            return cls(namespace, LabelSelector(), peer.pod_selector)
        return cls(None, peer.namespace_selector, peer.pod_selector)

    def matches_namespace(self, name: str, labels: Labels | None) -> bool:
        """Whether pods of a namespace can be members; ``labels`` None (no such object) meets no selector."""
        if self.namespace is not None:
            return self.namespace == name
        return labels is not None and self.namespace_selector.matches(labels)

    def elements(self, endpoint: Endpoint, namespace_labels: Labels | None) -> tuple[Element, ...]:
        """What an endpoint adds to the set."""
        if (
            endpoint.standing is Standing.POD
            and self.matches_namespace(endpoint.namespace, namespace_labels)
            and self.pod_selector.matches(endpoint.labels)
        ):
            return endpoint.addresses
        return ()

    def __str__(self) -> str:
        pods = f"pods with {self.pod_selector}" if self.pod_selector.requirements else "every pod"
        if self.namespace is not None:
            return f"{pods} in {self.namespace}"
        if self.namespace_selector.requirements:
            return f"{pods} in namespaces with {self.namespace_selector}"
        return f"{pods} in every namespace"


@dataclass(frozen=True, slots=True)
class NamedPort:
    """Who listens on one of some named ports of a protocol; ``names`` are in order.

    For ingress: the pods of this node in ``namespace``, since the port is the selected pod's.
    For egress: every pod of the cluster (``namespace`` None), since it is the peer's.
    """

    direction: Direction
    namespace: str | None
    names: tuple[str, ...]
    protocol: Protocol

    def elements(self, endpoint: Endpoint, namespace_labels: Labels | None) -> tuple[Element, ...]:
        """What an endpoint adds to the set."""
        if (
            endpoint.standing is not Standing.POD
            or self.namespace not in {None, endpoint.namespace}
            or (self.direction is Direction.INGRESS and not endpoint.local)
        ):
            return ()
        numbers = dict.fromkeys(
            port.number for port in endpoint.ports if port.protocol is self.protocol and port.name in self.names
        )
        return tuple((address, number) for number in numbers for address in endpoint.addresses)

    def __str__(self) -> str:
        where = "of every namespace" if self.namespace is None else f"of {self.namespace}"
        side = "selected pods" if self.direction is Direction.INGRESS else "pods"
        ports = f"port {self.names[0]}" if len(self.names) == 1 else f"ports {', '.join(self.names)}"
        return f"{ports} ({self.protocol.label}) of {side} {where}"


PodSet = PodSelection | NamedPort


def sets_of(policy: NetworkPolicy) -> frozenset[PodSet]:
    """Every set that the rules of a policy refer to."""
    found: set[PodSet] = set()
    for direction, rules in policy.rules.items():
        for rule in rules:
            found.update(PodSelection.of(p, policy.namespace) for p in rule.peers if isinstance(p, PodPeer))
            for protocol in Protocol:
                ports = [port.port for port in rule.ports if port.protocol is protocol]
                named = tuple(sorted({port for port in ports if isinstance(port, str)}))
                # Where every port of the protocol is allowed, names add nothing.
                if named and None not in ports:
                    found.add(named_port(direction, policy.namespace, named, protocol))
    return frozenset(found)


def named_port(direction: Direction, namespace: str, names: tuple[str, ...], protocol: Protocol) -> NamedPort:
    """The set for the named ports of a rule of a policy in ``namespace``; ``names`` are in order."""
    return NamedPort(direction, namespace if direction is Direction.INGRESS else None, names, protocol)
