"""The queue of the loop: functions that other threads have called on the loop's thread, and who waits for a commit."""

from __future__ import annotations

import queue
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")


class EventQueue:
    """Events in the order in which they were put."""

    def __init__(self) -> None:
        self._events: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        # For the loop's thread.
        self._uncommitted: list[Future[None]] = []

    # Any thread

    def put(self, event: Callable[[], None]) -> None:
        """Have an event run soon."""
        self._events.put(event)

    def close(self) -> None:
        """End the loop after the events that were put before."""
        self._events.put(None)

    def submit(self, event: Callable[[], None]) -> Future[None]:
        """Have an event run soon; the future has its result when the kernel holds what the event changed."""
        future: Future[None] = Future()

        def run() -> None:
            event()
            self._uncommitted.append(future)

        self._events.put(run)
        return future

    def call(self, function: Callable[[], T], seconds: float) -> T:
        """Run a function between transactions and return its result, or raise what it raised.

        Raises:
            TimeoutError: the loop was busy for ``seconds``.
        """
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function())
            except Exception as error:  # noqa: BLE001 - it belongs to the caller
                answer.set_exception(error)

        self._events.put(run)
        return answer.result(seconds)

    # The loop's thread

    def run_all(self, timeout: float | None) -> bool:
        """Wait for an event, and run all that are there; False after ``close``.

        Args:
            timeout: seconds to wait for the first one; None waits for ever.
        """
        try:
            event = self._events.get(timeout=timeout)
            while event is not None:
                event()
                event = self._events.get_nowait()
        except queue.Empty:
            return True
        return False

    def committed(self) -> None:
        """Give their result to the futures of all events that have run."""
        for future in self._uncommitted:
            future.set_result(None)
        self._uncommitted.clear()
