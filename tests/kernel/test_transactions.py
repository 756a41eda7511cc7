"""Every packet obeys the old policies or the new ones, whatever changes while it is under way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from enforcer.model.addresses import parse_address
from enforcer.model.objects import Protocol
from enforcer.policy.endpoints import Endpoint
from enforcer.policy.resolve import Cluster
from enforcer.policy.verdict import Connection, verdict
from tests.kernel.changes import CHANGES, run_change
from tests.kernel.engine import State
from tests.kernel.laboratory import CLIENT, FORBIDDEN, NETWORKS, PODS, SERVER, STEADY, Laboratory, address, build_flood

SWAPS = os.environ.get("DRAWBRIDGE_TEST_SWAPS")
"""How often the states of each change are swapped; by default as often as the change itself says."""
STAMPED_SWAPS = 60


@pytest.fixture(scope="module")
def flood(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_flood(tmp_path_factory.mktemp("flood"))


def allows(state: State, family: str, port: int) -> bool:
    endpoints = {
        pod.key: Endpoint(pod.key, pod.namespace, pod.addresses, local=True, labels=pod.labels)
        for pod in state.pods.values()
    }
    client, server = (parse_address(address(PODS[pod], family)) for pod in (CLIENT, SERVER))
    decisions = verdict(Cluster({}, endpoints, state.policies), Connection(client, server, Protocol.UDP.number, port))
    return all(decision.allowed for decision in decisions)


@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("kind", CHANGES)
def test_both_states_of_a_change_forbid_the_one_flow_and_allow_the_other(kind: str, family: str) -> None:
    for state in (CHANGES[kind].one, CHANGES[kind].other):
        assert not allows(state, family, FORBIDDEN)
        assert allows(state, family, STEADY)


@pytest.mark.netns
@pytest.mark.parametrize("family", NETWORKS)
def test_a_flood_arrives_where_nothing_is_in_its_way(flood: Path, family: str) -> None:
    with Laboratory(flood) as laboratory, laboratory.flood(family) as flooding:
        counts = flooding.counts()
    assert all(count.received > 0 and count.lost == 0 for count in counts)


@pytest.mark.netns
@pytest.mark.timeout(1800)
# How the thread of an agent that is killed ends here.
@pytest.mark.filterwarnings(
    "ignore:(?s)Exception in thread reconciler.*SystemExit:pytest.PytestUnhandledThreadExceptionWarning"
)
@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_lets_nothing_slip_through_and_loses_nothing(flood: Path, kind: str, family: str) -> None:
    change = CHANGES[kind]
    outcome = run_change(flood, change, family, swaps=int(SWAPS or change.swaps))
    assert outcome.forbidden.sent > outcome.swaps
    assert outcome.steady.received > 0
    assert outcome.forbidden.received == 0
    assert change.closes or outcome.steady.lost == 0


@pytest.mark.netns
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("family", NETWORKS)
@pytest.mark.parametrize("kind", ["label and policy in one batch", "one direction isolated, the other no more"])
def test_the_same_holds_where_connections_are_stamped_between_the_changes(flood: Path, kind: str, family: str) -> None:
    outcome = run_change(flood, CHANGES[kind], family, swaps=int(SWAPS or STAMPED_SWAPS), stamped=True)
    assert outcome.steady.received > 0
    assert (outcome.forbidden.received, outcome.steady.lost) == (0, 0)
