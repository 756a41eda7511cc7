"""What is wanted of Node objects, without a kernel: both ends agree, and the younger changes nothing for the older."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cni.node import topology
from cni.node.topology import KernelState, Plan, Routing, tunnel_mac
from enforcer.model.addresses import Address, Family, Network, family_of, parse_address
from enforcer.model.objects import Node
from enforcer.nodes.ownership import Machine, resolve_ownership

ROUTINGS: tuple[Routing, ...] = ("auto", "direct", "vxlan")


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What the kernel says: of the ways to other nodes, and of this machine."""

    links: Mapping[Address, int] = dataclasses.field(default_factory=dict)
    networks: frozenset[Network] = frozenset()
    addresses: frozenset[Address] = frozenset()
    gateways: frozenset[Address] = frozenset()

    @property
    def machine(self) -> Machine:
        return Machine(self.addresses, self.gateways)


def plan(nodes: Mapping[str, Node], *, own: str, routing: Routing, around: Surroundings) -> Plan:
    """The plan for what nodes own."""
    ownership = resolve_ownership(nodes, own=own, machine=around.machine)
    return topology.plan(ownership, own=own, routing=routing, kernel=KernelState(around.links, around.networks))


def node(name: str, cidrs: str = "", addresses: str = "", created: str = "") -> Node:
    return Node(name, tuple(map(Network.parse, cidrs.split())), tuple(map(parse_address, addresses.split())), created)


def planned(*nodes: Node, routing: Routing = "auto", around: Surroundings | None = None) -> Plan:
    """The plan of the first."""
    return plan({n.name: n for n in nodes}, own=nodes[0].name, routing=routing, around=around or Surroundings())


def networks(wanted: Plan) -> set[str]:
    return {str(n) for n in wanted.direct} | {str(n) for tunnel in wanted.tunnels.values() for n in tunnel.peers}


A = node("a", "10.1.0.0/24 fd01::/64", "192.0.2.1 2001:db8::1")
B = node("b", "10.2.0.0/24 fd02::/64", "192.0.2.2 2001:db8::2", "2024-01-01T00:00:00Z")
ON_SEGMENT = Surroundings(links=dict.fromkeys(B.addresses, 7))


def test_the_way_is_direct_on_a_segment_unless_it_is_to_be_the_tunnel() -> None:
    assert set(planned(A, B, around=ON_SEGMENT).direct.values()) == {(address, 7) for address in B.addresses}
    assert not planned(A, B, around=ON_SEGMENT, routing="vxlan").direct
    assert not planned(A, B, routing="direct").tunnels
    assert len(planned(A, B, routing="direct").refused) == 2


@pytest.mark.parametrize(
    ("mine", "theirs", "family"),
    [
        ("192.0.2.1 2001:db8::1", "2001:db8::2 192.0.2.2", Family.V4),
        ("192.0.2.1 2001:db8::1", "2001:db8::2", Family.V6),
        ("2001:db8::1", "192.0.2.2 2001:db8::2", Family.V6),
        ("192.0.2.1", "2001:db8::2", None),
        ("", "192.0.2.2", None),
    ],
)
def test_the_tunnel_is_of_ipv4_where_both_have_it_else_of_ipv6(mine: str, theirs: str, family: Family | None) -> None:
    wanted = planned(node("a", "10.1.0.0/24", mine), node("b", "10.2.0.0/24", theirs))
    assert set(wanted.tunnels) == ({family} if family else set())
    assert bool(wanted.refused) is (family is None)
    for tunnel in wanted.tunnels.values():
        assert {family_of(peer.address) for peer in tunnel.peers.values()} == {family_of(tunnel.local)} == {family}
        assert {peer.mac for peer in tunnel.peers.values()} == {tunnel_mac("b")}


def test_hardware_addresses_are_local_unicast_and_of_the_name_alone() -> None:
    for n in range(200):
        assert tunnel_mac(f"node-{n}")[0] & 0b11 == 0b10
    assert tunnel_mac("node-1").hex(":") == "9a:ce:ef:11:e6:5e"


def test_of_two_nodes_with_one_hardware_address_the_older_is_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "tunnel_mac", lambda name: b"same!!" if name != "a" else b"other!")
    c = node("aaa", "10.3.0.0/24", "192.0.2.3", "2025-01-01T00:00:00Z")
    wanted = planned(A, B, c)
    assert networks(wanted) == {"10.2.0.0/24", "fd02::/64"}
    assert "rename the node" in "".join(wanted.refused)


