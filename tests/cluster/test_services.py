"""Services, hostPorts, hostNetwork pods and probes on a real cluster: who reaches whom, and whom a policy sees.

kube-proxy runs in nftables mode; all is tried over IPv4 and IPv6. ``docs/semantics.md`` has the table of sources.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import ipaddress
import json
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from tests.api.processes import ProgramError, wait_until
from tests.cluster import fabric, images
from tests.cluster.cluster import Cluster
from tests.cluster.installation import NAMESPACE, agent_pod, install, settle
from tests.tools.build import binary

OUTSIDE = "outside"
OUTSIDE_BLOCKS = tuple(f"{address}/{length}" for address, length in zip(fabric.addresses(1), (32, 128), strict=True))
PORT = 8080
Targets = list[tuple[str, int]]


def pod(name: str, node: str, *arguments: str, **spec: Any) -> dict[str, Any]:
    """A pod of agnhost, with its name and node as labels, that serves HTTP if no other arguments are given."""
    container = {"name": "main", "image": images.AGNHOST, "args": arguments or ["netexec", f"--http-port={PORT}"]}
    container |= spec.pop("container", {})
    metadata = {"name": name, "labels": {"name": name, "node": node, "app": name.partition("-")[0]}}
    metadata["annotations"] = spec.pop("annotations", {})
    whole = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 0} | spec
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": whole}


def service(name: str, selector: dict[str, str], node_port: int, **spec: Any) -> dict[str, Any]:
    port = {"port": 80, "targetPort": PORT, "nodePort": node_port}
    whole = {"type": "NodePort", "selector": selector, "ipFamilyPolicy": "RequireDualStack", "ports": [port]} | spec
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": whole}


def policy(selector: dict[str, str], **directions: list[Any]) -> dict[str, Any]:
    """A policy in namespace default, with the rules of each direction that it is given."""
    types = [direction.capitalize() for direction in directions]
    spec = {"podSelector": {"matchLabels": selector}, "policyTypes": types, **directions}
    name = "-".join([*selector.values(), *directions]) or "all"
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name}, "spec": spec}


def from_pods(**labels: str) -> list[Any]:
    return [{"from": [{"podSelector": {"matchLabels": labels}}]}]


def from_blocks(*blocks: str) -> list[Any]:
    return [{"from": [{"ipBlock": {"cidr": block}} for block in blocks]}]


ON_1, ON_2, ON_1_LOCAL, WEB, STICKY = 30081, 30082, 30091, 30080, 30085
OBJECTS = [
    *(pod(f"{name}-{number}", f"node-{number}") for name in ("web", "client") for number in (1, 2)),
    *(
        pod(f"host-{number}", f"node-{number}", "netexec", "--http-port=9090", "--udp-port=-1", hostNetwork=True)
        for number in (1, 2)
    ),
    service("web", {"app": "web"}, WEB),
    service("on-1", {"name": "web-1"}, ON_1),
    service("on-2", {"name": "web-2"}, ON_2),
    service("on-1-local", {"name": "web-1"}, ON_1_LOCAL, externalTrafficPolicy="Local"),
    service("sticky", {"app": "web"}, STICKY, sessionAffinity="ClientIP"),
]


def listed(objects: Iterable[dict[str, Any]]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": list(objects)})


@pytest.fixture(scope="module")
def pods(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Cluster:
    """The cluster with two pods and a hostNetwork pod on each node, and Services before them.

    node-1 has the present portmap, which uses nftables, and node-2 that of the distribution, which uses iptables.
    """
    for plugin in ("portmap", "bandwidth"):
        cluster.run_on("node-1", "cp", "--remove-destination", binary(plugin), f"/opt/cni/bin/{plugin}")
    install(cluster)
    cluster.load_image(images.agnhost(tmp_path_factory.mktemp("images")))
    run(cluster, OBJECTS)
    services = [entry["metadata"]["name"] for entry in OBJECTS if entry["kind"] == "Service"]
    targets = [target for name in services for target in cluster_ips(cluster, name)]
    wait_until(
        lambda: all("" not in answers(cluster, source, targets) for source in ("client-1", "client-2")),
        "kube-proxy has the backends on both nodes",
        seconds=30,
    )
    return cluster


def run(cluster: Cluster, objects: Iterable[dict[str, Any]]) -> None:
    """Apply objects and return when their pods are ready."""
    cluster.kubectl("apply", "-f", "-", stdin=listed(objects))
    names = [f"pod/{entry['metadata']['name']}" for entry in objects if entry["kind"] == "Pod"]
    cluster.kubectl("wait", "--for=condition=Ready", "--timeout=60s", *names, seconds=70)


@contextlib.contextmanager
def enforced(cluster: Cluster, *policies: dict[str, Any]) -> Iterator[None]:
    """The policies hold on all nodes."""
    cluster.kubectl("apply", "-f", "-", stdin=listed(policies))
    try:
        settle(cluster)
        yield
    finally:
        cluster.kubectl("delete", "--wait=false", "-f", "-", stdin=listed(policies))
        settle(cluster)


_ASK = (
    'place=0; for url; do place=$((place + 1)); echo "$place $(curl -gs --connect-timeout 1 -m 5 "$url")" & done; wait'
)


def answers(cluster: Cluster, source: str, targets: Targets, *, what: str = "clientip") -> list[str]:
    """What a pod, a node or ``OUTSIDE`` gets from each target; empty where there is no answer.

    Args:
        what: ``clientip``, the address by which the server sees the client; or ``hostname``, the server's.
    """
    urls = [f"http://{f'[{host}]' if ':' in host else host}:{port}/{what}" for host, port in targets]
    command = ("sh", "-c", _ASK, "ask", *urls)
    if source == OUTSIDE:
        printed = cluster.run_outside(*command)
    elif source in cluster.nodes:
        printed = cluster.run_on(source, *command)
    else:
        printed = cluster.kubectl("exec", source, "--", *command)
    bodies = dict(line.split(" ", 1) for line in printed.splitlines())
    texts = [bodies[str(place)] for place in range(1, len(urls) + 1)]
    return texts if what == "hostname" else [text.rpartition(":")[0].strip("[]") for text in texts]


NOTHING = ["", ""]


def cluster_ips(cluster: Cluster, name: str) -> Targets:
    return [(address, 80) for address in cluster.get("service", name)["spec"]["clusterIPs"]]


def node_ports(cluster: Cluster, node: str, port: int) -> Targets:
    return [(address, port) for address in cluster.nodes[node]]


def of(cluster: Cluster, name: str) -> list[str]:
    """The addresses of a pod, IPv4 and then IPv6."""
    return [ip["ip"] for ip in cluster.get("pod", name)["status"]["podIPs"]]


@functools.cache
def gateways(cluster: Cluster, node: str) -> list[str]:
    """The addresses of a node on its pods' bridge."""
    networks = cluster.get("node", node)["spec"]["podCIDRs"]
    return [str(next(iter(ipaddress.ip_network(network).hosts()))) for network in networks]


