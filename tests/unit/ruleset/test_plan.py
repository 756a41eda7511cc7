"""Between and within the transactions of a change, nothing passes that neither the old nor the new policy allows."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.model.addresses import parse_address
from enforcer.model.objects import (
    ContainerPort,
    Direction,
    NetworkPolicy,
    Peer,
    PodPeer,
    PolicyPort,
    PolicyRule,
    Protocol,
)
from enforcer.model.selectors import LabelSelector, Operator, Requirement
from enforcer.policy.endpoints import Endpoint
from enforcer.policy.verdict import Connection
from enforcer.ruleset.evaluate import RulesetView
from enforcer.ruleset.objects import Chain, Table, Use
from enforcer.ruleset.plan import plan
from enforcer.ruleset.reach import NOTHING, Reach
from enforcer.ruleset.ruleset import Ruleset
from tests.properties.test_oracles import SOME_CONNECTIONS, events
from tests.support.model import Event, Kernel, Model, Tracked
from tests.support.strategies import policies

pytestmark = pytest.mark.usefixtures("group_chains")

HELD_UP_PACKETS, HOLD_UP = 4, 0.3
"""How many packets of a connection come in each state, and how likely each is held up before a look-up."""
LOOKUPS = 30
"""More than a packet needs."""


@dataclass
class History:
    """What the kernel held after each step of some changes.

    ``policies`` are the states that a change ended in; ``waits`` the states before whose successor every packet under
    way was waited for; ``passing`` are addresses that came to the node or went, by the state that a change led to.
    """

    model: Model
    states: list[Ruleset] = field(default_factory=list)
    policies: list[int] = field(default_factory=list)
    waits: set[int] = field(default_factory=set)
    passing: dict[int, set[bytes]] = field(default_factory=dict)
    taken: Reach = NOTHING

    def __post_init__(self) -> None:
        self.kernel = Kernel(self.model)
        for step in self.model.steps():
            self.kernel.apply(step)
        self._record()

    def follow(self) -> None:
        """Commit what has changed."""
        change = self.model.ruleset.take()
        for step in plan(change, self.model.ruleset):
            if self.taken.meets(step.gives):
                self.waits.add(len(self.states) - 1)
                self.taken = NOTHING
            self.taken |= step.takes
            self.kernel.apply(step)
            self.states.append(copy.deepcopy(self.kernel.held))
        self._record()
        local = [entry for entry in change.elements if entry.set.use is Use.LOCAL]
        self.passing[self.policies[-1]] = {key for entry in local for key in entry.removed.keys() ^ entry.added.keys()}

    def _record(self) -> None:
        self.states.append(copy.deepcopy(self.kernel.held))
        self.policies.append(len(self.states) - 1)

    def last_for(self, first: int) -> int:
        """The last state that a packet may meet which came in the first."""
        return min((state for state in self.waits if state >= first), default=len(self.states) - 1)

    def policies_of(self, first: int, last: int) -> range:
        """The states of the policies that a packet may obey which was under way from one state to another."""
        start = max(state for state in self.policies if state <= first)
        end = min(state for state in self.policies if state >= last)
        return range(self.policies.index(start), self.policies.index(end) + 1)


class HeldUp:
    """What a packet sees that is held up between its look-ups while the kernel goes through some states; a ``View``.

    ``hold`` says the state that a look-up meets, told the number of the look-up and the state of the one before.
    """

    def __init__(self, states: list[Ruleset], hold: Callable[[int, int], int]) -> None:
        self._states = [RulesetView(state) for state in states]
        self._sets = [{name for _, name in state.sets} for state in states]
        self._hold = hold
        self.lookups = 0
        self.present = 0

    def rules(self, chain: str) -> Sequence[str]:
        # A chain that has gone is there for whoever was sent to it.
        return next((rules for state in self._states[self.present :: -1] if (rules := state.rules(chain))), ())

    def element(self, name: str, key: str) -> str | None:
        self.present = self._hold(self.lookups, self.present)
        self.lookups += 1
        # So is a set, for whoever is in a chain that uses it.
        there = max(state for state in range(self.present + 1) if name in self._sets[state])
        return self._states[there].element(name, key)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(events, min_size=4, max_size=10),
    st.lists(st.lists(events, min_size=1, max_size=4), min_size=1, max_size=4),
    st.integers(0, 2**32),
)
def test_no_packet_however_long_it_is_held_up_passes_what_no_policy_of_its_time_allows(
    start: list[Event], batches: list[list[Event]], seed: int
) -> None:
    model = Model()
    model.put(*start)
    history = History(model)
    for batch in batches:
        model.put(*batch)
        history.follow()
    opens_nothing(history, Random(seed))  # noqa: S311 - nothing is secret here


def opens_nothing(history: History, random: Random) -> None:
    """Send each connection's packet from each state on, several times, to be held up until its last state at most."""
    settled = [RulesetView(history.states[state]) for state in history.policies]
    for first in range(len(history.states)):
        states = history.states[first : history.last_for(first) + 1]

        def hold(_: int, present: int, states: list[Ruleset] = states) -> int:
            return random.randrange(present, len(states)) if random.random() < HOLD_UP else present

        for connection in SOME_CONNECTIONS:
            allowed = [Tracked(connection).passes(view) for view in settled]
            for _ in range(HELD_UP_PACKETS):
                held = HeldUp(states, hold)
                passes = Tracked(connection).passes(held)
                last = first + held.present
                obeyed = history.policies_of(first, last)
                if passes and not any(allowed[policy] for policy in obeyed):
                    ends = {connection.client, connection.server}
                    came = (history.passing.get(history.policies[policy], set()) for policy in obeyed)
                    # One commit may come between in any case; more only where somebody's packets cannot be under way.
                    assert last > first + 1 and any(ends & addresses for addresses in came), (connection, first, last)


