"""The collections of the API that are read, and the requests that read them. Bodies come undecoded, with metadata.

Every function raises ``StatusError`` where the server refuses, ``urllib3.exceptions.HTTPError`` where it cannot be
reached, and ``msgspec.DecodeError`` where it answers with something else than JSON.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlencode

import msgspec
import urllib3
from kubernetes.client import ApiClient

from enforcer.kubernetes.client import StatusError, request
from enforcer.model.objects import Namespace, NetworkPolicy, Node, Object, Pod

# A page that is larger is asked for again with fewer objects, since one object may be of 1.5 MB.
_PAGE_BYTES = 8 << 20
# The server ends a watch after this many seconds; jitter keeps nodes from coming back together.
_WATCH_SECONDS = (240, 480)
# A watch that is silent for so long, without even a bookmark, is taken for dead.
_SILENCE_SECONDS = 90.0
_LIST_SECONDS = 60.0
_POLICIES = "/apis/networking.k8s.io/v1/namespaces/{}/networkpolicies"
_METADATA = {"Accept": "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1"}


@dataclass(frozen=True, slots=True)
class Resource:
    """A collection of the API.

    Attributes:
        kind: of its objects.
        path: of the collection, over all namespaces.
        fields: a field selector that spares the server what is not used.
        page: how many objects are asked for at once at most.
    """

    kind: type[Object]
    path: str
    fields: str = ""
    page: int = 500


RESOURCES = (
    Resource(Namespace, "/api/v1/namespaces"),
    Resource(Node, "/api/v1/nodes"),
    Resource(Pod, "/api/v1/pods", "status.phase!=Succeeded,status.phase!=Failed,spec.hostNetwork=false"),
    Resource(NetworkPolicy, "/apis/networking.k8s.io/v1/networkpolicies", page=50),
)


class Metadata(msgspec.Struct, rename="camel", frozen=True):
    """What of an object's metadata says which one, and which state of it, a body is."""

    name: str = ""
    namespace: str = ""
    resource_version: str = ""

    @property
    def key(self) -> str:
        """``namespace/name``, or the name of what is in no namespace."""
        return f"{self.namespace}/{self.name}" if self.namespace else self.name

    @property
    def version(self) -> int:
        """The resource version, to compare with others."""
        return version_number(self.resource_version)


@dataclass(frozen=True, slots=True)
class Body:
    """An object as the server sent it."""

    metadata: Metadata
    json: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a list, and the resource version of the list."""

    resource_version: str
    bodies: Iterator[Body]


@dataclass(frozen=True, slots=True)
class Event:
    """What a watch says: ``ADDED``, ``MODIFIED``, ``DELETED`` or ``BOOKMARK``."""

    type: str
    body: Body


class _ListMetadata(msgspec.Struct, rename="camel", frozen=True):
    resource_version: str = ""
    continue_: str = msgspec.field(name="continue", default="")


class _List(msgspec.Struct, frozen=True):
    metadata: _ListMetadata
    items: list[msgspec.Raw] | None = None


class _Item(msgspec.Struct, frozen=True):
    metadata: Metadata = Metadata()


class _MetadataList(msgspec.Struct, frozen=True):
    metadata: _ListMetadata
    items: list[_Item] | None = None


class _EventObject(msgspec.Struct, frozen=True):
    metadata: Metadata = Metadata()
    code: int = 0
    message: str = ""


class _Event(msgspec.Struct, frozen=True):
    type: str
    object: msgspec.Raw


_metadata_list = msgspec.json.Decoder(_MetadataList)
_item = msgspec.json.Decoder(_Item)
_list = msgspec.json.Decoder(_List)
_event = msgspec.json.Decoder(_Event)
_event_object = msgspec.json.Decoder(_EventObject)


def version_number(version: str) -> int:
    """A resource version to compare with others (Kubernetes 1.35 and later say that this may be done)."""
    return int(version) if version.isdecimal() else 0


def versions(api: ApiClient, resource: Resource) -> tuple[dict[str, int], int]:
    """The version of each object of the server by key, and that of the whole list."""
    with _get(api, resource.path, _selector(resource), _LIST_SECONDS, headers=_METADATA) as response:
        page = _metadata_list.decode(response.data)
    found = {item.metadata.key: item.metadata.version for item in page.items or ()}
    return found, version_number(page.metadata.resource_version)


def pages(api: ApiClient, resource: Resource) -> Iterator[Page]:
    """A list of all objects, in pages of bounded size."""
    query = _selector(resource)
    size = resource.page
    while True:
        query["limit"] = str(size)
        with _get(api, resource.path, query, _LIST_SECONDS) as response:
            data = response.read(_PAGE_BYTES + 1 if size > 1 else None)
        if size > 1 and len(data) > _PAGE_BYTES:
            size //= 2
            continue
        page = _list.decode(data)
        yield Page(page.metadata.resource_version, _bodies(page))
        if not page.metadata.continue_:
            return
        query["continue"] = page.metadata.continue_
        if len(data) < _PAGE_BYTES // 4:
            size = min(size * 2, resource.page)


def policy(api: ApiClient, key: str) -> Body | None:
    """A NetworkPolicy as it is now; None if there is none."""
    namespace, _, name = key.partition("/")
    # A list of one takes no other permission than the list of all does.
    query = {"fieldSelector": f"metadata.name={name}"}
    with _get(api, _POLICIES.format(namespace), query, _LIST_SECONDS) as response:
        return next(_bodies(_list.decode(response.data)), None)


def watch(api: ApiClient, resource: Resource, version: str) -> Iterator[Event | None]:
    """Each event after a resource version, until the server ends the watch; None first, when it has begun.

    Raises:
        StatusError: also where the server says so in an event; 410 if it has forgotten the version.
    """
    query = {
        "watch": "1",
        "resourceVersion": version,
        "allowWatchBookmarks": "1",
        "timeoutSeconds": str(random.randint(*_WATCH_SECONDS)),  # noqa: S311 - jitter
        **_selector(resource),
    }
    with _get(api, resource.path, query, _SILENCE_SECONDS) as response:
        yield None
        for line in _lines(response):
            event = _event.decode(line)
            about = _event_object.decode(event.object)
            if event.type == "ERROR":
                raise StatusError(about.code, about.message)
            yield Event(event.type, Body(about.metadata, event.object))


def _selector(resource: Resource) -> dict[str, str]:
    return {"fieldSelector": resource.fields} if resource.fields else {}


def _bodies(page: _List) -> Iterator[Body]:
    return (Body(_item.decode(item).metadata, item) for item in page.items or ())


def _get(
    api: ApiClient, path: str, query: dict[str, str], read_seconds: float, *, headers: dict[str, str] | None = None
) -> urllib3.BaseHTTPResponse:
    return request(api, "GET", f"{path}?{urlencode(query)}", headers=headers, read_seconds=read_seconds)


def _lines(response: urllib3.BaseHTTPResponse) -> Iterator[bytes]:
    rest = b""
    while chunk := response.read1():
        *lines, rest = (rest + chunk).split(b"\n")
        yield from filter(None, lines)
