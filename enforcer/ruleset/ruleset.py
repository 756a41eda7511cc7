"""The desired ruleset: what the kernel is to hold, and a journal of how that differs from what it does hold.

The journal keeps what stood before the first touch of each object, so a change that is taken back before it is
committed is no change, and the order in which changes came does not matter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from enforcer.ruleset.objects import PLAIN, Chain, Counter, Element, Set, Table, Use

Id = tuple[Table, str]
Object = TypeVar("Object", Set, Chain, Counter)


@dataclass(frozen=True, slots=True)
class Difference(Generic[Object]):
    """One object that is to change: what stands now and what is to stand, None for nothing."""

    before: Object | None
    after: Object | None


@dataclass(frozen=True, slots=True)
class Elements:
    """Elements of one set by packed key: those that go, and those that come.

    A key in both changes what goes with it.
    """

    set: Set
    removed: Mapping[bytes, Element] = field(default_factory=dict)
    added: Mapping[bytes, Element] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.removed or self.added)


@dataclass(frozen=True, slots=True)
class Change:
    """How a ruleset differs from the one before; ``plan`` makes transactions of it."""

    counters: tuple[Difference[Counter], ...] = ()
    sets: tuple[Difference[Set], ...] = ()
    chains: tuple[Difference[Chain], ...] = ()
    elements: tuple[Elements, ...] = ()

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
        return bool(self.counters or self.sets or self.chains or self.elements)


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
        self._local: list[Id] = []

    @property
    def counters(self) -> Mapping[Id, Counter]:
        """All counters, in the order in which they came."""
        return self._counters.present

    @property
    def sets(self) -> Mapping[Id, Set]:
        """All sets and maps."""
        return self._sets.present

    @property
    def chains(self) -> Mapping[Id, Chain]:
        """All chains; what a chain jumps to came before it."""
        return self._chains.present

    def elements(self, nft_set: Set) -> Mapping[bytes, Element]:
        """The elements of a set by packed key; of an interval set the key is the first and the last value."""
        return self._elements[nft_set.table, nft_set.name]

    def is_local(self, address: bytes) -> bool:
        """Whether a packed address is a pod's of this node."""
        return any(address in self._elements[identity] for identity in self._local)

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
        if new.use is Use.LOCAL:
            self._local.append((new.table, new.name))

    def remove_set(self, table: Table, name: str) -> None:
        """Remove a set, with whatever it holds."""
        for key in list(self._elements[table, name]):
            self.remove_element(table, name, key)
        self._sets.put((table, name), None)
        del self._elements[table, name]

    def put_chain(self, chain: Chain) -> None:
        """Add a chain."""
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

    def take(self) -> Change:
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
            stood = {} if identity in gone else {key: old for key, old in before.items() if old is not None}
            now = {key: present[key] for key in before if key in present}
            if changed := _changed_elements(self._sets.present[identity], stood, now):
                elements.append(changed)
        return Change(self._counters.take(), sets, self._chains.take(), tuple(elements))


def difference(present: Ruleset, desired: Ruleset) -> Change:
    """What turns one ruleset into another; sets that follow the epoch are left as they are."""
    sets = _changed(present.sets, desired.sets)
    anew = {(d.before.table, d.before.name) for d in sets if d.before is not None}
    elements = [
        changed
        for identity, nft_set in desired.sets.items()
        if nft_set.use is not Use.EPOCH
        and (
            changed := _changed_elements(
                nft_set,
                present.elements(nft_set) if identity in present.sets and identity not in anew else {},
                desired.elements(nft_set),
            )
        )
    ]
    return Change(
        tuple(_changed(present.counters, desired.counters)),
        tuple(sets),
        tuple(_changed(present.chains, desired.chains)),
        tuple(elements),
    )


def _changed(before: Mapping[Id, Object], after: Mapping[Id, Object]) -> list[Difference[Object]]:
    return [
        Difference(before.get(identity), after.get(identity))
        for identity in dict.fromkeys((*after, *before))
        if before.get(identity) != after.get(identity)
    ]


def _changed_elements(nft_set: Set, before: Mapping[bytes, Element], after: Mapping[bytes, Element]) -> Elements:
    return Elements(
        nft_set,
        {key: element for key, element in before.items() if after.get(key) != element},
        {key: element for key, element in after.items() if before.get(key) != element},
    )
