"""The enforcer's loop in the namespace of the calling thread, without the agent around it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Self

from enforcer.kernel.nftables import Tables
from enforcer.model.changes import Change
from enforcer.model.objects import NetworkPolicy, Object, Pod
from enforcer.reconcile.epochs import STAMP_KERNEL, StampKernel
from enforcer.reconcile.reconciler import Reconciler
from enforcer.reconcile.settings import Settings
from enforcer.ruleset.plan import Step

NODE = "node"
_SECONDS = 30.0
_LOOK_SECONDS = 0.01
_STEPS = 6
"""As many transactions as a change has, and its end."""


@dataclass(frozen=True, slots=True)
class State:
    """Pods and policies by key."""

    pods: Mapping[str, Pod]
    policies: Mapping[str, NetworkPolicy]

    def changes_from(self, before: State) -> Iterator[Change]:
        """What a source says when this state follows another."""
        pairs: tuple[tuple[type[Object], Mapping[str, Object], Mapping[str, Object]], ...] = (
            (NetworkPolicy, before.policies, self.policies),
            (Pod, before.pods, self.pods),
        )
        for kind, old, new in pairs:
            for key in dict.fromkeys((*old, *new)):
                if old.get(key) != new.get(key):
                    yield Change(kind, key, new.get(key))


class _Mortal(Tables):
    """Tables whose process ends when it is to commit one transaction more than it has ``left`` (None: never)."""

    left: int | None = None

    def __init__(self) -> None:
        super().__init__()
        self.ended = threading.Event()

    def commit(self, step: Step) -> None:
        if self.left is not None:
            if self.left == 0:
                self.ended.set()
                raise SystemExit
            self.left -= 1
        super().commit(step)


class Engine:
    """Has the kernel hold what a state says, by the way that is asked for; a context manager.

    Each way returns when the kernel holds it. With ``stamped`` it waits until the connections that are allowed are
    stamped again; without, none ever is, and every packet is judged.
    """

    def __init__(self, *, stamped: bool = False) -> None:
        self._stamped = stamped
        self._stack = contextlib.ExitStack()
        self._tables = _Mortal()
        self._kills = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()
        self._tables.close()

    def restart(self, state: State) -> None:
        """Forget all, and take over the tables as a new process would."""
        self._stack.close()
        over = threading.Event()

        def wait() -> None:
            over.wait()

        stamps = STAMP_KERNEL if self._stamped else StampKernel(wait_for_packets=wait)
        self._loop = Reconciler(self._tables, Settings(NODE), _Silent(), stamps=stamps)
        self._present = State({}, {})
        self._put(state)
        self._loop.synced()
        self._loop.start()
        self._stack.callback(self._loop.stop)
        self._stack.callback(over.set)
        self._settle()

    def commit(self, state: State) -> None:
        """Carry the tables over from the state before, in one batch."""
        self._put(state)
        self._settle()

    def kill(self, state: State) -> None:
        """Begin to carry the tables over, end after no transaction, one or more by turns, and start again."""
        self._tables.left = self._kills % _STEPS
        self._kills += 1
        self._put(state)
        while not self._tables.ended.is_set() and not self._loop.barrier(_LOOK_SECONDS):
            pass
        self._tables.left = None
        self._tables.ended.clear()
        self.restart(state)

    def repair(self, state: State) -> None:
        """The same in one batch with the news that others have changed the tables."""

        def put_both() -> None:
            self._loop.ruleset_changed(None)
            self._put(state)

        self._loop.call(put_both)
        self._settle()

    def _put(self, state: State) -> None:
        self._loop.changes(list(state.changes_from(self._present)))
        self._present = state

    def _settle(self) -> None:
        deadline = time.monotonic() + _SECONDS
        assert self._loop.barrier(_SECONDS)
        while self._stamped and self._loop.call(self._loop.state).stamps.epoch is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)


class _Silent:
    def committed(self, **_: object) -> None: ...
    def failed(self) -> None:
        raise AssertionError("a transaction was refused")

    def repaired(self) -> None: ...
    def cleared(self, connections: int) -> None: ...
