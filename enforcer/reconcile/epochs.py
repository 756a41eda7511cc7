"""When the next epoch of the connection mark begins, and what it waits for.

``EpochRenewal`` is the loop's. What it waits for is done on two threads, which own nothing but their queues:
``StampCleaner`` clears the stamps of old epochs before their values come again, ``GracePeriods`` waits until no packet
is under way that met the rules before.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from enforcer.kernel.conntrack import Conntrack
from enforcer.kernel.grace import wait_for_packets
from enforcer.model.marks import ConnectionMark
from enforcer.reconcile.commits import Commits
from enforcer.reconcile.state import Observer, Stamps

log = structlog.get_logger()

# Two UDP packets that raced leave an entry which lives for a second and is not listed: no stamp of it may be left.
_SETTLE_SECONDS = 1.1
_FIRST_RETRY_SECONDS, _LAST_RETRY_SECONDS = 1.0, 60.0


@dataclass(frozen=True, slots=True)
class Cleared:
    """What came of clearing a group of epochs: how many connections carried one, or why it could not be done.

    ``knowledge`` is the number that was asked with.
    """

    group: int
    knowledge: int
    connections: int = 0
    failure: str | None = None


def clear_marks(*, value: int, mask: int, bits: int) -> int:
    """Clear bits of connection marks in the network namespace of the calling thread; see ``Conntrack.clear``."""
    conntrack = Conntrack()
    try:
        return conntrack.clear(value=value, mask=mask, bits=bits)
    finally:
        conntrack.close()


@dataclass(frozen=True, slots=True)
class StampKernel:
    """What the kernel is asked of stamps and packets; tests ask something else."""

    clear: Callable[..., int] = clear_marks
    wait_for_packets: Callable[[], None] = wait_for_packets


STAMP_KERNEL = StampKernel()


class EpochRenewal:
    """Begins epochs. For the loop's thread, but ``start``, ``stop`` and ``alive``.

    Args:
        commits: commits the epoch.
        put: has a function called on the loop's thread.
        clock: seconds that never go back.
    """

    def __init__(
        self,
        commits: Commits,
        observer: Observer,
        put: Callable[[Callable[[], None]], None],
        kernel: StampKernel,
        clock: Callable[[], float],
    ) -> None:
        self._commits = commits
        self._observer = observer
        self._put = put
        self._cleaner = StampCleaner(commits.epochs.mark, self._report_cleared, kernel.clear, clock)
        self._grace = GracePeriods(self._report_grace_over, kernel.wait_for_packets)
        self._clearing: set[int] = set()
        self._knowledge = 0
        self._grace_asked: int | None = None
        self._grace_over: int | None = None
        self._cleared = 0
        self._failure: str | None = None

    def start(self) -> None:
        """Start the threads."""
        self._cleaner.start()
        self._grace.start()

    def stop(self) -> None:
        """End the threads."""
        self._cleaner.stop()
        self._grace.stop()

    def alive(self) -> bool:
        """Whether the threads run."""
        return self._cleaner.alive() and self._grace.alive()

    @property
    def stamps(self) -> Stamps:
        """What is known of the stamps that connections carry."""
        return Stamps(self._commits.epoch, self._cleared, self._failure)

    def renew(self) -> None:
        """Begin an epoch if its time has come; ask for what the next one has to wait for.

        Raises:
            NftError: the kernel refused it.
        """
        commits = self._commits
        if self._knowledge != commits.knowledge:
            self._knowledge = commits.knowledge
            self._clearing = set()
        if self._grace_over is not None and commits.begin_epoch(self._grace_over):
            log.debug("epoch began", epoch=commits.epoch)
        self._grace_over = None
        for group in commits.epochs.stale:
            if group not in self._clearing:
                self._clearing.add(group)
                self._cleaner.clear(group, self._knowledge)
        if commits.epoch is None and self._grace_asked != commits.ended:
            self._grace_asked = commits.ended
            self._grace.ask(commits.ended)

    def _take_cleared(self, cleared: Cleared) -> None:
        """Take in that old stamps were cleared, or could not be: an epoch may begin that had to wait for it."""
        self._failure = cleared.failure
        if cleared.failure is not None or cleared.knowledge != self._commits.knowledge:
            return
        self._clearing.discard(cleared.group)
        self._cleared += cleared.connections
        self._observer.cleared(cleared.connections)
        self._commits.epochs.cleared(cleared.group)
        self._grace_asked = None

    def _take_grace_over(self, ended: int) -> None:
        self._grace_over = ended

    # On the threads of the two

    def _report_cleared(self, cleared: Cleared) -> None:
        self._put(lambda: self._take_cleared(cleared))

    def _report_grace_over(self, ended: int) -> None:
        self._put(lambda: self._take_grace_over(ended))


class StampCleaner:
    """Clears groups of epochs one after the other; ``report`` hears of each, on this object's thread."""

    def __init__(
        self,
        mark: ConnectionMark,
        report: Callable[[Cleared], None],
        clear: Callable[..., int],
        clock: Callable[[], float],
    ) -> None:
        self._mark = mark
        self._report = report
        self._clear_marks = clear
        self._clock = clock
        self._asked: queue.SimpleQueue[tuple[int, int] | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="stamp cleaner", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; what it is at is left undone."""
        self._stopped.set()
        self._asked.put(None)
        self._thread.join()

    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def clear(self, group: int, knowledge: int) -> None:
        """Have the stamps of a group cleared soon. No rule may write any of them any more."""
        self._asked.put((group, knowledge))

    def _run(self) -> None:
        while (asked := self._asked.get()) is not None:
            self._clear_until_done(*asked)

    def _clear_until_done(self, group: int, knowledge: int) -> None:
        pause = _SETTLE_SECONDS
        retry = _FIRST_RETRY_SECONDS
        while not self._stopped.wait(pause):
            cleared = self._clear(group, knowledge)
            self._report(cleared)
            if cleared.failure is None:
                return
            pause, retry = retry, min(retry * 2, _LAST_RETRY_SECONDS)

    def _clear(self, group: int, knowledge: int) -> Cleared:
        started = self._clock()
        try:
            count = self._clear_marks(value=self._mark.group(group), mask=self._mark.group_mask, bits=self._mark.mask)
        except OSError as error:
            log.error(
                "stamps not cleared",
                error=str(error),
                consequence="every packet of a pod is judged until they are",
                hint="is the kernel module nf_conntrack_netlink loaded?",
            )
            return Cleared(group, knowledge, failure=str(error))
        ms = round((self._clock() - started) * 1e3, 3)
        log.info("stamps cleared", connections=count, ms=ms)
        return Cleared(group, knowledge, connections=count)


class GracePeriods:
    """Waits for grace periods; ``report`` hears of each with the number that was asked with, on this object's thread.

    What is asked while one is waited for is waited for together, by the last number.
    """

    def __init__(self, report: Callable[[int], None], wait: Callable[[], None]) -> None:
        self._report = report
        self._wait = wait
        self._asked: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="grace periods", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._asked.put(None)
        self._thread.join()

    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def ask(self, number: int) -> None:
        """Have a grace period waited for that begins after this call."""
        self._asked.put(number)

    def _run(self) -> None:
        while (number := self._asked.get()) is not None:
            while not self._asked.empty():
                later = self._asked.get()
                if later is None:
                    return
                number = later
            self._wait()
            self._report(number)
