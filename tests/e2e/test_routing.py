"""Nodes on several segments, real packets: direct routes, tunnels, both families, repairs, and no large packet lost."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cni.node.topology import tunnel_mac
from enforcer.demo.lab import Lab, Pod
from tests.e2e.conftest import put
from tests.e2e.site import SECONDS, NodeLab, Place, Site, datagram_arrives, ip, mtu_of, reaches, seen_from, transferred

pytestmark = pytest.mark.netns
PORT = 8080
BOTH = [True, True]
NEITHER = [False, False]
MEGABYTES = 20_000_000
LINK = "drawbridge-vx4"
Standing = tuple[Site, NodeLab, Pod, Pod]
"""Two nodes on two segments: the first node, its pod, and the pod of the other."""


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    with Site(tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Standing]:
    """For tests that leave it as they find it."""
    with Site(tmp_path_factory.mktemp("site")) as made:
        a, on_a, _, on_b = pair(made)
        yield made, a, on_a, on_b


def populate(site: Site, short: str, place: Place, **config: Any) -> tuple[NodeLab, Pod]:
    """A node with a pod that listens."""
    lab = site.add(short, place, **config)
    pod = site.add_pod(short, f"pod-{short}")
    lab.listen(pod, PORT)
    site.settle()
    return lab, pod


def pair(site: Site, **config: str) -> tuple[NodeLab, Pod, NodeLab, Pod]:
    """Two nodes on two segments."""
    return *populate(site, "a", Place(1, 1), **config), *populate(site, "b", Place(2, 1), **config)


def routes(site: Site, short: str) -> dict[str, str]:
    """What our routes of a node lead by, by network: a gateway and a link."""
    listed = [*json.loads(site.shown(short, "-j", "route", "show", "proto", "84")),
              *json.loads(site.shown(short, "-j", "-6", "route", "show", "proto", "84"))]  # fmt: skip
    return {route["dst"]: f"{route['gateway']} {route['dev']}" for route in listed if "gateway" in route}


def state(site: Site, short: str) -> list[str]:
    """Our routes of a node, and all that there is of the tunnel."""
    link = json.loads(site.shown(short, "-d", "-j", "link", "show", "dev", LINK))[0]
    return sorted([
        *map(str, routes(site, short).items()),
        *site.shown(short, "neigh", "show", "dev", LINK, "nud", "permanent").splitlines(),
        *site.inside(short, "bridge", "fdb", "show", "dev", LINK).splitlines(),
        *(address["local"] for address in json.loads(site.shown(short, "-j", "addr", "show", LINK))[0]["addr_info"]),
        *(str(link[key]) for key in ("mtu", "address", "group", "flags")),
        str(sorted(link["linkinfo"]["info_data"].items(), key=str)),
    ])  # fmt: skip


def test_pods_of_nodes_on_different_segments_see_each_others_own_addresses(standing: Standing) -> None:
    site, a, on_a, on_b = standing
    assert routes(site, "a") == {"10.244.2.0/24": f"10.244.2.0 {LINK}", "fd44:2::/64": f"fd44:2:: {LINK}"}
    assert reaches(site.labs["b"], on_b, on_a, PORT) == BOTH
    for here, there in zip(on_a.addresses, on_b.addresses, strict=True):
        assert seen_from(a, on_a, on_b, there) == here


def test_auto_goes_directly_where_the_nodes_are_on_one_segment_and_by_the_tunnel_elsewhere(site: Site) -> None:
    a, on_a, b, on_b = pair(site)
    c, on_c = populate(site, "c", Place(1, 2))
    assert routes(site, "a") == {
        "10.244.2.0/24": f"10.244.2.0 {LINK}", "fd44:2::/64": f"fd44:2:: {LINK}",
        "10.244.3.0/24": "10.8.1.2 eth0", "fd44:3::/64": "fd08:1::2 eth0",
    }  # fmt: skip
    assert set(routes(site, "b").values()) == {f"{gateway} {LINK}" for gateway in
                                               ("10.244.1.0", "10.244.3.0", "fd44:1::", "fd44:3::")}  # fmt: skip
    for lab, source in ((a, on_a), (b, on_b), (c, on_c)):
        for target in {on_a.key: on_a, on_b.key: on_b, on_c.key: on_c}.values():
            assert reaches(lab, source, target, PORT) == BOTH


def test_vxlan_takes_the_tunnel_on_one_segment_too_and_a_change_of_the_mode_moves_the_routes(site: Site) -> None:
    a, on_a = populate(site, "a", Place(1, 1), routing="vxlan")
    b, on_b = populate(site, "b", Place(1, 2), routing="vxlan")
    assert routes(site, "a") == {"10.244.2.0/24": f"10.244.2.0 {LINK}", "fd44:2::/64": f"fd44:2:: {LINK}"}
    assert reaches(a, on_a, on_b, PORT) == BOTH
    for mode, by in (
        ("direct", ["10.8.1.2 eth0", "fd08:1::2 eth0"]),
        ("vxlan", [f"10.244.2.0 {LINK}", f"fd44:2:: {LINK}"]),
    ):
        for short, lab in (("a", a), ("b", b)):
            put(site.folder / f"{short}.yaml", f"routing: {mode}\n")
            lab.stop_agent()
            lab.start_agent()
        assert list(routes(site, "a").values()) == by
        assert (LINK in site.shown("a", "link")) is (mode == "vxlan")
        assert reaches(a, on_a, on_b, PORT) == BOTH


def test_direct_reports_a_node_of_another_segment_and_makes_no_tunnel(site: Site) -> None:
    a, on_a, _, on_b = pair(site, routing="direct")
    assert reaches(a, on_a, on_b, PORT, seconds=0.3) == NEITHER
    assert f"{site.name('b')}: pod network 10.244.2.0/24 is not reached" in site.log("a")
    assert (routes(site, "a"), LINK in site.shown("a", "link")) == ({}, False)
    assert "tunnel" not in site.inside("a", "nft", "list", "ruleset")
    assert mtu_of(on_a) == 1500


def test_nodes_of_ipv6_only_carry_pods_of_both_families(site: Site) -> None:
    a, on_a = populate(site, "a", Place(1, 1, families=(6,)))
    _, on_b = populate(site, "b", Place(2, 1, families=(6,)))
    assert set(routes(site, "a").values()) == {"10.244.2.0 drawbridge-vx6", "fd44:2:: drawbridge-vx6"}
    assert mtu_of(on_a) == 1430
    for address in on_b.addresses:
        assert transferred(a, on_a, on_b, address, MEGABYTES) == MEGABYTES
        assert datagram_arrives(a, on_a, on_b, address, 1430)


def test_a_node_of_both_families_reaches_nodes_of_either_and_those_report_each_other(site: Site) -> None:
    a, on_a = populate(site, "a", Place(1, 1))
    b, on_b = populate(site, "b", Place(2, 1, families=(4,)))
    c, on_c = populate(site, "c", Place(3, 1, families=(6,)))
    assert reaches(a, on_a, on_b, PORT) == reaches(b, on_b, on_a, PORT) == BOTH
    assert reaches(a, on_a, on_c, PORT) == reaches(c, on_c, on_a, PORT) == BOTH
    assert reaches(b, on_b, on_c, PORT, seconds=0.3) == NEITHER
    assert f"{site.name('c')}: pod network 10.244.3.0/24 is not reached: the node and this one" in site.log("b")
    # By IPv6 the tunnel takes more, and the pods know only of IPv4's share; they learn.
    assert mtu_of(on_a) == 1450
    for address in on_c.addresses:
        assert transferred(a, on_a, on_c, address, MEGABYTES) == MEGABYTES


def test_a_node_that_moves_goes_and_comes_back_is_followed(site: Site) -> None:
    a, on_a, b, on_b = pair(site)
    site.readdress("b", Place(3, 7))
    site.settle()
    site.until(lambda: reaches(a, on_a, on_b, PORT, seconds=0.3) == BOTH, "the new address is followed")
    assert reaches(b, on_b, on_a, PORT) == BOTH
    assert "dst 10.8.3.7 " in site.inside("a", "bridge", "fdb", "show", "dev", LINK)
    assert "local 10.8.3.7 " in site.shown("b", "-d", "link", "show", LINK)
    gone = site.places.pop("b")
    site.publish()
    site.settle()
    assert (routes(site, "a"), LINK in site.shown("a", "link")) == ({}, False)
    gone.pods = 9
    site.places["b"] = gone
    site.publish()
    site.settle()
    assert routes(site, "a") == {"10.244.9.0/24": f"10.244.9.0 {LINK}", "fd44:9::/64": f"fd44:9:: {LINK}"}
    site.readdress("b", Place(1, 7))
    site.settle()
    site.until(lambda: routes(site, "a") == {"10.244.9.0/24": "10.8.1.7 eth0", "fd44:9::/64": "fd08:1::7 eth0"},
               "the node is on the segment now")  # fmt: skip


@pytest.mark.parametrize(
    "damage",
    [
        "ip route del 10.244.2.0/24",
        "ip -6 route del fd44:2::/64",
        "ip neigh del 10.244.2.0 dev {link}",
        "ip neigh replace fd44:2:: lladdr 02:00:00:00:00:01 dev {link} nud permanent",
        "bridge fdb del {mac} dev {link}",
        "bridge fdb append {mac} dev {link} dst 10.8.2.9",
        "bridge fdb append 02:00:00:00:00:01 dev {link} dst 10.8.2.9",
        "ip addr del 10.244.1.1/32 dev {link}",
        "ip addr add 10.244.7.1/32 dev {link}",
        "ip link set {link} mtu 1400",
        "ip link set {link} address 02:00:00:00:00:01",
        "ip link set {link} down",
        "ip link del {link}",
    ],
)
def test_what_someone_does_to_the_tunnel_is_put_right(standing: Standing, damage: str) -> None:
    site, a, on_a, on_b = standing
    before = state(site, "a")
    site.inside("a", "sh", "-euc", damage.format(link=LINK, mac=tunnel_mac(site.name("b")).hex(":")))
    site.until(lambda: LINK in site.shown("a", "link") and state(site, "a") == before, "all is as it was")
    assert reaches(a, on_a, on_b, PORT) == BOTH


def test_a_direct_route_that_someone_removes_is_put_back(site: Site) -> None:
    populate(site, "a", Place(1, 1))
    populate(site, "b", Place(1, 2))
    before = routes(site, "a")
    site.inside("a", "sh", "-euc", "ip route del 10.244.2.0/24; ip -6 route del fd44:2::/64")
    site.until(lambda: routes(site, "a") == before, "the routes are back")


def test_large_packets_fit_through_the_tunnel_and_are_not_lost(standing: Standing) -> None:
    site, a, on_a, on_b = standing
    assert (mtu_of(on_a), mtu_of(on_b)) == (1450, 1450)
    assert " mtu 1450 " in site.shown("a", "link", "show", LINK)
    for here, there in zip(on_a.addresses, on_b.addresses, strict=True):
        assert transferred(a, on_a, on_b, there, MEGABYTES) == MEGABYTES
        assert transferred(site.labs["b"], on_b, on_a, here, MEGABYTES) == MEGABYTES
        assert datagram_arrives(a, on_a, on_b, there, 1450)
        assert not datagram_arrives(a, on_a, on_b, there, 1451)


@pytest.mark.parametrize("host", [1, 2])
def test_a_pod_from_before_the_tunnel_learns_what_fits(site: Site, host: int) -> None:
    """As pods are that were attached under ``routing: direct``: their links are as large as the uplink."""
    a, on_a = populate(site, "a", Place(1, 1), routing="direct")
    b, on_b = populate(site, "b", Place(host, 2))
    put(site.folder / "a.yaml", "{}")
    a.stop_agent()
    a.start_agent()
    assert (mtu_of(on_a), mtu_of(on_b)) == (1500, 1450)
    for here, there in zip(on_a.addresses, on_b.addresses, strict=True):
        assert transferred(a, on_a, on_b, there, MEGABYTES) == MEGABYTES
        assert transferred(b, on_b, on_a, here, MEGABYTES) == MEGABYTES
    for there in on_b.addresses:
        if host == 2:
            # The first is answered by "too big"; after it the kernel of the pod refuses that size, and 1450 goes.
            assert not datagram_arrives(a, on_a, on_b, there, 1500)
            assert datagram_arrives(a, on_a, on_b, there, 1450)


def test_what_pods_send_out_of_the_cluster_comes_from_their_node_and_to_exempt_networks_from_themselves(
    site: Site,
) -> None:
    outside, exempt, own_port = ("10.8.1.254", "fd08:1::fe"), ("198.51.100.1", "2001:db8::1"), 9995
    a, on_a = populate(site, "a", Place(1, 1), notMasqueraded=["198.51.100.0/24", "2001:db8::/64"])
    for there, here, via in zip(exempt, on_a.addresses, site.places["a"].addresses, strict=True):
        option = "nodad" if ":" in there else ""
        ip(site.router, f"addr add {there} dev lo {option}", f"route add {here} via {via}")
    seen: list[tuple[str, int]] = []
    with Path("/run/netns", site.router).open() as router:
        for address in (*outside, *exempt):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            with a.inside(router.fileno()):
                server = socket.create_server((address, PORT), family=family)
            with a.inside(on_a.descriptor):
                client = socket.socket(family, socket.SOCK_STREAM)
            with server, client:
                client.settimeout(SECONDS)
                server.settimeout(SECONDS)
                client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                client.bind(("", own_port))
                client.connect((address, PORT))
                accepted, peer = server.accept()
                accepted.close()
                seen.append(peer[:2])
    nodes, pods = seen[:2], seen[2:]
    assert [address for address, _ in nodes] == site.places["a"].addresses
    # The node's ports are the kernel's choice, so that two pods that begin at once do not get the same.
    assert {port for _, port in nodes} != {own_port}
    assert pods == [(address, own_port) for address in on_a.addresses]


def test_policy_holds_through_the_tunnel(site: Site) -> None:
    a, on_a, _, on_b = pair(site)
    stranger = site.add_pod("a", "stranger")
    peer = {"podSelector": {"matchLabels": {"app": "pod-a"}}}
    policy = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
              "metadata": {"name": "only", "namespace": "x"},
              "spec": {"podSelector": {"matchLabels": {"app": "pod-b"}}, "ingress": [{"from": [peer]}]}}  # fmt: skip
    put(site.manifests / "policy.json", json.dumps(policy))
    site.settle()
    assert reaches(a, on_a, on_b, PORT) == BOTH
    assert reaches(a, stranger, on_b, PORT, seconds=0.3) == NEITHER
    policy["spec"] = {"podSelector": {"matchLabels": {"app": "pod-a"}}, "policyTypes": ["Egress"]}
    put(site.manifests / "policy.json", json.dumps(policy))
    site.settle()
    assert reaches(a, on_a, on_b, PORT, seconds=0.3) == NEITHER
    assert reaches(a, stranger, on_b, PORT) == BOTH


def vxlan(site: Site, target: str, source: str, destination: str) -> bytes:
    """A VXLAN packet for the node ``target`` with a UDP datagram for port 9998 in it."""

    def summed(words: bytes) -> bytes:
        total = sum(int.from_bytes(words[i : i + 2], "big") for i in range(0, len(words), 2))
        total = (total & 0xFFFF) + (total >> 16)
        return (~(total + (total >> 16)) & 0xFFFF).to_bytes(2, "big")

    head = bytes.fromhex("4500001d0000000040110000") + socket.inet_aton(source) + socket.inet_aton(destination)
    datagram = head[:10] + summed(head) + head[12:] + bytes.fromhex("1000270e00090000") + b"!"
    frame = tunnel_mac(site.name(target)) + bytes.fromhex("0200000000990800") + datagram
    return bytes.fromhex("08000000") + (84).to_bytes(3, "big") + b"\0" + frame


def arrives(lab: Lab, sender: int, pod: Pod, node: str, packet: bytes, *, port: int = 4789) -> bool:
    """Whether what is sent to a node's VXLAN port, or another, from a namespace is a datagram that comes to a pod."""
    with lab.inside(pod.descriptor):
        there = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with lab.inside(sender):
        here = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with there, here:
        there.bind((pod.addresses[0], 9998))
        there.settimeout(0.5)
        here.sendto(packet, (node, port))
        try:
            return there.recv(100) == b"!"
        except TimeoutError:
            return False


