"""ADD, CHECK, DEL, GC and STATUS, in the order that keeps a pod closed until its policy is in the kernel.

ADD: reserve the addresses; make the link, its node side down; let the enforcer commit the pod's policy, or a deny;
raise the link; mark the attachment ready. A failure anywhere undoes all of it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import structlog

from cni import netns
from cni.netlink.rtnetlink import NetlinkError
from cni.node.bridge import BRIDGE, BRIDGE_MAC, Bridge, gateways
from cni.plugin import delegation, links
from cni.plugin.protocol import (
    CHECK_FAILURE,
    INVALID_CONFIGURATION,
    INVALID_ENVIRONMENT,
    LINK_FAILURE,
    TRY_AGAIN_LATER,
    UNAVAILABLE,
    UNKNOWN_CONTAINER,
    CniError,
    Request,
    Result,
    success,
)
from cni.plugin.store import Record, Store
from enforcer.model.addresses import Address, Network
from enforcer.model.objects import Attachment

log = structlog.get_logger()


class EnforcerUnavailable(Exception):  # noqa: N818 - a state, not a mistake
    """The enforcer cannot put a pod's policy into the kernel now; the text says why."""


class Enforcer(Protocol):
    """The seam to the policy side; called from many threads at once."""

    def attach(self, attachment: Attachment) -> None:
        """Return when the kernel holds the attachment's policy, or a deny; raise ``EnforcerUnavailable`` if not."""

    def detach(self, key: str) -> None:
        """Return when the kernel holds nothing of the attachment any more; raise ``EnforcerUnavailable`` if not."""

    def ready(self) -> str | None:
        """None when ``attach`` can succeed, else the reason why not."""