def blocks(addresses: Iterable[str]) -> list[str]:
    return [str(ipaddress.ip_network(address)) for address in addresses]


# Cluster addresses


def test_a_cluster_ip_leads_to_backends_of_both_nodes_from_pods_and_nodes(pods: Cluster) -> None:
    for source in ("client-1", "client-2", "node-1", "node-2"):
        for number in (1, 2):
            backend = answers(pods, source, cluster_ips(pods, f"on-{number}"), what="hostname")
            assert backend == [f"web-{number}"] * 2, source


def test_behind_a_cluster_ip_the_pod_is_seen_as_itself_and_a_node_by_the_address_it_sends_from(pods: Cluster) -> None:
    for number in (1, 2):
        service_ips = cluster_ips(pods, f"on-{number}")
        assert answers(pods, "client-1", service_ips) == of(pods, "client-1")
    assert answers(pods, "node-1", cluster_ips(pods, "on-1")) == gateways(pods, "node-1")
    assert answers(pods, "node-1", cluster_ips(pods, "on-2")) == list(pods.nodes["node-1"])


def test_ingress_policy_behind_a_cluster_ip_judges_the_client_pod(pods: Cluster) -> None:
    with enforced(pods, policy({"app": "web"}, ingress=from_pods(name="client-1"))):
        for number in (1, 2):
            service_ips = cluster_ips(pods, f"on-{number}")
            assert answers(pods, "client-1", service_ips) == of(pods, "client-1")
            assert answers(pods, "client-2", service_ips) == NOTHING
            # Its own pods a node reaches always, others' by their policy.
            assert answers(pods, f"node-{number}", service_ips, what="hostname") == [f"web-{number}"] * 2
            assert answers(pods, f"node-{3 - number}", service_ips) == NOTHING