def test_only_nodes_send_into_the_tunnel(site: Site) -> None:
    a, on_a, b, on_b = pair(site)
    packet = vxlan(site, "b", on_a.addresses[0], on_b.addresses[0])
    node = site.places["b"].addresses[0]
    with Path("/run/netns", site.router).open() as outside:
        assert not arrives(b, outside.fileno(), on_b, node, packet)
        assert "denied/tunnel" in site.inside("b", "nft", "list", "counter", "inet", "drawbridge", "denied/tunnel")
        # It is the sender that matters: what a node sends comes in, unless it says that it is a pod of this one.
        assert arrives(b, a.descriptor, on_b, node, packet)
        other = site.add_pod("b", "other")
        forged = vxlan(site, "b", other.addresses[0], on_b.addresses[0])
        assert not arrives(b, a.descriptor, on_b, node, forged)
        # A pod's own goes out as its node's: it must not get that far.
        assert not arrives(a, on_a.descriptor, on_b, node, packet)
        assert not arrives(b, on_b.descriptor, on_b, node, packet)
        site.readdress("a", Place(1, 9))
        site.settle()
        site.until(lambda: arrives(b, a.descriptor, on_b, node, packet), "the new address is let in")


def test_no_pod_sends_into_the_tunnel_by_an_address_or_a_port_that_leads_there(site: Site) -> None:
    _, on_a, b, on_b = pair(site)
    c, _ = populate(site, "c", Place(3, 1))
    friend = site.add_pod("a", "friend")
    packet = vxlan(site, "b", friend.addresses[0], on_b.addresses[0])
    ip(b.name, "addr add 10.8.2.77/24 dev eth0")
    for lab in (b, c):
        site.inside(
            lab.name.rpartition("-")[2],
            "nft",
            """table ip other {
            chain to { type nat hook prerouting priority dstnat; udp dport 30000 dnat to 10.8.2.1:4789; }
            chain from { type nat hook postrouting priority srcnat; ct status dnat masquerade; }
            }""",
        )
    assert arrives(c, c.descriptor, on_b, "10.8.2.1", packet), "only the way of a node is open"
    assert not arrives(c, c.descriptor, on_b, "10.8.2.77", packet)
    for node, port in (("10.8.2.77", 4789), ("10.8.3.1", 30000), ("10.8.2.1", 30000)):
        assert not arrives(b, on_a.descriptor, on_b, node, packet, port=port), (node, port)
    assert reaches(site.labs["a"], friend, on_b, PORT) == BOTH


