"""Which connections a transaction gives or takes something, and when the next has to wait for packets under way. Pure.

A packet is under way for microseconds, and for milliseconds where the processor is taken from it. It looks up one set
after the other, each as it is at that instant. So a packet that was allowed by what one transaction takes may go on to
what a later one gives, although no policy ever allowed both. Between two such transactions every packet has to be
through. Where only one of the look-ups of a connection can differ, there is nothing to combine, and nothing to wait
for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from enforcer.ruleset.objects import Set, Use
from enforcer.ruleset.ruleset import Change, Elements, Ruleset


@dataclass(frozen=True, slots=True)
class Reach:
    """Connections by what has changed for them.

    Attributes:
        every: those of any address, at any look-up.
        addresses: those with one of these at an end, where sets of peers are looked up for it; packed.
    """

    every: bool = False
    addresses: frozenset[bytes] = frozenset()

    def __bool__(self) -> bool:
        return self.every or bool(self.addresses)

    def __or__(self, other: Reach) -> Reach:
        return Reach(self.every or other.every, self.addresses | other.addresses)

    def meets(self, other: Reach) -> bool:
        """Whether one connection may be of both, at different look-ups.

        An address at one end is looked up in one direction only: a connection needs another of its family.
        """
        if self.every or other.every:
            return bool(self) and bool(other)
        for width in {len(address) for address in self.addresses}:
            ours, theirs = ({a for a in reach.addresses if len(a) == width} for reach in (self, other))
            if theirs and len(ours | theirs) > 1:
                return True
        return False


NOTHING, EVERYTHING = Reach(), Reach(every=True)


class Locality:
    """The addresses of this node's pods, and those that come or go in a change.

    Before an address comes and after it has gone no policy is the address's own, so no packet of it is between two.
    """

    def __init__(self, change: Change, ruleset: Ruleset, *, repair: bool) -> None:
        self._ruleset = ruleset
        # What somebody else took out of the kernel, or put there, neither comes nor goes.
        self._passing = frozenset(
            key
            for entry in change.elements
            if entry.set.use is Use.LOCAL and not repair
            for key in entry.removed.keys() ^ entry.added.keys()
        )

    def leaves(self, elements: Iterable[Elements]) -> Reach:
        """What the removal of elements that permit takes."""
        reach = NOTHING
        for entry in elements:
            if entry.set.use is Use.PERMISSION:
                reach |= self._left(entry.set, entry.removed)
        return reach

    def _left(self, nft_set: Set, keys: Iterable[bytes]) -> Reach:
        addresses = {nft_set.unpack(key)[0] for key in keys} - self._passing
        if len(nft_set.key) > 1:
            # An address and a port are looked up before the peer of the same direction.
            return Reach(every=bool(addresses))
        # An address elsewhere is judged at this node in one direction, by one look-up.
        return Reach(addresses=frozenset(a for a in addresses if self._ruleset.is_local(a)))

    def joins(self, elements: Iterable[Elements]) -> Reach:
        """What elements that come to sets give: those that permit."""
        reach = NOTHING
        for entry in elements:
            if entry.set.use is Use.PERMISSION and len(entry.set.key) > 1:
                reach |= Reach(every=bool(entry.added))
            elif entry.set.use is Use.PERMISSION:
                reach |= Reach(addresses=frozenset(entry.added))
        return reach

    def switched(self, elements: Iterable[Elements]) -> tuple[Reach, Reach]:
        """What other dispatch elements take, and what they give: to whoever was or becomes isolated, anything."""
        dispatch = [entry for entry in elements if entry.set.use is Use.DISPATCH]
        takes = any(entry.added.keys() - self._passing for entry in dispatch)
        gives = any(entry.removed.keys() - self._passing for entry in dispatch)
        return Reach(every=takes), Reach(every=gives)
