"""What the benchmarks share: a policy, and how figures are printed."""

from __future__ import annotations

import os
import statistics
import sys


def policy(n: int, namespace: str, peer_app: int, name: str, *, port: int = 8080) -> dict:
    peer = {"podSelector": {"matchLabels": {"app": f"app-{peer_app}"}}}
    if n % 2:
        peer["namespaceSelector"] = {}
    rule = {"from": [peer], "ports": [{"port": port}]}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": namespace},
            "spec": {"podSelector": {"matchLabels": {"app": f"app-{n % 10}"}}, "ingress": [rule]}}  # fmt: skip


def median(values: list[float]) -> str:
    ordered = sorted(values)
    return f"p50 {statistics.median(ordered):.2f} ms, p99 {ordered[int(len(ordered) * 0.99)]:.2f} ms"


def platform() -> str:
    load = os.getloadavg()[0]
    return f"Python {sys.version.split()[0]}, Linux {os.uname().release}, {os.cpu_count()} cores, load {load:.1f}"
