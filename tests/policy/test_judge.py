"""Established flows are judged as new ones are, and none is forgotten whose verdict may have changed."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.policy.index import PolicyIndex
from enforcer.policy.judge import allows
from enforcer.policy.verdict import Packet, verdict
from enforcer.ruleset.ruleset import Ruleset
from enforcer.translate.translator import Translator
from tests.policy.strategies import ADDRESSES
from tests.policy.test_oracles import FLOWS, events, put

PACKETS = [
    Packet(source, destination, protocol, port)
    for source, destination in itertools.product(ADDRESSES, repeat=2)
    if len(source) == len(destination)
    for protocol, port in FLOWS
]


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=20))
def test_a_flow_is_judged_as_the_verdict_says_where_a_pod_of_this_node_decides(sequence) -> None:
    index = PolicyIndex(Translator(Ruleset()))
    for event in sequence:
        put(index, event)
    endpoints = index.cluster.endpoints
    for packet in PACKETS:
        here = [d for d in verdict(index.cluster, packet) if any(endpoints[key].local for key in d.endpoints)]
        assert allows(index, packet) is all(decision.allowed for decision in here), packet


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(events, min_size=1, max_size=3), max_size=8))
def test_each_flow_whose_verdict_changes_has_an_end_among_the_affected(batches) -> None:
    index = PolicyIndex(Translator(Ruleset()))
    before = [True] * len(PACKETS)
    for batch in batches:
        for event in batch:
            put(index, event)
        affected = index.take_affected()
        now = [allows(index, packet) for packet in PACKETS]
        for packet, was, is_now in zip(PACKETS, before, now, strict=True):
            assert was is is_now or {packet.source, packet.destination} & affected, packet
        before = now