def test_egress_policy_judges_the_backend_and_not_the_cluster_ip(pods: Cluster) -> None:
    service_ips = cluster_ips(pods, "on-2")
    to_backend = [{"to": [{"podSelector": {"matchLabels": {"name": "web-2"}}}], "ports": [{"port": PORT}]}]
    with enforced(pods, policy({"name": "client-1"}, egress=to_backend)):
        assert answers(pods, "client-1", service_ips, what="hostname") == ["web-2"] * 2
        assert answers(pods, "client-1", cluster_ips(pods, "on-1")) == NOTHING
    to_service = [{"to": [{"ipBlock": {"cidr": block}} for block in blocks(host for host, _ in service_ips)]}]
    with enforced(pods, policy({"name": "client-1"}, egress=to_service)):
        assert answers(pods, "client-1", service_ips) == NOTHING


# Node ports


def test_a_node_port_of_cluster_policy_answers_everyone_on_every_node_and_hides_the_client(pods: Cluster) -> None:
    for source in (OUTSIDE, "node-2", "client-2"):
        assert answers(pods, source, node_ports(pods, "node-1", ON_1)) == gateways(pods, "node-1"), source
        assert answers(pods, source, node_ports(pods, "node-1", ON_2)) == list(pods.nodes["node-1"]), source


def test_policy_sees_the_client_of_a_node_port_where_it_enters_and_the_node_where_it_was_passed_on(
    pods: Cluster,
) -> None:
    with enforced(pods, policy({"app": "web"}, ingress=from_blocks(*OUTSIDE_BLOCKS))):
        for node, entered, passed_on in (("node-1", ON_1, ON_2), ("node-2", ON_2, ON_1)):
            assert answers(pods, OUTSIDE, node_ports(pods, node, entered)) == gateways(pods, node)
            assert answers(pods, OUTSIDE, node_ports(pods, node, passed_on)) == NOTHING
    with enforced(pods, policy({"app": "web"}, ingress=from_blocks(*blocks(pods.nodes["node-1"])))):
        assert answers(pods, OUTSIDE, node_ports(pods, "node-1", ON_1)) == NOTHING
        assert answers(pods, OUTSIDE, node_ports(pods, "node-1", ON_2)) == list(pods.nodes["node-1"])


def test_a_node_port_of_local_policy_keeps_the_client_and_policy_judges_it(pods: Cluster) -> None:
    entrance = node_ports(pods, "node-1", ON_1_LOCAL)
    clients = {OUTSIDE: list(fabric.addresses(1)), "node-2": list(pods.nodes["node-2"])}
    # A pod's own node passes it on with its address; another node sees the address of the pod's node.
    clients |= {"client-1": of(pods, "client-1"), "client-2": list(pods.nodes["node-2"])}
    for source, seen in clients.items():
        assert answers(pods, source, entrance) == seen, source
    with enforced(pods, policy({"app": "web"}, ingress=from_blocks(*OUTSIDE_BLOCKS))):
        for source, seen in clients.items():
            assert answers(pods, source, entrance) == (seen if source == OUTSIDE else NOTHING), source


