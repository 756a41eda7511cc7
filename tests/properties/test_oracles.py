"""The two oracles: ``translate`` from scratch for the incremental path, ``verdict`` for the compiled ruleset."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.control.explain import connection_fields
from enforcer.model.addresses import parse_address
from enforcer.model.objects import NetworkPolicy
from enforcer.policy.endpoints import Endpoint
from enforcer.policy.resolve import Cluster, resolve
from enforcer.policy.verdict import Connection
from enforcer.ruleset.evaluate import RulesetView, evaluate
from enforcer.ruleset.listing import listing
from enforcer.translate.base import BaseSettings
from enforcer.translate.translator import translate
from tests.support.model import PROTOCOLS, Event, Kernel, Model, Tracked
from tests.support.strategies import ADDRESSES, NAMESPACES, endpoints, labels, policies

pytestmark = pytest.mark.usefixtures("group_chains")

FLOWS = [(1, None), *itertools.product((6, 17, 132), (53, 80, 81, 82, 83))]
CONNECTIONS = [
    Connection(source, destination, protocol, port)
    for source, destination in itertools.product(ADDRESSES, repeat=2)
    if len(source) == len(destination)
    for protocol, port in FLOWS
]
NODE = {4: parse_address("10.0.0.9"), 16: parse_address("fd00::9")}
"""The node's own addresses, by their length; in reach of some ipBlocks."""
TO_NODE = [Connection(source, NODE[len(source)], *flow) for source, flow in itertools.product(ADDRESSES, FLOWS)]
# Enough to meet each kind of peer and port; the states between two steps are many.
SOME_CONNECTIONS = [p for p in CONNECTIONS if (p.protocol, p.port) in {(6, 80), (6, 81)}]

events = st.one_of(
    endpoints().map(lambda e: ("endpoint", e.key, e)),
    endpoints().map(lambda e: ("endpoint", e.key, None)),
    policies.map(lambda p: ("policy", p.key, p)),
    policies.map(lambda p: ("policy", p.key, None)),
    st.tuples(st.just("namespace"), st.sampled_from(NAMESPACES), st.none() | labels),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(events, max_size=4), max_size=8))
def test_any_sequence_of_events_ends_in_the_ruleset_that_is_made_from_scratch(batches: list[list[Event]]) -> None:
    model = Model()
    kernel = Kernel(model)
    for batch in batches:
        model.put(*batch)
        for step in model.steps():
            kernel.apply(step)
        scratch = listing(translate(resolve(model.index.cluster)))
        assert listing(model.ruleset) == scratch
        # The kernel's own epoch is another than the one that is shown without a kernel.
        assert _without_epoch(listing(kernel.held)) == _without_epoch(scratch)


def _without_epoch(text: str) -> list[str]:
    return [line for line in text.splitlines() if "ct mark set ct mark" not in line and "{ 0x" not in line]


@settings(max_examples=100, deadline=None)
@given(st.lists(events, max_size=12))
def test_an_event_that_is_repeated_changes_nothing(sequence: list[Event]) -> None:
    model = Model()
    for event in sequence:
        model.put(event)
        model.ruleset.take()
        model.put(event)
        assert not model.ruleset.take()


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=12))
def test_when_everything_is_gone_nothing_is_left(sequence: list[Event]) -> None:
    model = Model()
    model.put(*sequence)
    model.put(*((kind, key, None) for kind, key, _ in sequence))
    assert listing(model.ruleset) == listing(translate(resolve(Cluster())))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(endpoints(), min_size=3, max_size=5),
    st.lists(policies, min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(NAMESPACES), labels),
)
def test_packets_of_both_directions_pass_as_the_api_reads_the_connection(
    pods: list[Endpoint], found: list[NetworkPolicy], namespaces: dict[str, dict[str, str]]
) -> None:
    model = Model()
    model.put(
        *(("namespace", name, of_namespace) for name, of_namespace in namespaces.items()),
        *(("endpoint", pod.key, pod) for pod in pods),
        *(("policy", policy.key, policy) for policy in found),
    )
    view = RulesetView(model.ruleset)
    for connection in CONNECTIONS:
        allowed = model.allows(connection)
        for reply, error in itertools.product((False, True), repeat=2):
            assert Tracked(connection).passes(view, reply=reply, error=error) is allowed, connection


@pytest.mark.parametrize("pod_to_own_node", [False, True], ids=["by policy", "let pass"])
@settings(max_examples=60, deadline=None)
@given(st.lists(endpoints(), min_size=2, max_size=4), st.lists(policies, min_size=1, max_size=4))
def test_what_pods_send_to_their_node_passes_as_their_egress_policy_says(
    pod_to_own_node: bool, pods: list[Endpoint], found: list[NetworkPolicy]
) -> None:
    model = Model(settings=BaseSettings(pod_to_own_node=pod_to_own_node))
    model.put(*(("endpoint", pod.key, pod) for pod in pods), *(("policy", policy.key, policy) for policy in found))
    view = RulesetView(model.ruleset)
    for connection in TO_NODE:
        allowed = pod_to_own_node or model.allows(connection)
        tracked = connection_fields(connection, PROTOCOLS[connection.protocol])
        # Node-local DNS: no connection is known, so only the headers tell.
        of_header = {field: value for field, value in tracked.items() if not field.startswith("ct ")}
        for fields in (tracked, of_header | {"ct state": "untracked"}):
            assert evaluate(view, "to-node", fields).accepted is allowed, (connection, fields["ct state"])


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(events, min_size=1, max_size=3), min_size=1, max_size=6))
def test_connections_that_go_on_obey_the_policy_of_each_instant(batches: list[list[Event]]) -> None:
    """Stamps of earlier verdicts pass nothing that the present policy denies, and cost nothing that it allows."""
    model = Model()
    kernel = Kernel(model)
    tracked = [Tracked(connection) for connection in SOME_CONNECTIONS]
    for number, batch in enumerate(batches):
        model.put(*batch)
        for step in model.steps():
            kernel.apply(step)
        if number % 3:
            kernel.begin_epoch()
        view = kernel.view()
        for entry in tracked:
            allowed = model.allows(entry.connection)
            assert entry.passes(view, reply=bool(number % 2)) is allowed, entry.connection
