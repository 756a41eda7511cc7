"""What is committed is what is desired, from whatever the kernel held before, and after a stop at any step."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enforcer.kernel.netlink import BatchError, BatchSocket
from enforcer.kernel.nftables import NftError, Tables
from enforcer.model.addresses import Network, parse_address
from enforcer.model.marks import GROUPS, ConnectionMark
from enforcer.model.objects import Direction, IPBlock, NetworkPolicy, PodPeer, PolicyPort, PolicyRule, Protocol
from enforcer.model.selectors import LabelSelector, Operator, Requirement
from enforcer.policy.endpoints import Endpoint
from enforcer.reconcile.commits import Commits
from enforcer.reconcile.denials import Denials
from enforcer.ruleset.plan import Purpose, Step, plan
from enforcer.ruleset.ruleset import difference
from enforcer.translate.base import stamp_chain
from tests.properties.test_oracles import events
from tests.support.model import Event, Model
from tests.support.strategies import policies

pytestmark = [pytest.mark.netns, pytest.mark.usefixtures("group_chains")]

FIRST_VERSION = Path(__file__).parent / "first-version.nft"


def run(*words: str) -> str:
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout


def nft(commands: str) -> str:
    done = subprocess.run(["nft", "-f", "-"], input=commands, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def selector(**labels: str) -> LabelSelector:
    return LabelSelector.of(*(Requirement(key, Operator.IN, (value,)) for key, value in labels.items()))


class Node:
    """A model, and the commits of one agent; another agent takes over with ``restart``."""

    def __init__(self, tables: Tables, denials: Denials | None = None) -> None:
        self.model = Model()
        self.tables = tables
        self.denials = denials or Denials(None)
        self.commits = Commits(tables, self.model.ruleset, self.model.translator, self.denials)

    def put(self, *happenings: Event) -> None:
        self.model.put(*happenings)

    def restart(self, tables: Tables) -> Commits:
        self.model.ruleset.take()
        return Commits(tables, self.model.ruleset, self.model.translator, self.denials)

    def is_right(self) -> bool:
        return not difference(self.tables.present(self.model.ruleset), self.model.ruleset)


def shop(*, ports: tuple[int, ...] = (80, 443), extra: bool = False) -> list[Event]:
    """A server with a policy for each direction, and a client of another node."""
    peers = (
        PodPeer(None, selector(app="client")),
        IPBlock(Network.parse("192.0.2.0/24"), (Network.parse("192.0.2.128/25"),)),
    )
    numbers = tuple(PolicyPort(Protocol.TCP, port) for port in ports)
    rules = {Direction.INGRESS: (PolicyRule(peers, numbers),), Direction.EGRESS: (PolicyRule(peers[1:], numbers),)}
    server = (parse_address("10.0.0.2"), parse_address("fd00::2"))
    return [
        ("namespace", "x", {}),
        ("endpoint", "x/server", Endpoint("x/server", "x", server, local=True, labels={"app": "server"})),
        (
            "endpoint",
            "x/client",
            Endpoint("x/client", "x", (parse_address("10.0.1.2"),), local=False, labels={"app": "client"}),
        ),
        ("policy", "x/server", NetworkPolicy("x", "server", selector(app="server"), rules)),
        ("policy", "x/extra", NetworkPolicy("x", "extra", rules={Direction.INGRESS: ()}) if extra else None),
    ]


@pytest.fixture
def tables(network: str) -> Iterator[Tables]:
    made = Tables()
    yield made
    made.close()


def test_the_kernel_holds_what_any_sequence_of_events_desires(tables: Tables) -> None:
    @settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(st.lists(events, max_size=4), max_size=5))
    def holds(batches: list[list[Event]]) -> None:
        tables.remove()
        node = Node(tables)
        node.commits.synchronize()
        for batch in batches:
            node.put(*batch)
            node.commits.change()
            assert node.is_right()

    holds()


def test_the_rule_of_the_epoch_is_encoded_as_nft_encodes_it(tables: Tables) -> None:
    node = Node(tables)
    node.commits.synchronize()
    for group in GROUPS:
        node.commits.epochs.cleared(group)
    assert node.commits.begin_epoch(node.commits.ended)
    (rule,) = tables.rules("stamp")[1:]
    assert (rule,) == stamp_chain(ConnectionMark(), 32).rules
    nft("table inet copy {\nchain stamp {\n" + rule + "\n}\n}")
    ours, theirs = (
        subprocess.run(
            ["nft", "--debug=netlink", "list", "chain", "inet", table, "stamp"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for table in ("drawbridge", "copy")
    )
    encoded = [line for line in ours.splitlines() if line.strip().startswith("[")]
    assert encoded == [line for line in theirs.splitlines() if line.strip().startswith("[")]
    assert len(encoded) == 3


STARTS = {"from nothing": [], "policy is there": shop(), "policy and more": shop(extra=True)}
ENDS = {
    "other ports": shop(ports=(80, 8080)),
    "one more policy": shop(extra=True),
    "nothing": [(k, key, None) for k, key, _ in shop()],
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("start", STARTS)
def test_an_agent_that_is_killed_between_two_steps_leaves_nothing_wrong_to_the_next(
    tables: Tables, start: str, end: str
) -> None:
    for stop in itertools.count():
        tables.remove()
        node = Node(tables)
        node.put(*STARTS[start])
        node.commits.synchronize()
        node.put(*ENDS[end])
        steps = plan(node.model.ruleset.take(), node.model.ruleset)
        node.commits._run(steps[:stop])
        node.restart(tables).synchronize()
        assert node.is_right(), stop
        if stop >= len(steps):
            break


def test_agents_that_are_each_killed_between_the_halves_of_a_switch_leave_nothing_that_is_too_deep(
    tables: Tables,
) -> None:
    node = Node(tables)
    node.put(*shop())
    node.commits.synchronize()

    def run_first_half(commits: Commits) -> None:
        run = commits._run

        def cut(steps: Sequence[Step]) -> None:
            first = [step.purpose for step in steps].index(Purpose.SWITCH)
            run(steps[: first + 1])

        commits._run = cut  # type: ignore[method-assign]
        commits.synchronize()

    for port in range(1, 5):
        node.put(*shop(ports=(80, port), extra=True))
        run_first_half(node.restart(tables))
    node.restart(tables).synchronize()
    assert node.is_right()


@pytest.mark.parametrize("end", ENDS)
def test_a_step_that_is_refused_is_made_good_by_the_next_synchronization(
    tables: Tables, end: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for refused in itertools.count():
        tables.remove()
        node = Node(tables)
        node.put(*shop())
        node.commits.synchronize()
        node.put(*ENDS[end])
        left = itertools.count()
        commit = Tables.commit

        def refuse(
            self: Tables,
            step: Step,
            left: Iterator[int] = left,
            refused: int = refused,
            commit: Callable[[Tables, Step], None] = commit,
        ) -> None:
            if next(left) == refused:
                raise NftError("refused")
            commit(self, step)

        with monkeypatch.context() as patched:
            patched.setattr(Tables, "commit", refuse)
            try:
                node.commits.change()
            except NftError:
                assert node.commits.epoch is None
            else:
                break
        node.commits.synchronize()
        assert node.is_right(), refused
    assert refused > 1


@pytest.mark.parametrize(
    "edit",
    [
        "flush ruleset",
        "delete table inet drawbridge",
        "flush table inet drawbridge",
        "flush chain inet drawbridge to-pod",
        "insert rule inet drawbridge from-pod accept",
        "insert rule inet drawbridge fast accept",
        "flush chain inet drawbridge allow-ingress",
        "flush map inet drawbridge ingress-v4",
        "delete element inet drawbridge local-v4 { 10.0.0.2 }",
        "add element inet drawbridge peer/x/app.client-v4 { 10.9.9.9 }",
        "add chain inet drawbridge other { type filter hook forward priority 5; policy drop; }",
        "add set inet drawbridge other { type ipv4_addr; timeout 1m; }; add element inet drawbridge other { 10.9.9.9 }",
        "add element inet drawbridge ingress-v4 { 10.9.9.9 : accept }",
        "delete element inet drawbridge ingress-v4 { 10.0.0.2 }; "
        "add element inet drawbridge ingress-v4 { 10.0.0.2 : accept }",
        "flush table bridge drawbridge",
        "add table inet drawbridge { flags dormant; }",
        "add table bridge drawbridge { flags dormant; }",
        'add element inet drawbridge local-v4 { 10.9.9.9 comment "a : b" }',
        'add element inet drawbridge local-v4 { 10.9.9.9 comment "ü" }',
        "add chain inet drawbridge foo; add map inet drawbridge m { type ipv4_addr : verdict; }; "
        "add element inet drawbridge m { 10.9.9.9 : jump foo }",
        "chain inet drawbridge to-pod { policy drop; }",
        "add map inet drawbridge foreign { type ipv4_addr : mark; }; "
        "add element inet drawbridge foreign { 10.9.9.9 : 7 }",
    ],
)
def test_what_another_program_has_edited_is_put_right(tables: Tables, edit: str) -> None:
    node = Node(tables)
    node.put(*shop(extra=True))
    node.commits.synchronize()
    nft(edit.replace("; add", "\nadd"))
    rules = tables.rules("fast")
    node.commits.synchronize()
    assert node.is_right()
    assert "accept" not in tables.rules("fast"), rules
    listed = nft("list ruleset")
    assert "ingress-v4" in listed
    assert "dormant" not in listed


def test_nft_lists_the_rules_of_any_policy_as_they_are_written(tables: Tables) -> None:
    """What is listed otherwise would be rewritten at each start."""

    @settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(policies.filter(lambda policy: policy.rejected is None), min_size=8, max_size=20))
    def same(found: list[NetworkPolicy]) -> None:
        tables.remove()
        node = Node(tables)
        node.put(*shop())
        named = [
            dataclasses.replace(policy, namespace="x", name=f"p{number}", pod_selector=LabelSelector())
            for number, policy in enumerate(found)
        ]
        node.put(*(("policy", policy.key, policy) for policy in named))
        node.commits.synchronize()
        assert node.is_right()

    same()


def test_no_batch_is_sent_that_older_kernels_would_not_answer(tables: Tables, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []
    commit = BatchSocket.commit

    def noted(self: BatchSocket, batch: list[bytes], generation: int) -> None:
        sizes.append(len(batch))
        commit(self, batch, generation)

    monkeypatch.setattr(BatchSocket, "commit", noted)
    node = Node(tables)
    node.commits.synchronize()
    node.restart(tables).synchronize()
    node.put(*shop())
    node.commits.change()
    assert sizes
    assert 0 not in sizes


def test_a_set_of_our_name_and_another_type_is_replaced(tables: Tables) -> None:
    node = Node(tables)
    node.put(*shop())
    node.commits.synchronize()
    listed = nft("list ruleset").replace(
        "set isolated-ingress-v4 {\n\t\ttype ipv4_addr",
        "set isolated-ingress-v4 {\n\t\ttype ipv4_addr\n\t\ttimeout 1m",
        1,
    )
    nft("flush ruleset")
    nft(listed)
    assert node.commits.synchronize().purposes == ("rebuild",)
    assert node.is_right()


def test_a_base_chain_of_our_name_at_another_hook_is_replaced(tables: Tables) -> None:
    node = Node(tables)
    node.put(*shop())
    node.commits.synchronize()
    listed = nft("list ruleset").replace("hook forward priority filter;", "hook forward priority 77;", 1)
    nft("flush ruleset")
    nft(listed)
    assert node.commits.synchronize().purposes == ("rebuild",)
    assert node.is_right()


def test_a_restart_rewrites_nothing_that_is_right(tables: Tables) -> None:
    node = Node(tables)
    node.put(*shop(extra=True))
    node.commits.synchronize()
    committed = node.restart(tables).synchronize()
    assert committed.purposes == ("switch",)
    assert set(committed.counts.values()) == {0}


def test_the_table_of_the_first_version_is_carried_over(tables: Tables) -> None:
    nft(FIRST_VERSION.read_text())
    node = Node(tables)
    node.put(*shop(extra=True))
    purposes = node.commits.synchronize().purposes
    # Its base chains know no stamps, and drop by a bit that is one of ours: they are the last to be refilled.
    assert purposes.index("switch") < purposes.index("attachment")
    assert "refill" not in purposes
    assert node.is_right()


def test_denied_packets_are_added_up_over_groups_that_go_and_agents_that_end(tables: Tables, tmp_path: Path) -> None:
    node = Node(tables, Denials(tmp_path))
    node.put(*shop())
    node.commits.synchronize()
    place = ("x/server", Direction.INGRESS)
    assert node.denials.totals({"denied/ingress/x/server": (5, 300)})[place] == 5
    # The group goes, with what its counter held.
    node.tables.counter = lambda counter: (  # type: ignore[method-assign]
        (5, 300) if counter.name == "denied/ingress/x/server" else (0, 0)
    )
    node.put(*shop(extra=True))
    node.commits.change()
    assert node.denials.totals({"denied/ingress/x/extra_server": (2, 120)})[place] == 7
    assert Denials(tmp_path).totals({})[place] == 5
    node.denials.keep({"x/extra"})
    assert place not in Denials(tmp_path).totals({})


def begin_epochs(node: Node) -> None:
    node.commits.synchronize()
    for group in GROUPS:
        node.commits.epochs.cleared(group)
    assert node.commits.begin_epoch(node.commits.ended)


def test_once_an_older_ruleset_was_loaded_again_no_stamp_is_trusted(tables: Tables) -> None:
    node = Node(tables)
    node.put(*shop())
    begin_epochs(node)
    older = run("nft", "list", "table", "inet", "drawbridge")
    node.put(*shop(ports=(90,)))
    node.commits.change()
    assert node.commits.begin_epoch(node.commits.ended)
    known = node.commits.knowledge
    nft(f"delete table inet drawbridge\n{older}")
    node.commits.synchronize()
    assert node.is_right()
    assert node.commits.knowledge != known
    assert not node.commits.begin_epoch(node.commits.ended)
    assert set(node.commits.epochs.stale) == set(GROUPS)


def test_an_element_that_somebody_deleted_costs_no_clearing_of_stamps(tables: Tables) -> None:
    node = Node(tables)
    node.put(*shop())
    begin_epochs(node)
    nft("delete element inet drawbridge local-v4 { 10.0.0.2 }")
    node.commits.synchronize()
    assert node.is_right()
    assert node.commits.begin_epoch(node.commits.ended)


def test_without_an_epoch_nothing_is_stamped(tables: Tables) -> None:
    node = Node(tables)
    begin_epochs(node)
    node.put(*shop())
    node.commits.change()
    node.commits.epochs.forget()
    assert not node.commits.begin_epoch(node.commits.ended)
    assert tables.rules("stamp")[1:] == []


def test_a_transaction_that_is_too_large_for_the_socket_is_refused_and_nothing_more(tables: Tables) -> None:
    node = Node(tables)
    node.commits.synchronize()
    socket = tables._socket
    with pytest.raises(BatchError, match="EMSGSIZE"):
        socket.commit([bytes(64 << 20)], tables.generation())
    node.put(*shop())
    node.commits.change()
    assert node.is_right()
