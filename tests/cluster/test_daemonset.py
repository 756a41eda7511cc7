"""deploy/drawbridge.yaml on a real cluster: it makes nodes ready, is upgraded, outlives crashes, and is uninstalled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.api.processes import ProgramError, wait_until
from tests.cluster import images
from tests.cluster.cluster import Cluster
from tests.cluster.installation import (
    MANIFEST,
    NAMESPACE,
    ROOT,
    agent_pod,
    apply,
    drawbridge,
    install,
    uninstall,
    wait_for_agents,
)
from tests.cluster.test_cluster import PORT, SERVICE, ask, server
from tests.cluster.test_drawbridge import addresses, policy, refused

IMAGE = "localhost/drawbridge:0.1.0"
NEXT_IMAGE = "localhost/drawbridge:next"
ECHO_PORT = 7777
AGENT = ("pgrep", "-f", "drawbridge agent")


@pytest.fixture(scope="module")
def pods(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """A server on each node, a Service before them, and a policy that lets only servers in."""
    install(cluster)
    cluster.load_image(images.agnhost(tmp_path_factory.mktemp("images")))
    objects = [SERVICE, policy("server"), *(server(node) for node in cluster.nodes), server("node-1", name="stranger")]
    cluster.kubectl("apply", "-f", "-", stdin="\n---\n".join(objects))
    cluster.kubectl("label", "pod", "stranger", "app-")
    cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s", seconds=70)
    return cluster


def policy_holds(cluster: Cluster) -> bool:
    """Whether the server on node-2 answers the one on node-1, and nobody else."""
    for address in addresses(cluster, "node-2"):
        assert ask(cluster, "node-1", address, PORT) == "node-2"
    return all(refused(cluster, "stranger", address) for address in addresses(cluster, "node-2"))


def test_nodes_are_ready_and_policies_hold(pods: Cluster) -> None:
    pods.kubectl("wait", "--for=condition=Ready", "node", "--all", "--timeout=60s", seconds=70)
    assert policy_holds(pods)


def test_the_agent_has_three_capabilities_and_cannot_write_its_own_root(pods: Cluster) -> None:
    pid = pods.run_on("node-1", *AGENT).split()[0]
    (granted,) = (line for line in pods.run_on("node-1", "cat", f"/proc/{pid}/status").splitlines() if "CapBnd" in line)
    dac_override, net_admin, sys_admin = 1, 12, 21
    assert int(granted.split()[1], 16) == 1 << dac_override | 1 << net_admin | 1 << sys_admin
    name = agent_pod(pods, "node-1")["metadata"]["name"]
    with pytest.raises(ProgramError, match="Read-only file system"):
        pods.kubectl("exec", f"--namespace={NAMESPACE}", name, "--", "touch", "/opt/drawbridge/x")


def test_nft_of_the_node_lists_what_the_image_wrote(pods: Cluster) -> None:
    listing = pods.run_on("node-2", "nft", "list", "ruleset")
    assert "table inet drawbridge {" in listing
    assert 'comment "default/node-2"' in listing


def test_explain_in_the_agents_pod_says_why(pods: Cluster) -> None:
    with pytest.raises(ProgramError):
        drawbridge(pods, "node-2", "explain", "default/stranger", "default/node-2", str(PORT))
    (flow, *_) = json.loads(pods.kubectl(
        "exec", f"--namespace={NAMESPACE}", agent_pod(pods, "node-2")["metadata"]["name"], "--", "sh", "-c",
        f"drawbridge explain default/stranger default/node-2 {PORT} -o json || true"))  # fmt: skip
    assert flow["allowed"] is False


def test_a_configuration_with_mistakes_stops_the_roll_out_at_one_node(pods: Cluster, tmp_path: Path) -> None:
    broken = tmp_path / "overlay"
    broken.mkdir()
    (broken / "config.yaml").write_text("networking: none\nmasquerade: 7\n")
    (broken / "kustomization.yaml").write_text(
        f"namespace: {NAMESPACE}\nresources: [base]\n"
        "configMapGenerator: [{name: drawbridge-config, behavior: replace, files: [config.yaml]}]\n"
    )
    (broken / "base").symlink_to(ROOT / "deploy" / "base")
    changed = pods.kubectl("kustomize", "--load-restrictor=LoadRestrictionsNone", broken)
    pods.kubectl("apply", "-f", "-", stdin=changed)
    try:

        def said() -> str:
            selector = ("-l", "app.kubernetes.io/name=drawbridge")
            return pods.kubectl("logs", f"--namespace={NAMESPACE}", *selector, "--ignore-errors", "--prefix")

        wait_until(lambda: "networking" in said() and "masquerade" in said(), "both mistakes are named", seconds=60)
        assert said().count("agent started") == 1
        assert policy_holds(pods)
    finally:
        apply(pods, MANIFEST.read_text())


def test_an_upgrade_goes_node_by_node_and_flows_and_policies_outlive_it(pods: Cluster) -> None:
    for node in pods.nodes:
        pods.run_on(node, "ctr", "--namespace=k8s.io", "images", "tag", IMAGE, NEXT_IMAGE)
    before = {node: agent_pod(pods, node)["metadata"]["uid"] for node in pods.nodes}
    target = addresses(pods, "node-2")[0]
    lines = start_flow(pods, target)
    pods.kubectl("apply", "-f", "-", stdin=MANIFEST.read_text().replace(IMAGE, NEXT_IMAGE))
    while not (rolled := rolled_out(pods)):
        assert pods.run_on("node-2", "nft", "list", "table", "inet", "drawbridge")
        assert refused(pods, "stranger", target), rolled
    agents = [agent_pod(pods, node) for node in pods.nodes]
    assert not {agent["metadata"]["uid"] for agent in agents} & set(before.values())
    first, second = sorted(agents, key=lambda agent: agent["metadata"]["creationTimestamp"])
    assert second["metadata"]["creationTimestamp"] >= ready_since(first)
    after = lines()
    wait_until(lambda: lines() > after, "the connection of before still carries lines", seconds=20)
    assert policy_holds(pods)
    apply(pods, MANIFEST.read_text())


def start_flow(cluster: Cluster, target: str) -> Callable[[], int]:
    """Open one connection from the server on node-1 to one on node-2 that sends back what it gets, a line at a time.

    Returns:
        How many lines have come back until now.
    """
    echo = f"nc -l {ECHO_PORT} </tmp/echo | tee /tmp/echo"
    cluster.kubectl("exec", "node-2", "--", "sh", "-c", f"mkfifo /tmp/echo; ({echo}) >/dev/null 2>&1 </dev/null &")
    talk = f"(while sleep 0.2; do echo x; done) | nc {target} {ECHO_PORT} >/tmp/lines"
    cluster.kubectl("exec", "node-1", "--", "sh", "-c", f"({talk}) >/dev/null 2>&1 </dev/null &")

    def lines() -> int:
        return int(cluster.kubectl("exec", "node-1", "--", "sh", "-c", "wc -l </tmp/lines"))

    wait_until(lambda: lines() > 0, "the connection carries lines", seconds=20)
    return lines


def ready_since(pod: dict[str, Any]) -> str:
    (ready,) = (condition for condition in pod["status"]["conditions"] if condition["type"] == "Ready")
    return str(ready["lastTransitionTime"])


def rolled_out(cluster: Cluster) -> bool:
    state = cluster.get("daemonset", "drawbridge", f"--namespace={NAMESPACE}")
    status, wanted = state["status"], len(cluster.nodes)
    return bool(
        status["observedGeneration"] == state["metadata"]["generation"]
        and status.get("updatedNumberScheduled", 0) == wanted
        and status.get("numberAvailable", 0) == wanted
    )


def test_an_agent_that_is_killed_comes_back_and_policies_hold_meanwhile(pods: Cluster) -> None:
    uid = agent_pod(pods, "node-2")["metadata"]["uid"]
    pods.run_on("node-2", "pkill", "--signal=KILL", "-f", "drawbridge agent")
    assert policy_holds(pods)
    # This pod's ADD meets no agent at first.
    pods.kubectl("apply", "-f", "-", stdin=server("node-2", name="late"))

    def restarted() -> bool:
        (container,) = agent_pod(pods, "node-2")["status"]["containerStatuses"]
        return bool(container["restartCount"] and container["ready"])

    wait_until(restarted, "the agent runs again", seconds=60)
    assert agent_pod(pods, "node-2")["metadata"]["uid"] == uid
    pods.kubectl("wait", "--for=condition=Ready", "pod", "late", "--timeout=60s", seconds=70)
    assert ask(pods, "node-1", addresses(pods, "late")[0], PORT) == "late"
    assert refused(pods, "stranger", addresses(pods, "late")[0])


def test_a_node_that_lost_power_works_again_by_itself(pods: Cluster) -> None:
    pods.stop_node("node-2")
    pods.start_node("node-2")

    def restarted() -> bool:
        (container,) = pods.get("pod", "node-2")["status"]["containerStatuses"]
        return bool(container["restartCount"] and container["ready"])

    wait_until(restarted, "the pod runs again", seconds=90)
    wait_for_agents(pods)
    assert policy_holds(pods)


def test_uninstall_leaves_nothing_on_any_node(pods: Cluster) -> None:
    uninstall(pods)
    for node in pods.nodes:
        assert "drawbridge" not in pods.run_on(node, "nft", "list", "tables")
        links = pods.run_on(node, "ip", "-br", "link")
        assert "dbr" not in links and "drawbridge" not in links
        for family in ("-4", "-6"):
            assert pods.run_on(node, "ip", family, "route", "show", "proto", "84") == ""
        assert "drawbridge" not in pods.run_on(node, "ls", "/opt/cni/bin", "/etc/cni/net.d")
        assert pods.run_on(node, "ls", "/run/drawbridge") == ""
    left = pods.get("clusterroles,clusterrolebindings,serviceaccounts,configmaps,daemonsets", "--all-namespaces")
    assert not [item["metadata"]["name"] for item in left["items"] if "drawbridge" in item["metadata"]["name"]]
