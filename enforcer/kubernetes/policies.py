"""A NetworkPolicy body becomes a value, validated as the API server does (``pkg/apis/networking/validation``).

A body that the API server would refuse becomes a value too: ``rejected`` says why, and it closes what it would have
isolated. Two things are stricter than the API server's legacy mode: an octet with a leading zero is refused
(CVE-2021-29923: it reads as octal elsewhere), and so is a field under ``spec`` that does not exist.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import msgspec

from enforcer.kubernetes import validation, wire
from enforcer.model.addresses import Network
from enforcer.model.changes import Rejection
from enforcer.model.objects import (
    Direction,
    IPBlock,
    NetworkPolicy,
    Peer,
    PodPeer,
    PolicyPort,
    PolicyRule,
    Protocol,
)
from enforcer.model.selectors import EVERYTHING, LabelSelector, Operator, Requirement

API_VERSION = "networking.k8s.io/v1"
DEFAULT_NAMESPACE = "default"

PROTOCOLS = {protocol.name: protocol for protocol in Protocol}
_OPERATORS = {operator.value: operator for operator in Operator}
_POLICY_TYPES = {"Ingress": Direction.INGRESS, "Egress": Direction.EGRESS}
_BOTH = tuple(Direction)

# An object of 1.5 MB can hold a hundred thousand mistakes.
_NAMED_ERRORS = 5

T = TypeVar("T")


def policy(body: object, *, refusal: str | None = None) -> NetworkPolicy | Rejection:
    """The policy that a body (JSON, or what YAML became) describes.

    Args:
        body: the object, its ``kind`` known to be NetworkPolicy.
        refusal: a reason that is known already why the API server would refuse it.

    Returns:
        A value, with ``rejected`` where the object is invalid; a Rejection only where the namespace is none that a pod
        could be in, so that there is nothing to close.

    Raises:
        msgspec.DecodeError: the bytes are no JSON.
    """
    errors = [refusal] if refusal else []
    try:
        read = wire.read(body, wire.Policy)
    except msgspec.ValidationError as error:
        return _of_wrong_type(wire.plain(body), errors=[*errors, wire.type_error(error)])
    meta, spec = read.metadata or wire.Meta(), read.spec or wire.PolicySpec()
    errors += validation.label_errors(meta.labels or {}, "metadata.labels")
    name = validation.checked(
        meta.name, validation.is_dns_subdomain, path="metadata.name", noun="DNS subdomain", errors=errors
    )
    selector, refused = _selector(spec.pod_selector, "spec.podSelector")
    errors += refused
    by_type: dict[Direction, tuple[PolicyRule, ...]] = {
        Direction.INGRESS: _rules(spec.ingress, path="spec.ingress", peers="from", errors=errors),
        Direction.EGRESS: _rules(spec.egress, path="spec.egress", peers="to", errors=errors),
    }
    directions, refused = _directions(spec.policy_types, has_egress=bool(spec.egress))
    errors += refused
    return _value(
        namespace=meta.namespace or DEFAULT_NAMESPACE,
        name=name,
        uid=meta.uid or "",
        selector=selector,
        rules={direction: by_type[direction] for direction in directions},
        errors=errors,
    )


def closed(*, namespace: str, name: str, reason: str) -> NetworkPolicy | Rejection:
    """A policy whose spec cannot be read at all: it closes its whole namespace, both ways."""
    return _value(namespace=namespace, name=name, selector=EVERYTHING, rules=dict.fromkeys(_BOTH, ()), errors=[reason])


def _value(
    *,
    namespace: str,
    name: str,
    selector: LabelSelector,
    rules: Mapping[Direction, tuple[PolicyRule, ...]],
    errors: list[str],
    uid: str = "",
) -> NetworkPolicy | Rejection:
    if not validation.is_dns_label(namespace):
        errors.insert(0, f"metadata.namespace: {validation.shown(namespace)} is no DNS label")
        return Rejection("NetworkPolicy", namespace, name, _reason(errors))
    if not errors:
        return NetworkPolicy(namespace, name, selector, rules, uid=uid)
    if not validation.is_dns_subdomain(name):
        # It must close its pods all the same, beside others of the same name or none, and the name that it has cannot
        # stand in a ruleset.
        closes = f"{name}\0{selector}\0{sorted(direction.value for direction in rules)}"
        name = f"invalid-{hashlib.sha256(closes.encode(errors='surrogatepass')).hexdigest()[:8]}"
    return NetworkPolicy(namespace, name, selector, dict.fromkeys(rules, ()), _reason(errors), uid)


def _reason(errors: Sequence[str]) -> str:
    """The first errors, and how many more there are."""
    more = [f"and {len(errors) - _NAMED_ERRORS} more"] if len(errors) > _NAMED_ERRORS else []
    return "; ".join([*errors[:_NAMED_ERRORS], *more])


def _of_wrong_type(body: object, *, errors: list[str]) -> NetworkPolicy | Rejection:
    """The value of a body with a field of a wrong type: what can be read of it decides what it closes."""
    meta, spec = _mapping(body, "metadata"), _mapping(body, "spec")
    name, namespace = _part(meta, "name", str), _part(meta, "namespace", str)
    if namespace is None and meta.get("namespace") is not None:
        return Rejection("NetworkPolicy", "", name or "", _reason(errors))
    selector = EVERYTHING
    read = _part(spec, "podSelector", wire.Selector)
    if read is not None:
        selector, _ = _selector(read, "")
    types = _part(spec, "policyTypes", list[str])
    directions: Iterable[Direction] = _BOTH
    # A field that does not exist may have been meant to be egress or policyTypes: then only both is safe.
    if types is not None or set(spec) <= {"podSelector", "ingress", "egress"}:
        directions, _ = _directions(types, has_egress=bool(spec.get("egress")))
    return _value(
        namespace=namespace or DEFAULT_NAMESPACE,
        name=name or "",
        uid=_part(meta, "uid", str) or "",
        selector=selector,
        rules=dict.fromkeys(directions, ()),
        errors=errors,
    )


def _mapping(body: object, field: str) -> Mapping[str, object]:
    value = body.get(field) if isinstance(body, dict) else None
    if isinstance(value, dict):
        return value
    # Something stands there that is no object: a field of no name keeps it from passing for an empty one.
    return {} if value is None else {"": value}


def _part(body: Mapping[str, object], field: str, wanted: type[T]) -> T | None:
    try:
        return msgspec.convert(body.get(field), wanted)
    except msgspec.ValidationError:
        return None


def _selector(read: wire.Selector | None, path: str) -> tuple[LabelSelector, list[str]]:
    """The selector, EVERYTHING where there are reasons against it."""
    if read is None:
        return EVERYTHING, []
    labels = read.match_labels or {}
    errors = list(validation.label_errors(labels, f"{path}.matchLabels"))
    requirements = [Requirement(key, Operator.IN, (value,)) for key, value in labels.items()]
    for index, expression in enumerate(read.match_expressions or ()):
        where = f"{path}.matchExpressions[{index}]"
        key, values = expression.key or "", expression.values or []
        operator = _OPERATORS.get(expression.operator or "")
        if not validation.is_label_key(key):
            errors.append(f"{where}.key: {validation.shown(key)} is no label key")
        if operator is None:
            errors.append(
                f"{where}.operator: {validation.shown(expression.operator or '')} is none of {', '.join(_OPERATORS)}"
            )
            continue
        if operator in {Operator.IN, Operator.NOT_IN}:
            if not values:
                errors.append(f"{where}.values: must be given with {operator.value}")
        elif values:
            errors.append(f"{where}.values: must not be given with {operator.value}")
        errors += (
            f"{where}.values[{position}]: {validation.shown(value)} is no label value"
            for position, value in enumerate(values)
            if not validation.is_label_value(value)
        )
        requirements.append(Requirement(key, operator, tuple(sorted(set(values)))))
    return (EVERYTHING if errors else LabelSelector.of(*requirements)), errors


def _directions(types: list[str] | None, *, has_egress: bool) -> tuple[tuple[Direction, ...], list[str]]:
    """The directions that ``policyTypes`` names; both where there are reasons against it."""
    if not types:
        # "policies will default to 'Ingress'; if spec.egress is specified, to both" (SetDefaults_NetworkPolicy)
        return (_BOTH if has_egress else (Direction.INGRESS,)), []
    if len(types) > len(_POLICY_TYPES):
        return _BOTH, ["spec.policyTypes: may not hold more than two"]
    errors = [
        f"spec.policyTypes[{index}]: {validation.shown(name)} is none of {', '.join(_POLICY_TYPES)}"
        for index, name in enumerate(types)
        if name not in _POLICY_TYPES
    ]
    if errors:
        return _BOTH, errors
    return tuple(direction for name, direction in _POLICY_TYPES.items() if name in types), []


def _rules(
    read: Sequence[wire.IngressRule | wire.EgressRule] | None, *, path: str, peers: str, errors: list[str]
) -> tuple[PolicyRule, ...]:
    rules = []
    for index, rule in enumerate(read or ()):
        where = f"{path}[{index}]"
        ports = [_port(port, f"{where}.ports[{at}]", errors) for at, port in enumerate(rule.ports or ())]
        others = [_peer(peer, f"{where}.{peers}[{at}]", errors) for at, peer in enumerate(rule.peers or ())]
        rules.append(
            PolicyRule(
                tuple(dict.fromkeys(other for other in others if other is not None)),
                tuple(dict.fromkeys(port for port in ports if port is not None)),
            )
        )
    return tuple(rules)


def _port(read: wire.Port, path: str, errors: list[str]) -> PolicyPort | None:
    protocol = PROTOCOLS.get("TCP" if read.protocol is None else read.protocol)
    before = len(errors)
    if protocol is None:
        errors.append(f"{path}.protocol: {validation.shown(read.protocol)} is none of {', '.join(PROTOCOLS)}")
    if isinstance(read.port, int):
        if not 1 <= read.port <= validation.MAX_PORT:
            errors.append(f"{path}.port: {read.port} is not in 1-{validation.MAX_PORT}")
        if read.end_port is not None and read.end_port < read.port:
            errors.append(f"{path}.endPort: {read.end_port} is below port {read.port}")
        if read.end_port is not None and not 1 <= read.end_port <= validation.MAX_PORT:
            errors.append(f"{path}.endPort: {read.end_port} is not in 1-{validation.MAX_PORT}")
    elif read.port is not None:
        if not validation.is_port_name(read.port):
            errors.append(f"{path}.port: {validation.shown(read.port)} is no port name")
        if read.end_port is not None:
            errors.append(f"{path}.endPort: may not be given with a named port")
    elif read.end_port is not None:
        errors.append(f"{path}.endPort: may not be given without port")
    if protocol is None or len(errors) > before:
        return None
    return PolicyPort(protocol, read.port, read.end_port)


def _peer(read: wire.Peer, path: str, errors: list[str]) -> Peer | None:
    if read.ip_block is not None:
        if read.pod_selector is not None or read.namespace_selector is not None:
            errors.append(f"{path}: may not specify both ipBlock and another peer")
        return _ip_block(read.ip_block, f"{path}.ipBlock", errors)
    if read.pod_selector is None and read.namespace_selector is None:
        errors.append(f"{path}: must specify a peer")
        return None
    pods, refused = _selector(read.pod_selector, f"{path}.podSelector")
    namespaces, also_refused = _selector(read.namespace_selector, f"{path}.namespaceSelector")
    errors += refused + also_refused
    return PodPeer(None if read.namespace_selector is None else namespaces, pods)


def _ip_block(read: wire.IPBlock, path: str, errors: list[str]) -> IPBlock | None:
    cidr = _network(read.cidr, f"{path}.cidr", errors)
    excepts = [_network(text, f"{path}.except[{index}]", errors) for index, text in enumerate(read.excepts or ())]
    if cidr is None:
        return None
    for index, inner in enumerate(excepts):
        if inner is None:
            continue
        if not cidr.covers(inner):
            errors.append(f"{path}.except[{index}]: {inner} is not within {cidr}")
        elif inner.length == cidr.length:
            errors.append(f"{path}.except[{index}]: {inner} leaves nothing of {cidr}: it must be a strict subset")
    return IPBlock(cidr, tuple(inner for inner in excepts if inner is not None))


def _network(text: str | None, path: str, errors: list[str]) -> Network | None:
    if not text:
        errors.append(f"{path}: must be given")
        return None
    try:
        return validation.read_network(text)
    except ValueError:
        errors.append(f"{path}: {validation.shown(text)} is no CIDR")
        return None
