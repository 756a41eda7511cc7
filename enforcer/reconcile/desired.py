"""The desired ruleset: what the source's objects and this node's attachments add up to. For the loop's thread."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import TypeVar

from enforcer.model.addresses import Network
from enforcer.model.changes import Change, Rejection
from enforcer.model.objects import Attachment, Namespace, NetworkPolicy, Node, Object, Pod
from enforcer.nodes.ownership import Machine, Ownership, resolve_ownership
from enforcer.policy.budget import Budget
from enforcer.policy.endpoints import Standing
from enforcer.policy.index import PolicyIndex
from enforcer.policy.resolve import Cluster
from enforcer.reconcile.endpoints import Changes, Endpoints
from enforcer.reconcile.settings import Settings
from enforcer.ruleset.ruleset import Ruleset
from enforcer.translate.translator import Translator

T = TypeVar("T")


class Desired:
    """Objects and attachments go in; ``ruleset`` is what they mean.

    Attributes:
        ruleset: journals what is different since it was last taken; complete after ``complete`` only.
        translator: wrote it, and knows which chain denies for which policies.
        policies: as they are enforced, by key.
        nodes: the Node objects, by name.
        ownership: who owns which network and address.
        changed_policies: keys of policies that were edited, or came into force, since the loop last cleared this.
    """

    def __init__(self, settings: Settings) -> None:
        self._node = settings.node
        self.ruleset = Ruleset()
        self.translator = Translator(self.ruleset, settings.base)
        self._index = PolicyIndex()
        unknown = Standing.GUEST if settings.unknown_pods_allowed else Standing.UNKNOWN
        self._endpoints = Endpoints(settings.node, unknown=unknown)
        self._budget = Budget(settings.limits)
        self._rejected: dict[str, Rejection] = {}
        self._own_networks: tuple[Network, ...] = ()
        self._machine = Machine()
        self.nodes: dict[str, Node] = {}
        self.ownership = Ownership()
        self.policies: dict[str, NetworkPolicy] = {}
        self.changed_policies: set[str] = set()
        self._edited: set[str] = set()
        self._rejections_changed = self._ownership_resolved = False
        # Policies that the source was asked to hand on again.
        self._asked: frozenset[str] = frozenset()

    @property
    def cluster(self) -> Cluster:
        """The policy model."""
        return self._index.cluster

    @property
    def attachments(self) -> list[Attachment]:
        """The attachments of this node."""
        return self._endpoints.attachments

    @property
    def local_pods(self) -> int:
        """How many endpoints of this node are pods that are known."""
        return sum(e.local and e.standing is Standing.POD for e in self.cluster.endpoints.values())

    @property
    def pods(self) -> int:
        """How many pods are known, of every node."""
        return self._endpoints.pods

    @property
    def own_networks(self) -> tuple[Network, ...]:
        """``spec.podCIDRs`` of this node, as last known."""
        return self._own_networks

    @property
    def rejections(self) -> tuple[Rejection, ...]:
        """The policies that are not enforced as written, and why."""
        return tuple(self._rejected.values())

    def selected(self, policy: str) -> int:
        """How many of this node's pods a policy selects."""
        return self._index.selected(policy)

    def knows_pod_of(self, attachment: Attachment) -> bool:
        """Whether the policies of an attachment's pod apply; there are none without Kubernetes arguments."""
        return attachment.pod is None or self._endpoints.known(attachment)

    def apply(self, changes: Sequence[Change]) -> None:
        """Take in the present state of objects."""
        nodes: dict[str, Node | None] = {}
        for change in changes:
            if change.kind is Node:
                nodes[change.key] = _as(Node, change.object)
            else:
                self._apply_object(change.kind, change.key, change.object)
        self._apply_nodes(nodes)

    def apply_limits(self) -> None:
        """Decide which policies are within the limits, once for all that was put in."""
        for key, judged in self._budget.take():
            self.changed_policies.add(key)
            self._edited.add(key)
            self._put_policy(key, judged)
            _put(self.policies, key, judged)

    @property
    def unread(self) -> AbstractSet[str]:
        """Keys of policies that the source has to hand on again; their pods are closed until it does."""
        return self._budget.unread

    def take_unread(self) -> AbstractSet[str]:
        """Those of ``unread`` that were not among them at the last call."""
        new = self._budget.unread - self._asked
        self._asked = frozenset(self._budget.unread)
        return new

    def take_edited(self) -> AbstractSet[str]:
        """Keys of the policies that came, were edited or went since the last call."""
        edited, self._edited = self._edited, set()
        return edited

    def take_rejections(self) -> tuple[Rejection, ...] | None:
        """``rejections``, if they are different since the last call."""
        changed, self._rejections_changed = self._rejections_changed, False
        return self.rejections if changed else None

    def take_ownership(self) -> Ownership | None:
        """``ownership``, if it was resolved anew since the last call.

        None until this node's own Node is known: without it, another's claim on its pods' network could not be told
        from a just one.
        """
        if self.ownership.pod_cidrs is None:
            return None
        resolved, self._ownership_resolved = self._ownership_resolved, False
        return self.ownership if resolved else None

    def set_machine(self, machine: Machine) -> None:
        """Take in what the kernel says of this machine."""
        self._machine = machine
        self._resolve_ownership()

    def attach(self, attachment: Attachment) -> None:
        """Put an attachment."""
        self.detach(attachment.key)
        self._set_endpoints(self._endpoints.attach(attachment))
        self.translator.attached(attachment)

    def detach(self, key: str) -> None:
        """Remove an attachment, if it is there."""
        attachment = self._endpoints.attachment(key)
        if attachment is not None:
            self._set_endpoints(self._endpoints.detach(key))
            self.translator.detached(attachment)

    def complete(self) -> None:
        """Bring the ruleset up to all that was put in."""
        delta = self._index.take()
        # A policy that selected no pod of this node may be new to the kernel, however old it is.
        self.changed_policies |= delta.policies.keys()
        self.translator.apply(delta)

    def reject(self, policies: Collection[str], reason: str) -> None:
        """Close what policies select, although they are valid."""
        for key in policies:
            self._put_policy(key, dataclasses.replace(self.policies[key], rejected=reason))

    def readmit(self, policies: Collection[str]) -> None:
        """Undo ``reject``."""
        for key in policies:
            self._put_policy(key, self.policies[key])

    def _apply_object(self, kind: type[Object], key: str, value: Object | None) -> None:
        if kind is Pod:
            self._set_endpoints(self._endpoints.set_pod(key, _as(Pod, value)))
        elif kind is NetworkPolicy:
            self._budget.put(key, _as(NetworkPolicy, value))
        else:
            namespace = _as(Namespace, value)
            self._index.set_namespace(key, namespace.labels if namespace else None)

    def _set_endpoints(self, changes: Changes) -> None:
        for key, endpoint in changes.items():
            self._index.set_endpoint(key, endpoint)

    def _apply_nodes(self, nodes: Mapping[str, Node | None]) -> None:
        # This node's own that is gone leaves its pods behind: it counts as it was last known.
        changed = {
            name: node
            for name, node in nodes.items()
            if node != self.nodes.get(name) and (node is not None or name != self._node)
        }
        for name, node in changed.items():
            _put(self.nodes, name, node)
        if (own := changed.get(self._node)) is not None:
            self._own_networks = own.pod_cidrs
            self.translator.own_networks_changed(own.pod_cidrs)
        if changed:
            self._resolve_ownership()

    def _resolve_ownership(self) -> None:
        self.ownership = resolve_ownership(self.nodes, own=self._node, machine=self._machine)
        self.translator.ownership_changed(self.ownership)
        self._ownership_resolved = True

    def _put_policy(self, key: str, policy: NetworkPolicy | None) -> None:
        self._index.set_policy(key, policy)
        rejection = None
        if policy is not None and policy.rejected is not None:
            rejection = Rejection("NetworkPolicy", policy.namespace, policy.name, policy.rejected, policy.uid)
        self._rejections_changed |= rejection != self._rejected.get(key)
        _put(self._rejected, key, rejection)


def _as(kind: type[T], value: object) -> T | None:
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind.__name__}")
    return value


def _put(objects: dict[str, T], key: str, value: T | None) -> None:
    if value is None:
        objects.pop(key, None)
    else:
        objects[key] = value
