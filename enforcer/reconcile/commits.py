"""Carries the kernel's tables over each change of the desired ruleset, and knows the epoch of the connection mark.

For the thread that owns the ruleset. It commits what ``plan`` says; where the kernel may hold something else than is
believed, at start, after a refusal, or when another program has changed our tables, it reads what is there and plans
from that, so what is right stays as it is.

A transaction that may take a permission away ends the epoch: it empties the set ``epoch``, so from its commit on
nothing passes by an earlier verdict. The next epoch begins only after a grace period, when no packet is under way that
met the rules before. A packet does not keep the rules of its generation: once two transactions have been committed
since it came, it meets rules of the second, and must not be given the second's stamp for what it was allowed before the
first. For the same reason a transaction that gives what such a packet could combine with what an earlier one took is
committed a grace period after that (see ``ruleset.reach``).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from enforcer.kernel.grace import wait_for_packets
from enforcer.kernel.nftables import NftError
from enforcer.model.marks import Epochs
from enforcer.policy.isolation import Group
from enforcer.reconcile.denials import Denials
from enforcer.reconcile.tables import Tables
from enforcer.ruleset.objects import Counter, Element, Table
from enforcer.ruleset.plan import Purpose, Step, plan
from enforcer.ruleset.reach import EVERYTHING, NOTHING
from enforcer.ruleset.ruleset import Change, Elements, Ruleset, difference
from enforcer.translate.base import EPOCH, epoch_elements, stamp_chain
from enforcer.translate.translator import Translator


@dataclass(frozen=True, slots=True)
class Committed:
    """What was committed: ``purposes`` of the transactions in order, and ``counts`` of what changed, for the log."""

    purposes: tuple[str, ...]
    counts: Mapping[str, int]


class Commits:
    """Commits the changes of one ruleset.

    Attributes:
        epochs: of the connection mark.
        knowledge: a number for what is known of the stamps on connections: a group that was to be cleared under another
            number may have been stamped since.
        ended: a number for the last transaction that ended an epoch.
    """

    def __init__(
        self,
        tables: Tables,
        ruleset: Ruleset,
        translator: Translator,
        denials: Denials,
        *,
        wait: Callable[[], None] = wait_for_packets,
    ) -> None:
        self._tables = tables
        self._ruleset = ruleset
        self._translator = translator
        self._denials = denials
        self._groups: dict[str, Group] = {}
        # What the kernel's set ``epoch`` holds.
        self._held: Mapping[bytes, Element] = {}
        self._wait = wait
        # The rule that the chain ``stamp`` was last given.
        self._stamp: tuple[str, ...] = ()
        # What was taken since packets under way were last waited for; nothing is known of an earlier agent.
        self._taken = EVERYTHING
        self.epochs = Epochs(translator.settings.mark)
        self.knowledge = 0
        self.ended = 0

    @property
    def epoch(self) -> int | None:
        """The epoch that connections are stamped with now; None: they are not stamped."""
        return self.epochs.current if self._held else None

    def change(self) -> Committed | None:
        """Commit what has changed in the ruleset since the last time; None if nothing has.

        Raises:
            NftError: a step was refused; ``synchronize`` is to follow.
        """
        change = self._ruleset.take()
        if not change:
            return None
        try:
            steps = plan(change, self._ruleset)
        except ValueError as error:
            # Two contents with one digest: as good as refused by the kernel.
            raise NftError(str(error)) from error
        return self._commit(change, steps)

    def synchronize(self) -> Committed:
        """Bring the tables from whatever they hold to the ruleset.

        Raises:
            NftError: a step was refused.
        """
        present = self._tables.present(self._ruleset)
        self._ruleset.take()
        change = difference(present, self._ruleset)
        self._take_epoch_of(present, change)
        if _types_differ(change):
            self._follow_groups()
            counted = self._counted(d.before for d in change.counters if d.before is not None and d.after is None)
            self._guarded(lambda: self._tables.rebuild(self._ruleset, present))
            self._denials.retire(counted)
            self._held = {}
            self._taken = EVERYTHING
            self.ended += 1
            return Committed(("rebuild",), change.counts)
        # A table that somebody has put to rest works again, too.
        self._guarded(self._tables.make)
        upgrade = (Table.POLICY, "fast") not in present.chains
        return self._commit(change, plan(change, self._ruleset, repair=True, upgrade=upgrade))

    def _take_epoch_of(self, present: Ruleset, change: Change) -> None:
        """Take in the epoch that the kernel holds. If rules were there that are not ours, any stamp may be about.

        Those may be the rules of an older state, which somebody has loaded again: its epoch may be one still to come.
        """
        held = present.elements(EPOCH) if (EPOCH.table, EPOCH.name) in present.sets else {}
        stamp = present.chains.get((Table.POLICY, "stamp"))
        same_epoch = held == self._held and (stamp is None or stamp.rules == self._stamp)
        if not same_epoch or any(not d.after.epoch for d in change.chains if d.after is not None):
            self.knowledge += 1
            self.epochs.forget()
        self._held, self._stamp = held, ()

    def begin_epoch(self, ended: int) -> bool:
        """Begin the next epoch, a grace period after the transaction ``ended``; whether one has begun.

        Raises:
            NftError: refused.
        """
        if ended != self.ended:
            return False
        self._taken = NOTHING
        if self._held:
            return False
        mark, epoch = self.epochs.mark, self.epochs.advance()
        elements = {} if epoch is None else epoch_elements(mark, epoch)
        stamp = stamp_chain(mark, epoch)
        if stamp.rules != self._stamp:
            # Without an epoch nothing is stamped, so that the group which was left can be cleared.
            added = (Elements(EPOCH, added=elements),) if elements else ()
            step = Step(purpose=Purpose.EPOCH, refilled=(stamp,), elements=added)
            self._guarded(lambda: self._tables.commit(step))
            self._stamp = stamp.rules
        self._held = elements
        return epoch is not None

    def _commit(self, change: Change, steps: Sequence[Step]) -> Committed:
        if change.counters:
            self._follow_groups()
        self._guarded(lambda: self._run(steps))
        return Committed(tuple(step.purpose.value for step in steps), change.counts)

    def _follow_groups(self) -> None:
        present = self._translator.denied
        self._denials.follow(self._groups | present)
        self._groups = present

    def _run(self, steps: Sequence[Step]) -> None:
        for step in steps:
            counted = self._counted(step.old_counters)
            if self._taken.meets(step.gives):
                self._wait()
                self._taken = NOTHING
            self._taken |= step.takes
            self._tables.commit(self._ending(step))
            self._denials.retire(counted)
            if step.ends_epoch:
                self._held = {}
                self.ended += 1

    def _counted(self, counters: Iterable[Counter]) -> dict[str, int]:
        """The packets of counters that are about to go, by name."""
        return {counter.name: self._tables.counter(counter)[0] for counter in counters}

    def _ending(self, step: Step) -> Step:
        """A step with what ends the epoch, if it does and one lasts."""
        if not step.ends_epoch or not self._held:
            return step
        end = Elements(EPOCH, removed=self._held)
        return dataclasses.replace(step, elements=(*step.elements, end))

    def _guarded(self, action: Callable[[], None]) -> None:
        """Run what commits; if it is refused, it is not known any more which stamps are written."""
        try:
            action()
        except NftError:
            self.knowledge += 1
            self.ended += 1
            self.epochs.forget()
            raise


def _types_differ(change: Change) -> bool:
    """Whether sets or base chains of our names are of other types than ours: no steps lead from there."""
    return any(d.before is not None and d.after is not None for d in change.sets) or any(
        d.before is not None and d.after is not None and d.before.hook != d.after.hook for d in change.chains
    )
