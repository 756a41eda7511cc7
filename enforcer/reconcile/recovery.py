"""What is done when the kernel refuses a transaction: everything is rendered, then without what may be to blame.

The policies that came into force or changed since the last commit may be to blame. They are closed, and if the kernel
takes that, tried again, half of them at a time, so that in the end only those are closed which the kernel refuses by
themselves; these too are tried again, ever more rarely. If closing them does not help, they are put back. However much
happens meanwhile, all this takes at most half of the loop's time.
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

    Args:
        clock: seconds that never go back.

    Attributes:
        failure: why the kernel does not hold the desired ruleset; None if it does.
    """

    def __init__(self, desired: Desired, drift: Drift, observer: Observer, clock: Callable[[], float]) -> None:
        self._desired = desired
        self._drift = drift
        self._observer = observer
        self._clock = clock
        self._suspects: list[_Suspects] = []
        self._retry_seconds = _FIRST_RETRY_SECONDS
        # While the kernel refuses: when everything is rendered again, and policies are blamed again.
        self._retry_at = self._blame_at = 0.0
        # Before this, nothing is tried again.
        self._rest_until = 0.0
        self.failure: str | None = None

    @property
    def wait_seconds(self) -> float | None:
        """When to ``run`` again although nothing has happened; None: not at all."""
        if self.failure is not None:
            due = self._retry_at
        elif self._suspects:
            due = min(suspects.due for suspects in self._suspects)
        else:
            return None
        return max(0.0, max(self._rest_until, due) - self._clock())

    def run(self, transact: Callable[[], None]) -> None:
        """Commit what is desired; if that is refused, without what may be to blame."""
        edited = self._desired.take_edited()
        for suspects in self._suspects:
            # A policy that was edited, or is gone, is tried as it is now.
            suspects.policies -= edited
        self._suspects = [suspects for suspects in self._suspects if suspects.policies]
        begun = self._clock()
        if self.failure is not None and begun < self._rest_until:
            self._retry_at = self._rest_until
            return
        try:
            transact()
        except NftError as error:
            self._observer.failed()
            log.error("transaction refused", consequence="full render", error=str(error))
            self._recover(transact, error)
            self._rest(begun)
            return
        self._succeeded()
        if self.wait_seconds == 0.0:
            due = min(self._suspects, key=lambda suspects: suspects.due)
            self._suspects.remove(due)
            self._try_again(transact, due)

    def _recover(self, transact: Callable[[], None], error: NftError) -> None:
        last: NftError | None = error
        if self.failure is None:
            last = self._render(transact)
        if last is not None and self._clock() >= self._blame_at and (blamed := self._to_blame()):
            self._reject(blamed, last)
            if self._render(transact) is None:
                self._suspect(blamed, _FIRST_SUSPECT_SECONDS)
                return
            # It was not they, and what was committed of the try is undone.
            self._desired.readmit(blamed)
            last = self._render(transact)
        if last is not None:
            self._fail(last)

    def _to_blame(self) -> set[str]:
        """Policies that are not closed already, and that the kernel may not have had before."""
        closed = {key for suspects in self._suspects for key in suspects.policies}
        changed = self._desired.changed_policies & self._desired.policies.keys()
        return {key for key in changed if self._desired.policies[key].rejected is None} - closed

    def _reject(self, policies: Collection[str], error: NftError) -> None:
        self._desired.reject(policies, f"the kernel refused a change with it: {error}; it is tried again")

    def _render(self, transact: Callable[[], None]) -> NftError | None:
        """Commit what is desired from what the kernel holds; why it was refused, if it was."""
        self._drift.needs_full_render = True
        try:
            transact()
        except NftError as error:
            self._observer.failed()
            return error
        self._succeeded()
        return None

    def _suspect(self, policies: set[str], pause: float) -> None:
        """Have policies tried again: one after a pause, several in halves as soon as events leave time."""
        if len(policies) == 1:
            self._suspects.append(_Suspects(policies, self._clock() + pause, pause))
            return
        ordered = sorted(policies)
        middle = len(ordered) // 2
        self._suspects += [_Suspects(set(half), self._clock()) for half in (ordered[:middle], ordered[middle:])]

    def _try_again(self, transact: Callable[[], None], suspects: _Suspects) -> None:
        begun = self._clock()
        self._desired.readmit(suspects.policies)
        try:
            transact()
        except NftError as error:
            self._observer.failed()
            some = sorted(suspects.policies)[:_NAMED_POLICIES]
            log.warning("policies refused", count=len(suspects.policies), policies=some, error=str(error))
            self._reject(suspects.policies, error)
            if (last := self._render(transact)) is not None:
                self._fail(last)
            self._suspect(suspects.policies, min(suspects.pause * 2, _LAST_SUSPECT_SECONDS))
            self._rest(begun)

    def _rest(self, begun: float) -> None:
        """Leave the loop as much time as was taken since ``begun``."""
        now = self._clock()
        self._rest_until = now + (now - begun)

    def _fail(self, error: NftError) -> None:
        self.failure = str(error)
        self._retry_seconds = min(self._retry_seconds * 2, _LAST_RETRY_SECONDS)
        self._retry_at = self._blame_at = self._clock() + self._retry_seconds
        log.error("full render refused", consequence="the last state stands", error=self.failure,
                  again_in=self._retry_seconds)  # fmt: skip

    def _succeeded(self) -> None:
        self.failure = None
        self._retry_seconds = _FIRST_RETRY_SECONDS
        self._blame_at = 0.0
