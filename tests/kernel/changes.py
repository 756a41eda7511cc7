"""Each kind of change as two states that take turns under a flood.

Neither state allows the client to reach the server's port FORBIDDEN, and both allow STEADY: whatever comes of the one,
or is lost of the other, a change did.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from enforcer.model.addresses import Network, parse_address
from enforcer.model.objects import (
    Direction,
    IPBlock,
    NetworkPolicy,
    Peer,
    Pod,
    PodPeer,
    PolicyPort,
    PolicyRule,
    Protocol,
)
from enforcer.model.selectors import LabelSelector, Operator, Requirement
from tests.kernel.engine import NODE, Engine, State
from tests.kernel.laboratory import NETWORKS, PODS, STEADY, Count, Laboratory, address

FIRST_VERSION = Path(__file__).with_name("first-version.nft")
SPACE = "shop"
ELSEWHERE = 9000
"""A port that nothing is sent to."""


@dataclass(frozen=True, slots=True)
class Change:
    """Two states, and the way from each to the other.

    ``swaps`` are enough for a flood to find what one transaction for everything leaks or loses. ``closes``: pods that a
    killed agent left between the halves of a switch are closed for a moment by the next, so packets are lost.
    """

    one: State
    other: State
    swap: Callable[[Engine, Laboratory, State], None]
    swaps: int
    closes: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of the forbidden flow and of the steady one in a number of swaps, which took so many seconds."""

    swaps: int
    seconds: float
    forbidden: Count
    steady: Count


def run_change(flood: Path, change: Change, family: str, *, swaps: int, stamped: bool = False) -> Outcome:
    """Swap the states of a change under a flood of one family; ``stamped``: at each swap, connections are stamped."""
    with Laboratory(flood) as laboratory, Engine(stamped=stamped) as engine:
        engine.restart(change.one)
        with laboratory.flood(family):
            started = time.monotonic()
            for number in range(swaps):
                change.swap(engine, laboratory, change.one if number % 2 else change.other)
            seconds = time.monotonic() - started
            return Outcome(swaps, seconds, *laboratory.flooding.counts())


# Ways from state to state


def commit(engine: Engine, _: Laboratory, state: State) -> None:
    engine.commit(state)


def restart(engine: Engine, _: Laboratory, state: State) -> None:
    engine.restart(state)


def kill(engine: Engine, _: Laboratory, state: State) -> None:
    engine.kill(state)


def repair(engine: Engine, laboratory: Laboratory, state: State) -> None:
    """Repair what others broke: an element and a chain, on which neither flow depends."""
    beside = re.search(rf"policy/{SPACE}/beside/\S+", laboratory.nft("list chains inet"))
    assert beside
    third = address(PODS["third"], "v4")
    laboratory.nft(f"delete element inet drawbridge ingress-v4 {{ {third} }}; flush chain inet drawbridge {beside[0]}")
    engine.repair(state)


def upgrade(engine: Engine, laboratory: Laboratory, state: State) -> None:
    """Take over the tables of the first version; bringing those back is not under test."""
    tables = ("inet drawbridge", "bridge drawbridge")
    clear = "".join(f"add table {table}; delete table {table}; " for table in tables)
    with laboratory.flooding.halted():
        laboratory.nft(clear + FIRST_VERSION.read_text())
    engine.restart(state)


# Words for states


def labelled(**labels: str) -> LabelSelector:
    """Pods with labels; ``a|b`` is either value."""
    return LabelSelector.of(*(Requirement(key, Operator.IN, tuple(value.split("|"))) for key, value in labels.items()))


def pods(**labels: str) -> PodPeer:
    return PodPeer(pod_selector=labelled(**labels))


def everyone_but(number: int) -> tuple[IPBlock, ...]:
    """An ipBlock of each family: every pod's address but one."""
    lengths = {"v4": (16, 32), "v6": (16, 128)}
    return tuple(
        IPBlock(Network.parse(f"{address(0, family)}/{all_}"), (Network.parse(f"{address(number, family)}/{one}"),))
        for family, (all_, one) in lengths.items()
    )


def allow(*peers: Peer, ports: tuple[int, ...] = (), span: tuple[int, int] | None = None) -> PolicyRule:
    """A rule for UDP to ports and a range of ports; neither is every port."""
    entries = [PolicyPort(Protocol.UDP, port) for port in ports]
    entries += [PolicyPort(Protocol.UDP, *span)] if span else []
    return PolicyRule(peers, tuple(entries) or (PolicyPort(Protocol.UDP),))


def ingress(name: str, selected: LabelSelector, *rules: PolicyRule) -> NetworkPolicy:
    return NetworkPolicy(SPACE, name, selected, {Direction.INGRESS: rules})


def egress(name: str, selected: LabelSelector, *rules: PolicyRule) -> NetworkPolicy:
    return NetworkPolicy(SPACE, name, selected, {Direction.EGRESS: rules})


def state(*policies: NetworkPolicy, **labels: dict[str, str]) -> State:
    """The policies, and every pod with its name as the label ``app``, and with these."""
    everyone = [
        Pod(
            SPACE,
            pod,
            labels={"app": pod} | labels.get(pod, {}),
            node=NODE,
            addresses=tuple(parse_address(address(number, family)) for family in NETWORKS),
        )
        for pod, number in PODS.items()
    ]
    return State({pod.key: pod for pod in everyone}, {policy.key: policy for policy in policies})


