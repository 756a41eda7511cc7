"""Cold start, change to kernel, memory, and ADD and DEL beside the reference plugins."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from enforcer.demo.lab import NETNS, Lab, Pod
from tests.e2e.conftest import EXECUTABLE

CHANGES = 200
ADDS = 40
LOCAL = 10


def manifests(folder: Path, *, pods: int, policies: int) -> None:
    """Deterministic: a tenth as many namespaces as policies; ten pods of this node; a file a policy, a List of pods."""
    rng = random.Random(1)  # noqa: S311 - the same manifests at each run
    namespaces = [f"ns-{n}" for n in range(max(1, policies // 10))]
    write(folder / "namespaces.json", [namespace(name) for name in namespaces])
    write(folder / "pods.json", [remote_pod(n, namespaces[n % len(namespaces)], rng) for n in range(pods - LOCAL)])
    for n in range(policies):
        write(folder / f"policy-{n}.json", [policy(n, namespaces[n % len(namespaces)], rng)])
    for n in range(LOCAL):
        write(folder / f"local-{n}.json", [pod(f"local-{n}", namespaces[n % len(namespaces)], f"app-{n % 10}")])


def namespace(name: str) -> dict:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def pod(name: str, namespace: str, app: str) -> dict:
    ports = [{"name": "http", "containerPort": 8080}]
    return {"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": {"app": app, "tier": "web"}},
            "spec": {"containers": [{"name": "c", "ports": ports}]}}  # fmt: skip


def remote_pod(n: int, namespace: str, rng: random.Random) -> dict:
    found = pod(f"pod-{n}", namespace, f"app-{rng.randrange(10)}")
    found["spec"]["nodeName"] = "elsewhere"
    found["status"] = {"podIPs": [{"ip": f"10.{100 + n // 65536}.{n // 256 % 256}.{n % 256}"}]}
    return found


def policy(n: int, namespace: str, rng: random.Random) -> dict:
    peer = {"podSelector": {"matchLabels": {"app": f"app-{rng.randrange(10)}"}}}
    if n % 2:
        peer["namespaceSelector"] = {}
    rule = {"from": [peer], "ports": [{"port": 8080}]}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": f"policy-{n}", "namespace": namespace},
            "spec": {"podSelector": {"matchLabels": {"app": f"app-{n % 10}"}}, "ingress": [rule]}}  # fmt: skip


def write(path: Path, items: list[dict]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    scratch.rename(path)


def median(values: list[float]) -> str:
    ordered = sorted(values)
    return f"p50 {statistics.median(ordered):.2f} ms, p99 {ordered[int(len(ordered) * 0.99)]:.2f} ms"


def resident(lab: Lab) -> float:
    """RSS of the agent, MB: of the process that `ip netns exec` became."""
    status = Path(f"/proc/{lab.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


def transactions(lab: Lab) -> list[dict]:
    lines = (lab.run_dir / "agent.log").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == "transaction"]


def engine(size: str, *, pods: int, policies: int) -> None:
    """Cold start; then label changes of one local pod, from the rename of its file to the listing of its set."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "manifests")
        folder.mkdir()
        manifests(folder, pods=pods, policies=policies)
        started = time.perf_counter()
        with Lab(name=f"dbbench-{os.getpid()}", source=folder, run_dir=Path(name, "run"), executable=EXECUTABLE,
                 pod_cidrs=("10.99.0.0/24",)) as lab:  # fmt: skip
            print(f"{size}: cold start (process start to synced) {time.perf_counter() - started:.2f} s, "
                  f"{resident(lab):.0f} MB resident")  # fmt: skip
            for n in range(LOCAL):
                lab.add_pod(f"ns-{n % max(1, policies // 10)}/local-{n}")
            waits = []
            for n in range(CHANGES):
                begun = time.perf_counter()
                write(folder / "local-0.json", [pod("local-0", "ns-0", f"app-{n % 2}")])
                lab.status()
                waits.append((time.perf_counter() - begun) * 1e3)
            commits = [line["ms"] for line in transactions(lab)[-CHANGES:]]
            print(f"{size}: label change of a pod, file renamed to `status` answered {median(waits)}")
            print(f"{size}: of that the transaction {median(commits)}; {resident(lab):.0f} MB resident")


def attach() -> None:
    """ADD and DEL through the executables, interleaved with bridge + host-local."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "manifests")
        folder.mkdir()
        write(folder / "pod.json", [pod("a", "x", "a")])
        with Lab(name=f"dbbench-{os.getpid()}", source=folder, run_dir=Path(name, "run"), executable=EXECUTABLE,
                 pod_cidrs=("10.99.0.0/24",)) as lab:  # fmt: skip
            ours = lab.add_pod("x/a")
            lab.cni("DEL", "x/a")
            ipam = {"type": "host-local", "ranges": [[{"subnet": "10.97.0.0/24"}]], "dataDir": name}
            config = {"cniVersion": "1.0.0", "name": "ref", "type": "bridge", "bridge": "ref0", "isGateway": True}
            config["ipam"] = ipam
            times: dict[str, list[float]] = {}
            for _ in range(ADDS):
                for command in ("ADD", "DEL"):
                    begun = time.perf_counter()
                    assert lab.cni(command, "x/a").returncode == 0
                    times.setdefault(f"{command} drawbridge", []).append((time.perf_counter() - begun) * 1e3)
                    times.setdefault(f"{command} reference", []).append(reference(lab, ours, command, config))
            for which, values in times.items():
                print(f"{which}: {median(values)}")


def reference(lab: Lab, of: Pod, command: str, config: dict) -> float:
    environment = {"CNI_COMMAND": command, "CNI_CONTAINERID": "ref", "CNI_NETNS": str(NETNS / of.namespace),
                   "CNI_IFNAME": "eth1", "CNI_PATH": "/usr/lib/cni"}  # fmt: skip
    with lab.inside(lab.descriptor):
        begun = time.perf_counter()
        subprocess.run(["/usr/lib/cni/bridge"], input=json.dumps(config).encode(), env=environment,
                       capture_output=True, check=True)  # fmt: skip
        return (time.perf_counter() - begun) * 1e3


def main() -> None:
    print(f"{platform()}")
    attach()
    engine("10 pods, 10 policies", pods=10 + LOCAL, policies=10)
    engine("10,000 pods, 1,000 policies", pods=10_000, policies=1_000)


def platform() -> str:
    load = os.getloadavg()[0]
    return f"Python {sys.version.split()[0]}, Linux {os.uname().release}, {os.cpu_count()} cores, load {load:.1f}"


main()