def test_another_vxlan_on_the_same_port_is_not_touched(site: Site) -> None:
    a, *_ = pair(site)
    for short, own, peer in (("a", "10.8.1.1", "10.8.2.1"), ("b", "10.8.2.1", "10.8.1.1")):
        ip(site.name(short), f"link add other type vxlan id 4096 dstport 4789 local {own} remote {peer}",
           f"addr add 192.168.77.{own[5]}/24 dev other", "link set other up")  # fmt: skip
    site.places.pop("b")
    site.publish()
    site.settle()
    assert a.connects(Pod("", "", a.descriptor), "192.168.77.2", PORT, seconds=0.3) is False
    # Refused by the other node's kernel, and not lost: the neighbour is known.
    assert "192.168.77.2 dev other lladdr" in site.shown("a", "neigh")


def test_a_node_whose_own_object_is_gone_keeps_its_tunnel(site: Site) -> None:
    pair(site)
    before = state(site, "a")
    site.places.pop("a")
    site.publish()
    site.settle()
    assert (state(site, "a"), routes(site, "b")) == (before, {})


@pytest.mark.parametrize(
    ("commands", "reported"),
    [
        ([f"link add {LINK} type bridge"], f"link {LINK} is not ours"),
        ([f"link add {LINK} type vxlan id 84 dstport 4789 local 10.8.1.1"], f"link {LINK} is not ours"),
        (
            ["link add other type vxlan id 84 dstport 4789 local 10.8.1.1"],
            "another VXLAN link has the same vxlanId and vxlanPort",
        ),
        (["link add other type vxlan dstport 4789 external", "link set other up"], "choose another vxlanPort"),
    ],
)
def test_a_link_that_is_anothers_is_left_and_reported_until_it_is_gone(
    site: Site, commands: list[str], reported: str
) -> None:
    a, on_a, _, on_b = pair(site)
    a.stop_agent()
    ip(a.name, f"link del {LINK}", *commands)
    name = commands[0].split()[2]
    before = site.shown("a", "-d", "link", "show", name)
    a.start_agent()
    assert reported in site.log("a")
    assert site.shown("a", "-d", "link", "show", name) == before
    ip(a.name, f"link del {name}")
    site.until(lambda: "10.244.2.0/24" in routes(site, "a"), "the tunnel is there")
    assert reaches(a, on_a, on_b, PORT) == BOTH