# States

CLIENT, SERVER = labelled(app="client"), labelled(app="server")
FROM_CLIENT, TO_SERVER = PodPeer(pod_selector=CLIENT), PodPeer(pod_selector=SERVER)
TIER_A, TIER_B, X, Y = {"tier": "a"}, {"tier": "b"}, {"role": "x"}, {"role": "y"}

STEADY_IN, STEADY_OUT = allow(FROM_CLIENT, ports=(STEADY,)), allow(TO_SERVER, ports=(STEADY,))
ELSEWHERE_IN, ELSEWHERE_OUT = allow(FROM_CLIENT, ports=(ELSEWHERE,)), allow(TO_SERVER, ports=(ELSEWHERE,))
FROM_X, FROM_Y = allow(pods(role="x")), allow(pods(role="y"))
X_ELSEWHERE, Y_ELSEWHERE = (allow(pods(role=role), ports=(ELSEWHERE,)) for role in "xy")
IN, OUT = ingress("in", SERVER, STEADY_IN), egress("out", CLIENT, STEADY_OUT)
BESIDE = ingress("beside", labelled(app="third"), ELSEWHERE_IN)


def tiers(a: PolicyRule, b: PolicyRule, *policies: NetworkPolicy, **labels: dict[str, str]) -> State:
    """A policy for each of two tiers, which the third pod and the fourth keep in force."""
    in_a, in_b = ingress("a", labelled(tier="a"), a), ingress("b", labelled(tier="b"), b)
    return state(in_a, in_b, *policies, third=TIER_A, fourth=TIER_B, **labels)


# Whoever gets the role x may send to the server, by the server's policy, and is isolated for egress.
ROLES = ingress("roles", SERVER, STEADY_IN, FROM_X), egress("x", labelled(role="x"), STEADY_OUT)
MUCH = (
    tiers(STEADY_IN, STEADY_IN, IN, BESIDE, *ROLES, server=TIER_A),
    tiers(STEADY_IN, STEADY_IN, IN, BESIDE, *ROLES, server=TIER_B, client=X),
)
"""The server moves to a new group, and the client is relabelled and isolated by it."""
MIXED = (
    state(IN, egress("out", CLIENT, allow(TO_SERVER))),
    state(ingress("in", SERVER, allow(FROM_CLIENT)), OUT),
)
"""Rules of one direction tightened, of the other loosened."""

CHANGES = {
    "new isolation group": Change(state(IN), state(IN, ingress("more", SERVER, ELSEWHERE_IN)), commit, 2000),
    "pod moves to a new group": Change(
        tiers(STEADY_IN, STEADY_IN, IN, server=TIER_A),
        tiers(STEADY_IN, STEADY_IN, IN, server=TIER_B),
        commit,
        2000,
    ),
    "pod moves to an existing group": Change(
        tiers(STEADY_IN, STEADY_IN, server=TIER_A),
        tiers(STEADY_IN, STEADY_IN, server=TIER_B),
        commit,
        2000,
    ),
    "pod moves to an existing group that closes": Change(
        tiers(STEADY_IN, allow(), server=TIER_A),
        tiers(allow(), STEADY_IN, server=TIER_B),
        commit,
        2000,
    ),
    "policy's ports edited": Change(
        state(ingress("p", SERVER, allow(FROM_CLIENT, ports=(STEADY,), span=(8000, 8010)))),
        state(ingress("p", SERVER, allow(FROM_CLIENT, ports=(STEADY,), span=(8000, 8011)))),
        commit,
        2000,
    ),
    "policy's ipBlock edited": Change(
        state(ingress("p", SERVER, allow(*everyone_but(8), ports=(STEADY,)))),
        state(ingress("p", SERVER, allow(*everyone_but(9), ports=(STEADY,)))),
        commit,
        2000,
    ),
    "policy's selector and rules edited": Change(
        state(IN, ingress("p", labelled(app="third"), allow())),
        state(IN, ingress("p", labelled(app="server|third"), ELSEWHERE_IN)),
        commit,
        2000,
    ),
    "policy removed": Change(state(OUT, egress("more", CLIENT, ELSEWHERE_OUT)), state(OUT), commit, 2000),
    "label and policy in one batch": Change(
        state(ingress("p", SERVER, STEADY_IN, FROM_X, Y_ELSEWHERE), client=Y),
        state(ingress("p", SERVER, STEADY_IN, X_ELSEWHERE, FROM_Y), client=X),
        commit,
        2000,
    ),
    "peer relabelled, and isolated by it": Change(state(*ROLES), state(*ROLES, client=X), commit, 2000),
    "rules of one direction tightened, of the other loosened": Change(*MIXED, commit, 2000),
    "one direction isolated, the other no more": Change(state(IN), state(OUT), commit, 2000),
    "killed in a change": Change(*MUCH, kill, 90, closes=True),
    "killed in a switch of two halves": Change(*MIXED, kill, 90, closes=True),
    "whole render": Change(*MUCH, restart, 300),
    "whole render, nothing changed": Change(MUCH[0], MUCH[0], restart, 300),
    "repair": Change(*MUCH, repair, 400),
    "upgrade": Change(*MUCH, upgrade, 300),
}