def test_no_node_without_a_backend_answers_under_local_policy(pods: Cluster) -> None:
    for source in (OUTSIDE, "node-1"):
        assert answers(pods, source, node_ports(pods, "node-2", ON_1_LOCAL)) == NOTHING, source
    # But for its own pods, to which it is the Service.
    assert answers(pods, "client-2", node_ports(pods, "node-2", ON_1_LOCAL)) == of(pods, "client-2")


def test_no_pod_gets_past_a_policy_by_a_node_port(pods: Cluster) -> None:
    with enforced(pods, policy({"app": "web"}, ingress=from_pods(app="nobody"))):
        for source in ("client-1", "client-2"):
            ways = [t for node in pods.nodes for port in (ON_1, ON_2, ON_1_LOCAL) for t in node_ports(pods, node, port)]
            assert set(answers(pods, source, ways)) == {""}, source


def test_a_pod_that_policy_allows_comes_through_a_node_port_of_the_node_that_both_are_on(pods: Cluster) -> None:
    with enforced(pods, policy({"app": "web"}, ingress=from_pods(name="client-1"))):
        assert answers(pods, "client-1", node_ports(pods, "node-1", ON_1)) == gateways(pods, "node-1")
        assert answers(pods, "client-1", node_ports(pods, "node-1", ON_1_LOCAL)) == of(pods, "client-1")
        # The nodes between have put their own addresses in its place.
        assert answers(pods, "client-1", node_ports(pods, "node-1", ON_2)) == NOTHING
        assert answers(pods, "client-1", node_ports(pods, "node-2", ON_1)) == NOTHING


@pytest.mark.parametrize("family", [4, 6])
def test_session_affinity_holds_while_policies_change(pods: Cluster, family: int) -> None:
    service_ip = cluster_ips(pods, "sticky")[family == 6]

    def backends() -> set[str]:
        return set(answers(pods, "client-1", [service_ip] * 10, what="hostname"))

    chosen = backends()
    assert len(chosen) == 1
    (backend,) = chosen
    with enforced(pods, policy({"app": "web"}, ingress=from_pods(app="client"))):
        assert backends() == chosen
        with enforced(pods, policy({"name": backend}, egress=[])):
            assert backends() == chosen
    with enforced(pods, policy({"name": backend}, ingress=[])):
        # It is not led to the other backend, either.
        assert backends() == {""}
    assert backends() == chosen


# A pod and itself, hostNetwork pods, the node


def test_a_pod_reaches_itself_through_its_service_even_where_it_is_cut_off_from_all(pods: Cluster) -> None:
    ways = [*cluster_ips(pods, "on-1"), *node_ports(pods, "node-1", ON_1), *node_ports(pods, "node-1", ON_1_LOCAL)]
    seen = gateways(pods, "node-1") * 3
    assert answers(pods, "web-1", ways) == seen
    with enforced(pods, policy({"name": "web-1"}, ingress=[], egress=[])):
        assert answers(pods, "web-1", ways) == seen
        assert answers(pods, "web-1", cluster_ips(pods, "on-2")) == NOTHING


def test_a_host_network_pod_is_its_node_as_client_and_as_server(pods: Cluster) -> None:
    on_host = {number: [(address, 9090) for address in pods.nodes[f"node-{number}"]] for number in (1, 2)}
    backends = {number: [(address, PORT) for address in of(pods, f"web-{number}")] for number in (1, 2)}
    # Policies that select hostNetwork pods have no effect, and rules that name them match nothing.
    closed = policy({"app": "host"}, ingress=[], egress=[])
    with enforced(pods, closed, policy({"app": "web"}, ingress=from_pods(app="host"))):
        assert answers(pods, "client-1", on_host[1]) == of(pods, "client-1")
        assert answers(pods, "client-1", on_host[2]) == list(pods.nodes["node-1"])
        assert answers(pods, OUTSIDE, on_host[1]) == list(fabric.addresses(1))
        assert answers(pods, "host-1", backends[1]) == gateways(pods, "node-1")
        assert answers(pods, "host-1", backends[2]) == NOTHING
    with enforced(pods, policy({"app": "web"}, ingress=from_blocks(*blocks(pods.nodes["node-1"])))):
        assert answers(pods, "host-1", backends[2]) == list(pods.nodes["node-1"])
        assert answers(pods, "host-2", backends[1]) == NOTHING


