"""The bodies of the Kubernetes API as they are on the wire, reduced to the fields that are used.

Every field may be absent or null, which is the same to the API server. Nothing is validated here but types.
Under ``spec`` of a NetworkPolicy an unknown field is an error, as it is to ``kubectl apply``: a rule whose ``ports``
is misspelt would otherwise allow every port.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import msgspec
from msgspec import Raw, Struct, field

T = TypeVar("T")


class Head(Struct, rename="camel", gc=False):
    """What tells which kind a body is."""

    api_version: str | None = None
    kind: str | None = None


class Items(Struct, gc=False):
    """A list of the API."""

    items: list[Any] | None = None


class RawItems(Struct, gc=False):
    """A list of the API as JSON; the items are not looked at yet."""

    items: list[Raw] | None = None


class Meta(Struct, gc=False):
    """``metadata``."""

    name: str | None = None
    namespace: str | None = None
    uid: str | None = None
    labels: dict[str, str] | None = None


class ContainerPort(Struct, rename="camel", gc=False):
    """``containers[].ports[]``."""

    name: str | None = None
    container_port: int | None = None
    protocol: str | None = None


class Container(Struct, rename="camel", gc=False):
    """``containers[]`` and ``initContainers[]``."""

    ports: list[ContainerPort] | None = None
    restart_policy: str | None = None


class PodSpec(Struct, rename="camel", gc=False):
    """``spec`` of a Pod."""

    node_name: str | None = None
    host_network: bool | None = None
    containers: list[Container] | None = None
    init_containers: list[Container] | None = None


class PodIP(Struct, gc=False):
    """``status.podIPs[]``."""

    ip: str | None = None


class PodStatus(Struct, gc=False):
    """``status`` of a Pod."""

    phase: str | None = None
    pod_ip: str | None = field(default=None, name="podIP")
    pod_ips: list[PodIP] | None = field(default=None, name="podIPs")


class Pod(Struct, gc=False):
    """v1 Pod."""

    metadata: Meta | None = None
    spec: PodSpec | None = None
    status: PodStatus | None = None


class Namespace(Struct, gc=False):
    """v1 Namespace."""

    metadata: Meta | None = None


class NodeSpec(Struct, gc=False):
    """``spec`` of a Node."""

    pod_cidr: str | None = field(default=None, name="podCIDR")
    pod_cidrs: list[str] | None = field(default=None, name="podCIDRs")


class NodeAddress(Struct, gc=False):
    """``status.addresses[]`` of a Node."""

    type: str | None = None
    address: str | None = None


class NodeStatus(Struct, gc=False):
    """``status`` of a Node."""

    addresses: list[NodeAddress] | None = None


class NodeMeta(Struct, gc=False):
    """``metadata`` of a Node: its labels are not used."""

    name: str | None = None
    creation_timestamp: str | None = field(default=None, name="creationTimestamp")


class Node(Struct, gc=False):
    """v1 Node."""

    metadata: NodeMeta | None = None
    spec: NodeSpec | None = None
    status: NodeStatus | None = None


class Requirement(Struct, gc=False, forbid_unknown_fields=True):
    """``matchExpressions[]``."""

    key: str | None = None
    operator: str | None = None
    values: list[str] | None = None


class Selector(Struct, rename="camel", gc=False, forbid_unknown_fields=True):
    """meta/v1 LabelSelector."""

    match_labels: dict[str, str] | None = None
    match_expressions: list[Requirement] | None = None


class IPBlock(Struct, gc=False, forbid_unknown_fields=True):
    """``ipBlock`` of a peer."""

    cidr: str | None = None
    excepts: list[str] | None = field(default=None, name="except")


class Peer(Struct, rename="camel", gc=False, forbid_unknown_fields=True):
    """``from[]`` and ``to[]``."""

    pod_selector: Selector | None = None
    namespace_selector: Selector | None = None
    ip_block: IPBlock | None = None


class Port(Struct, rename="camel", gc=False, forbid_unknown_fields=True):
    """``ports[]`` of a rule."""

    protocol: str | None = None
    port: int | str | None = None
    end_port: int | None = None


class IngressRule(Struct, gc=False, forbid_unknown_fields=True):
    """``ingress[]``."""

    ports: list[Port] | None = None
    peers: list[Peer] | None = field(default=None, name="from")


class EgressRule(Struct, gc=False, forbid_unknown_fields=True):
    """``egress[]``."""

    ports: list[Port] | None = None
    peers: list[Peer] | None = field(default=None, name="to")


class PolicySpec(Struct, rename="camel", gc=False, forbid_unknown_fields=True):
    """``spec`` of a NetworkPolicy."""

    pod_selector: Selector | None = None
    policy_types: list[str] | None = None
    ingress: list[IngressRule] | None = None
    egress: list[EgressRule] | None = None


class Policy(Struct, gc=False):
    """networking.k8s.io/v1 NetworkPolicy."""

    metadata: Meta | None = None
    spec: PolicySpec | None = None


_decoders: dict[type, msgspec.json.Decoder[Any]] = {}


def _decoder(wanted: type[T]) -> msgspec.json.Decoder[T]:
    decoder = _decoders.get(wanted)
    if decoder is None:
        decoder = _decoders[wanted] = msgspec.json.Decoder(wanted)
    return decoder


def read(body: object, wanted: type[T]) -> T:
    """Read a body, JSON (bytes or Raw) or what JSON or YAML became.

    Raises:
        msgspec.ValidationError: a field has another type; the message ends with its path.
        msgspec.DecodeError: the bytes are no JSON.
    """
    if isinstance(body, (bytes, Raw)):
        return _decoder(wanted).decode(body)
    return msgspec.convert(body, wanted)


def items(body: object) -> Sequence[object]:
    """The items of a list, each as a body of its own.

    Raises:
        msgspec.ValidationError: ``items`` is no list.
        msgspec.DecodeError: the bytes are no JSON.
    """
    if isinstance(body, (bytes, Raw)):
        return read(body, RawItems).items or ()
    return read(body, Items).items or ()


def plain(body: object) -> Any:
    """A body as dictionaries and lists; ``body`` itself unless it is JSON text."""
    return msgspec.json.decode(body) if isinstance(body, (bytes, Raw)) else body


def type_error(error: msgspec.ValidationError, path: str = "") -> str:
    """A reason from a wrong type: ``spec.ingress[0].from: expected array, got str``, under ``path``."""
    reason, at, where = str(error).partition(" - at `")
    inner = where.rstrip("`").rpartition("$")[2] if at else ""
    whole = f"{path}{inner}".lstrip(".")
    reason = reason.replace("`", "").replace("Object contains unknown field", "unknown field")
    reason = reason[:1].lower() + reason[1:]
    return f"{whole}: {reason}" if whole else reason