class Operations:
    """The CNI operations over the store, the node's links and the enforcer. Thread-safe."""

    def __init__(self, *, store: Store, bridge: Bridge, enforcer: Enforcer) -> None:
        self._store = store
        self._bridge = bridge
        self._enforcer = enforcer
        self._own_netns = netns.open_own()
        self._networks: tuple[Network, ...] = ()
        self._unusable = ""
        self._choosing = threading.Lock()
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    def start(self, networks: Sequence[Network]) -> tuple[Attachment, ...]:
        """Set the node up and clean up after an agent that was killed.

        Returns:
            The attachments that stand: their links are there and their ADD was answered.
        """
        self._networks = tuple(networks)
        self._bridge.start(self._networks)
        for record in self._store.records():
            if not record.ready or not links.exists(record.attachment.host_interface):
                log.info("attachment rolled back", attachment=record.attachment.key, pod=record.attachment.pod)
                try:
                    self._undo(record)
                except CniError as error:
                    # It stays pending, and so its addresses stay reserved, until a DEL or the next start.
                    log.error("attachment not rolled back", attachment=record.attachment.key, error=str(error))
        return self.attachments()

    def set_pod_cidrs(self, networks: Sequence[Network]) -> None:
        """Take in the node's pod networks; attachments outside them stay.

        Raises:
            NetlinkError: the kernel refused a step; as with the others, no pod gets an address until the next call.
            OSError: there is no way to ask it.
            ValueError: a network is every address.
        """
        self._networks = ()
        self._unusable = f"the node's pod CIDRs {', '.join(map(str, networks))} cannot be used; see the agent's log"
        self._bridge.set_networks(networks)
        self._networks, self._unusable = tuple(networks), ""

    def gateways(self) -> tuple[Address, ...]:
        """The node's own addresses on the pod network."""
        return tuple(gateways(self._networks).values())

    def attachments(self) -> tuple[Attachment, ...]:
        """The attachments that are ready."""
        return tuple(record.attachment for record in self._store.records() if record.ready)

    def unready(self, *, delegated: bool = False) -> str | None:
        """Why no pod can be attached now, None if one can; ``delegated``: addresses come from another IPAM plugin."""
        if (reason := self._enforcer.ready()) is not None:
            return reason
        if not links.exists(BRIDGE):
            return f"bridge {BRIDGE} is gone; restart the agent"
        return None if self._networks or delegated else self._unusable or "the node has no pod CIDR yet"

    def run(self, request: Request) -> dict[str, Any] | None:
        """Do a request.

        Returns:
            The result to print, None for nothing.

        Raises:
            CniError: it failed, and nothing of it is left.
        """
        match request.command:
            case "GC":
                self._gc(request)
            case "STATUS":
                self._status(request)
            case _:
                with _Held(self._guard, self._locks, f"{request.container_id}/{request.ifname}"):
                    match request.command:
                        case "ADD":
                            return self._add(request)
                        case "CHECK":
                            self._check(request)
                        case _:
                            self._delete(request.container_id, request.ifname, request)
        return None

    def _add(self, request: Request) -> dict[str, Any]:
        pod_netns = self._pod_netns(request)
        if self._store.record(request.container_id, request.ifname) is not None:
            raise CniError(
                INVALID_ENVIRONMENT,
                f"{request.container_id} has a {request.ifname} already",
                "run DEL before ADD again",
            )
        if not links.exists(BRIDGE):
            raise CniError(UNAVAILABLE, f"bridge {BRIDGE} is gone", "restart the agent, which makes it")
        record, lease = self._reserve(request)
        attachment = record.attachment
        try:
            links.Link(self._bridge, pod_netns, self._own_netns).make(attachment, lease.gateways)
            self._enforcer.attach(attachment)
            links.up(attachment)
            self._store.confirm(attachment)
        except Exception as error:
            try:
                self._undo(record)
            except CniError as left:
                log.error(
                    "failed ADD not undone", error=str(left), hint="a DEL, or the next start of the agent, undoes it"
                )
            raise _failure(error, "ADD") from error
        result = Result(
            port=attachment.host_interface,
            port_mac=BRIDGE_MAC,
            ifname=attachment.ifname,
            mac=attachment.mac,
            netns_path=request.netns_path,
            mtu=self._bridge.mtu,
            addresses=attachment.addresses,
            gateways=lease.gateways,
            dns=lease.dns,
        )
        return success(result, request.config)

    def _reserve(self, request: Request) -> tuple[Record, delegation.Lease]:
        if request.requested_mac == BRIDGE_MAC:
            raise CniError(INVALID_CONFIGURATION, "runtimeConfig.mac", f"{BRIDGE_MAC.hex(':')} is the bridge's own")
        if request.config.ipam_type:
            lease = delegation.add(request.raw_config, request.environment)
            record = _record(request, lease.addresses)
            try:
                self._store.reserve(record, requested=lease.addresses)
            except Exception:
                delegation.run("DEL", record.config, record.environment)
                raise
            return record, lease
        if not self._networks:
            raise CniError(
                TRY_AGAIN_LATER,
                self._unusable or "the node has no pod CIDR yet",
                "give the Node spec.podCIDRs, or the agent --pod-cidr",
            )
        with self._choosing:
            record = _record(request, self._store.choose(self._networks, request.requested_addresses))
            self._store.reserve(record, requested=request.requested_addresses)
        return record, delegation.Lease(record.attachment.addresses, gateways(self._networks), {})

    def _pod_netns(self, request: Request) -> int:
        if request.netns is None:
            reason = request.environment.get("NETNS_ERROR", "it is empty")
            raise CniError(INVALID_ENVIRONMENT, f"CNI_NETNS {request.netns_path!r} cannot be opened", reason)
        if not netns.is_network_namespace(request.netns):
            raise CniError(INVALID_ENVIRONMENT, f"CNI_NETNS {request.netns_path!r} is not a network namespace")
        if netns.same(request.netns, self._own_netns):
            raise CniError(INVALID_ENVIRONMENT, f"CNI_NETNS {request.netns_path!r} is the node's own network namespace")
        return request.netns

    def _check(self, request: Request) -> None:
        record = self._store.record(request.container_id, request.ifname)
        if record is None or not record.ready:
            raise CniError(UNKNOWN_CONTAINER, f"{request.container_id} has no {request.ifname} here")
        attachment = record.attachment
        if request.config.prev_result is None:
            raise CniError(INVALID_CONFIGURATION, "CHECK needs prevResult")
        if not set(attachment.addresses) <= request.previous_addresses:
            raise CniError(CHECK_FAILURE, f"prevResult has not the addresses of {attachment.key}")
        if not links.exists(attachment.host_interface):
            raise CniError(
                CHECK_FAILURE, f"link {attachment.host_interface} of {attachment.key} is gone", "delete the pod"
            )
        if _flag(attachment.host_interface, "isolated") != "1":
            raise CniError(
                CHECK_FAILURE, f"port {attachment.host_interface} of {attachment.key} is not isolated", "delete the pod"
            )
        missing = links.Link(self._bridge, self._pod_netns(request), self._own_netns).missing(
            attachment, request.previous_gateways
        )
        if missing:
            raise CniError(CHECK_FAILURE, f"{attachment.key} lacks {', '.join(missing)}", "delete the pod")
        if record.environment:
            delegation.run("CHECK", record.config, record.environment)

    def _delete(self, container_id: str, ifname: str, request: Request | None = None) -> None:
        record = self._store.record(container_id, ifname)
        if record is not None:
            self._undo(record)
        elif request is not None and request.config.ipam_type:
            # An ADD that was killed between the IPAM plugin and our own state has left the plugin's.
            delegation.run("DEL", request.raw_config, request.environment)

    def _undo(self, record: Record) -> None:
        """Link, policy, delegated address, allocation: each may be gone already."""
        try:
            links.remove(record.attachment, bridge_index=self._bridge.bridge_index)
            self._enforcer.detach(record.attachment.key)
        except Exception as error:
            raise _failure(error, "DEL") from error
        if record.environment:
            delegation.run("DEL", record.config, record.environment)
        self._store.release(record.attachment)

    def _gc(self, request: Request) -> None:
        if request.config.valid_attachments is None:
            raise CniError(INVALID_CONFIGURATION, "GC needs cni.dev/valid-attachments")
        valid = {f"{entry.container_id}/{entry.ifname}" for entry in request.config.valid_attachments}
        errors = []
        for record in self._store.records():
            attachment = record.attachment
            if record.network == request.config.name and attachment.key not in valid:
                try:
                    with _Held(self._guard, self._locks, attachment.key):
                        self._delete(attachment.container_id, attachment.ifname)
                except CniError as error:
                    errors.append(error)
        if request.config.ipam_type:
            try:
                delegation.run("GC", request.raw_config, request.environment)
            except CniError as error:
                errors.append(error)
        if errors:
            raise CniError(errors[0].code, errors[0].message, "; ".join(map(str, errors)))

    def _status(self, request: Request) -> None:
        delegated = bool(request.config.ipam_type)
        if delegated:
            delegation.run("STATUS", request.raw_config, request.environment)
        if (reason := self.unready(delegated=delegated)) is not None:
            raise CniError(UNAVAILABLE, "pods cannot be attached now", reason)