PROBES: dict[str, dict[str, Any]] = {
    "http": {"httpGet": {"port": PORT, "path": "/healthz"}},
    "tcp": {"tcpSocket": {"port": PORT}},
    "exec": {"exec": {"command": ["true"]}},
}


def test_probes_of_isolated_pods_pass(pods: Cluster) -> None:
    often: dict[str, Any] = {"periodSeconds": 1, "failureThreshold": 1, "timeoutSeconds": 5}
    probed = [
        pod(f"probed-{kind}", "node-1", container={f"{use}Probe": probe | often for use in ("liveness", "readiness")})
        for kind, probe in PROBES.items()
    ]
    with enforced(pods, policy({"app": "probed"}, ingress=[], egress=[])):
        run(pods, probed)
        wait_until(lambda: min(probes(pods, "successful").values()) > 3, "each pod is probed", seconds=30)
        assert set(probes(pods, "failed").values()) == {0}
        for name in PROBES:
            (container,) = pods.get("pod", f"probed-{name}")["status"]["containerStatuses"]
            assert container["ready"] and container["restartCount"] == 0
        # The kubelet probes the first address only; the node reaches the other, too, and other pods neither.
        isolated = [(address, PORT) for address in of(pods, "probed-http")]
        assert answers(pods, "node-1", isolated) == gateways(pods, "node-1")
        assert answers(pods, "client-1", isolated) == NOTHING
    pods.kubectl("delete", "-f", "-", stdin=listed(probed))


def probes(cluster: Cluster, result: str) -> dict[str, int]:
    """How many liveness probes of each probed pod have had a result, as the kubelet counts."""
    counts = dict.fromkeys(PROBES, 0)
    for line in cluster.kubectl("get", "--raw", "/api/v1/nodes/node-1/proxy/metrics/probes").splitlines():
        if line.startswith("prober_probe_total{") and 'probe_type="Liveness"' in line and f'result="{result}"' in line:
            for kind in PROBES:
                counts[kind] += int(float(line.rpartition(" ")[2])) if f'pod="probed-{kind}"' in line else 0
    return counts


LINK_LOCAL = ("169.254.20.10", "fd00:53::10")


def test_a_dns_server_on_an_address_of_the_node_alone_is_reached_as_egress_policy_allows(pods: Cluster) -> None:
    # The upstream has a dummy link, which this kernel may lack; any other that leads nowhere does as well.
    commands = [f"address add {address}/{length} dev lo" for address, length in zip(LINK_LOCAL, (32, 128), strict=True)]
    pods.run_on("node-1", "ip", "-batch", "-", stdin="\n".join(commands))
    listen = ("--udp-port=53", f"--udp-listen-addresses={','.join(LINK_LOCAL)}", "--http-port=9053")
    run(pods, [pod("dns-1", "node-1", "netexec", *listen, hostNetwork=True)])
    clients = of(pods, "client-1")
    assert resolved(pods) == clients
    with enforced(pods, policy({"name": "client-1"}, egress=[])):
        assert resolved(pods) == NOTHING
        to_dns = [{"ipBlock": {"cidr": block}} for block in blocks(LINK_LOCAL)]
        with enforced(
            pods, policy({"app": "client"}, egress=[{"to": to_dns, "ports": [{"port": 53, "protocol": "UDP"}]}])
        ):
            assert resolved(pods) == clients
            assert answers(pods, "client-1", [(address, 9053) for address in LINK_LOCAL]) == NOTHING