def test_a_changed_port_makes_the_link_anew(site: Site) -> None:
    a, on_a, b, on_b = pair(site)
    for short, lab in (("a", a), ("b", b)):
        put(site.folder / f"{short}.yaml", "vxlanPort: 4790\nvxlanId: 85\n")
        lab.stop_agent()
        lab.start_agent()
    assert "vxlan id 85 local 10.8.1.1 srcport 0 0 dstport 4790" in site.shown("a", "-d", "link", "show", LINK)
    assert reaches(a, on_a, on_b, PORT) == BOTH


def test_a_restart_leaves_the_tunnel_as_it_is_and_removes_what_is_stale(site: Site) -> None:
    a, on_a, _, on_b = pair(site)
    before, index = state(site, "a"), json.loads(site.shown("a", "-j", "link", "show", LINK))[0]["ifindex"]
    a.stop_agent(kill=True)
    site.inside("a", "bridge", "fdb", "append", "02:00:00:00:00:01", "dev", LINK, "dst", "10.8.2.9")
    site.inside("a", "ip", "neigh", "replace", "10.244.9.0", "lladdr", "02:00:00:00:00:01", "dev", LINK)
    site.inside("a", "ip", "route", "add", "10.244.9.0/24", "via", "10.244.9.0", "dev", LINK, "onlink", "proto", "84")
    nodes = (site.manifests / "nodes.json").rename(site.folder / "off.json")
    a.start_agent()
    assert "10.244.9.0/24" in routes(site, "a"), "nodes are not known, so everything stands"
    nodes.rename(site.manifests / "nodes.json")
    a.status()
    assert state(site, "a") == before
    assert json.loads(site.shown("a", "-j", "link", "show", LINK))[0]["ifindex"] == index
    assert reaches(a, on_a, on_b, PORT) == BOTH


