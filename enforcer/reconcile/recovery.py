"""What is done when the kernel refuses a transaction: everything is rendered, then without what may be to blame.

The policies that changed are to blame first. If the kernel goes on refusing, any policy may be: one that selected no
pod of this node was not refused when it came. Policies that were closed on suspicion are tried again, half of them at a
time, so that in the end only those are closed which the kernel refuses by themselves; these too are tried again, ever
more rarely. Trying takes at most half of the loop's time.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import structlog

from enforcer.kernel.nftables import NftError
from enforcer.reconcile.desired import Desired
from enforcer.reconcile.drift import Drift
from enforcer.reconcile.state import Observer

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.2, 10.0
_FIRST_SUSPECT_SECONDS, _LAST_SUSPECT_SECONDS = 1.0, 300.0
_NAMED_POLICIES = 5

log = structlog.get_logger()


@dataclass(slots=True)
class _Suspects:
    """Policies that are closed since the kernel refused a transaction with them.

    ``due`` is when they are tried again, on the clock of ``Recovery``; ``pause`` is in seconds, for the time after.
    """

    policies: set[str]
    due: float
    pause: float = _FIRST_SUSPECT_SECONDS


class Recovery:
    """Runs transactions until one stands. For the loop's thread.

    Attributes:
        failure: why the kernel does not hold the desired ruleset; None if it does.
    """

    def __init__(self, desired: Desired, drift: Drift, observer: Observer, clock: Callable[[], float]) -> None:
        self._desired = desired
        self._drift = drift
        self._observer = observer
        self._clock = clock
        self._retry_seconds = _FIRST_RETRY_SECONDS
        self._suspects: list[_Suspects] = []
        self._next_try = clock()
        self.failure: str | None = None

    @property
    def wait_seconds(self) -> float | None:
        """When to ``run`` again although nothing has happened; None: not at all."""
        if self.failure is not None:
            return self._retry_seconds
        if not self._suspects:
            return None
        return max(0.0, max(self._next_try, min(suspects.due for suspects in self._suspects)) - self._clock())

    def run(self, transact: Callable[[], None]) -> None:
        """Commit what is desired; if all of it is refused, close what the last changed policies select."""
        edited = self._desired.take_edited()
        for suspects in self._suspects:
            # A policy that was edited, or is gone, is tried as it is now.
            suspects.policies -= edited
        self._suspects = [suspects for suspects in self._suspects if suspects.policies]
        try:
            transact()
        except NftError as error:
            self._observer.failed()
            log.error("transaction refused", consequence="full render", error=str(error))
            self._render_everything(transact)
        else:
            self._succeeded()
        if self.failure is None and self.wait_seconds == 0.0:
            due = min(self._suspects, key=lambda suspects: suspects.due)
            self._suspects.remove(due)
            self._try_again(transact, due)

    def _render_everything(self, transact: Callable[[], None]) -> None:
        self._drift.needs_full_render = True
        try:
            transact()
        except NftError as error:
            for blamed in self._to_blame():
                if self._render_without(transact, blamed, error):
                    self._suspect(blamed, _FIRST_SUSPECT_SECONDS)
                    return
                # It was not they.
                self._desired.readmit(blamed)
        else:
            self._succeeded()

    def _to_blame(self) -> list[set[str]]:
        """Sets of policies that may be to blame, the likeliest first."""
        closed = {key for suspects in self._suspects for key in suspects.policies}
        in_force = {key for key, policy in self._desired.policies.items() if policy.rejected is None} - closed
        changed = in_force & self._desired.changed_policies
        return [changed] if self.failure is None else [changed, in_force]

    def _render_without(self, transact: Callable[[], None], policies: Collection[str], error: NftError) -> bool:
        """Close what policies select; whether the kernel takes the rest."""
        self._desired.reject(policies, f"the kernel refused a change with it: {error}; it is tried again")
        self._drift.needs_full_render = True
        try:
            transact()
        except NftError as last:
            self._observer.failed()
            self.failure = str(last)
            self._retry_seconds = min(self._retry_seconds * 2, _LAST_RETRY_SECONDS)
            log.error("full render refused", consequence="the last state stands", error=str(last),
                      again_in=self._retry_seconds)  # fmt: skip
            return False
        self._succeeded()
        return True

    def _suspect(self, policies: set[str], pause: float) -> None:
        """Have policies tried again: one after a pause, several in halves as soon as events leave time."""
        if len(policies) == 1:
            self._suspects.append(_Suspects(policies, self._clock() + pause, pause))
            return
        ordered = sorted(policies)
        middle = len(ordered) // 2
        for half in (ordered[:middle], ordered[middle:]):
            if half:
                self._suspects.append(_Suspects(set(half), self._clock()))

    def _try_again(self, transact: Callable[[], None], suspects: _Suspects) -> None:
        begun = self._clock()
        self._desired.readmit(suspects.policies)
        try:
            transact()
        except NftError as error:
            self._observer.failed()
            some = sorted(suspects.policies)[:_NAMED_POLICIES]
            log.warning("policies refused", count=len(suspects.policies), policies=some, error=str(error))
            self._render_without(transact, suspects.policies, error)
            self._suspect(suspects.policies, min(suspects.pause * 2, _LAST_SUSPECT_SECONDS))
            now = self._clock()
            self._next_try = now + (now - begun)

    def _succeeded(self) -> None:
        self.failure = None
        self._retry_seconds = _FIRST_RETRY_SECONDS
