"""docs/migration.md, node by node: from a pod network of ptp and routes, as Flannel's host-gw, and back to it."""

from __future__ import annotations

import json
from functools import partial

import pytest

from tests.api.processes import wait_until
from tests.cluster import images
from tests.cluster.cluster import Cluster
from tests.cluster.installation import MANIFEST, NAMESPACE, ROOT, apply, configured, drawbridge, install
from tests.cluster.test_cluster import configure, connect_nodes
from tests.cluster.test_drawbridge import policy
from tests.cluster.test_policy_only import pod, run_pods, until

MIGRATION = ROOT / "deploy" / "migration"
# What runs on a node, by the node's label.
RUNS = {"policy-only": "drawbridge-policy-only", "bridge": "drawbridge", "uninstall": "drawbridge-uninstall"}
PODS = {"node-1": ("here", "stranger"), "node-2": ("far",)}


def settled(cluster: Cluster, node: str, value: str) -> None:
    """Return when what a value of the label stands for runs on a node, is ready, and alone."""

    def runs() -> dict[str, str]:
        selectors = (
            "-l",
            f"app.kubernetes.io/name in ({','.join(RUNS.values())})",
            f"--field-selector=spec.nodeName={node}",
        )
        found = cluster.get("pods", f"--namespace={NAMESPACE}", *selectors)["items"]
        return {
            item["metadata"]["labels"]["app.kubernetes.io/name"]: condition["status"]
            for item in found
            for condition in item["status"].get("conditions", [])
            if condition["type"] == "Ready"
        }

    wait_until(lambda: runs() == {RUNS[value]: "True"}, f"{node} has {RUNS[value]} alone", seconds=90)


def change(cluster: Cluster, node: str, value: str) -> None:
    cluster.kubectl("label", "--overwrite", "node", node, f"drawbridge={value}")
    settled(cluster, node, value)


def attaches_no_pod(cluster: Cluster, node: str) -> bool:
    """Whether Drawbridge has neither a link on a node nor a configuration of the runtime."""
    links = cluster.run_on(node, "ip", "-br", "link")
    return not ("dbr" in links or "drawbridge" in links + cluster.run_on(node, "ls", "/etc/cni/net.d"))


def run_pods_of(cluster: Cluster, node: str) -> None:
    run_pods(cluster, *(pod(node, name) for name in PODS[node]))
    if node == "node-1":
        cluster.kubectl("label", "--overwrite", "pod", "stranger", "app=other")


def drain(cluster: Cluster, node: str) -> None:
    options = ("--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=60s")
    cluster.kubectl("drain", node, *options, seconds=70)


def holds(cluster: Cluster) -> None:
    """Servers reach each other across nodes, over both families, and the stranger reaches neither."""
    for source, target, expected in (("here", "far", True), ("far", "here", True), ("stranger", "far", False),
                                     ("stranger", "here", False)):  # fmt: skip
        until(cluster, source, target, expected)


