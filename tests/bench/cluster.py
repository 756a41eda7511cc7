"""On a cluster of two machines with the DaemonSet: from apply to Ready, from a pod's start to its first packet, from a
policy's creation to the kernels of both nodes, what the agents ask of the API, and what memory they hold."""

from __future__ import annotations

import json
import os
import re
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

from kubernetes.client import ApiClient, Configuration, NetworkingV1Api
from kubernetes.config import load_kube_config

from cni import netns
from enforcer.kernel.netlink import TableWatch
from tests.api.processes import wait_until
from tests.bench.common import median, platform, policy
from tests.cluster import images
from tests.cluster.cluster import Cluster
from tests.cluster.installation import IMAGE, MANIFEST, drawbridge, wait_for_agents
from tests.cluster.test_cluster import PORT, server

POLICIES = 200
PODS = 8
_USER = "system:serviceaccount:kube-system:drawbridge"
_AUDIT = {"apiVersion": "audit.k8s.io/v1", "kind": "Policy", "rules": [{"level": "Metadata", "users": [_USER]}]}


def ready(cluster: Cluster) -> None:
    """Seconds from `kubectl apply` until both nodes, and all agents, are ready; the images are there."""
    cluster.load_image(IMAGE)
    begun = time.perf_counter()
    cluster.kubectl("apply", "-f", MANIFEST)
    cluster.kubectl("wait", "--for=condition=Ready", "node", "--all", "--timeout=60s", seconds=70)
    nodes = time.perf_counter() - begun
    wait_for_agents(cluster)
    print(f"nodes ready {nodes:.1f} s after kubectl apply, agents {time.perf_counter() - begun:.1f} s")


def requests(cluster: Cluster, audit: Path, *, since: float) -> None:
    """What the agents have asked of the API until now, and the bytes of their connections."""
    counted: dict[str, int] = {}
    for line in audit.read_text().splitlines():
        event = json.loads(line)
        if event["user"]["username"] == _USER and event["stage"] == "RequestReceived":
            counted[event["verb"]] = counted.get(event["verb"], 0) + 1
    received = sent = 0
    for node in cluster.nodes:
        pid = cluster.run_on(node, "pgrep", "-f", "drawbridge agent").split()[0]
        for line in cluster.run_on(node, "ss", "-tnpiHO", "state", "established").splitlines():
            if f"pid={pid}," in line:
                found = {key: int(value) for key, value in re.findall(r"(bytes_received|bytes_sent):(\d+)", line)}
                received += found.get("bytes_received", 0)
                sent += found.get("bytes_sent", 0)
    nodes = len(cluster.nodes)
    print(f"{time.perf_counter() - since:.0f} s after the agents were ready: {counted} requests of {nodes} agents, "
          f"{received / nodes / 1e3:.1f} kB received and {sent / nodes / 1e3:.1f} kB sent by each")  # fmt: skip


def first_packets(cluster: Cluster) -> None:
    """Milliseconds from a container's first instruction to its first connection, to servers that let only it in."""
    for node in cluster.nodes:
        waits = []
        address = cluster.get("pod", node)["status"]["podIP"]
        for number in range(PODS):
            script = (
                f"s=$EPOCHREALTIME; until (echo >/dev/tcp/{address}/{PORT}) 2>/dev/null; do :; done;"
                " e=$EPOCHREALTIME; echo $(( ${e/./} - ${s/./} ))"
            )
            name = f"starts-{node}-{number}"
            pod = json.loads(server("node-1", name=name))
            pod["metadata"]["labels"] = {"app": "web"}
            pod["spec"] |= {"restartPolicy": "Never"}
            pod["spec"]["containers"][0] |= {"command": ["/bin/bash", "-c", script], "args": []}
            cluster.kubectl("apply", "-f", "-", stdin=json.dumps(pod))
            wait_until(partial(succeeded, cluster, name), "it is in", seconds=30)
            waits.append(int(cluster.kubectl("logs", name)) / 1e3)
            cluster.kubectl("delete", "pod", name, "--grace-period=0", "--force")
        where = "the same node" if node == "node-1" else "the other node"
        print(f"pod start to first allowed connection, server on {where}: {median(waits)}, most {max(waits):.0f} ms")


def succeeded(cluster: Cluster, name: str) -> bool:
    """Whether a pod has ended well."""
    return bool(cluster.get("pod", name)["status"]["phase"] == "Succeeded")