def node_object(name: str, cidr: str, *addresses: str, created: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "creationTimestamp": created},
            "spec": {"podCIDRs": [cidr]},
            "status": {"addresses": [{"type": "InternalIP", "address": a} for a in addresses]}}  # fmt: skip


def unreachable(site: Site, short: str) -> set[str]:
    """The networks that a node sends nothing to."""
    shown = [site.shown(short, *family, "-j", "route", "show", "proto", "84") for family in ([], ["-6"])]
    return {route["dst"] for one in shown for route in json.loads(one) if route.get("type") == "unreachable"}


def seen_outside(site: Site, lab: NodeLab, pod: Pod) -> str:
    """The address by which a host outside of the cluster sees a pod connect."""
    with Path("/run/netns", site.router).open() as outside, lab.inside(outside.fileno()):
        server = socket.create_server(("10.8.2.254", 0))
    with server:
        server.settimeout(10)
        assert lab.connects(pod, "10.8.2.254", server.getsockname()[1], seconds=10)
        accepted, peer = server.accept()
        accepted.close()
        return str(peer[0])


def test_pods_stay_masqueraded_whatever_networks_a_node_claims_and_without_their_own_nodes_object(site: Site) -> None:
    a, on_a, _, on_b = pair(site)
    ip(site.router, "route add 10.244.1.0/24 via 10.8.1.1")
    site.publish(bad=node_object("bad", "10.8.0.0/16", "10.8.9.9"), other=node_object("c", "10.8.2.0/24", "10.8.9.8"))
    site.settle()
    assert seen_outside(site, a, on_a) == "10.8.1.1"
    site.places.pop("a")
    site.publish()
    site.settle()
    assert seen_outside(site, a, on_a) == "10.8.1.1"
    assert a.connects(on_a, on_b.addresses[0], PORT, seconds=0.3) is False, "the other node knows this one no more"