def resolved(cluster: Cluster) -> list[str]:
    """By which addresses client-1 is seen by the server on port 53, over UDP."""
    script = 'for host; do echo "$host $(echo clientip | nc -u -w 1 $host 53)"; done'
    lines = cluster.kubectl("exec", "client-1", "--", "sh", "-c", script, "ask", *LINK_LOCAL).splitlines()
    return [line.partition(" ")[2].rpartition(":")[0].strip("[]") for line in lines]


# What is chained after us

HOST_PORT = 8088
HOST_PORTS = {"ports": [{"containerPort": PORT, "hostPort": HOST_PORT}]}
RATES = {"kubernetes.io/ingress-bandwidth": "80M", "kubernetes.io/egress-bandwidth": "160M"}


@pytest.mark.parametrize(("number", "other"), [(1, 2), (2, 1)], ids=["nftables", "iptables"])
def test_a_host_port_leads_to_its_pod_and_policy_judges_the_client(pods: Cluster, number: int, other: int) -> None:
    name, node = f"port-{number}", f"node-{number}"
    run(pods, [pod(name, node, container=HOST_PORTS)])
    entrance = node_ports(pods, node, HOST_PORT)
    clients = {
        OUTSIDE: list(fabric.addresses(1)),
        f"node-{other}": list(pods.nodes[f"node-{other}"]),
        f"client-{other}": list(pods.nodes[f"node-{other}"]),
        f"client-{number}": of(pods, f"client-{number}"),
        name: gateways(pods, node),
    }
    for source, seen in clients.items():
        assert answers(pods, source, entrance) == seen, source
    assert answers(pods, node, [("127.0.0.1", HOST_PORT)]) == gateways(pods, node)[:1]
    with enforced(pods, policy({"app": "port"}, ingress=from_blocks(*OUTSIDE_BLOCKS))):
        for source, seen in clients.items():
            assert answers(pods, source, entrance) == (seen if source in {OUTSIDE, name} else NOTHING), source
    agent = agent_pod(pods, node)["metadata"]["name"]
    assert "node settings changed by another program" not in pods.kubectl("logs", f"--namespace={NAMESPACE}", agent)
    pods.kubectl("delete", "pod", name)
    # iptables' rules are nftables rules here.
    wait_until(
        lambda: str(HOST_PORT) not in pods.run_on(node, "nft", "list", "ruleset"), "it is cleaned up", seconds=20
    )


