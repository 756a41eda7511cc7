"""A change of the ruleset as transactions, in an order in which no packet passes that neither ruleset allows. Pure.

Within one transaction the kernel is not atomic for a packet: the rules that it meets are those of the generation in
which it entered the base chain, but sets and maps are looked up as they are at that instant. So a chain that anything
refers to is never rewritten, and what only takes away, what only prepares, what switches and what only gives are
transactions of their own (see docs/decisions/0005).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum

from enforcer.ruleset.interim import Interim
from enforcer.ruleset.objects import Chain, Counter, Element, Set, Use
from enforcer.ruleset.reach import EVERYTHING, NOTHING, Locality, Reach
from enforcer.ruleset.ruleset import Change, Elements, Id, Ruleset


class Purpose(Enum):
    """What a transaction of a change is for, in the order of a change; a repair prepares before it refills."""

    LEAVES = "leaves"
    """Elements that permit go from sets in use."""
    PREPARATION = "preparation"
    """Objects come that nothing refers to yet."""
    REFILL = "refill"
    """Chains of our names whose rules somebody else has changed get their own again."""
    SWITCH = "switch"
    """Isolated pods are sent to other chains; what is not used any more goes."""
    ATTACHMENT = "attachment"
    """Base chains get their rules."""
    JOINS = "joins"
    """Elements that permit come to sets in use; what an isolated pod's chain did not decide is dropped from now on."""
    REMOVAL = "removal"
    """Counters that no rule uses any more go, and what was needed between the halves of a switch."""
    EPOCH = "epoch"
    """An epoch of the connection mark is prepared, or begins; no change has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One transaction.

    Attributes:
        ends_epoch: it may take a permission away, so from its commit on no packet may pass by an earlier verdict.
        takes, gives: what packets that are under way must not combine: if an earlier transaction took what ``gives``
            meets, every packet that was under way then has to be through before this one is committed.
        new_chains: they are added; ``refilled``: they are there, and their rules are replaced.
        elements: of one key in both, the removal comes first.
    """

    purpose: Purpose
    ends_epoch: bool = False
    takes: Reach = NOTHING
    gives: Reach = NOTHING
    new_counters: tuple[Counter, ...] = ()
    new_sets: tuple[Set, ...] = ()
    new_chains: tuple[Chain, ...] = ()
    refilled: tuple[Chain, ...] = ()
    elements: tuple[Elements, ...] = ()
    old_chains: tuple[Chain, ...] = ()
    old_sets: tuple[Set, ...] = ()
    old_counters: tuple[Counter, ...] = ()

    def __bool__(self) -> bool:
        return any(getattr(self, field.name) for field in dataclasses.fields(self) if field.name not in _ABOUT)


_ABOUT = {"purpose", "takes", "gives"}
"""What a step says of itself, and does not do."""


class Kind(Enum):
    """What a change of one dispatch element does to what its pod may."""

    TIGHTENS = "tightens"
    LOOSENS = "loosens"
    BOTH = "both"


