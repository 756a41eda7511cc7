"""What is seen of a change of policy that forbids connections, and of its being taken back."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from tests.support.flow import ERRORS, Flow, Source, silent, wait_for
from tests.support.watch import Watch

# How long a change is watched. A walk through conntrack would end connections some 35 ms after the commit, and stamps
# are written again some 100 ms after it.
_SECONDS = 0.25
_READY_SECONDS = 3.0


@dataclass(frozen=True, slots=True, repr=False)
class Observation:
    """What was seen of a change that forbids the flows ``cut``, leaves the flows ``kept`` alone, and is taken back.

    ``commit`` is when the last transaction of the change was notified, before the next epoch began; ``late`` holds, by
    flow, when packets were sent that passed after it. ``came`` and ``passed`` are counted while the change stands, from
    when status says that it does. ``lost`` is how many packets did not arrive, by flow that was left alone and lost
    any; errors, which are about a flow and not of it, are not counted. ``dead`` are the flows that did not go on when
    they were allowed again.
    ``ready`` says whether what was waited for before the change came.
    """

    cut: list[Flow]
    kept: list[Flow]
    commit: int
    late: dict[Flow, list[int]]
    came: int
    passed: int
    lost: dict[Flow, int]
    dead: list[Flow]
    ready: bool

    def last(self, flow: Flow) -> float:
        """The last packet of a flow that passed: milliseconds from the commit to when it was sent; 0 if none did."""
        return max((moment - self.commit) / 1e6 for moment in self.late[flow] or [self.commit])

    def too_late(self, flows: Iterable[Flow]) -> dict[Flow, str]:
        """For those flows of which packets passed after the commit, how many and when."""
        return {
            flow: f"{len(self.late[flow])} packets passed, the last {self.last(flow):.1f} ms after the commit"
            for flow in flows
            if self.late[flow]
        }

    def __str__(self) -> str:
        last = sorted(map(self.last, self.cut))
        return f"last packet after the commit p50 {statistics.median(last):.1f} ms, most {last[-1]:.1f} ms"


def observe(
    watches: Sequence[Watch],
    *,
    cut: list[Flow],
    kept: list[Flow],
    tighten: Callable[[], None],
    loosen: Callable[[], None],
    ready: Callable[[], bool] = lambda: True,
) -> Observation:
    """Have packets sent on all flows while a change forbids some, and another one allows them again.

    ``tighten`` and ``loosen`` return when the change is in the kernels of the nodes that are watched; ``ready`` is what
    the change waits for, for a while. The flows are closed.
    """
    with Source(*cut, *kept) as source:
        missing = silent([*cut, *kept], time.monotonic_ns())
        assert not missing, f"before the change nothing came of {missing}"
        try:
            wait_for(ready, "ready", seconds=_READY_SECONDS)
            was_ready = True
        except TimeoutError:
            was_ready = False
        generations = [watch.generation() for watch in watches]
        tighten()
        returned = time.monotonic_ns()
        moments = [watch.last_commit(after=before) for watch, before in zip(watches, generations, strict=True)]
        # A notification may be read late, and status may be answered before.
        commit = min(returned, max(filter(None, moments)))
        before = _counted(watches)
        # What is allowed and was sent later has arrived: what is forbidden would have, too.
        missing = silent(kept, _from_now(_SECONDS))
        assert not missing, f"after the change nothing came of {missing}"
        after = _counted(watches)
        late = {flow: [packet.sent for packet in flow.arrived() if packet.sent > commit] for flow in cut}
        loosen()
        late_enough = _from_now(_SECONDS)
        dead = silent(cut, time.monotonic_ns())
        silent(kept, late_enough)
        lost = source.losses(flow for flow in kept if flow.kind not in ERRORS)
    came, passed = (now - then for now, then in zip(after, before, strict=True))
    return Observation(cut, kept, commit, late, came, passed, lost, dead, was_ready)


def nothing_passes(
    watches: Sequence[Watch], flows: Iterable[Flow], beside: Iterable[Flow], *, seconds: float = _SECONDS
) -> None:
    """Assert that packets of some flows come to the nodes for a time and do not pass, while those of others arrive."""
    came, passed = _counted(watches)
    begin = time.monotonic_ns()
    missing = silent(beside, _from_now(seconds))
    assert not missing, f"nothing came of {missing}"
    now_came, now_passed = _counted(watches)
    assert now_came > came, "no packet came of what is forbidden"
    assert now_passed == passed, f"{now_passed - passed} of {now_came - came} packets passed"
    late = [flow for flow in flows if flow.arrived(after=begin)]
    assert not late, f"packets came of {late}"


def _from_now(seconds: float) -> int:
    return time.monotonic_ns() + int(seconds * 1e9)


def _counted(watches: Sequence[Watch]) -> tuple[int, int]:
    counts = [watch.counted() for watch in watches]
    return sum(came for came, _ in counts), sum(passed for _, passed in counts)
