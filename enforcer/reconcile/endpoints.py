"""Pods and attachments put together: which addresses are whose.

The addresses of a pod of this node are those of its attachments, since a CNI ADD knows them before any status does; of
another node's pod those of its status. An address that is attached here belongs to its attachment, whatever a status
still claims.
"""

from __future__ import annotations

from enforcer.model.addresses import Address
from enforcer.model.objects import Attachment, Pod
from enforcer.policy.endpoints import Endpoint, Standing

UNKNOWN_SUFFIX = " (unknown)"
"""Marks the endpoint of a pod whose object is not known, or is of an earlier pod of that name."""


Changes = dict[str, Endpoint | None]
"""The endpoints that may have changed, by key; None: there is no such endpoint."""


class Endpoints:
    """The endpoints of all pods and attachments."""

    def __init__(self, node: str, *, unknown: Standing = Standing.UNKNOWN) -> None:
        self._node = node
        self._unknown = unknown
        self._pods: dict[str, Pod] = {}
        self._attachments: dict[str, Attachment] = {}
        self._of_pod: dict[str, dict[str, Attachment]] = {}
        self._attached: dict[Address, str] = {}
        self._claims: dict[Address, tuple[str, ...]] = {}

    @property
    def attachments(self) -> list[Attachment]:
        """The attachments of this node."""
        return list(self._attachments.values())

    @property
    def pods(self) -> int:
        """How many pods are known, of every node."""
        return len(self._pods)

    def is_local(self, pod: Pod) -> bool:
        """Whether a pod is of this node: attached here, bound to it, or (in a manifest) to none."""
        return pod.node in {None, self._node} or pod.key in self._of_pod

    def known(self, attachment: Attachment) -> bool:
        """Whether an attachment's pod is known, so that its policies apply."""
        pod = self._pods.get(attachment.pod or "")
        return pod is not None and _applies(pod, attachment)

    def set_pod(self, key: str, pod: Pod | None) -> Changes:
        """Put or remove (None) a pod's object."""
        before = self._pods.get(key)
        if pod == before:
            return {}
        for address in dict.fromkeys(before.addresses) if before else ():
            left = tuple(claim for claim in self._claims[address] if claim != key)
            if left:
                self._claims[address] = left
            else:
                del self._claims[address]
        if pod is None:
            del self._pods[key]
        else:
            self._pods[key] = pod
            for address in dict.fromkeys(pod.addresses):
                self._claims[address] = (*self._claims.get(address, ()), key)
        return self._pod_endpoints(key)

    def attach(self, attachment: Attachment) -> Changes:
        """Put an attachment that is not there."""
        self._attachments[attachment.key] = attachment
        if attachment.pod is not None:
            self._of_pod.setdefault(attachment.pod, {})[attachment.key] = attachment
        for address in attachment.addresses:
            self._attached[address] = attachment.key
        return self._endpoints_around(attachment)

    def attachment(self, key: str) -> Attachment | None:
        """The attachment of a key, if it is there."""
        return self._attachments.get(key)

    def detach(self, key: str) -> Changes:
        """Remove an attachment that is there."""
        attachment = self._attachments.pop(key)
        if attachment.pod is not None:
            of_pod = self._of_pod[attachment.pod]
            del of_pod[key]
            if not of_pod:
                del self._of_pod[attachment.pod]
        for address in attachment.addresses:
            if self._attached.get(address) == key:
                del self._attached[address]
        return self._endpoints_around(attachment)

    def _endpoints_around(self, attachment: Attachment) -> Changes:
        """The endpoints that an attachment is of, or whose addresses it has."""
        if attachment.pod is not None:
            changes = self._pod_endpoints(attachment.pod)
        else:
            present = attachment.key in self._attachments
            changes = {attachment.key: self._guest(attachment) if present else None}
        for claimant in {c for address in attachment.addresses for c in self._claims.get(address, ())}:
            if claimant != attachment.pod:
                changes |= self._pod_endpoints(claimant)
        return changes

    def _pod_endpoints(self, key: str) -> Changes:
        """A pod's endpoint, and that of attachments which may not be its own."""
        pod = self._pods.get(key)
        attachments = list(self._of_pod.get(key, {}).values())
        trusted = [a for a in attachments if pod is not None and _applies(pod, a)]
        doubtful = [a for a in attachments if a not in trusted]
        return {
            key: self._known(pod, trusted) if pod is not None else None,
            key + UNKNOWN_SUFFIX: self._doubtful(key, doubtful) if doubtful else None,
        }

    def _known(self, pod: Pod, attachments: list[Attachment]) -> Endpoint | None:
        if pod.completed or pod.host_network:
            return None
        if attachments:
            addresses = tuple(dict.fromkeys(a for attachment in attachments for a in attachment.addresses))
        else:
            addresses = tuple(dict.fromkeys(a for a in pod.addresses if a not in self._attached))
        if not addresses:
            return None
        return Endpoint(pod.key, pod.namespace, addresses, local=self.is_local(pod), labels=pod.labels, ports=pod.ports)

    def _doubtful(self, key: str, attachments: list[Attachment]) -> Endpoint:
        addresses = tuple(address for attachment in attachments for address in attachment.addresses)
        namespace = key.partition("/")[0]
        return Endpoint(key + UNKNOWN_SUFFIX, namespace, addresses, local=True, standing=self._unknown, claimed_pod=key)

    def _guest(self, attachment: Attachment) -> Endpoint:
        return Endpoint(attachment.key, "", attachment.addresses, local=True, standing=Standing.GUEST)


def _applies(pod: Pod, attachment: Attachment) -> bool:
    """Whether an attachment was made for this very pod, not for an earlier or later one of its name.

    A pod that has completed or is in the host's network has none: whoever has that attachment is not known.
    """
    same = not pod.uid or not attachment.uid or pod.uid == attachment.uid
    return same and not pod.completed and not pod.host_network