def meetings(states: int) -> list[tuple[int, int]]:
    """In which states a packet may meet its first and its second base chain, with one commit between at most."""
    return [(first, second) for first in range(states) for second in (first, first + 1) if second < states]


@settings(max_examples=60, deadline=None)
@given(st.lists(events, min_size=3, max_size=10), st.lists(policies, min_size=1, max_size=4))
def test_a_change_of_policies_alone_loses_no_packet_that_the_old_and_the_new_allow(
    start: list[Event], changed: list[NetworkPolicy]
) -> None:
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


def labelled(**labels: str) -> LabelSelector:
    return LabelSelector.of(*(Requirement(key, Operator.IN, (value,)) for key, value in labels.items()))


def pods(**labels: str) -> PodPeer:
    return PodPeer(pod_selector=labelled(**labels))


def client(*, local: bool = True, **labels: str) -> Event:
    return "endpoint", "x/client", Endpoint("x/client", "x", (CLIENT,), local=local, labels={"app": "client"} | labels)


def server(*, local: bool = True, http: int | None = 80, **labels: str) -> Event:
    ports = (ContainerPort("http", Protocol.TCP, http),) if http else ()
    labels = {"app": "server"} | labels
    return "endpoint", "x/server", Endpoint("x/server", "x", (SERVER,), local=local, labels=labels, ports=ports)


def policy(direction: Direction, *rules: PolicyRule, **selected: str) -> Event:
    """One of a name for each direction; without labels it selects the client, or the server."""
    name, app = ("out", "client") if direction is Direction.EGRESS else ("in", "server")
    return "policy", f"x/{name}", NetworkPolicy("x", name, labelled(**selected or {"app": app}), {direction: rules})


def to_ports(*ports: int | str, peers: tuple[Peer, ...] = ()) -> PolicyRule:
    return PolicyRule(peers, tuple(PolicyPort(port=port) for port in ports))


IN, OUT = Direction.INGRESS, Direction.EGRESS
FROM_X, FROM_Y, TO_X = to_ports(80, peers=(pods(role="x"),)), to_ports(80, peers=(pods(role="y"),)), pods(role="x")
BESIDE = to_ports(90)

