"""Connections between pods of several nodes, directly and by the tunnel, obey the policy of this instant, too."""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest

from enforcer.demo.lab import NETNS, Pod
from tests.e2e.site import Place, Site, seen_from
from tests.support.connect import Connector, flows_between, stamps
from tests.support.flow import ERRORS, FAMILIES, Flow, Kind, Source, silent
from tests.support.observation import Observation, nothing_passes, observe
from tests.support.stage import KEPT, Manifest, attach, blocks, detach, namespace, pod, pods, policy, write
from tests.support.watch import CUT, Watch

pytestmark = pytest.mark.netns
ROUTER = ("10.8.1.254", "fd08:1::fe")
# An error about a connection with a translated address is not as easily made.
TRANSLATED = set(Kind) - ERRORS
DB, NEAR, FAR = pods("db", team="b"), pods("near", team="a"), pods("far", team="a")


@dataclass(frozen=True, slots=True)
class Change:
    """A change that forbids connections between pairs of ends, and the nodes that have to enforce it."""

    title: str
    pairs: list[str]
    enforced: str
    allowed: list[Manifest] = field(repr=False)
    forbidden: list[Manifest] = field(repr=False)
    labels: dict[str, str] = field(default_factory=dict)
    kinds: set[Kind] = field(default_factory=lambda: set(Kind))


class Nodes:
    """Node a with a database; node b beside it with clients; node c behind a router, by the tunnel, with another."""

    def __init__(self, site: Site) -> None:
        self.site = site
        self.pods: dict[str, Pod] = {}
        self.watches: dict[str, Watch] = {}
        self._ports = {CUT: itertools.count(CUT.start), KEPT: itertools.count(KEPT.start)}

    def world(self, *policies: Manifest, near: str = "near", far: str = "far", later: str = "") -> list[Manifest]:
        """All objects but the nodes; the pods ``near`` and ``far`` may have other labels.

        The pod ``later`` has the addresses of ``former`` if ``later`` says what its label is; else ``former`` has them.
        """
        turn = self._pod("y/later", "b", later) if later else self._pod("y/former", "b", "near")
        return [namespace("x", team="b"), namespace("y", team="a"), self._pod("x/db", "a", "db"),
                self._pod("y/near", "b", near), self._pod("y/far", "c", far), turn, *policies]  # fmt: skip

    def _pod(self, key: str, node: str, app: str) -> Manifest:
        had = self.pods.get("y/former" if key == "y/later" else key)
        return pod(key, *(had.addresses if had else ()), node=self.site.name(node), app=app)

    def settle(self, objects: list[Manifest]) -> None:
        """Have all agents take in a world, and return when the kernels have it."""
        write(self.site.manifests, objects)
        self.site.settle()

    def port(self, of: range) -> int:
        """A port that no connection has used yet."""
        return next(self._ports[of])

    def flows(self, connector: Connector, of: range, pairs: list[str], kinds: set[Kind]) -> list[Flow]:
        """A connection of each kind and family between each pair of ends, to ports of a range."""
        ends = {key.partition("/")[2]: found for key, found in self.pods.items()}
        return [flow for pair, kind, family in itertools.product(pairs, kinds, FAMILIES)
                for client, server in [pair.split("-")]
                for flow in connector.flows(kind, ends[client], ends[server], family, self.port(of),
                                            name=pair)]  # fmt: skip


def db(*peers: Manifest) -> Manifest:
    return policy("x/db", {"app": "db"}, ingress=list(peers))


def clients(*peers: Manifest) -> Manifest:
    return policy("y/clients", {}, egress=list(peers))


def to_outside(*peers: Manifest) -> Manifest:
    return policy("x/db", {"app": "db"}, egress=list(peers))


PAIRS = ["near-db", "far-db"]
CHANGES = [
    Change("ingress policy edited", PAIRS, "a", [db(NEAR, FAR)], [db()]),
    Change("clients relabelled", PAIRS, "a", [db(NEAR, FAR)], [db(NEAR, FAR)], labels={"near": "no", "far": "no"}),
    Change("egress policy edited", PAIRS, "bc", [clients(DB)], [clients()]),
    Change("egress policy of a masqueraded connection edited", ["db-router"], "a", [to_outside(*blocks(ROUTER))],
           [to_outside()], kinds=TRANSLATED),
]  # fmt: skip


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nodes]:
    with contextlib.ExitStack() as stack:
        site = stack.enter_context(Site(tmp_path_factory.mktemp("site")))
        for short, place in (("a", Place(1, 1)), ("b", Place(1, 2)), ("c", Place(2, 1))):
            site.add(short, place)
        made = Nodes(site)
        made.settle(made.world())
        for key, short in (("x/db", "a"), ("y/near", "b"), ("y/far", "c")):
            made.pods[key] = site.labs[short].add_pod(key)
        made.settle(made.world())
        router = os.open(NETNS / site.router, os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, router)
        made.pods["/router"] = Pod("router", site.router, router, list(ROUTER))
        made.watches |= {short: stack.enter_context(Watch(lab)) for short, lab in site.labs.items()}
        yield made


