"""The harness itself, with the reference plugin ``ptp`` as its pod network: nodes, pods, power cuts, and an end."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.api.processes import ProgramError, wait_until
from tests.cluster import images
from tests.cluster.cluster import Cluster

PORT = 8080


def configure(cluster: Cluster, node: str, networks: list[str]) -> None:
    """Give a node's pods addresses of its networks, and the routes to them to all others."""
    ranges = [[{"subnet": network}] for network in networks]
    routes = [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]
    plugin = {"type": "ptp", "ipam": {"type": "host-local", "ranges": ranges, "routes": routes}}
    configuration = {"cniVersion": "1.0.0", "name": "pods", "plugins": [plugin]}
    for network, gateway in zip(networks, cluster.nodes[node], strict=True):
        route = ("ip", "route", "replace", network, "via", gateway)
        cluster.run_outside(*route)
        for other in cluster.nodes.keys() - {node}:
            cluster.run_on(other, *route)
    cluster.run_on(node, "tee", "/etc/cni/net.d/10-pods.conflist", stdin=json.dumps(configuration))


def connect_nodes(cluster: Cluster) -> None:
    for node in cluster.get("nodes")["items"]:
        configure(cluster, node["metadata"]["name"], node["spec"]["podCIDRs"])


@pytest.fixture(scope="module")
def pods(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The cluster with a pod that serves HTTP on each node, called as the node is, and a Service before them."""
    connect_nodes(cluster)
    cluster.load_image(images.agnhost(tmp_path_factory.mktemp("images")))
    cluster.kubectl("apply", "-f", "-", stdin="\n---\n".join([SERVICE, *(server(node) for node in cluster.nodes)]))
    cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s", seconds=70)
    return cluster


SERVICE = f"""
apiVersion: v1
kind: Service
metadata: {{name: servers}}
spec: {{selector: {{app: server}}, ipFamilyPolicy: RequireDualStack, ports: [{{port: 80, targetPort: {PORT}}}]}}
"""


def server(node: str, *, name: str = "") -> str:
    container = {"name": "server", "image": images.AGNHOST, "args": ["netexec", f"--http-port={PORT}"]}
    spec = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 0}
    metadata = {"name": name or node, "labels": {"app": "server"}}
    return json.dumps({"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec})


def ask(cluster: Cluster, pod: str, address: str, port: int) -> str:
    """The name of the pod that answers another."""
    host = f"[{address}]" if ":" in address else address
    return cluster.kubectl("exec", pod, "--", "curl", "-gsS", "-m", "5", f"http://{host}:{port}/hostname")


def test_nodes_are_ready_with_networks_of_both_families(pods: Cluster) -> None:
    pods.kubectl("wait", "--for=condition=Ready", "node", "--all", "--timeout=60s", seconds=70)
    for node in pods.get("nodes")["items"]:
        assert [":" in network for network in node["spec"]["podCIDRs"]] == [False, True]
        addresses = [a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP"]
        assert addresses == list(pods.nodes[node["metadata"]["name"]])


def test_pods_of_both_nodes_reach_each_other(pods: Cluster) -> None:
    for ip in pods.get("pod", "node-2")["status"]["podIPs"]:
        assert ask(pods, "node-1", ip["ip"], PORT) == "node-2"


def test_a_service_reaches_pods_of_both_nodes(pods: Cluster) -> None:
    for address in pods.get("service", "servers")["spec"]["clusterIPs"]:
        assert {ask(pods, "node-1", address, 80) for _ in range(20)} == {"node-1", "node-2"}


def test_pods_reach_the_api_server(pods: Cluster) -> None:
    script = "cd /var/run/secrets/kubernetes.io/serviceaccount; curl -sS --cacert ca.crt https://10.96.0.1/version"
    assert json.loads(pods.kubectl("exec", "node-1", "--", "sh", "-c", script))["gitVersion"].startswith("v1.")


def test_the_host_sees_nothing_of_a_machine(pods: Cluster) -> None:
    pods.run_on("node-1", "sh", "-c", "touch /etc/drawbridge-test /opt/cni/bin/drawbridge-test /run/drawbridge-test")
    assert not list(Path("/").glob("*/drawbridge-test")) + list(Path("/usr/lib/cni").glob("drawbridge-test"))
    with pytest.raises(ProgramError):
        pods.run_on("node-2", "ls", "/etc/drawbridge-test")


def test_a_command_that_is_given_up_ends_in_the_machine(pods: Cluster) -> None:
    with pytest.raises(ProgramError, match="not done after 0 s"):
        pods.run_on("node-1", "sleep", "86399", seconds=0.3)
    wait_until(lambda: "86399" not in pods.run_on("node-1", "ps", "ax"), "the command ends", seconds=5)


def test_a_machine_comes_back_after_a_power_cut(pods: Cluster) -> None:
    pods.stop_node("node-2")
    with pytest.raises(ProgramError, match="node-2 does not run"):
        pods.run_on("node-2", "true")
    pods.start_node("node-2")
    connect_nodes(pods)

    def restarted() -> bool:
        (container,) = pods.get("pod", "node-2")["status"]["containerStatuses"]
        return bool(container["restartCount"] and container["ready"])

    wait_until(restarted, "the pod runs again", seconds=60)
    test_pods_of_both_nodes_reach_each_other(pods)


def test_nothing_is_left_of_a_cluster(tmp_path: Path) -> None:
    others = cgroups()
    with pytest.raises(ProgramError, match="says the test"), Cluster(tmp_path / "state", nodes=1) as cluster:
        marks = str(cluster.folder)
        assert cgroups() > others and marks in processes()
        raise ProgramError("says the test")
    assert marks not in processes()
    assert cgroups() == others
    assert {path.suffix for path in cluster.folder.rglob("*") if path.is_file()} >= {".log"}
    assert not list(cluster.folder.glob("*/own"))


def processes() -> str:
    return subprocess.run(["ps", "axww", "-o", "args"], capture_output=True, text=True, check=True).stdout


def cgroups() -> set[Path]:
    return set(Path("/sys/fs/cgroup").rglob(f"drawbridge-{os.getpid()}-*"))
