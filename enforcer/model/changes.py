"""What a source hands on: objects that are now, and objects that are no more."""

from __future__ import annotations

from dataclasses import dataclass

from enforcer.model.objects import Object


@dataclass(frozen=True, slots=True)
class Change:
    """The present state of one object; ``object`` None means that there is none of this kind and key.

    Level-triggered: a change says what is, never what happened, so one that is repeated changes nothing.
    """

    kind: type[Object]
    key: str
    object: Object | None


@dataclass(frozen=True, slots=True)
class Rejection:
    """An object that is not enforced as written, and why.

    ``reason`` names the field, or the file and line; ``uid`` is the object's in the API, "" where it has none.
    """

    kind: str
    namespace: str
    name: str
    reason: str
    uid: str = ""
