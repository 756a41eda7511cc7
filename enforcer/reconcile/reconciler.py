"""The owner of the state: takes events off a queue, and keeps the kernel's tables equal to what they add up to.

Other threads only ever put events; everything behind the queue is touched by the loop's thread alone. The first event
is worked off at once, and what arrives while a transaction runs goes into the next one together.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from typing import TypeVar

import structlog

from enforcer.model.changes import Change
from enforcer.model.objects import Attachment
from enforcer.nodes.ownership import Machine
from enforcer.reconcile.commits import Commits
from enforcer.reconcile.denials import Denials
from enforcer.reconcile.desired import Desired
from enforcer.reconcile.drift import Drift
from enforcer.reconcile.epochs import STAMP_KERNEL, EpochRenewal, StampKernel
from enforcer.reconcile.events import EventQueue
from enforcer.reconcile.recovery import Recovery
from enforcer.reconcile.settings import Settings
from enforcer.reconcile.state import Followers, Observer, State
from enforcer.reconcile.tables import Tables
from enforcer.reconcile.waiting import WaitingAttachments

T = TypeVar("T")

_COMMIT_SECONDS = 10.0

log = structlog.get_logger()


class NotReadyError(Exception):
    """The kernel could not be brought to hold something in time; the text says what to look at."""


class Reconciler:
    """The loop and its thread-safe doors.

    ``start`` runs it in a thread of its own. Nothing is committed before ``synced`` has been called once; the first
    commit replaces whatever an earlier agent left.

    Args:
        stamps: what the kernel is asked of stamps and packets.
        clock: seconds that never go back.

    Attributes:
        desired: objects, attachments and what they mean; for the loop's thread, which ``call`` leads to.
        denials: what each policy has denied; for the loop's thread.
    """

    def __init__(
        self,
        tables: Tables,
        settings: Settings,
        observer: Observer,
        *,
        stamps: StampKernel = STAMP_KERNEL,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._tables = tables
        self._settings = settings
        self._observer = observer
        self._clock = clock
        self._events = EventQueue()
        self._thread = threading.Thread(target=self._run, name="reconciler", daemon=True)
        self._followers = Followers()
        # Everything below belongs to that thread.
        self.desired = Desired(settings)
        self.denials = Denials(settings.state_folder)
        self._commits = Commits(tables, self.desired.ruleset, self.desired.translator, self.denials)
        self._epochs = EpochRenewal(self._commits, observer, self._events.put, stamps, clock)
        self._drift = Drift(tables, observer)
        self._recovery = Recovery(self.desired, self._drift, observer, clock)
        self._waiting = WaitingAttachments(self.desired.knows_pod_of)
        self._synced = False

    # Doors: any thread

    def follow(self, followers: Followers) -> None:
        """Say who is told of what; before ``start``."""
        self._followers = followers

    def start(self) -> None:
        """Start the loop."""
        self._epochs.start()
        self._thread.start()

    def stop(self) -> None:
        """End the loop after the events that were put before; the kernel's tables stay."""
        self._epochs.stop()
        self._events.close()
        self._thread.join()

    def alive(self) -> bool:
        """Whether the loop runs, and what clears stamps."""
        return self._thread.is_alive() and self._epochs.alive()

    def changes(self, changes: Sequence[Change]) -> None:
        """Take in the present state of objects."""
        self._events.put(lambda: self.desired.apply(changes))

    def synced(self) -> None:
        """Say that all the source holds has been handed to ``changes`` once."""
        self._events.put(self._begin)

    def attach(self, attachment: Attachment) -> None:
        """Return when the kernel holds the policy of a new attachment.

        If its pod is not known it is closed, and is waited for a bounded time.

        Raises:
            NotReadyError: the kernel does not hold it.
        """
        known: Future[None] = Future()
        committed = self._events.submit(lambda: self._attach(attachment, known))
        self._wait(committed, f"attach {attachment.pod or attachment.key}")
        try:
            known.result(self._settings.unknown_pod_wait)
        except FutureTimeout:
            log.warning(
                "pod unknown",
                pod=attachment.pod,
                standing="allowed" if self._settings.unknown_pods_allowed else "closed until its object is known",
            )
            self._events.put(lambda: self._waiting.remove(attachment.key))

    def restore(self, attachments: Sequence[Attachment]) -> None:
        """Take in attachments that an earlier agent made, before the first commit."""
        for attachment in attachments:
            self._events.put(functools.partial(self.desired.attach, attachment))

    def detach(self, key: str) -> None:
        """Return when the kernel holds nothing of an attachment.

        Raises:
            NotReadyError: the kernel may still hold some of it.
        """
        if self.call(lambda: self._synced):
            self._wait(self._events.submit(lambda: self._detach(key)), f"detach {key}")
        else:
            # The first commit will hold nothing of it.
            self._events.put(lambda: self._detach(key))

    def machine_changed(self, machine: Machine) -> None:
        """Take in what the kernel says of this machine."""
        self._events.put(lambda: self.desired.set_machine(machine))

    def ruleset_changed(self, generation: int | None) -> None:
        """Take in that a commit touched our tables (None: that one may have)."""
        self._events.put(lambda: self._drift.ruleset_changed(generation))

    def barrier(self, seconds: float) -> bool:
        """Wait until the kernel holds all that was put before; False if that takes longer than ``seconds``."""
        try:
            self._events.submit(lambda: None).result(seconds)
        except FutureTimeout:
            return False
        return True

    def call(self, function: Callable[[], T]) -> T:
        """Run a function on the owner's thread, between transactions, and return its result."""
        return self._events.call(function, _COMMIT_SECONDS)

    def state(self) -> State:
        """The state of the loop; to be asked through ``call``."""
        return State(
            synced=self._synced and not self._drift.needs_full_render,
            failure=self._recovery.failure,
            local_pods=self.desired.local_pods,
            cluster_pods=self.desired.pods,
            policies=len(self.desired.policies),
            attachments=len(self.desired.attachments),
            rejections=self.desired.rejections,
            unread=len(self.desired.unread),
            stamps=self._epochs.stamps,
        )

    # The loop

    def _run(self) -> None:
        going_on = True
        while going_on:
            going_on = self._events.run_all(self._recovery.wait_seconds)
            self._commit()

    def _begin(self) -> None:
        self._synced = True

    def _attach(self, attachment: Attachment, known: Future[None]) -> None:
        self.desired.attach(attachment)
        self._waiting.add(attachment, known)

    def _detach(self, key: str) -> None:
        self._waiting.remove(key)
        self.desired.detach(key)

    def _wait(self, committed: Future[None], what: str) -> None:
        try:
            committed.result(_COMMIT_SECONDS)
        except FutureTimeout:
            waits = "it is busy with other changes" if self._synced else "the source has not been read yet"
            reason = self._recovery.failure or waits
            raise NotReadyError(f"{what}: the kernel did not take it up in {_COMMIT_SECONDS:.0f} s: {reason}") from None

    def _commit(self) -> None:
        self.desired.apply_limits()
        if unread := self.desired.take_unread():
            self._followers.read_again(unread)
        if not self._synced:
            return
        if (ownership := self.desired.take_ownership()) is not None:
            self._followers.ownership(ownership)
        self._recovery.run(self._transact)
        if self._recovery.failure is not None:
            return
        if self.desired.changed_policies - self.desired.policies.keys():
            self.denials.keep(self.desired.policies)
        self.desired.changed_policies.clear()
        if (rejections := self.desired.take_rejections()) is not None:
            self._followers.rejections(rejections)
        self._events.committed()
        self._waiting.complete()

    def _transact(self) -> None:
        """Commit what is desired, and begin an epoch if its time has come.

        Raises:
            NftError: the kernel refused it.
        """
        started = self._clock()
        self.desired.complete()
        whole, begun = self._drift.needs_full_render, self._drift.begin()
        committed = self._commits.synchronize() if whole else self._commits.change()
        if committed is not None:
            self._drift.committed(begun)
            seconds, counts = self._clock() - started, committed.counts
            self._observer.committed(whole=whole, seconds=seconds, elements=counts["added"] + counts["removed"])
            ms = round(seconds * 1e3, 3)
            log.info("transactions committed", steps=committed.purposes, whole=whole, **counts, ms=ms)
        self._epochs.renew()
