"""Drawbridge as the pod network of a real cluster: kubelets call it, Services stand in front of it, policies hold."""

from __future__ import annotations

import json
from functools import partial

import pytest

from tests.api.processes import ProgramError, wait_until
from tests.cluster import fabric, images
from tests.cluster.cluster import Cluster
from tests.cluster.installation import drawbridge, install
from tests.cluster.test_cluster import PORT, SERVICE, ask, server
from tests.tools.build import binary


@pytest.fixture(scope="module")
def pods(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A server on each node and a Service before them."""
    install(cluster)
    cluster.load_image(images.agnhost(tmp_path_factory.mktemp("images")))
    cluster.kubectl("apply", "-f", "-", stdin="\n---\n".join([SERVICE, *(server(node) for node in cluster.nodes)]))
    cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s", seconds=70)
    return cluster


def addresses(cluster: Cluster, pod: str) -> list[str]:
    return [ip["ip"] for ip in cluster.get("pod", pod)["status"]["podIPs"]]


def refused(cluster: Cluster, pod: str, address: str) -> bool:
    try:
        ask(cluster, pod, address, PORT)
    except ProgramError:
        return True
    return False


def policy(peer: str) -> str:
    spec = {"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": peer}}}]}]}
    head = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": "only"}}
    return json.dumps(head | {"spec": spec})


def test_nodes_are_ready_and_pods_reach_each_other_across_them_over_both_families(pods: Cluster) -> None:
    pods.kubectl("wait", "--for=condition=Ready", "node", "--all", "--timeout=60s", seconds=70)
    for here, there in (("node-1", "node-2"), ("node-2", "node-1")):
        assert [":" in address for address in addresses(pods, there)] == [False, True]
        for address in addresses(pods, there):
            assert ask(pods, here, address, PORT) == there


def test_a_service_reaches_pods_of_both_nodes_and_its_own_pod(pods: Cluster) -> None:
    for address in pods.get("service", "servers")["spec"]["clusterIPs"]:
        assert {ask(pods, "node-1", address, 80) for _ in range(20)} == {"node-1", "node-2"}


def test_policies_of_the_api_hold_on_one_node_and_across(pods: Cluster) -> None:
    target = addresses(pods, "node-2")
    pods.kubectl("apply", "-f", "-", stdin=policy("nobody"))
    try:
        wait_until(lambda: refused(pods, "node-1", target[0]), "the policy holds", seconds=20)
        assert refused(pods, "node-1", target[1])
        denied = drawbridge(pods, "node-2", "policies", "-o", "json")
        assert sum(row["denied"].get("ingress", 0) for row in json.loads(denied)["policies"]) > 0
        pods.kubectl("apply", "-f", "-", stdin=policy("server"))
        wait_until(lambda: not refused(pods, "node-1", target[0]), "the policy allows", seconds=20)
        # The kubelet's own probes are never denied; nor is a pod cut off from itself.
        pods.kubectl("apply", "-f", "-", stdin=policy("nobody"))
        wait_until(lambda: refused(pods, "node-1", target[0]), "the policy holds", seconds=20)
        assert ask(pods, "node-2", target[0], PORT) == "node-2"
        assert pods.run_on("node-2", "curl", "-sS", "-m", "5", f"http://{target[0]}:{PORT}/hostname") == "node-2"
    finally:
        pods.kubectl("delete", "networkpolicy", "only")


def test_what_leaves_the_cluster_comes_from_the_node_and_what_stays_keeps_its_address(pods: Cluster) -> None:
    pods.control_plane.start("outside", binary("agnhost"), "netexec", "--http-port=7777", "--udp-port=-1")
    for outside, own in zip(fabric.addresses(1), pods.nodes["node-1"], strict=True):
        wait_until(partial(sees, pods, outside, own), "the node's address is seen", seconds=20)
    for there, here in zip(addresses(pods, "node-2"), addresses(pods, "node-1"), strict=True):
        assert seen_by(pods, there, PORT) == here


def seen_by(cluster: Cluster, address: str, port: int) -> str:
    """The address by which a server sees the pod on node-1; empty if it does not answer."""
    host = f"[{address}]" if ":" in address else address
    command = ("exec", "node-1", "--", "curl", "-gsS", "-m", "3", f"http://{host}:{port}/clientip")
    try:
        return cluster.kubectl(*command).rpartition(":")[0].strip("[]")
    except ProgramError:
        return ""


def sees(cluster: Cluster, outside: str, expected: str) -> bool:
    return seen_by(cluster, outside, 7777) == expected


def test_a_route_that_someone_removes_is_put_back(pods: Cluster) -> None:
    ours = ("proto", "84", "via", pods.nodes["node-2"][0])
    (route,) = pods.run_on("node-1", "ip", "-4", "route", "show", *ours).splitlines()
    pods.run_on("node-1", "ip", "route", "del", route.split()[0])
    wait_until(lambda: not refused(pods, "node-1", addresses(pods, "node-2")[0]), "the route is back", seconds=10)
