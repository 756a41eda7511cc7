"""A long campaign: every kind of change under a flood of each family, and a table of what leaked and what was lost."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import tempfile
from pathlib import Path

import structlog

from tests.kernel.changes import CHANGES, run_change
from tests.kernel.laboratory import NETWORKS, build_flood

_ROW = "{:56} {:>6} {:>7} {:>7} {:>11} {:>7} {:>11} {:>6}"


def main() -> None:
    """Run what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m tests.kernel", description=__doc__)
    parser.add_argument("--swaps", type=int, help="of each kind and family; without it, as many as in the tests")
    parser.add_argument("--kind", action="append", choices=list(CHANGES), help="only this kind; may be repeated")
    parser.add_argument("--family", action="append", choices=list(NETWORKS), help="only this family")
    parser.add_argument("--stamped", action="store_true", help="wait at each swap until connections are stamped again")
    options = parser.parse_args()
    # Ended from outside, it removes its namespaces, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    print(_ROW.format("kind", "family", "swaps", "ms each", "forbidden", "leaked", "steady", "lost"))
    with tempfile.TemporaryDirectory() as folder:
        flood = build_flood(Path(folder))
        for kind in options.kind or CHANGES:
            for family in options.family or NETWORKS:
                change = CHANGES[kind]
                swaps = options.swaps or change.swaps
                outcome = run_change(flood, change, family, swaps=swaps, stamped=options.stamped)
                each = f"{outcome.seconds / swaps * 1e3:.2f}"
                forbidden, steady = outcome.forbidden, outcome.steady
                words = (forbidden.sent, forbidden.received, steady.sent, steady.lost)
                print(_ROW.format(kind, family, swaps, each, *words), flush=True)


if __name__ == "__main__":
    main()