def plan(change: Change, ruleset: Ruleset, *, repair: bool = False, upgrade: bool = False) -> list[Step]:
    """The transactions of a change, in order; none is empty.

    Args:
        change: what is to change.
        ruleset: the ruleset after it.
        repair: the change is from what the kernel was found to hold, so chains may have other rules than their names
            say, and connections may carry stamps that nothing of this ruleset gave them.
        upgrade: what was found are the base chains of another version, which do not know this version's stamps: they
            get their rules after the switch.

    Raises:
        ValueError: without ``repair``, the change would rewrite a chain.
    """
    elements = _Sorted.of(change)
    changed = [d.after for d in change.chains if d.before is not None and d.after is not None]
    if changed and not repair:
        raise ValueError(f"chain {changed[0].name} is in use, and another content asks for another name")
    added = [d.after for d in change.chains if d.before is None and d.after is not None]
    attached = [chain for chain in added if chain.hook] + [chain for chain in changed if chain.hook and upgrade]
    locality = Locality(change, ruleset, repair=repair)
    switches, interim, interim_maps, handed_over = _switches(elements.switch, change, ruleset, locality)
    left_chains = [d.before for d in change.chains if d.before is not None and d.after is None]
    left_sets = [d.before for d in change.sets if d.before is not None and d.after is None]
    preparation = Step(
        purpose=Purpose.PREPARATION,
        new_counters=tuple(d.after for d in change.counters if d.before is None and d.after is not None),
        new_sets=(
            *(d.after for d in change.sets if d.before is None and d.after is not None),
            *interim_maps,
        ),
        # Base chains first: in this order the kernel lists them.
        new_chains=(
            *(dataclasses.replace(chain, rules=()) for chain in added if chain.hook),
            *(chain for chain in added if not chain.hook),
            *interim,
        ),
        elements=(*elements.fresh, *handed_over),
    )
    refilled = tuple(chain for chain in changed if not (chain.hook and upgrade))
    refill = _of_all(Step(purpose=Purpose.REFILL, ends_epoch=bool(refilled), refilled=refilled))
    leaves = Step(
        purpose=Purpose.LEAVES,
        ends_epoch=any(e.set.use in {Use.PERMISSION, Use.LOCAL} for e in elements.leaves),
        takes=locality.leaves(elements.leaves),
        elements=tuple(elements.leaves),
    )
    switches[-1] = dataclasses.replace(switches[-1], ends_epoch=switches[-1].ends_epoch or repair)
    removal = Step(
        purpose=Purpose.REMOVAL,
        old_counters=tuple(d.before for d in change.counters if d.before is not None and d.after is None),
    )
    old_chains, old_sets = (*left_chains, *interim), (*left_sets, *interim_maps)
    if interim_maps:
        # Whoever is in an interim chain still needs its map, and what that leads to.
        removal = dataclasses.replace(removal, gives=EVERYTHING, old_chains=old_chains, old_sets=old_sets)
    else:
        switches[-1] = dataclasses.replace(switches[-1], old_chains=old_chains, old_sets=old_sets)
    steps = [
        *((preparation, refill, leaves) if repair else (leaves, preparation)),
        *switches,
        _of_all(Step(purpose=Purpose.ATTACHMENT, ends_epoch=bool(attached), refilled=tuple(attached))),
        Step(purpose=Purpose.JOINS, gives=locality.joins(elements.joins), elements=tuple(elements.joins)),
        removal,
    ]
    return [step for step in steps if step]


@dataclass(slots=True)
class _Sorted:
    """The elements of a change by the step in which they come or go."""

    leaves: list[Elements]
    fresh: list[Elements]
    switch: list[Elements]
    joins: list[Elements]

    @classmethod
    def of(cls, change: Change) -> _Sorted:
        new = {(d.after.table, d.after.name) for d in change.sets if d.after is not None}
        found = cls([], [], [], [])
        for entry in change.elements:
            nft_set = entry.set
            is_new = (nft_set.table, nft_set.name) in new
            if nft_set.verdicts or (nft_set.interval and (nft_set.use is Use.DISPATCH or not is_new)):
                found.switch.append(entry)
            elif is_new and nft_set.use is not Use.DISPATCH:
                found.fresh.append(entry)
            else:
                # Whose an address is may change while the address stays: that is neither a leave nor a join.
                both = entry.removed.keys() & entry.added.keys()
                # A pod is not isolated any more at once; but before a pod becomes isolated in the second look-up, every
                # packet has to meet it in the first.
                gone = found.switch if nft_set.use is Use.DISPATCH else found.leaves
                parts: tuple[tuple[list[Elements], dict[bytes, Element], dict[bytes, Element]], ...] = (
                    (gone, {k: e for k, e in entry.removed.items() if k not in both}, {}),
                    (found.switch, {k: entry.removed[k] for k in both}, {k: entry.added[k] for k in both}),
                    (found.joins, {}, {k: e for k, e in entry.added.items() if k not in both}),
                )
                for kept, removed, added in parts:
                    if removed or added:
                        kept.append(Elements(nft_set, removed, added))
        return found


def _of_all(step: Step) -> Step:
    """A step that may take and give any connection something."""
    return dataclasses.replace(step, takes=EVERYTHING, gives=EVERYTHING)


def _switch(elements: list[Elements], locality: Locality) -> Step:
    takes, gives = locality.switched(elements)
    return Step(
        purpose=Purpose.SWITCH, ends_epoch=_ends_epoch(elements), takes=takes, gives=gives, elements=tuple(elements)
    )


