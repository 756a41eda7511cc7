"""What the benchmarks share: objects and their files, a node to measure, what it takes, and how figures are printed."""

from __future__ import annotations

import contextlib
import json
import os
import queue
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from enforcer.demo.lab import Lab
from enforcer.kernel.netlink import TableWatch
from tests.e2e.conftest import EXECUTABLE

_QUIET_SECONDS = 0.1
"""An agent that has not committed for this long has done all that came of a change."""


@contextlib.contextmanager
def node(*objects: dict[str, Any]) -> Iterator[tuple[Lab, Path]]:
    """A node and the folder of its manifests, which holds these objects at first."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "manifests")
        folder.mkdir()
        write(folder / "objects.json", objects)
        with Lab(name=f"dbbench-{os.getpid()}", source=("--source", folder), run_dir=Path(name, "run"),
                 executable=EXECUTABLE, pod_cidrs=("10.99.0.0/24",)) as lab:  # fmt: skip
            yield lab, folder


def namespace(name: str) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def pod(name: str, namespace: str, app: str, **labels: str) -> dict[str, Any]:
    ports = [{"name": "http", "containerPort": 8080}]
    return {"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": {"app": app, "tier": "web", **labels}},
            "spec": {"containers": [{"name": "c", "ports": ports}]}}  # fmt: skip


def remote_pod(n: int, namespace: str, app: int) -> dict[str, Any]:
    found = pod(f"pod-{n}", namespace, f"app-{app}")
    found["spec"]["nodeName"] = "elsewhere"
    found["status"] = {"podIPs": [{"ip": f"10.{100 + n // 65536}.{n // 256 % 256}.{n % 256}"}]}
    return found


def selecting(name: str, namespace: str, rules: Sequence[dict[str, Any]], **labels: str) -> dict[str, Any]:
    """A policy that selects the pods with labels for ingress."""
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"podSelector": {"matchLabels": labels}, "policyTypes": ["Ingress"],
                     "ingress": list(rules)}}  # fmt: skip


def policy(n: int, namespace: str, peer_app: int, name: str, *, port: int = 8080) -> dict[str, Any]:
    peer: dict[str, Any] = {"podSelector": {"matchLabels": {"app": f"app-{peer_app}"}}}
    if n % 2:
        peer["namespaceSelector"] = {}
    return selecting(name, namespace, [{"from": [peer], "ports": [{"port": port}]}], app=f"app-{n % 10}")


def write(path: Path, items: Sequence[dict[str, Any]]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    scratch.rename(path)


def resident(lab: Lab) -> float:
    """RSS of the agent, MB: of the process that `ip netns exec` became."""
    status = Path(f"/proc/{lab.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


def processor_seconds(pid: int) -> float:
    """What all threads of a process have taken: its clock, as clock_getcpuclockid(3) makes it."""
    return time.clock_gettime(~pid << 3 | 2)


@dataclass(frozen=True, slots=True)
class Cost:
    """Milliseconds of one change: until the agent has committed it, of the commit alone, and of its processor time.

    The first two are by its log. The third is of all that comes of a change, also after the commit.
    """

    done: float
    commit: float
    processor: float


class Meter:
    """Measures changes of a lab's agent one by one; a change is over when the kernel hears no more of it."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        with lab.inside(lab.descriptor):
            self._watch = TableWatch()
        self._commits: queue.SimpleQueue[int | None] = queue.SimpleQueue()
        threading.Thread(target=self._follow, daemon=True).start()

    def _follow(self) -> None:
        while True:
            self._commits.put(self._watch.wait())

    def settle(self) -> None:
        """Return once nothing has been committed for a while."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._commits.get(timeout=_QUIET_SECONDS)

    def measure(self, change: Callable[[], object]) -> Cost:
        """Carry out what makes the agent commit something."""
        log = self._lab.run_dir / "agent.log"
        known = log.stat().st_size
        taken, begun = processor_seconds(self._lab.pid), time.time()
        change()
        self._commits.get(timeout=60)
        self.settle()
        taken = processor_seconds(self._lab.pid) - taken
        lines = [json.loads(line) for line in log.read_bytes()[known:].splitlines()]
        commits = [line for line in lines if line["event"] == "transactions committed"]
        done = datetime.fromisoformat(commits[-1]["timestamp"]).timestamp()
        return Cost((done - begun) * 1e3, sum(line["ms"] for line in commits), taken * 1e3)


def median(values: Sequence[float]) -> str:
    ordered = sorted(values)
    return f"p50 {statistics.median(ordered):.2f} ms, p99 {ordered[int(len(ordered) * 0.99)]:.2f} ms"


def platform() -> str:
    load = os.getloadavg()[0]
    return f"Python {sys.version.split()[0]}, Linux {os.uname().release}, {os.cpu_count()} cores, load {load:.1f}"