@pytest.mark.parametrize(
    ("cidr", "address", "word"),
    [
        ("10.1.0.128/25", "192.0.2.9", "overlaps one of a"),
        ("10.2.0.0/16", "192.0.2.9", "overlaps one of b"),
        ("10.0.0.0/8", "192.0.2.9", "overlaps one of"),
        ("10.2.0.9/32", "192.0.2.9", "overlaps one of b"),
        ("0.0.0.0/0", "192.0.2.9", "no network of hosts"),
        ("::/0", "192.0.2.9", "no network of hosts"),
        ("224.0.0.0/24", "192.0.2.9", "no network of hosts"),
        ("127.0.0.0/24", "192.0.2.9", "no network of hosts"),
        ("fe80::/64", "192.0.2.9", "no network of hosts"),
        ("192.0.2.0/24", "198.51.100.1", "holds an address"),
        ("192.0.2.2/32", "198.51.100.1", "holds an address"),
        ("198.51.100.0/24", "198.51.100.1", "holds an address"),
        ("203.0.113.0/25", "198.51.100.1", "holds an address"),
        ("10.77.0.0/24", "198.51.100.1", "another's route"),
        ("10.3.0.0/24", "224.0.0.9", "no unicast address"),
        ("10.3.0.0/24", "255.255.255.255", "no unicast address"),
        ("10.3.0.0/24", "127.0.0.1", "no unicast address"),
        ("10.3.0.0/24", "192.0.2.1", "this node's own"),
        ("10.3.0.0/24", "203.0.113.200", "this node's own"),
        ("10.3.0.0/24", "10.2.0.7", "lies in a pod network of b"),
        ("10.3.0.0/24", "10.1.0.7", "lies in a pod network of a"),
    ],
)
def test_a_node_that_claims_what_is_not_its_own_gets_nothing_and_is_named(cidr: str, address: str, word: str) -> None:
    around = Surroundings(
        networks=frozenset({Network.parse("10.77.0.0/24")}),
        addresses=frozenset({parse_address("203.0.113.200")}),
        gateways=frozenset({parse_address("203.0.113.1")}),
    )
    honest = planned(A, B, around=around)
    wanted = planned(A, node("0", cidr, address, "2025-01-01T00:00:00Z"), B, around=around)
    assert (wanted.direct, wanted.tunnels) == (honest.direct, honest.tunnels)
    assert any(reason.startswith("0: ") and word in reason for reason in wanted.refused)


def test_a_node_may_be_a_gateway() -> None:
    gateways = Surroundings(gateways=frozenset(B.addresses))
    assert networks(planned(A, B, around=gateways)) == {"10.2.0.0/24", "fd02::/64"}


# Few values, so that they meet.
_addresses = st.sampled_from(
    ["192.0.2.1", "192.0.2.2", "10.1.0.9", "10.2.0.9", "2001:db8::1", "2001:db8::2", "fd01::9"]
)
_cidrs = st.sampled_from(
    ["10.1.0.0/24", "10.2.0.0/24", "10.2.0.0/25", "10.0.0.0/8", "192.0.2.0/24", "fd01::/64", "fd02::/64", "0.0.0.0/0"]
)


@st.composite
def clusters(draw: st.DrawFn) -> Mapping[str, Node]:
    names = draw(st.permutations(["a", "b", "c", "d"]))
    return {
        name: node(
            name,
            " ".join(draw(st.lists(_cidrs, max_size=2, unique=True))),
            " ".join(draw(st.lists(_addresses, max_size=3, unique=True))),
            f"2024-01-0{draw(st.integers(1, 3))}T00:00:00Z",
        )
        for name in names
    }


_around = st.builds(
    Surroundings,
    links=st.dictionaries(_addresses.map(parse_address), st.integers(1, 2), max_size=3),
    networks=st.frozensets(_cidrs.map(Network.parse), max_size=1),
)


@given(clusters(), _around, st.sampled_from(ROUTINGS))
def test_no_route_leads_into_another_and_none_to_this_nodes_pods(
    nodes: Mapping[str, Node], around: Surroundings, routing: Routing
) -> None:
    wanted = plan(nodes, own="a", routing=routing, around=around)
    routed = list(map(Network.parse, networks(wanted)))
    kept = [*routed, *(network for network in nodes["a"].pod_cidrs if network.length)]
    assert not [(one, other) for one in routed for other in kept if one is not other and one.covers(other)]
    assert not [(one, other) for one in kept for other in routed if one is not other and one.covers(other)]
    assert not set(routed) & around.networks


