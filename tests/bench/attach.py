"""ADD and DEL through the executables, in turns with Debian's `bridge` and `host-local`."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from typing import Any

from enforcer.demo.lab import NETNS, Lab, Pod
from tests.bench.common import median, node, pod

ROUNDS = 40
CONFIG = {"cniVersion": "1.0.0", "name": "ref", "type": "bridge", "bridge": "ref0", "isGateway": True}


def main() -> None:
    with tempfile.TemporaryDirectory() as data, node(pod("a", "x", "a")) as (lab, _):
        ours = lab.add_pod("x/a")
        lab.cni("DEL", "x/a")
        ipam = {"type": "host-local", "ranges": [[{"subnet": "10.97.0.0/24"}]], "dataDir": data}
        times: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for command in ("ADD", "DEL"):
                begun = time.perf_counter()
                assert lab.cni(command, "x/a").returncode == 0
                times.setdefault(f"{command} drawbridge", []).append((time.perf_counter() - begun) * 1e3)
                took = reference(lab, ours, command, CONFIG | {"ipam": ipam})
                times.setdefault(f"{command} reference", []).append(took)
        for which, values in times.items():
            print(f"{which}: {median(values)}")


def reference(lab: Lab, of: Pod, command: str, config: dict[str, Any]) -> float:
    environment = {"CNI_COMMAND": command, "CNI_CONTAINERID": "ref", "CNI_NETNS": str(NETNS / of.namespace),
                   "CNI_IFNAME": "eth1", "CNI_PATH": "/usr/lib/cni"}  # fmt: skip
    with lab.inside(lab.descriptor):
        begun = time.perf_counter()
        subprocess.run(["/usr/lib/cni/bridge"], input=json.dumps(config).encode(), env=environment,
                       capture_output=True, check=True)  # fmt: skip
        return (time.perf_counter() - begun) * 1e3


if __name__ == "__main__":
    main()
