"""An epoch begins when its stamps are cleared and no packet of before is under way; if that fails, status says why."""

from __future__ import annotations

import errno
import os
import threading

from enforcer.model.addresses import parse_address
from enforcer.model.changes import Change
from enforcer.model.objects import Direction, NetworkPolicy, Pod
from enforcer.reconcile.epochs import StampKernel
from enforcer.reconcile.reconciler import Reconciler
from enforcer.reconcile.settings import Settings
from enforcer.translate.base import EPOCH
from tests.api.processes import wait_until
from tests.unit.reconcile.test_refused import Silent, Tables

CLIENT = Change(Pod, "x/p", Pod("x", "p", addresses=(parse_address("10.0.0.1"),)))


def policy(name: str) -> Change:
    return Change(NetworkPolicy, f"x/{name}", NetworkPolicy("x", name, rules={Direction.INGRESS: ()}))


def started(stamps: StampKernel) -> tuple[Reconciler, Tables]:
    tables = Tables()
    loop = Reconciler(tables, Settings("here"), Silent(), stamps=stamps)
    loop.start()
    loop.changes([CLIENT])
    loop.synced()
    assert loop.barrier(5)
    return loop, tables


def test_stamps_that_cannot_be_cleared_leave_no_epoch_and_the_reason_until_they_are() -> None:
    broken = [True]

    def clear(**_: int) -> int:
        if broken[0]:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        return 7

    loop, tables = started(StampKernel(clear=clear, wait_for_packets=lambda: None))
    try:
        wait_until(lambda: loop.call(loop.state).stamps.failure is not None, "the failure is told", seconds=20)
        stamps = loop.call(loop.state).stamps
        assert (stamps.epoch, stamps.cleared) == (None, 0)
        assert "Operation not permitted" in (stamps.failure or "")
        assert not tables.held.elements(EPOCH)
        broken[0] = False
        wait_until(lambda: loop.call(loop.state).stamps.epoch is not None, "an epoch begins", seconds=20)
        stamps = loop.call(loop.state).stamps
        assert (stamps.cleared % 7, stamps.failure) == (0, None)
        assert stamps.cleared
        assert tables.held.elements(EPOCH)
    finally:
        loop.stop()


def test_what_takes_a_permission_away_ends_the_epoch_at_once_and_the_next_waits_for_packets_under_way() -> None:
    over = threading.Event()
    over.set()

    def wait() -> None:
        over.wait()

    loop, tables = started(StampKernel(clear=lambda **_: 0, wait_for_packets=wait))
    try:
        wait_until(lambda: loop.call(loop.state).stamps.epoch is not None, "an epoch begins", seconds=20)
        first = loop.call(loop.state).stamps.epoch
        assert first is not None
        over.clear()
        loop.changes([policy("deny")])
        assert loop.barrier(5)
        assert loop.call(loop.state).stamps.epoch is None
        assert not tables.held.elements(EPOCH)
        over.set()
        wait_until(lambda: loop.call(loop.state).stamps.epoch == first + 1, "the next begins", seconds=20)
    finally:
        over.set()
        loop.stop()
