"""Established flows follow policy, too: those that it does not allow any more are marked, and the rules drop them.

Deleting their conntrack entries would not end them: the next packet, of either side, would make a new one. A thread of
its own lists the flows that a transaction may concern, has the owner of the state judge them, and marks or clears them.
"""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from itertools import islice

import structlog

from enforcer.kernel.conntrack import Conntrack, Flow
from enforcer.model.addresses import Address, Family, family_of, format_address

log = structlog.get_logger()

Addresses = set[Address] | None
"""The addresses whose flows are to be judged; None is all."""

_CHUNK = 1000
_LISTED_SINGLY = 8
# A packet that the rules let pass just before a transaction may make its flow known just after: a second look finds it.
_SECOND_LOOK_SECONDS = 0.02
_LAST_PAUSE_SECONDS = 60.0


class Revocation:
    """Judges flows after each transaction.

    Args:
        mark: the bit of the conntrack mark that says revoked.
        judge: tells of each flow whether policy allows it; it is called on this object's thread.
        report: hears how many flows were marked.
    """

    def __init__(self, mark: int, judge: Callable[[list[Flow]], list[bool]], report: Callable[[int], None]) -> None:
        self._mark = mark
        self._judge = judge
        self._report = report
        self._asked: queue.SimpleQueue[Addresses | Future[None] | type[StopIteration]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="revocation", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after what was asked before."""
        self._asked.put(StopIteration)
        self._thread.join()

    def judge(self, addresses: Addresses) -> None:
        """Have the flows of addresses judged soon."""
        self._asked.put(addresses)

    def done(self) -> Future[None]:
        """A future that has its result when all that was asked before is done."""
        reached: Future[None] = Future()
        self._asked.put(reached)
        return reached

    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def _run(self) -> None:
        again: Addresses = set()
        pause, due = _SECOND_LOOK_SECONDS, 0.0
        while True:
            try:
                asked = self._take(None if again == set() else max(0.0, due - time.monotonic()))
            except queue.Empty:
                asked = []
            addresses = _union(entry for entry in asked if entry is None or isinstance(entry, set))
            if addresses != set():
                self._look(addresses)
                due = time.monotonic() + pause if again == set() else due
                again = _union((again, addresses))
            for entry in asked:
                if isinstance(entry, Future):
                    entry.set_result(None)
            if StopIteration in asked:
                return
            if again != set() and time.monotonic() >= due:
                done = self._look(again)
                again = set() if done else again
                pause = _SECOND_LOOK_SECONDS if done else min(max(pause * 2, 1.0), _LAST_PAUSE_SECONDS)
                due = time.monotonic() + pause

    def _take(self, seconds: float | None) -> list[Addresses | Future[None] | type[StopIteration]]:
        """All that has been asked; waits for the first."""
        taken = [self._asked.get(timeout=seconds)]
        while True:
            try:
                taken.append(self._asked.get_nowait())
            except queue.Empty:
                return taken

    def _look(self, addresses: Addresses) -> bool:
        """Judge and mark once; False if that could not be done."""
        started = time.perf_counter()
        revoked = restored = 0
        conntrack = None
        try:
            conntrack = Conntrack()
            # All flows are listed before the first is marked: one socket, one answer at a time.
            flows = iter(list(_flows(conntrack, addresses)))
            while chunk := list(islice(flows, _CHUNK)):
                for flow, allowed in zip(chunk, self._judge(chunk), strict=True):
                    marked = bool(flow.mark & self._mark)
                    if allowed is not marked or (not allowed and _is_own(flow.source)):
                        continue
                    if conntrack.mark(flow, 0 if allowed else self._mark, self._mark):
                        restored, revoked = restored + allowed, revoked + (not allowed)
        except Exception as error:  # noqa: BLE001 - whatever it is, the next look may succeed
            log.error(
                "established flows could not be judged; those that policy denies now may go on",
                error=str(error),
                hint="is the kernel module nf_conntrack_netlink there?",
            )
            return False
        finally:
            if conntrack is not None:
                conntrack.close()
        if revoked or restored:
            self._report(revoked)
            ms = round((time.perf_counter() - started) * 1e3, 3)
            log.info("established flows judged", revoked=revoked, restored=restored, ms=ms)
        return True


def _union(parts: Iterable[Addresses]) -> Addresses:
    whole: set[Address] = set()
    for part in parts:
        if part is None:
            return None
        whole |= part
    return whole


def _flows(conntrack: Conntrack, addresses: Addresses) -> Iterator[Flow]:
    if addresses is not None and len(addresses) <= _LISTED_SINGLY:
        for address in addresses:
            yield from conntrack.flows(address)
    else:
        yield from _of_addresses(conntrack.flows(), addresses)


def _of_addresses(flows: Iterable[Flow], addresses: Addresses) -> Iterator[Flow]:
    for flow in flows:
        if addresses is None or flow.source in addresses or flow.destination in addresses:
            yield flow


def _is_own(address: Address) -> bool:
    """Whether an address is the node's own: what the node itself begins is not filtered."""
    family = socket.AF_INET if family_of(address) is Family.V4 else socket.AF_INET6
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.bind((format_address(address), 0))
        except OSError:
            return False
    return True
