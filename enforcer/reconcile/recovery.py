"""What is done when the kernel refuses a transaction: everything is rendered, and then without what may be to blame."""

from __future__ import annotations

from collections.abc import Callable

import structlog

from enforcer.kernel.nftables import NftError
from enforcer.reconcile.desired import Desired
from enforcer.reconcile.drift import Drift
from enforcer.reconcile.state import Observer

_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 0.2, 10.0

log = structlog.get_logger()


class Recovery:
    """Runs transactions until one stands. For the loop's thread.

    Attributes:
        failure: why the kernel does not hold the desired ruleset; None if it does.
        retry_seconds: when to try again after a failure.
    """

    def __init__(self, desired: Desired, drift: Drift, observer: Observer) -> None:
        self._desired = desired
        self._drift = drift
        self._observer = observer
        self.failure: str | None = None
        self.retry_seconds = _FIRST_RETRY_SECONDS

    def run(self, transact: Callable[[], None]) -> None:
        """Commit what is desired; if all of it is refused, close what the last changed policies select."""
        try:
            transact()
        except NftError as error:
            self._observer.failed()
            log.error("transaction refused", consequence="full render", error=str(error))
            self._render_everything(transact)
        else:
            self._succeeded()

    def _render_everything(self, transact: Callable[[], None]) -> None:
        self._drift.needs_full_render = True
        try:
            transact()
        except NftError as error:
            self._render_without_last(transact, error)
        else:
            self._succeeded()

    def _render_without_last(self, transact: Callable[[], None], error: NftError) -> None:
        blamed = self._desired.changed_policies & self._desired.policies.keys()
        self._desired.reject(blamed, f"the kernel refused it: {error}")
        try:
            transact()
        except NftError as last:
            # It was not they.
            self._desired.readmit(blamed)
            self._observer.failed()
            self.failure = str(last)
            self.retry_seconds = min(self.retry_seconds * 2, _LAST_RETRY_SECONDS)
            log.error(
                "full render refused", consequence="the last state stands", error=str(last), retry=self.retry_seconds
            )
        else:
            self._succeeded()

    def _succeeded(self) -> None:
        self.failure = None
        self.retry_seconds = _FIRST_RETRY_SECONDS
