"""Which selectors could match these labels? An index that spares asking each of them.

Each selector is filed under one requirement that must hold for it to match (a value, or a key), within the namespace
that it is bound to; those without such a requirement are asked always.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Generic, TypeVar

from enforcer.model.selectors import Labels, LabelSelector, Operator

T = TypeVar("T", bound=Hashable)

_Anchor = tuple[str | None, str, str] | tuple[str | None, str] | tuple[str | None]


def _anchors(namespace: str | None, selector: LabelSelector) -> list[_Anchor]:
    """Where a selector is filed: under the shortest list of values, else under a key, else under its namespace."""
    valued = [r for r in selector.requirements if r.operator is Operator.IN]
    if valued:
        best = min(valued, key=lambda requirement: len(requirement.values))
        return [(namespace, best.key, value) for value in best.values]
    for requirement in selector.requirements:
        if requirement.operator is Operator.EXISTS:
            return [(namespace, requirement.key)]
    return [(namespace,)]


class SelectorIndex(Generic[T]):
    """Items filed by pod selector; ``namespace`` None stands for items that any namespace may match."""

    def __init__(self) -> None:
        self._filed: dict[_Anchor, dict[T, None]] = {}

    def add(self, item: T, namespace: str | None, selector: LabelSelector) -> None:
        """File an item."""
        for anchor in _anchors(namespace, selector):
            self._filed.setdefault(anchor, {})[item] = None

    def remove(self, item: T, namespace: str | None, selector: LabelSelector) -> None:
        """Undo ``add`` with the same arguments."""
        for anchor in _anchors(namespace, selector):
            items = self._filed[anchor]
            del items[item]
            if not items:
                del self._filed[anchor]

    def candidates(self, namespace: str, labels: Labels) -> Iterator[T]:
        """Every item whose selector might match, each once; those left out cannot."""
        filed = self._filed
        for scope in (namespace, None):
            yield from filed.get((scope,), ())
            for key, value in labels.items():
                yield from filed.get((scope, key), ())
                yield from filed.get((scope, key, value), ())