def _switches(
    elements: list[Elements], change: Change, ruleset: Ruleset, locality: Locality
) -> tuple[list[Step], tuple[Chain, ...], tuple[Set, ...], tuple[Elements, ...]]:
    """The switch, and the objects that are needed between its two halves: chains, maps, and their elements.

    Egress and ingress are judged in two base chains, and a commit may come between. Where one direction gives what the
    other takes, a packet could pass by the new rules of the one and the old rules of the other. Then what takes is
    committed first; an element that does both is sent in between to chains that allow what its old and its new chain
    both allow.
    """
    chains = dict(ruleset.chains)
    chains |= {(d.before.table, d.before.name): d.before for d in change.chains if d.before is not None}
    kinds = {
        (entry.set.name, key): _kind(_rules(chains, entry.set, before), _rules(chains, entry.set, after))
        for entry in elements
        if entry.set.verdicts
        for key, before, after in _pairs(entry)
    }
    directions = {name.rpartition("-")[0] for name, _ in kinds}
    effects = set(kinds.values())
    if len(directions) <= 1 or effects <= {Kind.TIGHTENS} or effects <= {Kind.LOOSENS}:
        return [_switch(elements, locality)], (), (), ()
    interim = _interim(elements, kinds, chains, change)
    first: list[Elements] = []
    last: list[Elements] = []
    for entry in elements:
        early, late = _Halves(entry.set), _Halves(entry.set)
        for key, before, after in _pairs(entry):
            kind = kinds.get((entry.set.name, key), _plain_kind(before, after))
            if kind is Kind.TIGHTENS or entry.set.interval:
                early.put(key, before, after)
            elif kind is Kind.LOOSENS or before is None or after is None:
                late.put(key, before, after)
            else:
                new = chains[entry.set.table, after.jump or ""]
                between = dataclasses.replace(after, jump=interim.between(entry.set, key, new))
                early.put(key, before, between)
                if between != after:
                    late.put(key, between, after)
        first += early.elements()
        last += late.elements()
    return [_switch(part, locality) for part in (first, last) if part], *interim.made()


def _interim(
    elements: list[Elements], kinds: Mapping[tuple[str, bytes], Kind], chains: Mapping[Id, Chain], change: Change
) -> Interim:
    before = {
        entry.set: {key: element for key, element in entry.removed.items() if kinds[entry.set.name, key] is Kind.BOTH}
        for entry in elements
        if entry.set.verdicts
    }
    # No policy's chain looks up a dispatch map.
    ours = [rule for chain in chains.values() if "/" not in chain.name for rule in chain.rules]
    dispatch = {nft_set: tuple(rule for rule in ours if rule.endswith(f"vmap @{nft_set.name}")) for nft_set in before}
    taken = frozenset(d.before.name for d in change.sets if d.before is not None)
    return Interim(chains, dispatch, {nft_set: replaced for nft_set, replaced in before.items() if replaced}, taken)


@dataclass(slots=True)
class _Halves:
    nft_set: Set
    removed: dict[bytes, Element] = dataclasses.field(default_factory=dict)
    added: dict[bytes, Element] = dataclasses.field(default_factory=dict)

    def put(self, key: bytes, before: Element | None, after: Element | None) -> None:
        if before is not None:
            self.removed[key] = before
        if after is not None:
            self.added[key] = after

    def elements(self) -> list[Elements]:
        return [Elements(self.nft_set, self.removed, self.added)] if self.removed or self.added else []


def _pairs(entry: Elements) -> Iterator[tuple[bytes, Element | None, Element | None]]:
    for key in dict.fromkeys((*entry.removed, *entry.added)):
        yield key, entry.removed.get(key), entry.added.get(key)


def _rules(chains: Mapping[Id, Chain], nft_set: Set, element: Element | None) -> frozenset[str] | None:
    """What allows in the chain that an element jumps to; None: nothing is judged."""
    chain = None if element is None or element.jump is None else chains.get((nft_set.table, element.jump))
    return None if chain is None else frozenset(_permitting(chains, chain))


def _permitting(chains: Mapping[Id, Chain], group: Chain) -> Iterator[str]:
    """The rules of a group's chain but for the drop; in the place of a chain that only jumps, the rules of that."""
    for line in group.rules[:-1]:
        target = chains.get((group.table, line.removeprefix("jump ")))
        if target is not None and all(inner.startswith("jump ") for inner in target.rules):
            yield from target.rules
        else:
            yield line


def _kind(before: frozenset[str] | None, after: frozenset[str] | None) -> Kind:
    if before is None or (after is not None and after <= before):
        return Kind.TIGHTENS
    return Kind.LOOSENS if after is None or before <= after else Kind.BOTH


def _plain_kind(before: Element | None, after: Element | None) -> Kind:
    """The kind for a set of isolated pods, or of networks: what is in it is closed."""
    return Kind.LOOSENS if after is None else Kind.TIGHTENS


def _ends_epoch(elements: Iterable[Elements]) -> bool:
    """Whether somebody may lose a permission: a pod is sent to another chain, or an address has another owner."""
    return any(entry.added for entry in elements if entry.set.use is not Use.OTHER)