# Two states of policies and pods, neither of which lets the client reach the server.
FORBIDDING: dict[str, tuple[list[Event], list[Event]]] = {
    "egress opens, ingress closes": (
        [client(), server(), policy(OUT), policy(IN, to_ports(80))],
        [policy(OUT, to_ports(80)), policy(IN)],
    ),
    "ingress opens, egress closes": (
        [client(), server(), policy(IN), policy(OUT, to_ports(80))],
        [policy(IN, to_ports(80)), policy(OUT)],
    ),
    "egress opens, ingress closes, and both the other way round for another port": (
        [client(), server(), policy(OUT, BESIDE), policy(IN, to_ports(80))],
        [policy(OUT, to_ports(80)), policy(IN, BESIDE)],
    ),
    "ingress opens, egress closes, and both the other way round for another port": (
        [client(), server(), policy(IN, BESIDE), policy(OUT, to_ports(80))],
        [policy(IN, to_ports(80)), policy(OUT, BESIDE)],
    ),
    "the client's label lets it in and isolates it": (
        [client(), server(), policy(IN, FROM_X), policy(OUT, role="x")],
        [client(role="x")],
    ),
    "the client's label let it in and isolated it": (
        [client(role="x"), server(), policy(IN, FROM_X), policy(OUT, role="x")],
        [client()],
    ),
    "labels at both ends": (
        [client(), server(role="x"), policy(IN, FROM_Y), policy(OUT, to_ports(80, peers=(TO_X,)))],
        [client(role="y"), server()],
    ),
    "a named port leaves as its client comes": (
        [client(), server(), policy(IN, to_ports("http", peers=(pods(role="x"),)))],
        [client(role="x"), server(http=81)],
    ),
    "the same of a client elsewhere": (
        [client(local=False), server(), policy(IN, to_ports("http", peers=(pods(role="x"),)))],
        [client(local=False, role="x"), server(http=81)],
    ),
    "a server elsewhere leaves the peers as its named port comes": (
        [client(), server(local=False, http=None, role="x"), policy(OUT, to_ports("http", peers=(TO_X,)))],
        [server(local=False)],
    ),
    "the policy's peer and the label of a client elsewhere": (
        [client(local=False), server(), policy(IN, FROM_X)],
        [client(local=False, role="x"), policy(IN, FROM_Y)],
    ),
}


def _hold_until(held_up: int, last: int, number: int, _: int) -> int:
    """The last state from a look-up on, and the first before it."""
    return last if number >= held_up else 0


@pytest.mark.parametrize("together", [True, False], ids=["in one change", "in a change each"])
@pytest.mark.parametrize("forward", [True, False], ids=["there", "and back"])
@pytest.mark.parametrize("forbidding", FORBIDDING)
def test_a_packet_that_is_held_up_anywhere_passes_by_no_mixture(forbidding: str, forward: bool, together: bool) -> None:
    before, changed = FORBIDDING[forbidding]
    states = (before, [*before, *changed])
    start, end = states if forward else reversed(states)
    model = Model()
    model.put(*start)
    history = History(model)
    allowed = [model.allows(FLOW)]
    for batch in [end] if together else [[event] for event in end]:
        model.put(*batch)
        history.follow()
        allowed.append(model.allows(FLOW))
    assert not allowed[0]
    assert not allowed[-1]
    for first in range(len(history.states)):
        met = history.states[first : history.last_for(first) + 1]
        for held_up, last in itertools.product(range(LOOKUPS), range(len(met))):
            view = HeldUp(met, partial(_hold_until, held_up, last))
            passes = Tracked(FLOW).passes(view)
            assert view.lookups < LOOKUPS
            obeyed = history.policies_of(first, first + view.present)
            assert not passes or any(allowed[policy] for policy in obeyed), (first, held_up, last)


def test_a_chain_is_never_rewritten_in_place() -> None:
    ruleset = Ruleset()
    ruleset.put_chain(Chain(Table.POLICY, "policy/x/a/ingress/0", ("accept",)))
    ruleset.take()
    ruleset.put_chain(Chain(Table.POLICY, "policy/x/a/ingress/0", ("drop",)))
    with pytest.raises(ValueError, match="policy/x/a/ingress/0"):
        plan(ruleset.take(), ruleset)


@pytest.mark.parametrize("pods_here", [4, 16])
def test_each_chain_is_copied_once_for_the_interim_however_many_groups_change(pods_here: int) -> None:
    model = Model()
    everyone = range(pods_here)
    for n in everyone:
        key, address = f"x/pod-{n}", parse_address(f"10.0.0.{n + 1}")
        model.put(("endpoint", key, Endpoint(key, "x", (address,), local=True, labels={"id": f"pod-{n}"})))

    def others(n: int, *ports: int) -> Event:
        """A policy of both types for all pods but one, so that each pod is a group of its own."""
        selector = LabelSelector.of(Requirement("id", Operator.NOT_IN, (f"pod-{n}",)))
        rules = (to_ports(*ports, peers=(pods(role="x"),)),)
        return "policy", f"x/p{n}", NetworkPolicy("x", f"p{n}", selector, dict.fromkeys(Direction, rules))

    model.put(*(others(n, 80, 81) for n in everyone))
    model.steps()
    model.put(others(0, 80, 82))
    made = sum(len(step.new_chains) for step in model.steps())
    # In each direction: chains of the groups and of the policy, and copies of those and of each policy's chains.
    assert made <= 2 * (2 * (pods_here + 3) + 4 * pods_here)
