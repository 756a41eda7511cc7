"""Between and within the transactions of a change, nothing passes that neither the old nor the new policy allows."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.model.addresses import parse_address
from enforcer.model.objects import Direction, NetworkPolicy, PolicyPort, PolicyRule
from enforcer.model.selectors import LabelSelector, Operator, Requirement
from enforcer.policy.endpoints import Endpoint
from enforcer.policy.verdict import Connection
from enforcer.ruleset.evaluate import RulesetView
from enforcer.ruleset.objects import Chain, Table
from enforcer.ruleset.plan import plan
from enforcer.ruleset.ruleset import Ruleset
from tests.policy.model import Kernel, Model, Tracked
from tests.policy.strategies import policies
from tests.policy.test_oracles import SOME_CONNECTIONS, events


def opens_nothing(model: Model, kernel: Kernel) -> None:
    """Commit what has changed; at each step a packet may meet its second base chain one commit after its first."""
    views = [RulesetView(copy.deepcopy(kernel.held))]
    for step in model.steps():
        kernel.apply(step)
        views.append(RulesetView(copy.deepcopy(kernel.held)))
    for connection in SOME_CONNECTIONS:
        first, last = (Tracked(connection).passes(view) for view in (views[0], views[-1]))
        for before, after in meetings(len(views)):
            if Tracked(connection).passes(views[before], views[after]):
                assert first or last, (connection, before, after)


def meetings(states: int) -> list[tuple[int, int]]:
    """In which states a packet may meet its first and its second base chain."""
    return [(first, second) for first in range(states) for second in (first, first + 1) if second < states]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(events, min_size=3, max_size=10),
    st.lists(st.lists(events, min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_no_step_of_a_change_opens_what_neither_policy_allows(start, batches) -> None:
    model = Model()
    kernel = Kernel(model)
    model.put(*start)
    for step in model.steps():
        kernel.apply(step)
    for batch in batches:
        model.put(*batch)
        opens_nothing(model, kernel)


@settings(max_examples=60, deadline=None)
@given(st.lists(events, min_size=3, max_size=10), st.lists(policies, min_size=1, max_size=4))
def test_a_change_of_policies_alone_loses_no_packet_that_the_old_and_the_new_allow(start, changed) -> None:
    model = Model()
    kernel = Kernel(model)
    model.put(*start)
    for step in model.steps():
        kernel.apply(step)
    model.put(*(("policy", policy.key, policy) for policy in changed))
    views = [RulesetView(copy.deepcopy(kernel.held))]
    for step in model.steps():
        kernel.apply(step)
        views.append(RulesetView(copy.deepcopy(kernel.held)))
    for connection in SOME_CONNECTIONS:
        if all(Tracked(connection).passes(view) for view in (views[0], views[-1])):
            for before, after in meetings(len(views)):
                assert Tracked(connection).passes(views[before], views[after]), (connection, before, after)


CLIENT, SERVER = (parse_address(f"10.0.0.{n}") for n in (1, 2))
FLOW = Connection(CLIENT, SERVER, 6, 80)


def policy(direction: Direction, *ports: int) -> NetworkPolicy:
    """One that lets the client out, or into the server, on these ports."""
    name = "out" if direction is Direction.EGRESS else "in"
    selector = LabelSelector.of(Requirement("app", Operator.IN, ("a" if direction is Direction.EGRESS else "b",)))
    rules = (PolicyRule(ports=tuple(PolicyPort(port=port) for port in ports)),) if ports else ()
    return NetworkPolicy("x", name, selector, {direction: rules})


@pytest.mark.parametrize("opens", Direction)
@pytest.mark.parametrize("others", [(), (90,)], ids=["and nothing else", "and other ports the other way round"])
def test_one_direction_opens_as_the_other_closes_and_nothing_passes_in_between(opens, others) -> None:
    model = Model()
    kernel = Kernel(model)
    model.put(
        ("endpoint", "x/a", Endpoint("x/a", "x", (CLIENT,), local=True, labels={"app": "a"})),
        ("endpoint", "x/b", Endpoint("x/b", "x", (SERVER,), local=True, labels={"app": "b"})),
    )
    (closes,) = set(Direction) - {opens}
    for direction, ports in ((opens, others), (closes, (80,))):
        model.put(("policy", policy(direction).key, policy(direction, *ports)))
    for step in model.steps():
        kernel.apply(step)
    for direction, ports in ((opens, (80,)), (closes, others)):
        model.put(("policy", policy(direction).key, policy(direction, *ports)))
    views = [RulesetView(copy.deepcopy(kernel.held))]
    for step in model.steps():
        kernel.apply(step)
        views.append(RulesetView(copy.deepcopy(kernel.held)))
    for before, after in meetings(len(views)):
        assert not Tracked(FLOW).passes(views[before], views[after]), (before, after)


def test_a_chain_is_never_rewritten_in_place() -> None:
    ruleset = Ruleset()
    ruleset.put_chain(Chain(Table.POLICY, "policy/x/a/ingress/0", ("accept",)))
    ruleset.take()
    ruleset.put_chain(Chain(Table.POLICY, "policy/x/a/ingress/0", ("drop",)))
    with pytest.raises(ValueError, match="policy/x/a/ingress/0"):
        plan(ruleset.take(), ruleset)
