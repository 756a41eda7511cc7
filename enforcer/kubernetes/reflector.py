"""The Kubernetes API as a source: list, then watch, of the four kinds, each on a thread of its own.

A list is read in pages; a watch goes on from the list's resource version, and from the last event's or bookmark's after
a disconnect. Where the server has forgotten that version (410), the kind is listed anew, and what differs is handed on
at once, so no state is enforced that the API never had. Errors leave the last state as it is: they are logged, and
tried again with growing, jittered pauses.

Requests are made by ``resources``; bodies are decoded by ``decoding``.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import structlog
from kubernetes.client import ApiClient

from enforcer.kubernetes import resources
from enforcer.kubernetes.client import StatusError
from enforcer.kubernetes.decoding import decode
from enforcer.kubernetes.resources import RESOURCES, Body, Metadata, Resource
from enforcer.model.changes import Change, Rejection
from enforcer.model.objects import NetworkPolicy, Object
from enforcer.model.sources import SourceStatus

log = structlog.get_logger()

_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.25, 30.0
# Whoever adds and removes a policy of a full namespace makes every node read others again.
_READ_AGAIN_PAUSE_SECONDS, _LAST_READ_AGAIN_PAUSE_SECONDS = 0.25, 5.0
# Policies of a namespace that are handed on together, since each such change is a transaction.
_READ_TOGETHER = 20
_SHORT_WATCH_SECONDS = 1.0
_GONE = 410


@dataclass(slots=True)
class _Health:
    """When a resource was last heard of (seconds of the source's clock), and what is wrong now, if anything."""

    heard: float
    last_error: str = ""


class _BehindError(Exception):
    """The server answered with an older state than it did before."""


class ApiSource:
    """Hands on what the API holds, and then each difference.

    Args:
        api: see ``client.connect``.
        changes: takes differences, on the threads of the watches. Must not raise.
        synced: called once, when a first list of every kind has been handed on.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        api: ApiClient,
        *,
        changes: Callable[[Sequence[Change]], None],
        synced: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._api = api
        self._changes = changes
        self._synced = synced
        self._clock = clock
        self._stopped = threading.Event()
        self._lock = threading.Condition()
        # What has been handed on: the version of each object by key, and how far each watch has come.
        self._known: dict[type[Object], dict[str, int]] = {resource.kind: {} for resource in RESOURCES}
        self._reached = {resource.kind: 0 for resource in RESOURCES}
        self._unlisted = {resource.kind for resource in RESOURCES}
        self._health = {resource.kind: _Health(clock()) for resource in RESOURCES}
        self._refused: dict[tuple[type[Object], str], Rejection] = {}
        # Policies to be read again, by namespace, and those that are being read.
        self._unread: dict[str, dict[str, None]] = {}
        self._reading: list[str] = []
        # What the last list had of the objects that have not changed since; each kind is for its own thread.
        self._digests: dict[type[Object], dict[str, bytes]] = {resource.kind: {} for resource in RESOURCES}
        self._threads = [
            threading.Thread(target=self._read_unread, name="NetworkPolicy read again", daemon=True),
        ]
        self._threads += [
            threading.Thread(target=self._follow, args=(resource,), name=resource.kind.__name__, daemon=True)
            for resource in RESOURCES
        ]

    def start(self) -> None:
        """Begin to list and watch."""
        for thread in self._threads:
            thread.start()

    def alive(self) -> bool:
        """Whether every watch's thread runs."""
        return all(thread.is_alive() for thread in self._threads)

    def stop(self) -> None:
        """Ask for the end of the watches; what they hold is handed on no more, their threads end with the process."""
        self._stopped.set()

    def catch_up(self, seconds: float) -> bool:
        """Wait until all that the server holds now has been handed on; False if that takes longer, or is not known."""
        deadline = self._clock() + seconds
        try:
            for resource in RESOURCES:
                wanted, version = resources.versions(self._api, resource)
                with self._lock:
                    covers = partial(self._covers, resource.kind, wanted, version)
                    if not self._lock.wait_for(covers, max(0.0, deadline - self._clock())):
                        return False
            with self._lock:
                read = self._lock.wait_for(
                    lambda: not self._unread and not self._reading, max(0.0, deadline - self._clock())
                )
        except Exception as error:  # noqa: BLE001 - see _follow
            log.warning("source unavailable", error=str(error))
            return False
        return read

    def _covers(self, kind: type[Object], wanted: Mapping[str, int], version: int) -> bool:
        """Whether what was handed on is at least as new as a list."""
        known = self._known[kind]
        return self._reached[kind] >= version or (
            all(known.get(key, -1) >= found for key, found in wanted.items())
            and all(key in wanted or found > version for key, found in known.items())
        )

    def rejections(self) -> tuple[Rejection, ...]:
        """Objects that cannot be used, with the reason."""
        with self._lock:
            return tuple(self._refused.values())

    def read_again(self, policies: Collection[str]) -> None:
        """Read these policies, four a second, namespaces in turns; what cannot be read is tried again."""
        with self._lock:
            for key in policies:
                self._unread.setdefault(key.partition("/")[0], {})[key] = None
            self._lock.notify_all()

    def status(self) -> tuple[SourceStatus, ...]:
        """How old what was handed on of each kind is, and why no more is heard, if so."""
        now = self._clock()
        with self._lock:
            return tuple(
                SourceStatus(kind.__name__, now - health.heard, health.last_error)
                for kind, health in self._health.items()
            )

    # A resource's thread

    def _follow(self, resource: Resource) -> None:
        version = ""
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopped.is_set():
            try:
                if not version:
                    version = self._relist(resource)
                    self._listed(resource)
                begun = self._clock()
                for reached in self._watch(resource, version):
                    version = reached
                    pause = _FIRST_PAUSE_SECONDS
                    self._heard(resource)
                if self._clock() - begun < _SHORT_WATCH_SECONDS:
                    # A server, or a proxy before it, that ends each watch at once is not asked without a rest.
                    self._stopped.wait(_FIRST_PAUSE_SECONDS)
            except Exception as error:  # noqa: BLE001 - no error of transport, credentials or bodies ends a watch
                if self._stopped.is_set():
                    return
                if isinstance(error, StatusError) and error.code == _GONE:
                    version = ""
                    log.info("watch expired", resource=resource.path)
                    self._stopped.wait(_FIRST_PAUSE_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 - jitter
                    continue
                asked = getattr(error, "retry_after", 0.0)
                wait = max(pause * random.uniform(0.5, 1.5), asked * random.uniform(1.0, 1.5))  # noqa: S311
                pause = min(pause * 2, _LAST_PAUSE_SECONDS)
                self._failed(resource, error, wait)
                self._stopped.wait(wait)

    def _listed(self, resource: Resource) -> None:
        self._heard(resource)
        with self._lock:
            first = resource.kind in self._unlisted
            self._unlisted.discard(resource.kind)
            complete = first and not self._unlisted
        if complete:
            self._synced()

    def _heard(self, resource: Resource) -> None:
        with self._lock:
            health = self._health[resource.kind]
            restored = bool(health.last_error)
            health.heard, health.last_error = self._clock(), ""
        if restored:
            log.info("source recovered", resource=resource.path)

    def _failed(self, resource: Resource, error: Exception, wait: float) -> None:
        hint = ""
        if isinstance(error, StatusError) and error.code in {401, 403}:
            hint = f"grant this user list and watch of {resource.path}"
        with self._lock:
            self._health[resource.kind].last_error = str(error)
        log.warning("source unavailable", consequence="the last state stands", resource=resource.path, error=str(error),
                    again_in=round(wait, 2), hint=hint)  # fmt: skip

    def _relist(self, resource: Resource) -> str:
        """Hand on what differs from the list before, and what is gone, at once; returns the list's resource version.

        The first list is handed on page by page, since nothing of it is enforced before its end.
        """
        found: list[tuple[Metadata, list[Change]]] = []
        digests: dict[str, bytes] = {}
        version = ""
        with self._lock:
            first = resource.kind in self._unlisted
        before = self._digests[resource.kind]
        for page in resources.pages(self._api, resource):
            version = page.resource_version
            for body in page.bodies:
                digest = digests[body.metadata.key] = hashlib.blake2b(body.json, digest_size=16).digest()
                if before.get(body.metadata.key) != digest:
                    found.append((body.metadata, self._decoded(resource.kind, body)))
            if first:
                self._hand_on(resource.kind, found)
                found = []
        self._hand_on(resource.kind, found, gone=[key for key in self._known[resource.kind] if key not in digests])
        self._digests[resource.kind] = digests
        return version

    def _hand_on(
        self, kind: type[Object], found: Sequence[tuple[Metadata, Sequence[Change]]], *, gone: Sequence[str] = ()
    ) -> None:
        """Hand on objects, with the version of each; what is read again is compared with it under the same lock."""
        changes = [change for _, of_object in found for change in of_object]
        changes += [Change(kind, key, None) for key in gone]
        with self._lock:
            if changes:
                self._changes(changes)
            known = self._known[kind]
            known |= {metadata.key: metadata.version for metadata, _ in found}
            for key in gone:
                known.pop(key, None)
                self._refused.pop((kind, key), None)
            self._lock.notify_all()

    def _watch(self, resource: Resource, version: str) -> Iterator[str]:
        """Hand on each event until the server ends the watch; gives the resource version at first and after each."""
        for event in resources.watch(self._api, resource, version):
            if event is None:
                yield version
                continue
            if self._stopped.is_set():
                return
            metadata = event.body.metadata
            if event.type != "BOOKMARK":
                self._digests[resource.kind].pop(metadata.key, None)
            if event.type == "DELETED":
                self._hand_on(resource.kind, (), gone=[metadata.key])
            elif event.type != "BOOKMARK":
                self._hand_on(resource.kind, [(metadata, self._decoded(resource.kind, event.body))])
            self._reach(resource.kind, metadata.version)
            yield metadata.resource_version

    def _reach(self, kind: type[Object], version: int) -> None:
        with self._lock:
            self._reached[kind] = max(self._reached[kind], version)
            self._lock.notify_all()

    # The thread that reads policies again

    def _read_unread(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopped.is_set():
            with self._lock:
                self._lock.wait_for(lambda: self._unread)
                keys = self._reading = self._next_unread()
            error = self._read_policies(keys)
            with self._lock:
                self._reading = []
                self._lock.notify_all()
            if error is None:
                pause = _FIRST_PAUSE_SECONDS
                self._rest()
                continue
            wait = max(pause * random.uniform(0.5, 1.5), getattr(error, "retry_after", 0.0))  # noqa: S311 - jitter
            pause = min(pause * 2, _LAST_READ_AGAIN_PAUSE_SECONDS)
            log.warning("policies not read again", consequence="their pods stay closed", first=keys[0],
                        error=str(error), again_in=round(wait, 2))  # fmt: skip
            self._stopped.wait(wait)

    def _rest(self) -> None:
        self._stopped.wait(_READ_AGAIN_PAUSE_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 - jitter

    def _next_unread(self) -> list[str]:
        """Some policies of the namespace that has waited longest."""
        namespace = next(iter(self._unread))
        waiting = list(self._unread.pop(namespace))
        if left := waiting[_READ_TOGETHER:]:
            self._unread[namespace] = dict.fromkeys(left)
        return waiting[:_READ_TOGETHER]

    def _read_policies(self, keys: Sequence[str]) -> Exception | None:
        """Hand on policies once more, those that are still what was handed on; newer ones come by the watch.

        Returns:
            Why some could not be read, which are then among those to be read again; None if all were.
        """
        read: list[tuple[Metadata, list[Change]]] = []
        failure: Exception | None = None
        for place, key in enumerate(keys):
            if place:
                self._rest()
            try:
                body = self._read_policy(key)
            except Exception as error:  # noqa: BLE001 - see _follow
                failure = error
                behind = isinstance(error, _BehindError)
                self.read_again([key] if behind else keys[place:])
                if not behind:
                    break
            else:
                if body is not None:
                    read.append((body.metadata, self._decoded(NetworkPolicy, body)))
        with self._lock:
            known = self._known[NetworkPolicy]
            self._hand_on(NetworkPolicy, [entry for entry in read if known.get(entry[0].key) == entry[0].version])
        return failure

    def _read_policy(self, key: str) -> Body | None:
        """A policy as it was handed on; None if the watch has brought, or is to bring, another."""
        body = resources.policy(self._api, key)
        version = -1 if body is None else body.metadata.version
        with self._lock:
            known = self._known[NetworkPolicy].get(key)
        if known is not None and version < known:
            raise _BehindError(f"{key}: version {known} was handed on, and the server has {version}")
        return body if version == known else None

    def _decoded(self, kind: type[Object], body: Body) -> list[Change]:
        """What an object is now; one that cannot be read is absent, which closes, and is reported."""
        changes = []
        for decoded in decode(body.json, kind=kind.__name__):
            if isinstance(decoded, Rejection):
                key = f"{decoded.namespace}/{decoded.name}" if decoded.namespace else decoded.name
                log.error("object rejected", kind=decoded.kind, object=key, reason=decoded.reason)
                with self._lock:
                    self._refused[kind, key] = decoded
                changes.append(Change(kind, key, None))
            else:
                with self._lock:
                    self._refused.pop((kind, decoded.key), None)
                changes.append(Change(kind, decoded.key, decoded))
        return changes
