"""When the last packet of a forbidden connection passes, beside how many others; and what allowed ones lose meanwhile.

``python -m tests.bench.connections``, as root. The commit is the last one of the change, by the kernel's notification.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from tests.bench.common import platform
from tests.support.connect import Connector
from tests.support.flow import Kind
from tests.support.observation import Observation, observe
from tests.support.stage import KEPT, OUTSIDE, WEB, Stage, blocks, policy, world
from tests.support.watch import CUT

CYCLES = 20
OTHERS = (0, 10_000, 200_000)
PAIRS = ("web-db", "outside-db")
# Until connections carry the stamp of the epoch; to list them takes longer where there are many.
STAMPED_SECONDS = 1.0


def cycle(stage: Stage) -> Observation:
    """A policy is edited so that it forbids what two clients send and get, and back."""
    allowed = world(policy("x/db", {"app": "db"}, ingress=[WEB, *blocks(OUTSIDE)]))
    stage.settle(allowed)
    with Connector(stage.lab) as connector:
        stamped = time.monotonic() + STAMPED_SECONDS
        return observe(
            [stage.watch],
            cut=stage.flows(connector, CUT, PAIRS, Kind),
            kept=stage.flows(connector, KEPT, PAIRS, [Kind.TCP_UP, Kind.TCP_DOWN, Kind.UDP_BOTH]),
            tighten=lambda: stage.settle(world(policy("x/db", {"app": "db"}, ingress=[]))),
            loosen=lambda: stage.settle(allowed),
            ready=lambda: time.monotonic() > stamped,
        )


def main() -> None:
    print(platform())
    with tempfile.TemporaryDirectory() as name, Stage(Path(name)) as stage:
        for others in OTHERS:
            with stage.others(others):
                seen = [cycle(stage) for _ in range(CYCLES)]
            last = [one.last(flow) for one in seen for flow in one.cut]
            sent = sum(flow.sent for one in seen for flow in one.kept)
            print(
                f"beside {others:,} connections, {CYCLES} edits, {len(last)} flows: last packet after the commit "
                f"p50 {statistics.median(last):.1f} ms, most {max(last):.1f} ms; {sum(map(bool, last))} flows had any; "
                f"allowed flows lost {sum(sum(one.lost.values()) for one in seen)} of {sent:,} packets; "
                f"{sum(len(one.dead) for one in seen)} flows did not go on"
            )


if __name__ == "__main__":
    main()