def test_an_older_node_that_says_it_has_a_pods_address_takes_no_network(site: Site) -> None:
    a, on_a, _, on_b = pair(site)
    for place in site.places.values():
        place.created = "2026-01-01T00:00:00Z"
    site.publish(old=node_object("old", "10.244.99.0/24", "10.244.2.200", "10.8.9.9", created="2020-01-01T00:00:00Z"))
    site.settle()
    assert routes(site, "a")["10.244.2.0/24"] == f"10.244.2.0 {LINK}"
    assert reaches(a, on_a, on_b, PORT) == BOTH
    assert "old: address 10.244.2.200 lies in a pod network of" in site.log("a")


def test_pod_networks_without_a_way_are_unreachable_until_there_is_one(site: Site) -> None:
    a, on_a, _, on_b = pair(site)
    theirs = {"10.244.2.0/24", "fd44:2::/64"}
    assert not unreachable(site, "a") & theirs
    lost = site.places["b"]
    site.places["b"] = Place(2, 1, families=(), pods=lost.pods)
    site.publish()
    site.settle()
    assert (unreachable(site, "a") >= theirs, routes(site, "a")) == (True, {})
    site.inside("a", "ip", "route", "del", "unreachable", "10.244.2.0/24", "proto", "84")
    site.until(lambda: unreachable(site, "a") >= theirs, "it is put back")
    site.inside("a", "ip", "route", "replace", "10.244.2.0/24", "via", "10.8.1.254")
    site.places["b"] = lost
    site.publish()
    site.settle()
    assert "10.244.2.0/24 via 10.8.1.254 dev eth0" in site.shown("a", "route"), "another's stays"
    site.inside("a", "ip", "route", "del", "10.244.2.0/24")
    site.until(lambda: set(routes(site, "a")) == theirs, "there is a way again")
    assert reaches(a, on_a, on_b, PORT) == BOTH
    site.places["b"] = Place(2, 1, families=(), pods=lost.pods)
    site.publish()
    site.settle()
    site.places.pop("b")
    site.publish()
    site.settle()
    assert not unreachable(site, "a") & theirs
    assert unreachable(site, "a") == {"10.244.1.0/24", "fd44:1::/64"}


