"""iperf3 from pod to pod, on one node and across two, each path with and without our rules in one run."""

from __future__ import annotations

import json
import statistics
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from enforcer.demo.lab import Pod
from tests.e2e.conftest import put
from tests.e2e.site import Place, Site, mtu_of

ROUNDS = 10
PORT = 5201
PATHS = {
    "one node": ("direct", None),
    "two nodes, direct": ("direct", 1),
    "two nodes, direct, room for a tunnel": ("auto", 1),
    "two nodes, VXLAN": ("auto", 2),
}
"""``routing``, and the segment of the second node; the first's is 1."""


def main() -> None:
    """Print a line for each path: with rules, without, and their ratio; medians of rounds that take turns."""
    for name, (routing, segment) in PATHS.items():
        with tempfile.TemporaryDirectory() as folder, Site(Path(folder), {"routing": routing}) as site:
            site.add("a", Place(1, 1))
            if segment is not None:
                site.add("b", Place(segment, 2))
            client, server = site.add_pod("a", "client"), site.add_pod("a" if segment is None else "b", "server")
            put(site.manifests / "policy.json", json.dumps(policy()))
            site.settle()
            rates: dict[bool, list[float]] = {True: [], False: []}
            listening = ["ip", "netns", "exec", server.namespace, "iperf3", "--server"]
            serving = subprocess.Popen(listening, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                while not site.labs["a"].connects(client, server.addresses[0], PORT):
                    pass
                rules = {lab: lab.nft("list", "ruleset") for lab in site.labs.values()}
                for lab in rules:
                    lab.stop_agent()
                for _ in range(ROUNDS):
                    rates[True].append(rate(client, server))
                    for lab in rules:
                        lab.nft("flush", "ruleset")
                    rates[False].append(rate(client, server))
                    for lab, text in rules.items():
                        lab.nft(text)
            finally:
                serving.terminate()
                serving.wait()
            with_rules, without = (statistics.median(rates[which]) for which in (True, False))
            print(f"iperf3, {name}, MTU {mtu_of(client)}: {with_rules:.1f} Gbit/s, without rules {without:.1f}, "
                  f"ratio {with_rules / without:.2f}", flush=True)  # fmt: skip


def policy() -> dict[str, Any]:
    """One that selects the server and lets the client in."""
    peer = {"podSelector": {"matchLabels": {"app": "client"}}}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "server", "namespace": "x"},
            "spec": {"podSelector": {"matchLabels": {"app": "server"}},
                     "ingress": [{"from": [peer], "ports": [{"port": PORT}]}]}}  # fmt: skip


def rate(client: Pod, server: Pod) -> float:
    """Gbit/s of one stream over 2 s."""
    command = ["ip", "netns", "exec", client.namespace, "iperf3", "--client", server.addresses[0], "--time", "2"]
    done = subprocess.run([*command, "--json"], capture_output=True, check=True)
    return float(json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"]) / 1e9


if __name__ == "__main__":
    main()