@given(clusters(), _around, st.sampled_from(ROUTINGS))
def test_the_plan_does_not_depend_on_the_order_in_which_nodes_come(
    nodes: Mapping[str, Node], around: Surroundings, routing: Routing
) -> None:
    backwards = dict(reversed(list(nodes.items())))
    assert plan(nodes, own="a", routing=routing, around=around) == plan(
        backwards, own="a", routing=routing, around=around
    )


@given(clusters(), _around, st.sampled_from(ROUTINGS))
def test_a_younger_node_changes_nothing_for_the_others(
    nodes: Mapping[str, Node], around: Surroundings, routing: Routing
) -> None:
    older = {
        name: dataclasses.replace(n, addresses=tuple({family_of(a): a for a in n.addresses}.values()))
        for name, n in nodes.items()
        if name != "d"
    }
    younger = {**older, "d": dataclasses.replace(nodes["d"], created="2025-01-01T00:00:00Z")}
    before = plan(older, own="a", routing=routing, around=around)
    after = plan(younger, own="a", routing=routing, around=around)
    assert before.direct.items() <= after.direct.items()
    assert before.refused <= after.refused
    assert before.unreachable <= after.unreachable
    for family, tunnel in before.tunnels.items():
        assert tunnel.peers.items() <= after.tunnels[family].peers.items()


@given(clusters(), _around, st.sampled_from(["auto", "vxlan"]), _addresses)
def test_a_further_address_of_an_older_node_takes_no_network(
    nodes: Mapping[str, Node], around: Surroundings, routing: Routing, further: str
) -> None:
    own_ones = tuple(map(parse_address, ("198.51.100.1", "2001:db8:1::1")))
    honest = {**nodes, "b": dataclasses.replace(nodes["b"], addresses=own_ones, created="2023-01-01T00:00:00Z")}
    greedy = dataclasses.replace(honest["b"], addresses=(parse_address(further), *own_ones))
    before = plan(honest, own="a", routing=routing, around=around)
    after = plan({**honest, "b": greedy}, own="a", routing=routing, around=around)
    assert networks(before) | set(map(str, before.unreachable)) == networks(after) | set(map(str, after.unreachable))


@given(clusters(), _around, st.sampled_from(ROUTINGS))
def test_a_network_that_is_believed_has_a_way_or_is_unreachable_or_is_anothers_to_route(
    nodes: Mapping[str, Node], around: Surroundings, routing: Routing
) -> None:
    ownership = resolve_ownership(nodes, own="a", machine=around.machine)
    believed = {network for name, of in ownership.networks.items() if name != "a" for network in of}
    wanted = plan(nodes, own="a", routing=routing, around=around)
    with_way = set(map(Network.parse, networks(wanted)))
    assert not with_way & wanted.unreachable
    # With direct routes only, a router of the network may know the way.
    assert wanted.unreachable == (set() if routing == "direct" else believed - around.networks - with_way)


@given(clusters())
def test_no_believed_address_of_another_node_lies_in_a_pod_network(nodes: Mapping[str, Node]) -> None:
    ownership = resolve_ownership(nodes, own="a")
    addresses = {a for name, of in ownership.addresses.items() if name != "a" for a in of}
    assert not [(a, n) for a in addresses for of in ownership.networks.values() for n in of if a in n]


@given(clusters())
def test_both_ends_take_a_tunnel_of_one_family(nodes: Mapping[str, Node]) -> None:
    """Where each has addresses of its own; a claim for another's is not heard alike by both."""
    separate = {
        name: dataclasses.replace(n, addresses=tuple(a[:-1] + bytes([i]) for a in n.addresses), pod_cidrs=(
            Network.parse(f"10.{100 + i}.0.0/24"),
        ))
        for i, (name, n) in enumerate(nodes.items(), 1)
    }  # fmt: skip
    taken: dict[tuple[str, str], Family] = {}
    for own in separate:
        wanted = plan(separate, own=own, routing="vxlan", around=Surroundings())
        macs = {tunnel_mac(name): name for name in separate}
        for family, tunnel in wanted.tunnels.items():
            assert tunnel.mac == tunnel_mac(own)
            taken |= {(own, macs[peer.mac]): family for peer in tunnel.peers.values()}
    assert all(taken.get((there, here)) is family for (here, there), family in taken.items())