class _Held:
    """One operation at a time on an attachment: a DEL waits for an ADD in flight."""

    def __init__(self, guard: threading.Lock, locks: dict[str, tuple[threading.Lock, int]], key: str) -> None:
        self._guard, self._locks, self._key = guard, locks, key

    def __enter__(self) -> None:
        with self._guard:
            lock, users = self._locks.get(self._key, (threading.Lock(), 0))
            self._locks[self._key] = (lock, users + 1)
        lock.acquire()

    def __exit__(self, *_: object) -> None:
        with self._guard:
            lock, users = self._locks.pop(self._key)
            if users > 1:
                self._locks[self._key] = (lock, users - 1)
        lock.release()


def _failure(error: Exception, command: str) -> CniError:
    match error:
        case CniError():
            return error
        case EnforcerUnavailable():
            return CniError(TRY_AGAIN_LATER, f"{command}: the policy is not in the kernel", str(error))
        case NetlinkError() | OSError():
            return CniError(LINK_FAILURE, f"{command}: {error}")
        case _:
            log.error("unexpected error", command=command, exc_info=error)
            return CniError(LINK_FAILURE, f"{command} failed unexpectedly: {error!r}", "see the agent's log")


def _record(request: Request, addresses: tuple[Address, ...]) -> Record:
    """What is kept of a request; the environment only where a delegated plugin is to be undone with it."""
    attachment = Attachment(
        container_id=request.container_id,
        ifname=request.ifname,
        pod=request.pod,
        uid=request.args.get("K8S_POD_UID", ""),
        addresses=addresses,
        mac=request.requested_mac or links.default_mac(request.container_id, request.ifname),
        host_interface=links.port_name(request.container_id, request.ifname),
    )
    environment = dict(request.environment) if request.config.ipam_type else {}
    return Record(attachment, request.config.name, request.raw_config, environment, ready=False)


def _flag(port: str, name: str) -> str:
    try:
        return Path("/sys/class/net", port, "brport", name).read_text().strip()
    except OSError:
        return ""
