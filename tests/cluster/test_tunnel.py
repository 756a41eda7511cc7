"""Clusters whose nodes reach each other's pods by VXLAN: because they are told to, and because they must."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.api.processes import wait_until
from tests.cluster import images
from tests.cluster.cluster import Cluster
from tests.cluster.installation import configured, install
from tests.cluster.test_cluster import PORT, SERVICE, ask, server
from tests.cluster.test_drawbridge import addresses, policy, refused, seen_by

LINK = "drawbridge-vx4"
NODE_PORT = 30080
LINES = 200_000


@pytest.fixture(scope="module", params=["vxlan on one segment", "auto on a segment each"])
def pods(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A server on each node and a Service before them, with a port of the nodes."""
    routing, _, where = request.param.partition(" on ")
    service = SERVICE.replace("{selector", "{type: NodePort, selector")
    service = service.replace(f"targetPort: {PORT}", f"targetPort: {PORT}, nodePort: {NODE_PORT}")
    with Cluster(tmp_path_factory.mktemp("cluster") / "state", routed=where == "a segment each") as cluster:
        install(cluster, configured(routing=routing))
        cluster.load_image(images.agnhost(tmp_path_factory.mktemp("images")))
        cluster.kubectl("apply", "-f", "-", stdin="\n---\n".join([service, *(server(node) for node in cluster.nodes)]))
        cluster.kubectl("wait", "--for=condition=Ready", "pod", "--all", "--timeout=60s", seconds=70)
        yield cluster


def test_pods_reach_each_other_by_the_tunnel_and_see_their_own_addresses(pods: Cluster) -> None:
    for here, there in (("node-1", "node-2"), ("node-2", "node-1")):
        for address, network in zip(addresses(pods, there), networks(pods, there), strict=True):
            family = "-6" if ":" in network else "-4"
            assert f" dev {LINK} proto 84" in pods.run_on(here, "ip", family, "route", "show", network)
            assert ask(pods, here, address, PORT) == there
    for there, here in zip(addresses(pods, "node-2"), addresses(pods, "node-1"), strict=True):
        assert seen_by(pods, there, PORT) == here


def networks(cluster: Cluster, node: str) -> list[str]:
    return list(cluster.get("node", node)["spec"]["podCIDRs"])


def test_services_hold_and_large_answers_come_through_pods_and_from_outside(pods: Cluster) -> None:
    numbers = f"/shell?cmd=seq+1+{LINES}"
    for address in pods.get("service", "servers")["spec"]["clusterIPs"]:
        assert {ask(pods, "node-1", address, 80) for _ in range(20)} == {"node-1", "node-2"}
    for address in addresses(pods, "node-2"):
        host = f"[{address}]" if ":" in address else address
        got = pods.kubectl("exec", "node-1", "--", "curl", "-gsS", "-m", "20", f"http://{host}:{PORT}{numbers}")
        assert json.loads(got)["output"].split()[-1] == str(LINES)
    # From outside by the port of one node to the pods of both: the answers of the other one go back by the tunnel.
    for address in pods.nodes["node-1"]:
        host = f"[{address}]" if ":" in address else address
        url = f"http://{host}:{NODE_PORT}"
        answering = {pods.run_outside("curl", "-gsS", "-m", "10", f"{url}/hostname") for _ in range(20)}
        assert answering == {"node-1", "node-2"}
        for _ in range(6):
            got = pods.run_outside("curl", "-gsS", "-m", "20", f"{url}{numbers}")
            assert json.loads(got)["output"].split()[-1] == str(LINES)


def test_a_node_reaches_the_other_nodes_pods(pods: Cluster) -> None:
    for address in addresses(pods, "node-2"):
        host = f"[{address}]" if ":" in address else address
        assert pods.run_on("node-1", "curl", "-gsS", "-m", "5", f"http://{host}:{PORT}/hostname") == "node-2"


def test_policies_hold_through_the_tunnel(pods: Cluster) -> None:
    target = addresses(pods, "node-2")
    pods.kubectl("apply", "-f", "-", stdin=policy("nobody"))
    try:
        wait_until(lambda: refused(pods, "node-1", target[0]), "the policy holds", seconds=20)
        assert refused(pods, "node-1", target[1])
        pods.kubectl("apply", "-f", "-", stdin=policy("server"))
        wait_until(lambda: not refused(pods, "node-1", target[0]), "the policy allows", seconds=20)
    finally:
        pods.kubectl("delete", "networkpolicy", "only")


def test_a_node_that_is_deleted_and_registers_again_is_followed(pods: Cluster) -> None:
    before = pods.run_on("node-1", "bridge", "fdb", "show", "dev", LINK)
    pods.stop_node("node-2")
    pods.kubectl("delete", "node", "node-2")
    wait_until(lambda: LINK not in pods.run_on("node-1", "ip", "link"), "nobody needs the link", seconds=20)
    pods.start_node("node-2")
    wait_until(
        lambda: pods.run_on("node-1", "bridge", "fdb", "show", "dev", LINK) == before, "its entry is back", seconds=60
    )
    for network in networks(pods, "node-2"):
        family = "-6" if ":" in network else "-4"
        assert LINK in pods.run_on("node-1", "ip", family, "route", "show", network)
