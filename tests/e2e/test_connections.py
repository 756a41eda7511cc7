"""Every packet of a connection obeys the policy of this instant: a real agent, pods, and packets that are timed."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import pytest

from tests.support.connect import Connector, flows_between, stamps
from tests.support.flow import ERRORS, FAMILIES, Flow, Kind, Source, silent, wait_for
from tests.support.observation import Observation, nothing_passes, observe
from tests.support.stage import (
    DB,
    KEPT,
    NODE,
    OUTSIDE,
    SERVICE,
    WEB,
    Manifest,
    Stage,
    attach,
    blocks,
    detach,
    pods,
    policy,
    world,
    write,
)
from tests.support.watch import CUT, nft

pytestmark = pytest.mark.netns
INGRESS, EGRESS = ("web-db", "outside-db"), ("web-db", "web-outside")
# The node's own answers leave by the output hook, where nothing is judged.
TO_NODE = {Kind.TCP_UP, Kind.UDP_UP}
BOTH_WAYS = set(Kind) - ERRORS


@dataclass(frozen=True, slots=True)
class Change:
    """A change of the world that forbids connections between pairs of ends, and how the agent comes to know it.

    ``others`` is how many connections the node tracks beside those.
    """

    title: str
    pairs: tuple[str, ...]
    allowed: list[Manifest] = field(repr=False)
    forbidden: list[Manifest] = field(repr=False)
    by: Callable[[Stage, list[Manifest]], None] = Stage.settle
    others: int = 0


def restart(stage: Stage, objects: list[Manifest], *damage: str) -> None:
    """Change the world while no agent runs."""
    stage.lab.stop_agent(kill=True)
    if damage:
        stage.lab.nft(*damage)
    write(stage.source, objects)
    stage.lab.start_agent()


def restart_without_table(stage: Stage, objects: list[Manifest]) -> None:
    restart(stage, objects, "delete", "table", "inet", "drawbridge")


def db(*peers: Manifest) -> Manifest:
    return policy("x/db", {"app": "db"}, ingress=list(peers))


def web(*peers: Manifest) -> Manifest:
    return policy("y/web", {"app": "web"}, egress=list(peers))


OUT, HOST = blocks(OUTSIDE), blocks(NODE)
OPEN, SHUT = db(WEB, *OUT), db()
TIERS = policy("x/open", {"tier": "open"}, ingress=[WEB, *OUT]), policy("x/shut", {"tier": "shut"}, ingress=[])
CHANGES = [
    Change("ingress policy edited", (*INGRESS, "web-db by service", "outside-db by local", "outside-db by cluster"),
           world(OPEN), world(SHUT)),
    Change("ingress ports edited", INGRESS, world(OPEN),
           world(policy("x/db", {"app": "db"}, ingress=[WEB, *OUT], ports=range(9000, 9999)))),
    Change("ingress policy added", INGRESS, world(), world(SHUT)),
    Change("ingress policy removed", INGRESS, world(SHUT, policy("x/more", {"app": "db"}, ingress=[WEB, *OUT])),
           world(SHUT)),
    Change("client relabelled", ("web-db",), world(OPEN), world(OPEN, web="other")),
    Change("client's namespace relabelled", ("web-db",), world(OPEN), world(OPEN, team="none")),
    Change("server moves to another policy", INGRESS,
           world(*TIERS, tier="open"), world(*TIERS, tier="shut")),
    Change("client's address moves on another node", ("outside-db",), world(db(WEB), far="web"),
           world(db(WEB), far="other")),
    Change("egress policy edited", (*EGRESS, "web-node", "web-db by service"), world(web(DB, *OUT, *HOST)),
           world(web())),
    Change("egress policy added", EGRESS, world(), world(web())),
    Change("egress policy removed", EGRESS, world(web(), policy("y/more", {"app": "web"}, egress=[DB, *OUT])),
           world(web())),
    Change("server relabelled", ("web-db",), world(web(DB)), world(web(DB), db="other")),
    Change("server's address moves on another node", ("web-outside",), world(web(pods("db", team="a")), far="db"),
           world(web(pods("db", team="a")), far="other")),
    Change("agent restarted", INGRESS, world(OPEN), world(SHUT), restart),
    Change("agent restarted without its table", INGRESS, world(OPEN), world(SHUT), restart_without_table),
    Change("ingress policy edited beside 10000 connections", INGRESS, world(OPEN), world(SHUT), others=10_000),
    Change("ingress policy edited beside 200000 connections", INGRESS, world(OPEN), world(SHUT), others=200_000),
]  # fmt: skip


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with Stage(tmp_path_factory.mktemp("stage")) as made:
        yield made


@pytest.fixture
def connector(stage: Stage) -> Iterator[Connector]:
    with Connector(stage.lab) as made:
        yield made


@pytest.fixture(scope="module", params=CHANGES, ids=lambda change: change.title)
def seen(request: pytest.FixtureRequest, stage: Stage) -> Observation:
    """A change that is made and taken back under packets of all kinds."""
    change: Change = request.param
    stage.settle(change.allowed)
    ours = stage.fresh(CUT)
    with Connector(stage.lab) as connector, stage.others(change.others):
        cut, kept = (
            [flow for pair in change.pairs for flow in stage.flows(connector, ports, [pair], kinds_of(pair) - without)]
            for ports, without in ((CUT, set()), (KEPT, {Kind.UDP_UP, Kind.UDP_DOWN}))
        )
        made = observe([stage.watch], cut=cut, kept=kept, ready=lambda: all(stamps(stage.lab, ours)),
                       tighten=lambda: change.by(stage, change.forbidden),
                       loosen=lambda: stage.settle(change.allowed))  # fmt: skip
    print(f"{change.title}: {made}")
    return made


def kinds_of(pair: str) -> set[Kind]:
    if pair.endswith("-node"):
        return TO_NODE
    return BOTH_WAYS if " by " in pair else set(Kind)


def test_connections_that_are_allowed_are_stamped(seen: Observation) -> None:
    assert seen.ready


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
@pytest.mark.parametrize("kind", Kind, ids=lambda kind: kind.value)
def test_no_packet_of_a_forbidden_flow_passes_after_the_commit(seen: Observation, kind: Kind, family: int) -> None:
    assert seen.too_late(flow for flow in seen.cut if (flow.kind, flow.family) == (kind, family)) == {}


def test_once_status_says_so_nothing_of_a_forbidden_flow_passes_the_node(seen: Observation) -> None:
    assert seen.came > 0
    assert seen.passed == 0


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
def test_an_allowed_flow_loses_no_packet_while_others_are_forbidden(seen: Observation, family: int) -> None:
    assert {flow: lost for flow, lost in seen.lost.items() if flow.family == family} == {}


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
def test_flows_go_on_by_themselves_when_they_are_allowed_again(seen: Observation, family: int) -> None:
    assert [flow for flow in seen.dead if flow.family == family] == []


def deny_all(namespace: str) -> Manifest:
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "deny-all", "namespace": namespace},
            "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}}  # fmt: skip


@pytest.mark.parametrize("side", ["client", "server"])
def test_a_pod_that_gets_an_address_which_another_had_inherits_no_connection(
    stage: Stage, connector: Connector, side: str
) -> None:
    if side == "client":
        of, closed, opened = "y", OPEN, db(pods("other", team="a"))
    else:
        of, closed, opened = "x", web(DB), web(pods("other", team="b"))
    stage.settle(world(closed))
    former = attach(stage.lab, f"{of}/former")
    ends = (former, stage.ends["db"]) if side == "client" else (stage.ends["web"], former)
    kept = stage.flows(connector, KEPT, ["web-db"], [Kind.UDP_BOTH])
    made = [(kind, family, connector.connect(kind, *ends, family, stage.port(CUT)))
            for kind in (Kind.UDP_BOTH, Kind.TCP_UP, Kind.TCP_DOWN) for family in FAMILIES]  # fmt: skip
    detach(stage.lab, former.key)
    later = attach(stage.lab, f"{of}/later", *former.addresses)
    flows: list[Flow] = []
    for kind, family, (near, far) in made:
        over = (connector.take_over(near, later), far) if side == "client" else (near, connector.take_over(far, later))
        flows += flows_between(f"{side} is another", kind, family, over)
    with Source(*flows, *kept):
        nothing_passes([stage.watch], flows, kept)
        stage.settle(world(opened))
        assert silent(flows, time.monotonic_ns()) == []
    detach(stage.lab, later.key)


@pytest.mark.parametrize("damage", ["delete table inet drawbridge", "flush ruleset"])
def test_a_flow_that_began_while_the_table_was_gone_is_judged_once_it_is_back(
    stage: Stage, connector: Connector, damage: str
) -> None:
    stage.settle(world(SHUT))
    # With no table at all nothing is tracked, and who sends first once there is one has begun the connection.
    kinds = [Kind.UDP_UP] if damage == "flush ruleset" else list(Kind)
    kept = stage.flows(connector, KEPT, INGRESS, [Kind.TCP_UP, Kind.TCP_DOWN, Kind.UDP_BOTH])
    with contextlib.ExitStack() as sources:
        with paused(stage):
            stage.lab.nft(*damage.split())
            cut = stage.flows(connector, CUT, INGRESS, kinds)
            if damage == "flush ruleset":
                stage.add_tables()
            # From here on: the kernel itself may drop a packet while it deletes a table with base chains.
            others = sources.enter_context(Source(*kept))
        with Source(*cut):
            wait_for(lambda: "chain to-pod" in stage.lab.nft("list", "ruleset"), "the table is back")
            assert stage.lab.status()["synced"]
            nothing_passes([stage.watch], cut, kept)
            stage.settle(world(OPEN))
            assert silent(cut, time.monotonic_ns()) == []
        assert others.losses(kept) == {}


def test_an_agent_that_starts_without_its_table_trusts_no_stamp_that_it_finds(
    stage: Stage, connector: Connector
) -> None:
    stage.settle(world())
    kept = stage.flows(connector, KEPT, INGRESS, [Kind.UDP_BOTH])
    stage.lab.stop_agent(kill=True)
    stage.lab.nft("delete", "table", "inet", "drawbridge")
    ours = stage.fresh(CUT)
    values = range(1 << 24, 1 << 32, 1 << 24)
    marks = ", ".join(f"{port} : {value:#x}" for port, value in zip(ours, values, strict=False))
    nft(stage.lab, f"table inet marks {{ chain c {{ type filter hook forward priority 0\n"
                   f"ct mark set udp dport map {{ {marks} }}\n}}\n}}\n")  # fmt: skip
    ends = stage.ends["web"], stage.ends["db"]
    flows = [flow for _ in values for flow in
             connector.flows(Kind.UDP_UP, *ends, 4, stage.port(CUT), name="stamped")]  # fmt: skip
    nft(stage.lab, "delete table inet marks\n")
    assert set(stamps(stage.lab, ours)) == set(values)
    write(stage.source, world(SHUT))
    of_pods = stage.fresh(KEPT)
    with Source(*flows, *kept, interval=0.02):
        stage.lab.start_agent()
        allowed = stage.flows(connector, KEPT, INGRESS, [Kind.UDP_BOTH])
        with Source(*allowed):
            wait_for(lambda: all(stamps(stage.lab, of_pods)), "stamps are written again")
        nothing_passes([stage.watch], flows, kept)
        stage.settle(world(OPEN))
        assert silent(flows, time.monotonic_ns()) == []


@contextlib.contextmanager
def paused(stage: Stage) -> Iterator[None]:
    """Have the agent do nothing for the body."""
    os.kill(stage.lab.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(stage.lab.pid, signal.SIGCONT)


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
def test_what_the_node_itself_has_begun_passes_though_the_pod_is_closed_and_carries_no_stamp(
    stage: Stage, connector: Connector, family: int
) -> None:
    stage.settle(world(OPEN))
    of_node, of_pods = stage.fresh(CUT), stage.fresh(KEPT)
    flows = stage.flows(connector, CUT, ["node-db"], BOTH_WAYS, [family])
    beside = stage.flows(connector, KEPT, ["web-db"], [Kind.UDP_BOTH], [family])
    with Source(*flows, *beside) as source:
        for policies in ([deny_all("x")], [SHUT], [deny_all("x")], [OPEN]):
            stage.settle(world(*policies))
            assert silent(flows, time.monotonic_ns()) == []
        wait_for(lambda: all(stamps(stage.lab, of_pods)), "what pods have begun is stamped")
        assert set(stamps(stage.lab, of_node)) == {0}
        assert source.losses(flows) == {}


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
def test_what_a_pod_has_begun_with_its_node_comes_back_though_the_pod_is_closed_for_ingress(
    stage: Stage, connector: Connector, family: int
) -> None:
    closed = deny_all("y") | {"spec": {"podSelector": {}, "policyTypes": ["Ingress"]}}
    stage.settle(world(closed, web(*HOST)))
    flows = stage.flows(connector, CUT, ["web-node"], BOTH_WAYS, [family])
    with Source(*flows) as source:
        for policies in ([closed, web(DB, *HOST)], [closed], [closed, web(*HOST)]):
            stage.settle(world(*policies))
            assert silent(flows, time.monotonic_ns()) == []
        assert source.losses(flows) == {}


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
def test_a_pod_reaches_itself_by_a_service_under_any_policy(stage: Stage, connector: Connector, family: int) -> None:
    stage.settle(world(deny_all("x")))
    flows = stage.flows(connector, CUT, ["db-db by service"], BOTH_WAYS, [family])
    with Source(*flows) as source:
        for policies in ([OPEN], [SHUT], [deny_all("x")]):
            stage.settle(world(*policies))
            assert silent(flows, time.monotonic_ns()) == []
        assert source.losses(flows) == {}


@pytest.mark.parametrize("direction", ["ingress", "egress"])
def test_a_policy_on_the_pods_port_matches_what_a_service_translates_and_one_on_the_services_port_does_not(
    stage: Stage, direction: str
) -> None:
    for port, allowed in ((80, False), (8080, True), (80, False)):
        only = range(port, port + 1)
        stage.settle(world(policy("x/db", {"app": "db"}, ingress=[WEB], ports=only) if direction == "ingress" else
                           policy("y/web", {"app": "web"}, egress=[DB], ports=only)))  # fmt: skip
        for address in SERVICE:
            assert stage.lab.connects(stage.ends["web"], address, 80, seconds=5 if allowed else 0.2) is allowed


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
@pytest.mark.parametrize("pair", ["web-db", "outside-db", "web-outside", "web-node"])
def test_an_error_about_an_idle_connection_passes_though_other_permissions_have_gone_since(
    stage: Stage, connector: Connector, pair: str, family: int
) -> None:
    more, less = (policy("x/more", {"app": "db"}, ingress=peers, ports=range(9000, 9001)) for peers in ([WEB], []))
    stage.settle(world(OPEN, web(DB, *OUT, *HOST), more))
    client, server = (stage.ends[name] for name in pair.split("-"))
    flows = connector.idle_errors(client, server, family, stage.port(CUT), name=pair)
    stage.settle(world(OPEN, web(DB, *OUT, *HOST), less))
    with Source(*flows):
        assert silent(flows, time.monotonic_ns(), seconds=2) == []


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
def test_a_packet_of_no_connection_neither_reaches_a_closed_pod_nor_leaves_one(
    stage: Stage, connector: Connector, family: int
) -> None:
    stage.settle(world(deny_all("x")))
    kept = stage.flows(connector, KEPT, ["web-node"], [Kind.UDP_BOTH], [family])
    strays = [connector.stray_errors(*ends, family, stage.port(CUT)) for ends in
              ((stage.ends["web"], stage.ends["db"]), (stage.ends["db"], stage.ends["web"]))]  # fmt: skip
    with Source(*strays, *kept):
        assert silent(kept, time.monotonic_ns() + 20_000_000) == []
        assert all(flow.sent for flow in strays)
        assert [flow for flow in strays if flow.arrived()] == []


@contextlib.contextmanager
def untracked(stage: Stage) -> Iterator[None]:
    """Have the node not track UDP with ports ``CUT``, as it is done for the node's own DNS server."""
    rules = "".join(f"meta l4proto udp th {end} {CUT.start}-{CUT.stop - 1} notrack\n" for end in ("dport", "sport"))
    chains = "".join(
        f"chain {hook} {{ type filter hook {hook} priority raw\n{rules}}}\n" for hook in ("prerouting", "output")
    )
    nft(stage.lab, f"table inet untracked {{\n{chains}}}\n")
    try:
        yield
    finally:
        nft(stage.lab, "delete table inet untracked\n")


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
def test_what_is_not_tracked_passes_no_closed_pod(stage: Stage, connector: Connector, family: int) -> None:
    stage.settle(world())
    with untracked(stage):
        flows = stage.flows(connector, CUT, INGRESS, [Kind.UDP_BOTH], [family])
        kept = stage.flows(connector, KEPT, ["web-node"], [Kind.UDP_BOTH], [family])
        with Source(*flows, *kept):
            stage.settle(world(deny_all("x")))
            nothing_passes([stage.watch], flows, kept)
            stage.settle(world())
            assert silent(flows, time.monotonic_ns()) == []


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
def test_what_is_not_tracked_on_its_way_to_the_node_follows_egress_policy(
    stage: Stage, connector: Connector, family: int
) -> None:
    stage.settle(world(web(*HOST)))
    with untracked(stage):
        flows = stage.flows(connector, CUT, ["web-node"], [Kind.UDP_UP], [family])
        kept = stage.flows(connector, KEPT, ["web-node"], [Kind.UDP_BOTH], [family])
        with Source(*flows, *kept):
            # With stamps and, some time after a change, without.
            assert silent(flows, time.monotonic_ns() + 500_000_000) == []
            stage.settle(world(web()))
            nothing_passes([stage.watch], flows, kept)
            stage.settle(world(web(*HOST)))
            assert silent(flows, time.monotonic_ns()) == []
