"""The two oracles: ``translate`` from scratch for the incremental path, ``verdict`` for the compiled ruleset."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.model.addresses import Family, family_of, format_address
from enforcer.model.objects import Direction
from enforcer.policy.index import PolicyIndex
from enforcer.policy.resolve import Cluster, resolve
from enforcer.policy.verdict import Packet, decide
from enforcer.ruleset.evaluate import RulesetView, evaluate
from enforcer.ruleset.ruleset import Ruleset, Transaction
from enforcer.ruleset.text import listing
from enforcer.translate.translator import Translator, translate
from tests.policy.strategies import ADDRESSES, NAMESPACES, endpoints, labels, policies

FLOWS = [(1, None), *itertools.product((6, 17, 132), (53, 80, 81, 82, 83))]

events = st.one_of(
    endpoints().map(lambda e: ("endpoint", e.key, e)),
    endpoints().map(lambda e: ("endpoint", e.key, None)),
    policies.map(lambda p: ("policy", p.key, p)),
    policies.map(lambda p: ("policy", p.key, None)),
    st.tuples(st.just("namespace"), st.sampled_from(NAMESPACES), st.none() | labels),
)


def put(index: PolicyIndex, event: tuple) -> None:
    kind, key, value = event
    {"endpoint": index.set_endpoint, "policy": index.set_policy, "namespace": index.set_namespace}[kind](key, value)


def mirror(kernel: dict, change: Transaction) -> None:
    """Apply a transaction as the kernel does, refusing what the kernel refuses."""
    for of in change.sets:
        if of.after is not None:
            assert (of.after.table, of.after.name) not in kernel
            kernel[of.after.table, of.after.name] = {}
    for elements in change.elements:
        held = kernel[elements.set.table, elements.set.name]
        for key in elements.removed:
            del held[key]
        for key, element in elements.added:
            assert key not in held
            held[key] = element
    for of in change.sets:
        if of.after is None:
            del kernel[of.before.table, of.before.name]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.lists(events, max_size=4), max_size=8))
def test_any_sequence_of_events_ends_in_the_ruleset_that_is_made_from_scratch(batches) -> None:
    ruleset = Ruleset()
    index = PolicyIndex(Translator(ruleset))
    kernel: dict = {}
    for batch in batches:
        for event in batch:
            put(index, event)
        mirror(kernel, ruleset.take())
        scratch = translate(resolve(index.cluster))
        assert listing(ruleset) == listing(scratch)
        assert kernel == {(s.table, s.name): scratch.elements(s) for s in scratch.sets}


@settings(max_examples=100, deadline=None)
@given(st.lists(events, max_size=12))
def test_an_event_that_is_repeated_changes_nothing(sequence) -> None:
    ruleset = Ruleset()
    index = PolicyIndex(Translator(ruleset))
    for event in sequence:
        put(index, event)
        ruleset.take()
        put(index, event)
        assert not ruleset.take()


@settings(max_examples=60, deadline=None)
@given(st.lists(events, max_size=12))
def test_when_everything_is_gone_nothing_is_left(sequence) -> None:
    ruleset = Ruleset()
    index = PolicyIndex(Translator(ruleset))
    for event in sequence:
        put(index, event)
    for kind, key, _ in sequence:
        put(index, (kind, key, None))
    assert listing(ruleset) == listing(translate(resolve(Cluster())))


def fields(packet: Packet) -> dict[str, str]:
    ip, nfproto = ("ip", "ipv4") if family_of(packet.source) is Family.V4 else ("ip6", "ipv6")
    protocol = {6: "tcp", 17: "udp", 132: "sctp", 1: "icmp"}[packet.protocol]
    found = {
        f"{ip} saddr": format_address(packet.source),
        f"{ip} daddr": format_address(packet.destination),
        "meta nfproto": nfproto,
        "meta l4proto": protocol,
        "ct state": "new",
    }
    if packet.port is not None:
        found |= {f"{protocol} dport": str(packet.port), "th dport": str(packet.port)}
    return found


@settings(max_examples=100, deadline=None)
@given(
    st.lists(endpoints(), min_size=3, max_size=5),
    st.lists(policies, min_size=1, max_size=4),
    st.dictionaries(st.sampled_from(NAMESPACES), labels),
)
def test_the_compiled_ruleset_decides_as_the_api_reads(pods, found, namespaces) -> None:
    ruleset = Ruleset()
    index = PolicyIndex(Translator(ruleset))
    for name, of_namespace in namespaces.items():
        index.set_namespace(name, of_namespace)
    for pod in pods:
        index.set_endpoint(pod.key, pod)
    for policy in found:
        index.set_policy(policy.key, policy)
    local = {a for e in index.cluster.endpoints.values() if e.local for a in e.addresses}
    view = RulesetView(ruleset)
    for own, peer, (protocol, port) in itertools.product(local, ADDRESSES, FLOWS):
        if len(own) != len(peer):
            continue
        for direction, chain, packet in (
            (Direction.EGRESS, "from-pod", Packet(own, peer, protocol, port)),
            (Direction.INGRESS, "to-pod", Packet(peer, own, protocol, port)),
        ):
            decision = decide(index.cluster, packet, direction)
            assert evaluate(view, chain, fields(packet)).accepted is decision.allowed, (packet, decision)
