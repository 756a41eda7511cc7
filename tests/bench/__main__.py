"""Cold start, change to kernel, memory, throughput, and ADD and DEL beside the reference plugins."""

from __future__ import annotations

import json
import os
import random
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import yaml

from enforcer.demo.lab import NETNS, Lab, Pod
from enforcer.kernel.netlink import TableWatch
from tests.bench import network
from tests.bench.common import median, platform, policy
from tests.e2e.conftest import EXECUTABLE

CHANGES = 200
ADDS = 40
LOCAL = 10
ROUNDS = 3


def manifests(folder: Path, *, pods: int, policies: int) -> None:
    """Deterministic: a tenth as many namespaces as policies; ten pods of this node; a file a policy, a List of pods."""
    rng = random.Random(1)  # noqa: S311 - the same manifests at each run
    namespaces = [f"ns-{n}" for n in range(max(1, policies // 10))]
    write(folder / "namespaces.json", [namespace(name) for name in namespaces])
    write(
        folder / "pods.json",
        [remote_pod(n, namespaces[n % len(namespaces)], rng.randrange(10)) for n in range(1, pods - LOCAL)],
    )
    for n in range(policies):
        write(
            folder / f"policy-{n}.json", [policy(n, namespaces[n % len(namespaces)], rng.randrange(10), f"policy-{n}")]
        )
    for n in range(LOCAL):
        write(folder / f"local-{n}.json", [pod(f"local-{n}", namespaces[n % len(namespaces)], f"app-{n % 10}")])


def namespace(name: str) -> dict:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}}


def pod(name: str, namespace: str, app: str) -> dict:
    ports = [{"name": "http", "containerPort": 8080}]
    return {"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": {"app": app, "tier": "web"}},
            "spec": {"containers": [{"name": "c", "ports": ports}]}}  # fmt: skip


def remote_pod(n: int, namespace: str, app: int) -> dict:
    found = pod(f"pod-{n}", namespace, f"app-{app}")
    found["spec"]["nodeName"] = "elsewhere"
    found["status"] = {"podIPs": [{"ip": f"10.{100 + n // 65536}.{n // 256 % 256}.{n % 256}"}]}
    return found


def write(path: Path, items: list[dict]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    scratch.rename(path)


def resident(lab: Lab) -> float:
    """RSS of the agent, MB: of the process that `ip netns exec` became."""
    status = Path(f"/proc/{lab.pid}/status").read_text()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1000


def engine(size: str, *, pods: int, policies: int) -> None:
    """Cold start with attached pods and an empty kernel; then changes, from a file's rename to the kernel's word."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "manifests")
        folder.mkdir()
        manifests(folder, pods=pods, policies=policies)
        with Lab(name=f"dbbench-{os.getpid()}", source=("--source", folder), run_dir=Path(name, "run"),
                 executable=EXECUTABLE, pod_cidrs=("10.99.0.0/24",)) as lab:  # fmt: skip
            for n in range(LOCAL):
                lab.add_pod(f"ns-{n % max(1, policies // 10)}/local-{n}")
            print(f"{size}: cold start, JSON {cold(lab):.2f} s, {resident(lab):.0f} MB resident")
            waits = kernel_changes(lab, folder / "remote-0.json", [remote_pod(0, "ns-0", app) for app in (0, 1)])
            print(f"{size}: label of a pod elsewhere, file renamed to elements committed {median(waits)}")
            waits = kernel_changes(lab, folder / "extra.json", [policy(0, "ns-0", n, "extra") for n in (0, 1)])
            print(f"{size}: a policy's rules, renamed to committed {median(waits)}")
            waits = kernel_changes(lab, folder / "local-0.json", [pod("local-0", "ns-0", f"app-{n}") for n in (0, 1)])
            print(
                f"{size}: label of a pod here, its group changes, to committed {median(waits)}; {resident(lab):.0f} MB"
            )
            as_yaml(folder)
            print(f"{size}: cold start, a YAML file a pod {cold(lab):.2f} s, {resident(lab):.0f} MB resident")


def cold(lab: Lab) -> float:
    """Seconds from the start of the agent's process until it is in sync, from an empty kernel."""
    lab.stop_agent()
    lab.nft("flush", "ruleset")
    started = time.perf_counter()
    lab.start_agent()
    return time.perf_counter() - started


def kernel_changes(lab: Lab, path: Path, states: list[dict]) -> list[float]:
    """Milliseconds of each of many changes, from the rename of a file until the kernel tells of the commit."""
    with lab.inside(lab.descriptor):
        watch = TableWatch()
    waits = []
    write(path, [states[1]])
    lab.status()
    watch.wait()
    for n in range(CHANGES):
        begun = time.perf_counter()
        write(path, [states[n % 2]])
        watch.wait()
        waits.append((time.perf_counter() - begun) * 1e3)
        lab.status()
    watch.close()
    return waits


def as_yaml(folder: Path) -> None:
    """Write the pods elsewhere as one YAML file each, in the place of the JSON list."""
    items = json.loads((folder / "pods.json").read_text())["items"]
    (folder / "pods.json").unlink()
    for item in items:
        (folder / f"{item['metadata']['name']}.yaml").write_text(yaml.safe_dump(item))


def throughput() -> None:
    """iperf3 between two pods: without policies, with one, and with a hundred that select the server."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "manifests")
        folder.mkdir()
        write(folder / "pods.json", [namespace("x"), pod("server", "x", "app-0"), pod("client", "x", "app-1")])
        with Lab(name=f"dbbench-{os.getpid()}", source=("--source", folder), run_dir=Path(name, "run"),
                 executable=EXECUTABLE, pod_cidrs=("10.99.0.0/24",)) as lab:  # fmt: skip
            server, client = lab.add_pod("x/server"), lab.add_pod("x/client")
            serving = subprocess.Popen(["ip", "netns", "exec", server.namespace, "iperf3", "--server"],
                                       stdout=subprocess.DEVNULL)  # fmt: skip
            rates: dict[int, list[float]] = {}
            try:
                while not lab.connects(client, server.addresses[0], 5201):
                    pass
                for _ in range(ROUNDS):
                    for count in (0, 1, 100):
                        allowed = [
                            policy(0, "x", 1, f"p-{n}", port=5201 if n == count - 1 else 80) for n in range(count)
                        ]
                        write(folder / "policies.json", allowed)
                        lab.status()
                        command = ["ip", "netns", "exec", client.namespace, "iperf3", "--client", server.addresses[0]]
                        done = subprocess.run([*command, "--time", "3", "--json"], capture_output=True, check=True)
                        rate = json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"] / 1e9
                        rates.setdefault(count, []).append(rate)
            finally:
                serving.terminate()
                serving.wait()
            for count, found in rates.items():
                ratio = statistics.median(found) / statistics.median(rates[0])
                print(f"iperf3, {count} policies: median {statistics.median(found):.1f} Gbit/s, {ratio:.2f} of none")


def attach() -> None:
    """ADD and DEL through the executables, interleaved with bridge + host-local."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name, "manifests")
        folder.mkdir()
        write(folder / "pod.json", [pod("a", "x", "a")])
        with Lab(name=f"dbbench-{os.getpid()}", source=("--source", folder), run_dir=Path(name, "run"),
                 executable=EXECUTABLE, pod_cidrs=("10.99.0.0/24",)) as lab:  # fmt: skip
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
    throughput()
    network.throughput()
    engine("10 pods, 10 policies", pods=10 + LOCAL, policies=10)
    engine("10,000 pods, 1,000 policies", pods=10_000, policies=1_000)


main()