@pytest.fixture(scope="module")
def pods(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    connect_nodes(cluster)
    cluster.load_image(images.agnhost(tmp_path_factory.mktemp("images")))
    for node in cluster.nodes:
        run_pods_of(cluster, node)
    cluster.kubectl("apply", "-f", "-", stdin=policy("server"))
    return cluster


def test_policy_only_comes_first_and_no_pod_is_restarted(pods: Cluster) -> None:
    until(pods, "stranger", "far", True)
    install(pods, configured(network="none"))
    holds(pods)
    assert {p["metadata"]["name"] for p in pods.get("pods")["items"]} == {"here", "stranger", "far"}
    assert not any(p["status"]["containerStatuses"][0]["restartCount"] for p in pods.get("pods")["items"])


def test_labels_take_over_from_policy_only_on_all_nodes(pods: Cluster) -> None:
    pods.kubectl("label", "nodes", "--all", "drawbridge=policy-only")
    pods.kubectl("apply", "-k", MIGRATION)
    for node in pods.nodes:
        settled(pods, node, "policy-only")
    holds(pods)
    assert all(attaches_no_pod(pods, node) for node in pods.nodes)


@pytest.mark.parametrize("node", ["node-2", "node-1"])
def test_a_node_is_moved_and_reaches_the_nodes_that_are_not_and_policies_hold(pods: Cluster, node: str) -> None:
    drain(pods, node)
    pods.run_on(node, "rm", "/etc/cni/net.d/10-pods.conflist")
    change(pods, node, "bridge")
    pods.kubectl("uncordon", node)
    run_pods_of(pods, node)
    holds(pods)
    ports = {row["pod"]: row["port"] for row in json.loads(drawbridge(pods, node, "pods", "-o", "json"))}
    assert all(ports[f"default/{name}"].startswith("dbr") for name in PODS[node])


def own_route(cluster: Cluster, node: str, network: str) -> str:
    return cluster.run_on(node, "ip", "-6" if ":" in network else "-4", "route", "show", network, "proto", "84")


def _is_there(cluster: Cluster, node: str, network: str) -> bool:
    return own_route(cluster, node, network) != ""


def test_where_the_other_networks_routes_go_drawbridges_own_take_their_place(pods: Cluster) -> None:
    networks = {n["metadata"]["name"]: n["spec"]["podCIDRs"] for n in pods.get("nodes")["items"]}
    for node, other in (("node-1", "node-2"), ("node-2", "node-1")):
        for network in networks[other]:
            assert own_route(pods, node, network) == ""
            pods.run_on(node, "ip", "route", "del", network)
            wait_until(partial(_is_there, pods, node, network), "Drawbridge's route is there", seconds=10)
    holds(pods)


def test_the_daemonset_of_all_nodes_takes_over_and_hands_back(pods: Cluster) -> None:
    pods.kubectl("delete", "-k", MIGRATION / "policy-only")
    pods.kubectl("delete", "-k", ROOT / "deploy" / "uninstall")
    apply(pods, MANIFEST.read_text())
    pods.kubectl("label", "nodes", "--all", "drawbridge-")
    for node in pods.nodes:
        settled(pods, node, "bridge")
    holds(pods)
    pods.kubectl("label", "nodes", "--all", "drawbridge=bridge")
    pods.kubectl("apply", "-k", MIGRATION)
    for node in pods.nodes:
        settled(pods, node, "bridge")
    holds(pods)


@pytest.mark.parametrize("node", ["node-2", "node-1"])
def test_a_node_is_moved_back_and_nothing_of_drawbridge_is_left_on_it(pods: Cluster, node: str) -> None:
    drain(pods, node)
    change(pods, node, "uninstall")
    assert attaches_no_pod(pods, node)
    assert "drawbridge" not in pods.run_on(node, "ls", "/opt/cni/bin")
    assert "drawbridge" not in pods.run_on(node, "nft", "list", "tables")
    (found,) = (n for n in pods.get("nodes")["items"] if n["metadata"]["name"] == node)
    configure(pods, node, found["spec"]["podCIDRs"])
    for other in pods.get("nodes")["items"]:
        # What the other network's agent would do on this node.
        if other["metadata"]["name"] != node:
            for network, gateway in zip(other["spec"]["podCIDRs"], pods.nodes[other["metadata"]["name"]], strict=True):
                pods.run_on(node, "ip", "route", "replace", network, "via", gateway)
    change(pods, node, "policy-only")
    pods.kubectl("uncordon", node)
    run_pods_of(pods, node)
    holds(pods)
    assert attaches_no_pod(pods, node)


def test_policy_only_ends_on_one_node_and_holds_on_the_other_and_then_all_is_gone(pods: Cluster) -> None:
    change(pods, "node-2", "uninstall")
    assert "drawbridge" not in pods.run_on("node-2", "nft", "list", "tables")
    until(pods, "stranger", "far", True)
    until(pods, "stranger", "here", False)
    change(pods, "node-1", "uninstall")
    until(pods, "stranger", "here", True)
    for node in pods.nodes:
        assert "drawbridge" not in pods.run_on(node, "nft", "list", "tables")
        assert attaches_no_pod(pods, node)
        assert "drawbridge" not in pods.run_on(node, "ls", "/opt/cni/bin")
    pods.kubectl("delete", "--wait", "-k", MIGRATION)
    pods.kubectl("delete", "configmap", f"--namespace={NAMESPACE}", "-l", "app.kubernetes.io/name=drawbridge")
    left = pods.get("clusterroles,clusterrolebindings,serviceaccounts,configmaps,daemonsets", "--all-namespaces")
    assert not [item["metadata"]["name"] for item in left["items"] if "drawbridge" in item["metadata"]["name"]]