def test_a_younger_node_takes_nothing_from_those_that_are_there(site: Site) -> None:
    a, on_a, _, on_b = pair(site)
    before = state(site, "a")

    claims = [("10.244.2.0/24", "10.8.9.1"), ("10.244.2.128/25", "10.8.9.1"), ("0.0.0.0/0", "10.8.9.1"),
              ("10.244.0.0/16", "10.8.9.1"), ("10.8.2.0/25", "10.8.9.1"), ("10.8.1.128/25", "10.8.9.1"),
              ("10.77.0.0/24", "224.0.0.1"), ("10.78.0.0/24", "10.244.2.9"), ("10.79.0.0/24", "10.8.1.1"),
              ("224.0.0.0/24", "10.8.9.1")]  # fmt: skip
    site.publish(**{str(n): node_object(f"a{n}", *claim) for n, claim in enumerate(claims)})
    site.settle()
    assert state(site, "a") == before
    assert reaches(a, on_a, on_b, PORT) == BOTH
    assert f"a0: pod network 10.244.2.0/24 overlaps one of {site.name('b')}" in site.log("a")


def test_a_network_that_holds_a_gateway_is_refused_whenever_it_becomes_one(site: Site) -> None:
    site.add("a", Place(1, 1))
    site.publish(
        one=node_object("one", "10.8.1.128/26", "10.8.9.1"), two=node_object("two", "10.8.1.64/26", "10.8.9.2")
    )
    site.settle()
    assert {"10.8.1.128/26", "10.8.1.64/26"} <= set(routes(site, "a"))
    hops = [word for host in (130, 70) for word in ("nexthop", "via", f"10.8.1.{host}", "dev", "eth0")]
    site.inside("a", "ip", "route", "replace", "default", "via", "10.8.1.130")
    site.until(lambda: "10.8.1.128/26" not in routes(site, "a"), "a route does not lead past the gateway")
    assert "10.8.1.64/26" in routes(site, "a")
    site.inside("a", "ip", "route", "replace", "default", *hops)
    site.until(lambda: "10.8.1.64/26" not in routes(site, "a"), "nor past one of several")
    assert "one: pod network 10.8.1.128/26 holds an address of this node, of this machine or of a gateway" in site.log(
        "a"
    )
    site.inside("a", "ip", "route", "del", "default")
    site.until(lambda: {"10.8.1.128/26", "10.8.1.64/26"} <= set(routes(site, "a")), "they are routed again")


