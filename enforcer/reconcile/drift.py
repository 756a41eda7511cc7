"""Whether the kernel may hold something else than was committed, because another program wrote to our tables."""

from __future__ import annotations

import contextlib

import structlog

from enforcer.kernel.nftables import NftError
from enforcer.reconcile.state import Observer
from enforcer.reconcile.tables import Tables

log = structlog.get_logger()


class Drift:
    """What is believed of the kernel's tables. For the loop's thread.

    Attributes:
        needs_full_render: whether the next commit has to start from what the kernel holds; true at first.
    """

    def __init__(self, tables: Tables, observer: Observer) -> None:
        self._tables = tables
        self._observer = observer
        self._accounted = 0
        self.needs_full_render = True

    def ruleset_changed(self, generation: int | None) -> None:
        """Take in that a commit touched our tables (None: that one may have)."""
        if generation is not None and self._tables.is_own(generation):
            return
        with contextlib.suppress(NftError):
            if generation is None and self._tables.all_own_since(self._accounted):
                return
        log.warning("ruleset changed by another process", consequence="full render", generation=generation)
        self.needs_full_render = True
        self._observer.repaired()

    def begin(self) -> int:
        """The generation from which the commit to come is accounted for."""
        return self._tables.generation() if self.needs_full_render else self._accounted

    def committed(self, begun: int) -> None:
        """Take in that our commit stands."""
        self.needs_full_render = False
        # A commit of another whose notification was lost is not to be taken for accounted for.
        if self._tables.all_own_since(begun):
            self._accounted = self._tables.generation()
