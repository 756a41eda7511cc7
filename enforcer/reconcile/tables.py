"""What the loop needs of the kernel's tables; ``kernel.nftables.Tables`` is what it gets from the agent."""

from __future__ import annotations

from typing import Protocol

from enforcer.ruleset.objects import Counter
from enforcer.ruleset.plan import Step
from enforcer.ruleset.ruleset import Ruleset


class Tables(Protocol):
    """Commits to our two tables, and tells own commits from those of others. Methods raise ``NftError``."""

    def generation(self) -> int:
        """The present generation of the ruleset, whoever made it."""

    def is_own(self, generation: int) -> bool:
        """Whether a generation was made through this object alone."""

    def all_own_since(self, generation: int) -> bool:
        """Whether every generation after ``generation`` was made through this object alone."""

    def make(self) -> None:
        """Make both tables where they are not there."""

    def present(self, desired: Ruleset) -> Ruleset:
        """What the tables hold; objects that are as desired are the desired objects themselves."""

    def commit(self, step: Step) -> None:
        """Carry the tables over one step of a change, in one transaction."""

    def rebuild(self, ruleset: Ruleset, present: Ruleset) -> None:
        """Put a whole ruleset in the place of what the tables hold, in one transaction."""

    def counter(self, counter: Counter) -> tuple[int, int]:
        """Packets and bytes of one counter; none if it is not there."""
