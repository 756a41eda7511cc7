"""What stamps on connections wait for, each on a thread of its own that owns nothing but its queue.

``StampCleaner`` clears the stamps of old epochs before their values come again; ``GracePeriods`` waits until no packet
is under way that met the rules before.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

import structlog

from enforcer.kernel.conntrack import Conntrack
from enforcer.kernel.grace import wait_for_packets
from enforcer.model.marks import ConnectionMark

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


class StampCleaner:
    """Clears groups of epochs one after the other; ``report`` hears of each, on this object's thread."""

    def __init__(self, mark: ConnectionMark, report: Callable[[Cleared], None], clear: Callable[..., int]) -> None:
        self._mark = mark
        self._report = report
        self._clear_marks = clear
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
        started = time.perf_counter()
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
        ms = round((time.perf_counter() - started) * 1e3, 3)
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
