"""All benchmarks that need one machine and no cluster; the command line may name some of them."""

from __future__ import annotations

import argparse

from tests.bench import attach, changes, connections, limits, network, packets
from tests.bench.common import platform

PARTS = {
    "attach": attach.main,
    "changes": changes.main,
    "packets": packets.main,
    "network": network.main,
    "limits": limits.main,
    "connections": connections.main,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all of them without it")
    options = parser.parse_args()
    if unknown := set(options.parts) - PARTS.keys():
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    for part in options.parts or PARTS:
        print(f"{part}: {platform()}", flush=True)
        PARTS[part]()


main()
