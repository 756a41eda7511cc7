"""Bodies of the Kubernetes API become values of the model, from a manifest or from the API alike.

In: JSON as bytes, or what YAML became. Out: a value or a Rejection for each object that is ours; other kinds are passed
over. A bad object never raises: a policy closes what it would have isolated (see ``policies``), anything else is
treated as absent, which closes too.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

import msgspec

from enforcer.kubernetes import policies, validation, wire
from enforcer.model.addresses import Address
from enforcer.model.changes import Rejection
from enforcer.model.objects import ContainerPort, Namespace, Node, Object, Pod

Decoded = Object | Rejection
"""An object as it is, or why it is not one."""

_NAME_LABEL = "kubernetes.io/metadata.name"
_CORE = "v1"
_GROUPS = frozenset({"networking.k8s.io", "extensions"})
"""Groups of which a NetworkPolicy is, or once was, the one that we enforce."""
_COMPLETED = frozenset({"Succeeded", "Failed"})

_shared = validation.Shared()


def decode(body: object, *, kind: str | None = None) -> list[Decoded]:
    """Decode one body: an object, or a list of them (``List``, ``PodList`` and so on).

    Args:
        body: JSON (``bytes`` or ``msgspec.Raw``), or a document of YAML as dictionaries, lists and scalars.
        kind: the kind where the body may leave it out, as the items of the API's own lists do; None takes its word.

    Returns:
        The objects in their order. A Rejection without ``kind`` is for a body that is no object of any kind.

    Raises:
        msgspec.DecodeError: the bytes are no JSON.
    """
    try:
        head = wire.read(body, wire.Head)
    except msgspec.ValidationError as error:
        return [Rejection("", "", "", wire.type_error(error))]
    named = head.kind or kind
    if not named:
        return [Rejection("", "", "", "kind: must be given")]
    if named == "List":
        return _mixed_items(body)
    item_kind = named.removesuffix("List")
    spelt = _SPELLINGS.get(item_kind.lower())
    if spelt is None:
        return []
    version, decoder = _KINDS[spelt]
    # The items of a list that the API itself made carry neither kind nor version.
    if head.api_version != version and (head.api_version is not None or kind is None):
        group, slash, _ = (head.api_version or "").rpartition("/")
        if slash and group not in _GROUPS:
            return []
        decoder = _refuser(spelt, f"apiVersion: {validation.shown(head.api_version or '')} is not {version}")
    elif item_kind != spelt:
        decoder = _refuser(spelt, f"kind: {validation.shown(item_kind)} is not {spelt}")
    return [decoder(body)] if item_kind == named else _items(body, named, decoder)


def _refuser(kind: str, reason: str) -> Callable[[object], Decoded]:
    """A decoder for bodies of a version that the API server does not know."""
    if kind == "NetworkPolicy":
        return functools.partial(policies.policy, refusal=reason)
    return functools.partial(_refused, kind=kind, errors=[reason])


def _items(body: object, kind: str, decoder: Callable[[object], Decoded]) -> list[Decoded]:
    """The objects of a list of one kind."""
    try:
        return [decoder(item) for item in wire.items(body)]
    except msgspec.ValidationError as error:
        return [Rejection(kind, "", "", wire.type_error(error))]


def _mixed_items(body: object) -> list[Decoded]:
    """The objects of a ``List``, each of which says its kind."""
    try:
        items = wire.items(body)
    except msgspec.ValidationError as error:
        return [Rejection("List", "", "", wire.type_error(error))]
    return [decoded for item in items for decoded in decode(item)]


def _pod(body: object) -> Pod | Rejection:
    """A v1 Pod."""
    try:
        read = wire.read(body, wire.Pod)
    except msgspec.ValidationError as error:
        return _refused(body, kind="Pod", errors=[wire.type_error(error)])
    meta, spec, status = read.metadata or wire.Meta(), read.spec or wire.PodSpec(), read.status or wire.PodStatus()
    errors: list[str] = []
    namespace = sys.intern(meta.namespace or policies.DEFAULT_NAMESPACE)
    validation.checked(namespace, validation.is_dns_label, path="metadata.namespace", noun="DNS label", errors=errors)
    name = validation.checked(
        meta.name, validation.is_dns_subdomain, path="metadata.name", noun="DNS subdomain", errors=errors
    )
    if spec.node_name:
        validation.checked(
            spec.node_name, validation.is_dns_subdomain, path="spec.nodeName", noun="DNS subdomain", errors=errors
        )
    labels = _shared.labels(meta.labels or {}, "metadata.labels", errors)
    ports = _container_ports(spec, errors) if spec.containers or spec.init_containers else ()
    pod = Pod(
        namespace=namespace,
        name=name,
        uid=meta.uid or "",
        labels=labels,
        node=sys.intern(spec.node_name) if spec.node_name else None,
        addresses=_addresses(status, errors),
        ports=ports,
        host_network=bool(spec.host_network),
        completed=status.phase in _COMPLETED,
    )
    return pod if not errors else Rejection("Pod", namespace, name, "; ".join(errors))


def _addresses(status: wire.PodStatus, errors: list[str]) -> tuple[Address, ...]:
    addresses = []
    if status.pod_ips:
        texts = [(entry.ip, f"status.podIPs[{index}].ip") for index, entry in enumerate(status.pod_ips)]
    else:
        texts = [(status.pod_ip, "status.podIP")] if status.pod_ip else []
    for text, path in texts:
        try:
            addresses.append(validation.read_address(text or ""))
        except ValueError:
            errors.append(f"{path}: {validation.shown(text or '')} is no IP address")
    return tuple(addresses)


_known_ports: dict[tuple[str, str, int], ContainerPort] = {}
_MAX_KNOWN_PORTS = 4096


def _container_ports(spec: wire.PodSpec, errors: list[str]) -> tuple[ContainerPort, ...]:
    """The named ports of containers, and of init containers that keep running beside them (sidecars)."""
    ports = []
    for field, containers in (("containers", spec.containers), ("initContainers", spec.init_containers)):
        for index, container in enumerate(containers or ()):
            if field == "initContainers" and container.restart_policy != "Always":
                continue
            for at, read in enumerate(container.ports or ()):
                if not read.name:
                    continue
                identity = (read.name, read.protocol or "TCP", read.container_port or 0)
                port = _known_ports.get(identity) or _container_port(
                    *identity, path=f"spec.{field}[{index}].ports[{at}]", errors=errors
                )
                if port is not None:
                    ports.append(port)
    return tuple(ports)


def _container_port(name: str, protocol: str, number: int, *, path: str, errors: list[str]) -> ContainerPort | None:
    before = len(errors)
    if not validation.is_port_name(name):
        errors.append(f"{path}.name: {validation.shown(name)} is no port name")
    if protocol not in policies.PROTOCOLS:
        errors.append(f"{path}.protocol: {validation.shown(protocol)} is none of {', '.join(policies.PROTOCOLS)}")
    if not 1 <= number <= validation.MAX_PORT:
        errors.append(f"{path}.containerPort: {number} is not in 1-{validation.MAX_PORT}")
    if len(errors) > before:
        return None
    port = ContainerPort(sys.intern(name), policies.PROTOCOLS[protocol], number)
    if len(_known_ports) >= _MAX_KNOWN_PORTS:
        _known_ports.clear()
    _known_ports[name, protocol, number] = port
    return port


def _namespace(body: object) -> Namespace | Rejection:
    """A v1 Namespace; the label with its name is always there, as the API server sets it."""
    try:
        meta = wire.read(body, wire.Namespace).metadata or wire.Meta()
    except msgspec.ValidationError as error:
        return _refused(body, kind="Namespace", errors=[wire.type_error(error)])
    errors: list[str] = []
    name = validation.checked(meta.name, validation.is_dns_label, path="metadata.name", noun="DNS label", errors=errors)
    labels = meta.labels or {}
    errors += validation.label_errors(labels, "metadata.labels")
    if errors:
        return Rejection("Namespace", "", name, "; ".join(errors))
    return Namespace(name, {**labels, _NAME_LABEL: name})


def _node(body: object) -> Node | Rejection:
    """A v1 Node."""
    try:
        read = wire.read(body, wire.Node)
    except msgspec.ValidationError as error:
        return _refused(body, kind="Node", errors=[wire.type_error(error)])
    meta, spec = read.metadata or wire.NodeMeta(), read.spec or wire.NodeSpec()
    errors: list[str] = []
    name = validation.checked(
        meta.name, validation.is_dns_subdomain, path="metadata.name", noun="DNS subdomain", errors=errors
    )
    if spec.pod_cidrs:
        texts = [(text, f"spec.podCIDRs[{index}]") for index, text in enumerate(spec.pod_cidrs)]
    else:
        texts = [(spec.pod_cidr, "spec.podCIDR")] if spec.pod_cidr else []
    cidrs = []
    for text, path in texts:
        try:
            cidrs.append(validation.read_network(text))
        except ValueError:
            errors.append(f"{path}: {validation.shown(text)} is no CIDR")
    addresses = []
    for index, entry in enumerate((read.status or wire.NodeStatus()).addresses or ()):
        if entry.type == "InternalIP":
            try:
                addresses.append(validation.read_address(entry.address or ""))
            except ValueError:
                errors.append(
                    f"status.addresses[{index}].address: {validation.shown(entry.address or '')} is no IP address"
                )
    if errors:
        return Rejection("Node", "", name, "; ".join(errors))
    return Node(name, tuple(cidrs), tuple(addresses), meta.creation_timestamp or "")


def _refused(body: object, *, kind: str, errors: list[str]) -> Rejection:
    """The Rejection of a body with a field of a wrong type, with as much of a name as can be read."""
    plain = wire.plain(body)
    meta = plain.get("metadata") if isinstance(plain, dict) else None
    namespace, name = (
        value if isinstance(value, str) else ""
        for value in ((meta.get("namespace"), meta.get("name")) if isinstance(meta, dict) else ("", ""))
    )
    if kind == "Pod":
        namespace = namespace or policies.DEFAULT_NAMESPACE
    return Rejection(kind, namespace, name, "; ".join(errors))


_KINDS: dict[str, tuple[str, Callable[[object], Decoded]]] = {
    "Namespace": (_CORE, _namespace),
    "Node": (_CORE, _node),
    "Pod": (_CORE, _pod),
    "NetworkPolicy": (policies.API_VERSION, policies.policy),
}
_SPELLINGS = {kind.lower(): kind for kind in _KINDS}
"""A kind in the wrong case is a mistake to name: no other API has it."""
