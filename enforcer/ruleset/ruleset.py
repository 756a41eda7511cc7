"""The desired ruleset: what the kernel is to hold, and a journal of how that differs from what it does hold.

The journal keeps what stood before the first touch of each object, so a change that is taken back within one
transaction is no change, and the order in which changes came does not matter.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Generic, TypeVar

from enforcer.ruleset.objects import PLAIN, Chain, Counter, Element, Set, Table

Id = tuple[Table, str]
Object = TypeVar("Object", Set, Chain, Counter)


@dataclass(frozen=True, slots=True)
class Difference(Generic[Object]):
    """One object that is to change: what stands now and what is to stand, None for nothing."""

    before: Object | None
    after: Object | None


@dataclass(frozen=True, slots=True)
class Elements:
    """Elements of one set, to be removed and to be added; a key that is in both changes what goes with it."""

    set: Set
    removed: tuple[bytes, ...]
    added: tuple[tuple[bytes, Element], ...]


@dataclass(frozen=True, slots=True)
class Transaction:
    """Differences that the kernel must take up together."""

    counters: tuple[Difference[Counter], ...] = ()
    sets: tuple[Difference[Set], ...] = ()
    chains: tuple[Difference[Chain], ...] = ()
    elements: tuple[Elements, ...] = ()

    @property
    def structural(self) -> bool:
        """Whether more changes than elements of plain sets."""
        return bool(self.counters or self.sets or self.chains) or any(change.set.interval for change in self.elements)

    @property
    def counts(self) -> dict[str, int]:
        """For the log: how many chains and sets change, and how many elements come and go."""
        return {
            "chains": len(self.chains),
            "sets": len(self.sets),
            "added": sum(len(elements.added) for elements in self.elements),
            "removed": sum(len(elements.removed) for elements in self.elements),
        }

    def __bool__(self) -> bool:
        return self.structural or bool(self.elements)


@dataclass(slots=True)
class _Journalled(Generic[Object]):
    """Objects of one kind by identity, and those that were touched with what stood before."""

    present: dict[Id, Object] = field(default_factory=dict)
    before: dict[Id, Object | None] = field(default_factory=dict)

    def put(self, identity: Id, value: Object | None) -> None:
        self.before.setdefault(identity, self.present.get(identity))
        if value is None:
            del self.present[identity]
        else:
            self.present[identity] = value

    def take(self) -> tuple[Difference[Object], ...]:
        touched, self.before = self.before, {}
        return tuple(
            Difference(before, self.present.get(identity))
            for identity, before in touched.items()
            if before != self.present.get(identity)
        )


class Ruleset:
    """Counters, sets with their elements, and chains; mutable, owned by one thread."""

    def __init__(self) -> None:
        self._counters: _Journalled[Counter] = _Journalled()
        self._sets: _Journalled[Set] = _Journalled()
        self._chains: _Journalled[Chain] = _Journalled()
        self._elements: dict[Id, dict[bytes, Element]] = {}
        self._elements_before: dict[Id, dict[bytes, Element | None]] = {}

    @property
    def counters(self) -> list[Counter]:
        """All counters."""
        return list(self._counters.present.values())

    @property
    def sets(self) -> list[Set]:
        """All sets and maps."""
        return list(self._sets.present.values())

    @property
    def chains(self) -> list[Chain]:
        """All chains."""
        return list(self._chains.present.values())

    def elements(self, of: Set) -> dict[bytes, Element]:
        """The elements of a set by packed key; of an interval set the key is the first and the last value."""
        return self._elements[of.table, of.name]

    def put_counter(self, counter: Counter) -> None:
        """Add a counter."""
        self._counters.put((counter.table, counter.name), counter)

    def remove_counter(self, table: Table, name: str) -> None:
        """Remove a counter that no rule uses any more."""
        self._counters.put((table, name), None)

    def put_set(self, new: Set) -> None:
        """Add an empty set."""
        self._sets.put((new.table, new.name), new)
        self._elements[new.table, new.name] = {}

    def remove_set(self, table: Table, name: str) -> None:
        """Remove a set, with whatever it holds."""
        for key in list(self._elements[table, name]):
            self.remove_element(table, name, key)
        self._sets.put((table, name), None)
        del self._elements[table, name]

    def put_chain(self, chain: Chain) -> None:
        """Add a chain, or replace it whole."""
        self._chains.put((chain.table, chain.name), chain)

    def remove_chain(self, table: Table, name: str) -> None:
        """Remove a chain that nothing jumps to any more."""
        self._chains.put((table, name), None)

    def put_element(self, table: Table, name: str, key: bytes, element: Element = PLAIN) -> None:
        """Add an element to a set, or change what goes with its key."""
        elements = self._elements[table, name]
        self._elements_before.setdefault((table, name), {}).setdefault(key, elements.get(key))
        elements[key] = element

    def remove_element(self, table: Table, name: str, key: bytes) -> None:
        """Remove an element from a set."""
        elements = self._elements[table, name]
        self._elements_before.setdefault((table, name), {}).setdefault(key, elements.pop(key))

    def take(self) -> Transaction:
        """All differences since the last ``take``, which the kernel is now to take up."""
        sets = self._sets.take()
        gone = {(d.before.table, d.before.name) for d in sets if d.before is not None}
        touched, self._elements_before = self._elements_before, {}
        elements = []
        for identity, before in touched.items():
            present = self._elements.get(identity)
            if present is None:
                # The set goes, and its elements with it.
                continue
            # A set that is replaced by one of another type starts empty in the kernel.
            stood = {} if identity in gone else before
            removed = tuple(k for k, old in stood.items() if old is not None and old != present.get(k))
            added = tuple(
                (k, present[k]) for k in before if k in present and (k not in stood or present[k] != stood[k])
            )
            if removed or added:
                elements.append(Elements(self._sets.present[identity], removed, added))
        return Transaction(self._counters.take(), sets, self._chains.take(), tuple(elements))
