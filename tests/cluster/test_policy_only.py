"""``network: none``: policies on pods that ptp attaches, with routes between nodes as Flannel's host-gw makes them."""

from __future__ import annotations

import json

import pytest

from tests.api.processes import ProgramError, wait_until
from tests.cluster import images
from tests.cluster.cluster import Cluster
from tests.cluster.installation import NAMESPACE, apply, configured, drawbridge, install, uninstall
from tests.cluster.test_cluster import PORT, connect_nodes, server
from tests.cluster.test_drawbridge import addresses, policy

STRAY = "stray"


def pod(node: str, name: str) -> str:
    """A server on a node; it bears its name as a label."""
    made = json.loads(server(node))
    made["metadata"] = {"name": name, "labels": {"app": "server", "name": name}}
    return json.dumps(made)


def run_pods(cluster: Cluster, *pods: str) -> None:
    cluster.kubectl("apply", "-f", "-", stdin="\n---\n".join(pods))
    cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s", seconds=70)


@pytest.fixture(scope="module")
def pods(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """Two pods on node-1 and one on node-2, which are there before the agents start."""
    connect_nodes(cluster)
    cluster.load_image(images.agnhost(tmp_path_factory.mktemp("images")))
    run_pods(cluster, pod("node-1", "here"), pod("node-1", "near"), pod("node-2", "far"))
    install(cluster, configured(network="none"))
    return cluster


def reaches(cluster: Cluster, source: str, address: str) -> bool:
    """Whether a pod, or ``stray``, gets an answer from an address."""
    host = f"[{address}]" if ":" in address else address
    ask = ("curl", "-gsS", "-m", "2", f"http://{host}:{PORT}/hostname")
    try:
        if source == STRAY:
            cluster.run_on("node-1", "ip", "netns", "exec", STRAY, *ask)
        else:
            cluster.kubectl("exec", source, "--", *ask)
    except ProgramError:
        return False
    return True


def reach(cluster: Cluster, source: str, target: str) -> list[bool]:
    """Whether a pod reaches another, for each family."""
    return [reaches(cluster, source, address) for address in addresses(cluster, target)]


def until(cluster: Cluster, source: str, target: str, expected: bool) -> None:
    wait_until(lambda: reach(cluster, source, target) == [expected, expected],
               f"{source} -> {target}: {expected}", seconds=40)  # fmt: skip


def test_pods_that_were_there_before_the_agent_obey_on_one_node_and_across_over_both_families(pods: Cluster) -> None:
    for source in ("near", "far"):
        assert reach(pods, source, "here") == [True, True]
    pods.kubectl("apply", "-f", "-", stdin=policy("nobody"))
    for source, target in (("near", "here"), ("far", "here"), ("here", "far")):
        until(pods, source, target, False)
    # The node's own traffic, the kubelet's probes among it, is never denied.
    for address in addresses(pods, "here"):
        host = f"[{address}]" if ":" in address else address
        assert pods.run_on("node-1", "curl", "-gsS", "-m", "5", f"http://{host}:{PORT}/hostname") == "here"
    pods.kubectl("apply", "-f", "-", stdin=policy("server"))
    for source, target in (("near", "here"), ("far", "here"), ("here", "far")):
        until(pods, source, target, True)


def test_a_label_that_changes_is_followed_on_the_pods_node_and_on_others(pods: Cluster) -> None:
    for source in ("near", "far"):
        pods.kubectl("label", "--overwrite", "pod", source, "app=other")
        until(pods, source, "here", False)
        pods.kubectl("label", "--overwrite", "pod", source, "app=server")
        until(pods, source, "here", True)


def test_a_pod_that_is_deleted_takes_its_addresses_along_and_a_new_one_obeys(pods: Cluster) -> None:
    gone = addresses(pods, "near")
    pods.kubectl("delete", "pod", "near")
    wait_until(lambda: "near" not in drawbridge(pods, "node-1", "pods"), "it is forgotten", seconds=20)
    ruleset = pods.run_on("node-1", "nft", "list", "table", "inet", "drawbridge")
    assert not any(f"{address} comment" in ruleset for address in gone)
    run_pods(pods, pod("node-1", "near"))
    until(pods, "near", "here", True)
    pods.kubectl("label", "--overwrite", "pod", "near", "app=other")
    until(pods, "near", "here", False)
    pods.kubectl("label", "--overwrite", "pod", "near", "app=server")


def attach_unknown(cluster: Cluster) -> str:
    """Attach a network namespace to node-1's pod network as the kubelet does a pod's; nothing tells the API of it."""
    configuration = json.loads(cluster.run_on("node-1", "cat", "/etc/cni/net.d/10-pods.conflist"))
    plugin = configuration["plugins"][0] | {"cniVersion": "1.0.0", "name": configuration["name"]}
    cluster.run_on("node-1", "ip", "netns", "add", STRAY)
    environment = ("CNI_COMMAND=ADD", f"CNI_CONTAINERID={STRAY}", f"CNI_NETNS=/run/netns/{STRAY}", "CNI_IFNAME=eth0",
                   "CNI_PATH=/opt/cni/bin")  # fmt: skip
    result = cluster.run_on("node-1", "env", *environment, "/opt/cni/bin/ptp", stdin=json.dumps(plugin))
    return str(json.loads(result)["ips"][0]["address"]).partition("/")[0]


def test_an_address_of_the_nodes_pods_is_closed_until_a_pod_is_known_for_it_unless_unknown_pods_are_allowed(
    pods: Cluster,
) -> None:
    pods.kubectl("delete", "networkpolicy", "only")
    until(pods, "near", "here", True)
    stray = attach_unknown(pods)
    targets = [*addresses(pods, "here"), *addresses(pods, "far")]
    assert [reaches(pods, STRAY, address) for address in targets] == [False] * 4
    denied = json.loads(drawbridge(pods, "node-1", "policies", "-o", "json"))["denied"]
    assert denied["unknown-pod"] > 0
    with pytest.raises(ProgramError):
        drawbridge(pods, "node-1", "explain", stray, "default/far", str(PORT))
    assert not reaches(pods, "far", stray)
    apply(pods, configured(network="none", unknownPods="allow"))
    assert [reaches(pods, STRAY, address) for address in targets] == [True] * 4
    apply(pods, configured(network="none"))
    assert [reaches(pods, STRAY, address) for address in targets] == [False] * 4


def test_a_new_pod_comes_out_of_it_by_itself(pods: Cluster) -> None:
    """A container that asks at once, and again until it is answered, ends well."""
    target = addresses(pods, "far")[0]
    script = f"until curl -sS -m 2 http://{target}:{PORT}/hostname; do :; done"
    made = json.loads(pod("node-1", "asks"))
    made["spec"]["containers"][0] |= {"command": ["sh", "-c", script], "args": []}
    made["spec"]["restartPolicy"] = "Never"
    pods.kubectl("apply", "-f", "-", stdin=json.dumps(made))
    wait_until(lambda: pods.get("pod", "asks")["status"]["phase"] == "Succeeded", "it is answered", seconds=60)
    pods.kubectl("delete", "pod", "asks")


def test_rules_hold_while_no_agent_runs_and_uninstall_leaves_the_other_pod_network_as_it_is(pods: Cluster) -> None:
    def network() -> list[str]:
        commands = ("ip -br link", "ip -br addr", "ip route", "ip -6 route", "ls /etc/cni/net.d")
        return [pods.run_on(node, *command.split()) for node in pods.nodes for command in commands]

    def reaches_here() -> list[bool]:
        return reach(pods, "far", "here") + reach(pods, "near", "here")

    assert not any("drawbridge" in printed for printed in network())
    pods.kubectl("apply", "-f", "-", stdin=policy("nobody"))
    until(pods, "far", "here", False)
    before = network()
    pods.kubectl("delete", "--cascade=foreground", "--wait", "daemonset", "drawbridge", f"--namespace={NAMESPACE}")
    assert reaches_here() == [False] * 4
    uninstall(pods)
    assert network() == before
    assert reaches_here() == [True] * 4
    for node in pods.nodes:
        assert "drawbridge" not in pods.run_on(node, "nft", "list", "tables")
        assert "drawbridge" not in pods.run_on(node, "ls", "/opt/cni/bin")
