"""The sets of nodes and pod networks: kept by differences, they are what a new translator makes of the same nodes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer.model.addresses import Network, parse_address
from enforcer.model.objects import Node
from enforcer.model.tunnel import Vxlan
from enforcer.nodes.ownership import resolve_ownership
from enforcer.ruleset.ruleset import Ruleset
from enforcer.translate.base import BaseSettings
from enforcer.translate.translator import Translator

SETTINGS = BaseSettings(masquerade=True, tunnel=Vxlan(84, 4789))
ADDRESSES = tuple(map(parse_address, ("192.0.2.1", "192.0.2.2", "2001:db8::1")))
NETWORKS = tuple(map(Network.parse, ("10.1.0.0/24", "10.2.0.0/24", "fd01::/64", "0.0.0.0/0")))
_nodes = st.lists(
    st.builds(
        Node,
        st.sampled_from(["a", "b", "c"]),
        st.lists(st.sampled_from(NETWORKS), max_size=2).map(tuple),
        st.lists(st.sampled_from(ADDRESSES), max_size=3).map(tuple),
    ),
    max_size=3,
    unique_by=lambda node: node.name,
)


def rendered(*states: list[Node]) -> dict[str, object]:
    """The elements of each set of node ``a`` after these states."""
    ruleset = Ruleset()
    translator = Translator(ruleset, SETTINGS)
    for nodes in states:
        translator.ownership_changed(resolve_ownership({node.name: node for node in nodes}, own="a"))
    return {of.name: ruleset.elements(of) for of in ruleset.sets.values()}


@given(st.lists(_nodes, min_size=1, max_size=5))
def test_sets_of_nodes_do_not_depend_on_what_was_before(states: list[list[Node]]) -> None:
    assert rendered(*states) == rendered(states[-1])


@pytest.mark.parametrize(
    ("cidr", "address"),
    [
        ("0.0.0.0/1", "198.51.100.9"),
        ("128.0.0.0/1", "198.51.100.9"),
        ("192.0.0.0/8", "198.51.100.9"),
        ("192.0.2.2/32", "198.51.100.9"),
        ("10.2.0.0/16", "10.2.0.9"),
        ("10.1.0.9/32", "10.1.0.9"),
        ("::/0", "224.0.0.1"),
    ],
)
def test_a_younger_node_turns_masquerade_off_for_no_network_that_is_not_its_own(cidr: str, address: str) -> None:
    nodes = [Node("a", NETWORKS[:1], ADDRESSES[:1]), Node("b", NETWORKS[1:2], ADDRESSES[1:2])]
    bad = Node("0", (Network.parse(cidr),), (parse_address(address),), "2025-01-01T00:00:00Z")
    expected, got = rendered(nodes), rendered([*nodes, bad])
    for name in ("pod-networks-v4", "pod-networks-v6"):
        assert got[name] == expected[name]
    if not address.startswith("198."):
        assert got["nodes-v4"] == expected["nodes-v4"]