def policies(cluster: Cluster, api: NetworkingV1Api, *, others: int) -> None:
    """Milliseconds from before a policy's creation until both kernels have it, with others around it."""
    for number in range(others):
        create(api, "scale", policy(number, "scale", number % 10, f"other-{number}"))
    for node in cluster.nodes:
        drawbridge(cluster, node, "status", "--wait", "60")
    watches = {}
    for node in cluster.nodes:
        with visiting(cluster.netns(node)):
            watches[node] = TableWatch()
    waits: dict[str, list[float]] = {node: [] for node in ("the API server's answer", *cluster.nodes, "both nodes")}
    for number in range(POLICIES):
        name = f"timed-{number}"
        body = policy(0, "default", 1, name)
        body["spec"]["podSelector"] = {"matchLabels": {"app": "server"}}
        committed = committing(watches)
        begun = time.perf_counter()
        create(api, "default", body)
        waits["the API server's answer"].append((time.perf_counter() - begun) * 1e3)
        times = {node: (end() - begun) * 1e3 for node, end in committed.items()}
        for node, wait in times.items():
            waits[node].append(wait)
        waits["both nodes"].append(max(times.values()))
        committed = committing(watches)
        api.delete_namespaced_network_policy(name, "default")
        for end in committed.values():
            end()
    for watch in watches.values():
        watch.close()
    for which, found in waits.items():
        print(f"policy created to enforced, {others} others, {which}: {median(found)}")
    for number in range(others):
        api.delete_namespaced_network_policy(f"other-{number}", "scale")


def create(api: NetworkingV1Api, namespace: str, body: dict[str, Any]) -> None:
    """Create a policy; the client takes a plain body, though its types say otherwise."""
    api.create_namespaced_network_policy(namespace, body)  # type: ignore[arg-type]


def committing(watches: dict[str, TableWatch]) -> dict[str, Callable[[], float]]:
    """Begin to wait for the next commit on each node; the functions return when it was."""

    def wait(watch: TableWatch) -> float:
        watch.wait()
        return time.perf_counter()

    threads = ThreadPoolExecutor(len(watches))
    return {node: threads.submit(wait, watch).result for node, watch in watches.items()}


def visiting(path: Path) -> ExitStack:
    stack = ExitStack()
    own = netns.open_own()
    file = stack.enter_context(path.open("rb"))
    stack.enter_context(netns.visit(file.fileno(), home=own))
    return stack


def usage(cluster: Cluster) -> None:
    """What the agents hold, and the processor time that they have taken until now."""
    for node in cluster.nodes:
        pid = cluster.run_on(node, "pgrep", "-f", "drawbridge agent").split()[0]
        status = cluster.run_on(node, "cat", f"/proc/{pid}/status")
        resident = int(status.partition("VmRSS:")[2].split()[0]) / 1000
        ticks = sum(map(int, cluster.run_on(node, "cat", f"/proc/{pid}/stat").rpartition(")")[2].split()[11:13]))
        print(
            f"agent of {node}: {resident:.0f} MB resident, {ticks / os.sysconf('SC_CLK_TCK'):.2f} s of processor time"
        )


def main() -> None:
    print(platform())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        audit = folder / "audit.log"
        (folder / "audit.json").write_text(json.dumps(_AUDIT))
        options = (f"--audit-policy-file={folder / 'audit.json'}", f"--audit-log-path={audit}")
        with Cluster(folder / "state", options=options) as cluster:
            ready(cluster)
            since = time.perf_counter()
            requests(cluster, audit, since=since)
            usage(cluster)
            # Nothing happens in this minute.
            time.sleep(max(0.0, 60 - (time.perf_counter() - since)))
            requests(cluster, audit, since=since)
            usage(cluster)
            cluster.load_image(images.agnhost(folder))
            cluster.kubectl("create", "namespace", "scale")
            for node in cluster.nodes:
                cluster.kubectl("apply", "-f", "-", stdin=server(node))
            only = policy(0, "default", 0, "only")
            only["spec"] = {"podSelector": {"matchLabels": {"app": "server"}},
                            "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]}]}  # fmt: skip
            cluster.kubectl("apply", "-f", "-", stdin=json.dumps(only))
            cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s", seconds=70)
            usage(cluster)
            first_packets(cluster)
            configuration = Configuration()
            load_kube_config(str(cluster.control_plane.kubeconfig), client_configuration=configuration)  # type: ignore[no-untyped-call]
            with visiting(cluster.netns("")):
                api = NetworkingV1Api(ApiClient(configuration))
                for others in (10, 1000):
                    policies(cluster, api, others=others)
                    usage(cluster)


if __name__ == "__main__":
    main()