def test_uninstall_removes_the_tunnel(site: Site) -> None:
    a, *_ = pair(site)
    a.stop_agent()
    removed = site.inside("a", sys.executable, "-m", "enforcer", "uninstall")
    assert f"removed link {LINK}" in removed
    assert LINK not in site.shown("a", "link")
    assert routes(site, "a") == {}


def test_another_node_gets_the_network_that_this_one_had_before_a_restart(site: Site) -> None:
    a = site.add("a", Place(1, 1, pods=1))
    site.settle()
    a.stop_agent()
    site.places["a"].pods = 5
    site.publish()
    a.start_agent()
    _, on_b = populate(site, "b", Place(2, 1, pods=1))
    on_a = site.add_pod("a", "pod-a")
    site.settle()
    assert reaches(a, on_a, on_b, PORT) == BOTH
    assert "10.244.1.1" not in site.shown("a", "addr", "show", "drawbridge0")


def test_no_pod_is_attached_from_a_pod_network_that_cannot_be_used(site: Site) -> None:
    a = site.add("a", Place(1, 1))
    place = site.places.pop("a")
    site.publish(own=node_object(a.name, "0.0.0.0/0", "10.8.1.1"))
    site.settle()
    assert "0.0.0.0/0 cannot be used" in a.status()["unready"]
    site.places["a"] = place
