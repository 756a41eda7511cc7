"""To the engine before and back to this one while connections run; prints what passed and what was lost, in packets.

The engine before is taken from the repository's history, so this is not a test of the suite.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.e2e.test_connections import INGRESS, OPEN, SHUT
from tests.support.connect import Connector
from tests.support.flow import Flow, Kind, Source, silent
from tests.support.stage import KEPT, Stage, world
from tests.support.watch import CUT

BEFORE = "ceb6464"
"""The last commit with the engine before."""
ROUNDS = 10
SECONDS = 2.0
_ROOT = Path(__file__).parents[2]
_ROW = "{:8} {:>12} {:>20} {:>15} {:>14}"


def unpack(folder: Path) -> None:
    """Unpack the engine before."""
    archive = folder.with_suffix(".tar")
    subprocess.run(["git", "archive", f"--output={archive}", BEFORE], cwd=_ROOT, check=True)
    shutil.unpack_archive(archive, folder)


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """The modules of an agent that is started meanwhile are those of this folder."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(here)


def take_over(stage: Stage, tree: Path, cut: list[Flow], kept: list[Flow]) -> tuple[int, int, int]:
    """Start the other agent: what came of a forbidden connection, what an allowed one lost, and how many died."""
    stage.lab.stop_agent()
    came = {flow: len(flow.arrived()) for flow in cut}
    lost = {flow: flow.lost() for flow in kept}
    with working_in(tree):
        stage.lab.start_agent()
    time.sleep(SECONDS)
    return (
        max(len(flow.arrived()) - came[flow] for flow in cut),
        # The last few are under way.
        max(max(flow.lost() - lost[flow] - 2, 0) for flow in kept),
        len(silent(kept, time.monotonic_ns())),
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        unpack(folder / "before")
        (folder / "stage").mkdir()
        stage = stack.enter_context(Stage(folder / "stage"))
        print(_ROW.format("engine", "takes over", "forbidden passed", "allowed lost", "allowed dead"))
        for number in range(ROUNDS):
            stage.settle(world(OPEN))
            with Connector(stage.lab) as connector:
                cut = stage.flows(connector, CUT, INGRESS, [Kind.UDP_UP, Kind.UDP_BOTH])
                kept = stage.flows(connector, KEPT, INGRESS, [Kind.UDP_BOTH, Kind.TCP_UP, Kind.TCP_DOWN])
                stage.settle(world(SHUT))
                with Source(*cut), Source(*kept):
                    time.sleep(SECONDS)
                    for engine, tree in (("before", folder / "before"), ("now", _ROOT)):
                        print(_ROW.format(engine, number + 1, *take_over(stage, tree, cut, kept)), flush=True)


if __name__ == "__main__":
    main()
