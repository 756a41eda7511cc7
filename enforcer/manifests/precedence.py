"""Which of several manifests speaks for an object: the first in sorted (path, position) order.

Files claim the objects that they hold. Two claims on one key are a mistake of the operator's; one must win, always the
same one, whatever the order in which the files came. Pure: files go in, changes come out.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from itertools import zip_longest

from enforcer.model.changes import Change, Rejection
from enforcer.model.objects import Namespace, Node, Object

_Identity = tuple[type[Object], str]
_Claim = tuple[str, int, Object]
"""Path, position among the objects of the file, and the object. No two claims have the same place."""


class Claims:
    """The claims of all files, and the changes since they were last taken."""

    def __init__(self) -> None:
        self._claims: dict[_Identity, tuple[_Claim, ...]] = {}
        self._contested: set[_Identity] = set()
        self._before: dict[_Identity, Object | None] = {}

    def replace(self, path: str, *, old: Sequence[Object], new: Sequence[Object]) -> None:
        """Put the objects that a file holds in place of those that it held; either may be empty."""
        for position, (was, now) in enumerate(zip_longest(old, new)):
            if was is now:
                continue
            if was is not None:
                self._remove(path, position, was)
            if now is not None:
                self._add(path, position, now)

    def take(self) -> list[Change]:
        """What is different now from when this was last called."""
        changes = []
        for identity, before in self._before.items():
            now = self._winner(identity)
            if now != before:
                changes.append(Change(*identity, now))
        self._before.clear()
        return changes

    def present(self, kind: type[Object], keys: Collection[str]) -> list[Change]:
        """The present state of some objects."""
        return [Change(kind, key, self._winner((kind, key))) for key in keys]

    def duplicates(self) -> list[Rejection]:
        """A Rejection for each claim that lost, which names its place and the winner's."""
        rejections = []
        for identity in sorted(self._contested, key=lambda identity: (identity[0].__name__, identity[1])):
            winner, *others = self._claims[identity]
            for path, position, lost in others:
                # Namespaces and nodes are in no namespace.
                namespace = "" if isinstance(lost, (Namespace, Node)) else lost.namespace
                reason = f"{_place(path, position)}: already given at {_place(winner[0], winner[1])}, which stands"
                rejections.append(Rejection(identity[0].__name__, namespace, lost.name, reason))
        return rejections

    def _winner(self, identity: _Identity) -> Object | None:
        claims = self._claims.get(identity)
        return claims[0][2] if claims else None

    def _add(self, path: str, position: int, claimed: Object) -> None:
        identity = (type(claimed), claimed.key)
        self._before.setdefault(identity, self._winner(identity))
        claims = self._claims.get(identity, ())
        claim = (path, position, claimed)
        self._claims[identity] = tuple(sorted((*claims, claim), key=lambda one: one[:2])) if claims else (claim,)
        if claims:
            self._contested.add(identity)

    def _remove(self, path: str, position: int, claimed: Object) -> None:
        identity = (type(claimed), claimed.key)
        self._before.setdefault(identity, self._winner(identity))
        left = tuple(claim for claim in self._claims[identity] if claim[:2] != (path, position))
        if left:
            self._claims[identity] = left
        else:
            del self._claims[identity]
        if len(left) <= 1:
            self._contested.discard(identity)


def _place(path: str, position: int) -> str:
    return f"{path} (object {position + 1})"
