"""The Kubernetes API as a source: list, then watch, of the four kinds, each on a thread of its own.

A list is read in pages; a watch goes on from the list's resource version, and from the last event's or bookmark's after
a disconnect. Where the server has forgotten that version (410), the kind is listed anew: what the new list lacks is
handed on as gone, so no change falls between, and what it has the same costs nothing. Errors leave the last state as it
is: they are logged, and tried again with growing, jittered pauses.

Requests are made by ``client``; bodies are decoded by ``decoding``.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from urllib.parse import urlencode

import msgspec
import structlog
import urllib3
from kubernetes.client import ApiClient

from enforcer.kubernetes.client import StatusError, request
from enforcer.kubernetes.decoding import decode
from enforcer.model.changes import Change, Rejection
from enforcer.model.objects import Namespace, NetworkPolicy, Node, Object, Pod
from enforcer.model.sources import SourceStatus

log = structlog.get_logger()

# A page that is larger is asked for again with fewer objects, since one object may be of 1.5 MB.
_PAGE_BYTES = 8 << 20
# The server ends a watch after this many seconds; jitter keeps nodes from coming back together.
_WATCH_SECONDS = (240, 480)
# A watch that is silent for so long, without even a bookmark, is taken for dead.
_SILENCE_SECONDS = 90.0
_LIST_SECONDS = 60.0
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 0.25, 30.0
# Whoever adds and removes a policy of a full namespace makes every node read others again.
_READ_AGAIN_PAUSE_SECONDS = 0.25
_SHORT_WATCH_SECONDS = 1.0
_GONE = 410


@dataclass(frozen=True, slots=True)
class Resource:
    """A collection of the API.

    ``fields`` is a field selector that spares the server what is not used. ``page`` is how many objects are asked for
    at once at most. ``large`` ones are handed on one at a time, so that a list of them is never in memory at once.
    """

    kind: type[Object]
    path: str
    fields: str = ""
    page: int = 500
    large: bool = False


RESOURCES = (
    Resource(Namespace, "/api/v1/namespaces"),
    Resource(Node, "/api/v1/nodes"),
    Resource(Pod, "/api/v1/pods", "status.phase!=Succeeded,status.phase!=Failed,spec.hostNetwork=false"),
    Resource(NetworkPolicy, "/apis/networking.k8s.io/v1/networkpolicies", page=50, large=True),
)
_POLICY = "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies"


class _ListMeta(msgspec.Struct, rename="camel", frozen=True):
    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct, frozen=True):
    metadata: _ListMeta
    items: list[msgspec.Raw] | None = None


class _Meta(msgspec.Struct, rename="camel", frozen=True):
    name: str = ""
    namespace: str = ""
    resource_version: str = ""

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}" if self.namespace else self.name


class _Item(msgspec.Struct, frozen=True):
    metadata: _Meta = _Meta()


class _MetaList(msgspec.Struct, frozen=True):
    metadata: _ListMeta
    items: list[_Item] | None = None


class _EventObject(msgspec.Struct, frozen=True):
    metadata: _Meta = _Meta()
    code: int = 0
    message: str = ""


class _Event(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


_meta_list = msgspec.json.Decoder(_MetaList)
_item = msgspec.json.Decoder(_Item)
_list = msgspec.json.Decoder(_List)
_event = msgspec.json.Decoder(_Event)
_event_object = msgspec.json.Decoder(_EventObject)


@dataclass(slots=True)
class _Health:
    """When a resource was last heard of (monotonic seconds), and what is wrong now, if anything."""

    heard: float = field(default_factory=time.monotonic)
    last_error: str = ""


class _BehindError(Exception):
    """The server answered with an older state than it did before."""


class ApiSource:
    """Hands on what the API holds, and then each difference.

    Args:
        api: see ``client.connect``.
        changes: takes differences, on the threads of the watches. Must not raise.
        synced: called once, when a first list of every kind has been handed on.
    """

    def __init__(
        self, api: ApiClient, *, changes: Callable[[Sequence[Change]], None], synced: Callable[[], None]
    ) -> None:
        self._api = api
        self._changes = changes
        self._synced = synced
        self._stopped = threading.Event()
        self._lock = threading.Condition()
        # What has been handed on: the version of each object by key, and how far each watch has come.
        self._known: dict[type[Object], dict[str, int]] = {resource.kind: {} for resource in RESOURCES}
        self._reached = {resource.kind: 0 for resource in RESOURCES}
        self._unlisted = {resource.kind for resource in RESOURCES}
        self._health = {resource.kind: _Health() for resource in RESOURCES}
        self._refused: dict[tuple[type[Object], str], Rejection] = {}
        self._unread: dict[str, None] = {}
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
        deadline = time.monotonic() + seconds
        try:
            for resource in RESOURCES:
                wanted, version = self._metadata(resource)
                with self._lock:
                    covers = partial(self._covers, resource.kind, wanted, version)
                    if not self._lock.wait_for(covers, max(0.0, deadline - time.monotonic())):
                        return False
        except Exception as error:  # noqa: BLE001 - see _follow
            log.warning("the API cannot be asked", error=str(error))
            return False
        return True

    def _metadata(self, resource: Resource) -> tuple[dict[str, int], int]:
        """The version of each object of the server by key, and that of the whole."""
        query = {"fieldSelector": resource.fields} if resource.fields else {}
        accept = {"Accept": "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"}
        with self._get(resource.path, query, read_seconds=_LIST_SECONDS, headers=accept) as response:
            page = _meta_list.decode(response.data)
        found = {item.metadata.key: _number(item.metadata.resource_version) for item in page.items or ()}
        return found, _number(page.metadata.resource_version)

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
        """Read these policies one by one, four a second; one that cannot be read is tried again."""
        with self._lock:
            self._unread.update(dict.fromkeys(policies))
            self._lock.notify_all()

    def status(self) -> tuple[SourceStatus, ...]:
        """How old what was handed on of each kind is, and why no more is heard, if so."""
        now = time.monotonic()
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
                begun = time.monotonic()
                for reached in self._watch(resource, version):
                    version = reached
                    pause = _FIRST_PAUSE_SECONDS
                    self._heard(resource)
                if time.monotonic() - begun < _SHORT_WATCH_SECONDS:
                    # A server, or a proxy before it, that ends each watch at once is not asked without a rest.
                    self._stopped.wait(_FIRST_PAUSE_SECONDS)
            except Exception as error:  # noqa: BLE001 - no error of transport, credentials or bodies ends a watch
                if self._stopped.is_set():
                    return
                if isinstance(error, StatusError) and error.code == _GONE:
                    version = ""
                    log.info("the watch is too old; listing anew", resource=resource.path)
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
            health.heard, health.last_error = time.monotonic(), ""
        if restored:
            log.info("the API is read again", resource=resource.path)

    def _failed(self, resource: Resource, error: Exception, wait: float) -> None:
        hint = ""
        if isinstance(error, StatusError) and error.code in {401, 403}:
            hint = f"grant this user list and watch of {resource.path}"
        with self._lock:
            self._health[resource.kind].last_error = str(error)
        log.warning("the API cannot be read; the last state stands", resource=resource.path, error=str(error),
                    again_in=round(wait, 2), hint=hint)  # fmt: skip

    def _relist(self, resource: Resource) -> str:
        """Hand on all that there is, and what is gone; returns the list's resource version."""
        found: list[tuple[_Meta, list[Change]]] = []
        listed: set[str] = set()
        version = ""
        for page in self._pages(resource):
            version = page.metadata.resource_version
            for item in page.items or ():
                meta = _item.decode(item).metadata
                listed.add(meta.key)
                found.append((meta, self._decoded(resource, item)))
                if resource.large:
                    self._hand_on(resource.kind, found)
                    found = []
        self._hand_on(resource.kind, found, gone=[key for key in self._known[resource.kind] if key not in listed])
        return version

    def _pages(self, resource: Resource) -> Iterator[_List]:
        query = {"fieldSelector": resource.fields} if resource.fields else {}
        size = resource.page
        while True:
            query["limit"] = str(size)
            with self._get(resource.path, query, read_seconds=_LIST_SECONDS) as response:
                body = response.read(_PAGE_BYTES + 1 if size > 1 else None)
            if size > 1 and len(body) > _PAGE_BYTES:
                size //= 2
                continue
            page = _list.decode(body)
            yield page
            if not page.metadata.continue_:
                return
            query["continue"] = page.metadata.continue_
            if len(body) < _PAGE_BYTES // 4:
                size = min(size * 2, resource.page)

    def _hand_on(
        self, kind: type[Object], found: Sequence[tuple[_Meta, Sequence[Change]]], *, gone: Sequence[str] = ()
    ) -> None:
        """Hand on objects, with the version of each; what is read again is compared with it under the same lock."""
        changes = [change for _, of_object in found for change in of_object]
        changes += [Change(kind, key, None) for key in gone]
        with self._lock:
            if changes:
                self._changes(changes)
            known = self._known[kind]
            known |= {meta.key: _number(meta.resource_version) for meta, _ in found}
            for key in gone:
                known.pop(key, None)
                self._refused.pop((kind, key), None)
            self._lock.notify_all()

    def _watch(self, resource: Resource, version: str) -> Iterator[str]:
        """Hand on each event until the server ends the watch; gives the resource version at first and after each."""
        query = {
            "watch": "1",
            "resourceVersion": version,
            "allowWatchBookmarks": "1",
            "timeoutSeconds": str(random.randint(*_WATCH_SECONDS)),  # noqa: S311 - jitter
        }
        query |= {"fieldSelector": resource.fields} if resource.fields else {}
        with self._get(resource.path, query, read_seconds=_SILENCE_SECONDS) as response:
            yield version
            for line in _lines(response):
                if self._stopped.is_set():
                    return
                event = _event.decode(line)
                about = _event_object.decode(event.object)
                if event.type == "ERROR":
                    raise StatusError(about.code, about.message)
                if event.type == "DELETED":
                    self._hand_on(resource.kind, (), gone=[about.metadata.key])
                elif event.type != "BOOKMARK":
                    self._hand_on(resource.kind, [(about.metadata, self._decoded(resource, event.object))])
                self._reach(resource.kind, about.metadata.resource_version)
                yield about.metadata.resource_version

    def _reach(self, kind: type[Object], version: str) -> None:
        with self._lock:
            self._reached[kind] = max(self._reached[kind], _number(version))
            self._lock.notify_all()

    # The thread that reads policies again

    def _read_unread(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopped.is_set():
            with self._lock:
                self._lock.wait_for(lambda: self._unread)
                key = next(iter(self._unread))
                del self._unread[key]
            try:
                self._read_policy(key)
            except Exception as error:  # noqa: BLE001 - see _follow
                wait = max(pause * random.uniform(0.5, 1.5), getattr(error, "retry_after", 0.0))  # noqa: S311 - jitter
                pause = min(pause * 2, _LAST_PAUSE_SECONDS)
                log.warning("a policy cannot be read again; it stays closed", policy=key, error=str(error),
                            again_in=round(wait, 2))  # fmt: skip
                self.read_again([key])
                self._stopped.wait(wait)
            else:
                pause = _FIRST_PAUSE_SECONDS
                self._stopped.wait(_READ_AGAIN_PAUSE_SECONDS * random.uniform(0.5, 1.5))  # noqa: S311 - jitter

    def _read_policy(self, key: str) -> None:
        """Hand on a policy once more, if it is still what was handed on; a newer one comes by the watch."""
        namespace, _, name = key.partition("/")
        resource = next(resource for resource in RESOURCES if resource.kind is NetworkPolicy)
        # A list of one takes no other permission than the list of all does.
        query = {"fieldSelector": f"metadata.name={name}"}
        with self._get(_POLICY.format(namespace), query, read_seconds=_LIST_SECONDS) as response:
            items = _list.decode(response.data).items or []
        found = [(_item.decode(item).metadata, item) for item in items]
        version = max((_number(meta.resource_version) for meta, _ in found), default=-1)
        changes = [(meta, self._decoded(resource, item)) for meta, item in found]
        with self._lock:
            known = self._known[NetworkPolicy].get(key)
            if known is None or version > known:
                return
            if version < known:
                raise _BehindError(f"version {known} was handed on, and the server has {version}")
            self._hand_on(NetworkPolicy, changes)

    def _decoded(self, resource: Resource, body: msgspec.Raw) -> list[Change]:
        """What an object is now; one that cannot be read is absent, which closes, and is reported."""
        changes = []
        for decoded in decode(body, kind=resource.kind.__name__):
            if isinstance(decoded, Rejection):
                key = f"{decoded.namespace}/{decoded.name}" if decoded.namespace else decoded.name
                log.error("object refused", kind=decoded.kind, object=key, reason=decoded.reason)
                with self._lock:
                    self._refused[resource.kind, key] = decoded
                changes.append(Change(resource.kind, key, None))
            else:
                with self._lock:
                    self._refused.pop((resource.kind, decoded.key), None)
                changes.append(Change(resource.kind, decoded.key, decoded))
        return changes

    def _get(
        self, path: str, query: Mapping[str, str], *, read_seconds: float, headers: Mapping[str, str] | None = None
    ) -> urllib3.BaseHTTPResponse:
        return request(self._api, "GET", f"{path}?{urlencode(query)}", headers=headers, read_seconds=read_seconds)


def _lines(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    rest = b""
    while chunk := response.read1():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from filter(None, lines)


def _number(version: str) -> int:
    """A resource version to compare with others (Kubernetes 1.35 and later say that this may be done)."""
    return int(version) if version.isdecimal() else 0
