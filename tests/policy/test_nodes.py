"""The sets of nodes and pod networks: kept by differences, they are what a new translator makes of the same nodes."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from enforcer.model.addresses import Network, parse_address
from enforcer.model.objects import Node
from enforcer.model.tunnel import Vxlan
from enforcer.ruleset.ruleset import Ruleset
from enforcer.translate.rules import BaseSettings
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
    """The elements of each set after these states."""
    ruleset = Ruleset()
    translator = Translator(ruleset, SETTINGS)
    for nodes in states:
        translator.nodes_changed(nodes)
    return {of.name: ruleset.elements(of) for of in ruleset.sets}


@given(st.lists(_nodes, min_size=1, max_size=5))
def test_sets_of_nodes_do_not_depend_on_what_was_before(states: list[list[Node]]) -> None:
    assert rendered(*states) == rendered(states[-1])
