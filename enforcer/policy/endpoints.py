"""Endpoints: the addresses on the pod network, and what is known of the pods behind them.

The policy packages see neither Pod objects nor attachments, only endpoints, so they need not know whether an address
came from a CNI ADD of this node or from a status of another.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from enforcer.model.addresses import Address
from enforcer.model.objects import ContainerPort
from enforcer.model.selectors import Labels


class Standing(Enum):
    """What may be said of an endpoint's pod."""

    POD = "pod"
    """Its object is known: policies apply."""
    UNKNOWN = "unknown"
    """It has a pod whose object is not known (yet): closed in both directions, member of no set."""
    GUEST = "guest"
    """It was attached without Kubernetes arguments: isolated by no policy, matched by ipBlock peers only."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A pod's addresses on the pod network.

    ``key`` is ``namespace/name`` of a pod, or the attachment's key for what has none. ``local`` says that its packets
    pass this node's hooks, so that its policies are this node's to enforce. ``claimed_pod`` is the pod that an
    attachment names, where its object is not known.
    """

    key: str
    namespace: str
    addresses: tuple[Address, ...]
    local: bool
    standing: Standing = Standing.POD
    labels: Labels = field(default_factory=dict)
    ports: tuple[ContainerPort, ...] = ()
    claimed_pod: str | None = None
