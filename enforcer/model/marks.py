"""The bits of the connection mark that say "judged", and the epochs that they count. Pure.

A connection that policy has allowed carries the epoch of that verdict in its mark, so its next packets pass without
another one. A commit that may take a permission away starts a new epoch, and every connection is judged again.
"""

from __future__ import annotations

from dataclasses import dataclass

DEFAULT_MASK = 0xFF000000
GROUPS = (1, 2, 3)
"""The values of an epoch's two highest bits. 0 is not one of them: a mark that was never written is no stamp."""

_SMALLEST_MASK = 5


@dataclass(frozen=True, slots=True)
class ConnectionMark:
    """Where in the 32 bits of a connection mark the stamp is: ``mask`` is one run of bits.

    The lowest bit says that ingress is still to be judged; the others are the epoch.

    Raises:
        ValueError: ``mask`` is not one run of at least 5 bits.
    """

    mask: int = DEFAULT_MASK

    def __post_init__(self) -> None:
        run = self.mask >> self.shift if 0 < self.mask < 1 << 32 else 0
        if run & (run + 1) or run.bit_length() < _SMALLEST_MASK:
            raise ValueError(f"must be one run of at least {_SMALLEST_MASK} bits out of 32, got {self.mask:#x}")

    @property
    def shift(self) -> int:
        """The number of the lowest bit."""
        return (self.mask & -self.mask).bit_length() - 1

    @property
    def epoch_mask(self) -> int:
        """The bits of the epoch."""
        return self.mask & ~(1 << self.shift)

    @property
    def group_mask(self) -> int:
        """The two highest bits of the epoch."""
        return 0b11 << (self.mask.bit_length() - 2)

    @property
    def epochs_in_group(self) -> int:
        """How many epochs share their two highest bits."""
        return 1 << ((self.mask >> self.shift).bit_length() - 3)

    def judged(self, epoch: int) -> int:
        """The stamp of a connection that both directions have allowed."""
        return epoch << (self.shift + 1)

    def egress_judged(self, epoch: int) -> int:
        """The stamp of a connection that egress has allowed, and whose ingress is still to be judged."""
        return self.judged(epoch) | 1 << self.shift

    def group(self, group: int) -> int:
        """The value of ``group_mask`` in every stamp of a group's epochs."""
        return group << (self.mask.bit_length() - 2)


@dataclass(slots=True)
class Epochs:
    """The epoch that was used last, and which groups of epochs no connection is stamped with.

    Epochs are used in the order of their value, group after group. A group is entered only when it is clean, so a value
    that comes again never meets a connection that still carries it from before. ``current`` None: there was no clean
    group to enter.
    """

    mark: ConnectionMark
    current: int | None = None
    clean: frozenset[int] = frozenset()

    @property
    def stale(self) -> tuple[int, ...]:
        """The groups whose stamps have to be cleared before they can be entered."""
        return tuple(group for group in GROUPS if group not in self.clean and group != self._entered)

    def advance(self) -> int | None:
        """The next epoch; None, and no epoch, if the group that is to be entered is not clean."""
        after = None if self.current is None else self.current + 1
        if after is not None and after // self.mark.epochs_in_group == self._entered:
            self.current = after
            return after
        order = GROUPS if self._entered is None else (self._entered % len(GROUPS) + 1,)
        group = next((group for group in order if group in self.clean), None)
        if group is not None:
            # Each other group is cleared once more meanwhile: a walk through connections may miss one that is moved.
            self.clean = frozenset()
        self.current = None if group is None else group * self.mark.epochs_in_group
        return self.current

    def cleared(self, group: int) -> None:
        """Take in that no connection carries a stamp of a group."""
        self.clean |= {group}

    def forget(self) -> None:
        """Take in that connections may carry any stamp."""
        self.current, self.clean = None, frozenset()

    @property
    def _entered(self) -> int | None:
        return None if self.current is None else self.current // self.mark.epochs_in_group
