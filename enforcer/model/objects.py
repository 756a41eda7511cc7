"""Kubernetes objects and CNI attachments, reduced to what enforcement reads.

A key is ``namespace/name``. Defaults of the API are applied when an object is decoded (``policyTypes``, ``protocol``),
so a value here says what holds, not what was written.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from enforcer.model.addresses import Address, Network
from enforcer.model.selectors import EVERYTHING, Labels, LabelSelector


class Direction(Enum):
    """A policy type, always seen from the selected pod; the other side is the peer."""

    INGRESS = "ingress"
    EGRESS = "egress"


class Protocol(Enum):
    """``ports[].protocol``: its name in nft and its IP protocol number."""

    TCP = ("tcp", 6)
    UDP = ("udp", 17)
    SCTP = ("sctp", 132)

    def __init__(self, label: str, number: int) -> None:
        self.label = label
        self.number = number


@dataclass(frozen=True, slots=True)
class Namespace:
    """A namespace. ``labels`` always hold ``kubernetes.io/metadata.name``, as the API server sets it."""

    name: str
    labels: Labels

    @property
    def key(self) -> str:
        """The name."""
        return self.name


@dataclass(frozen=True, slots=True)
class Node:
    """A node, the pod networks that were assigned to it (``spec.podCIDRs``), and its own addresses (InternalIP).

    ``created`` is ``metadata.creationTimestamp`` (RFC 3339, UTC), which sorts by age; empty where there is none.
    """

    name: str
    pod_cidrs: tuple[Network, ...] = ()
    addresses: tuple[Address, ...] = ()
    created: str = ""

    @property
    def key(self) -> str:
        """The name."""
        return self.name


@dataclass(frozen=True, slots=True)
class ContainerPort:
    """A named port of a container (``containers[].ports[]``); ports without a name are of no interest."""

    name: str
    protocol: Protocol
    number: int


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod as its object says.

    ``node`` is ``spec.nodeName`` (None while unscheduled or, in a manifest, for "this node").
    ``addresses`` are ``status.podIPs``. ``completed`` is phase Succeeded or Failed: its addresses are free.
    """

    namespace: str
    name: str
    uid: str = ""
    labels: Labels = field(default_factory=dict)
    node: str | None = None
    addresses: tuple[Address, ...] = ()
    ports: tuple[ContainerPort, ...] = ()
    host_network: bool = False
    completed: bool = False

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class PolicyPort:
    """An entry of ``ports``: ``port`` is a number, a name, or None for every port; ``end_port`` makes it a range."""

    protocol: Protocol = Protocol.TCP
    port: int | str | None = None
    end_port: int | None = None


@dataclass(frozen=True, slots=True)
class IPBlock:
    """An ``ipBlock`` peer: the addresses of ``cidr`` less those of every ``except``."""

    cidr: Network
    excepts: tuple[Network, ...] = ()

    def __str__(self) -> str:
        return f"{self.cidr} except {', '.join(map(str, self.excepts))}" if self.excepts else str(self.cidr)


@dataclass(frozen=True, slots=True)
class PodPeer:
    """A selector peer. ``namespace_selector`` None means the policy's own namespace."""

    namespace_selector: LabelSelector | None = None
    pod_selector: LabelSelector = EVERYTHING


Peer = PodPeer | IPBlock


@dataclass(frozen=True, slots=True)
class PolicyRule:
    """An entry of ``ingress`` or ``egress``. No peers means every peer, no ports every port and protocol."""

    peers: tuple[Peer, ...] = ()
    ports: tuple[PolicyPort, ...] = ()


@dataclass(frozen=True, slots=True)
class NetworkPolicy:
    """A networking.k8s.io/v1 NetworkPolicy.

    ``rules`` has a key for each policy type that is in force (``policyTypes``, or its default): the selected pods are
    isolated in that direction, and an empty tuple allows nothing.
    ``rejected`` is the reason why the object cannot be rendered: the pods that it selects are then closed in the
    directions of ``rules``, whatever other policies allow. ``uid`` is the object's in the API, "" where it has none.
    """

    namespace: str
    name: str
    pod_selector: LabelSelector = EVERYTHING
    rules: Mapping[Direction, tuple[PolicyRule, ...]] = field(default_factory=dict)
    rejected: str | None = None
    uid: str = ""

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"


Object = Namespace | Node | Pod | NetworkPolicy


@dataclass(frozen=True, slots=True)
class Attachment:
    """A pod's interface on this node, made by a CNI ADD.

    ``pod`` is ``namespace/name`` from ``CNI_ARGS`` (None without Kubernetes arguments), ``uid`` its K8S_POD_UID or "".
    ``host_interface`` is the host side's interface name, ``mac`` the 6 bytes of the pod side's hardware address.
    """

    container_id: str
    ifname: str
    pod: str | None
    uid: str
    addresses: tuple[Address, ...]
    mac: bytes
    host_interface: str

    @property
    def key(self) -> str:
        """``container_id/ifname``, the identity that the CNI specification gives an attachment."""
        return f"{self.container_id}/{self.ifname}"