@pytest.fixture(scope="module", params=CHANGES, ids=lambda change: change.title)
def seen(request: pytest.FixtureRequest, nodes: Nodes) -> Observation:
    """A change that is made and taken back under packets of all kinds."""
    change: Change = request.param
    allowed, forbidden = nodes.world(*change.allowed), nodes.world(*change.forbidden, **change.labels)
    nodes.settle(allowed)
    ours = range(nodes.port(CUT) + 1, CUT.stop)
    with Connector(nodes.site.labs["a"]) as connector:
        cut = nodes.flows(connector, CUT, change.pairs, change.kinds)
        kept = nodes.flows(connector, KEPT, change.pairs, change.kinds - {Kind.UDP_UP, Kind.UDP_DOWN})
        made = observe([nodes.watches[short] for short in change.enforced], cut=cut, kept=kept,
                       ready=lambda: all(all(stamps(nodes.site.labs[short], ours)) for short in change.enforced),
                       tighten=lambda: nodes.settle(forbidden), loosen=lambda: nodes.settle(allowed))  # fmt: skip
    print(f"{change.title}: {made}")
    return made


def test_connections_that_are_allowed_are_stamped_by_the_node_that_enforces(seen: Observation) -> None:
    assert seen.ready


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
def test_no_packet_of_a_forbidden_flow_passes_after_the_commit(seen: Observation, family: int) -> None:
    assert seen.too_late(flow for flow in seen.cut if flow.family == family) == {}


def test_once_status_says_so_nothing_of_a_forbidden_flow_passes_the_node_that_enforces(seen: Observation) -> None:
    assert seen.came > 0
    assert seen.passed == 0


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
def test_an_allowed_flow_loses_no_packet_while_others_are_forbidden(seen: Observation, family: int) -> None:
    assert {flow: lost for flow, lost in seen.lost.items() if flow.family == family} == {}


@pytest.mark.parametrize("family", FAMILIES, ids="ipv{}".format)
def test_flows_go_on_by_themselves_when_they_are_allowed_again(seen: Observation, family: int) -> None:
    assert [flow for flow in seen.dead if flow.family == family] == []


def test_what_leaves_the_cluster_is_masqueraded(nodes: Nodes) -> None:
    nodes.settle(nodes.world())
    lab, router = nodes.site.labs["a"], nodes.pods["/router"]
    for address, seen_by in zip(ROUTER, nodes.site.places["a"].addresses, strict=True):
        assert seen_from(lab, nodes.pods["x/db"], router, address) == seen_by


def test_a_pod_that_gets_an_address_which_another_had_on_another_node_inherits_no_connection(nodes: Nodes) -> None:
    there, server = nodes.site.labs["b"], nodes.pods["x/db"]
    former = nodes.pods["y/former"] = attach(there, "y/former")
    nodes.settle(nodes.world(db(NEAR)))
    with Connector(nodes.site.labs["a"]) as connector:
        kept = nodes.flows(connector, KEPT, ["near-db"], {Kind.UDP_BOTH})
        made = [(kind, family, connector.connect(kind, former, server, family, nodes.port(CUT)))
                for kind in (Kind.UDP_BOTH, Kind.TCP_UP, Kind.TCP_DOWN) for family in FAMILIES]  # fmt: skip
        detach(there, former.key)
        later = attach(there, "y/later", *former.addresses)
        nodes.settle(nodes.world(db(NEAR), later="other"))
        flows: list[Flow] = []
        for kind, family, (near, far) in made:
            flows += flows_between("client is another", kind, family, (connector.take_over(near, later), far))
        with Source(*flows, *kept):
            nothing_passes([nodes.watches["a"]], flows, kept)
            nodes.settle(nodes.world(db(NEAR, pods("other", team="a")), later="other"))
            assert silent(flows, time.monotonic_ns()) == []
    detach(there, later.key)
    del nodes.pods["y/former"]