@pytest.mark.parametrize("number", [1, 2], ids=["present", "of the distribution"])
def test_a_pod_of_limited_bandwidth_is_shaped_both_ways(pods: Cluster, number: int) -> None:
    name, node = f"slow-{number}", f"node-{number}"
    run(pods, [pod(name, node, annotations=RATES)])
    port, _, device = links_of(attachment(pods, node, name))
    before = {link: shaped(pods, node, link) for link in (port, device)}
    assert {link: rate for link, (rate, _) in before.items()} == {port: 80_000_000 // 8, device: 160_000_000 // 8}
    assert (
        answers(pods, f"client-{number}", [(address, PORT) for address in of(pods, name)], what="hostname")
        == [name] * 2
    )
    for link, (_, packets) in before.items():
        assert shaped(pods, node, link)[1] > packets
    pods.kubectl("delete", "pod", name)
    wait_until(lambda: not links(pods, node) & {port, device}, "both links are gone", seconds=20)


def test_check_finds_what_a_chained_plugin_has_lost(pods: Cluster) -> None:
    run(pods, [pod("checked", "node-1", container=HOST_PORTS, annotations=RATES)])
    cached = attachment(pods, "node-1", "checked")
    port, _, device = links_of(cached)
    assert check(pods, "node-1", cached) == ["drawbridge", "portmap", "bandwidth"]
    pods.run_on("node-1", "ip", "link", "delete", device)
    with pytest.raises(ProgramError, match="ifb"):
        check(pods, "node-1", cached)
    pods.run_on("node-1", "nft", "flush", "chain", "ip6", "cni_hostport", "hostports")
    with pytest.raises(ProgramError, match="hostport"):
        check(pods, "node-1", cached)
    pods.kubectl("delete", "pod", "checked")
    wait_until(lambda: port not in links(pods, "node-1"), "the pod's link is gone", seconds=20)


def links(cluster: Cluster, node: str) -> set[str]:
    return {link["ifname"] for link in json.loads(cluster.run_on(node, "ip", "-json", "link"))}


def links_of(cached: dict[str, Any]) -> list[str]:
    """The links of an attachment: its port of the bridge, the pod's, and that which shapes what the pod sends."""
    return [interface["name"] for interface in cached["result"]["interfaces"]]


def attachment(cluster: Cluster, node: str, name: str) -> dict[str, Any]:
    """What the runtime has kept of a pod's ADD."""
    kept = cluster.run_on(node, "sh", "-c", "cat /var/lib/cni/results/drawbridge-*").replace("}{", "}\n{").splitlines()
    found: dict[str, Any]
    (found,) = (entry for entry in map(json.loads, kept) if ["K8S_POD_NAME", name] in entry["cniArgs"])
    return found


def shaped(cluster: Cluster, node: str, link: str) -> tuple[int, int]:
    """The rate in bytes a second that a link is shaped to, and the packets that have passed."""
    queues = json.loads(cluster.run_on(node, "tc", "-json", "-stats", "qdisc", "show", "dev", link))
    (queue,) = (queue for queue in queues if queue["kind"] == "tbf")
    return queue["options"]["rate"], queue["packets"]


def check(cluster: Cluster, node: str, cached: dict[str, Any]) -> list[str]:
    """Call each plugin with CHECK, as a runtime would; the plugins that were called."""
    configuration = json.loads(base64.b64decode(cached["config"]))
    environment = {
        "CNI_COMMAND": "CHECK",
        "CNI_CONTAINERID": cached["containerId"],
        "CNI_NETNS": cached["result"]["interfaces"][1]["sandbox"],
        "CNI_IFNAME": cached["ifName"],
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": ";".join("=".join(pair) for pair in cached["cniArgs"]),
    }
    called = []
    for plugin in configuration["plugins"]:
        asked = {name: cached["capabilityArgs"][name] for name in plugin.get("capabilities", ())}
        whole = plugin | {key: configuration[key] for key in ("cniVersion", "name")}
        whole |= {"prevResult": cached["result"], "runtimeConfig": asked}
        variables = [f"{name}={value}" for name, value in environment.items()]
        executable = f"/opt/cni/bin/{plugin['type']}"
        cluster.run_on(node, "env", *variables, executable, stdin=json.dumps(whole))
        called.append(plugin["type"])
    return called


# Others' rules


def test_kube_proxy_has_its_table_beside_ours_and_policies_hold_while_it_starts_again(pods: Cluster) -> None:
    rulesets = {node: pods.run_on(node, "nft", "list", "ruleset") for node in pods.nodes}
    for ruleset in rulesets.values():
        for table in ("ip kube-proxy", "ip6 kube-proxy", "inet drawbridge", "bridge drawbridge"):
            assert f"table {table} {{" in ruleset
    service_ips = cluster_ips(pods, "web")
    with enforced(pods, policy({"app": "web"}, ingress=from_pods(name="client-1"))):
        for node in pods.nodes:
            for family in ("ip", "ip6"):
                pods.run_on(node, "nft", "delete", "table", family, "kube-proxy")
            pods.run_on(node, "pkill", "-KILL", "-x", "kube-proxy")
        assert answers(pods, "client-2", [(address, PORT) for address in of(pods, "web-1")]) == [""] * 2
        wait_until(lambda: "" not in answers(pods, "client-1", service_ips), "Services are back", seconds=30)
        assert answers(pods, "client-2", service_ips) == NOTHING
