"""Hypothesis strategies: small clusters in which selectors, ports and addresses meet often."""

from __future__ import annotations

from hypothesis import strategies as st

from enforcer.model.addresses import Network, parse_address
from enforcer.model.objects import (
    ContainerPort,
    Direction,
    IPBlock,
    NetworkPolicy,
    PodPeer,
    PolicyPort,
    PolicyRule,
    Protocol,
)
from enforcer.model.selectors import EVERYTHING, LabelSelector, Operator, Requirement
from enforcer.policy.endpoints import Endpoint, Standing

NAMESPACES = ["x", "y"]
KEYS = ["app", "tier"]
VALUES = ["a", "b"]
ADDRESSES = [parse_address(f"10.0.0.{n}") for n in range(1, 7)] + [parse_address(f"fd00::{n}") for n in range(1, 5)]

labels = st.dictionaries(st.sampled_from(KEYS), st.sampled_from(VALUES))


@st.composite
def requirements(draw: st.DrawFn) -> Requirement:
    operator = draw(st.sampled_from(Operator))
    values: tuple[str, ...] = ()
    if operator in {Operator.IN, Operator.NOT_IN}:
        values = tuple(sorted(draw(st.sets(st.sampled_from(VALUES), min_size=1))))
    return Requirement(draw(st.sampled_from(KEYS)), operator, values)


# Most selectors select something, else policies would seldom meet.
selectors = st.just(EVERYTHING) | st.lists(requirements(), max_size=2).map(lambda found: LabelSelector.of(*found))
networks = st.sampled_from(
    ["10.0.0.0/29", "10.99.0.2/31", "fd99::2/127", "10.0.0.4/30", "10.0.0.2/32", "0.0.0.0/0", "::/0", "fd00::/126"]
).map(Network.parse)


@st.composite
def ip_blocks(draw: st.DrawFn) -> IPBlock:
    cidr = draw(networks)
    inside = [n for n in map(Network.parse, ["10.0.0.0/30", "10.0.0.3/32", "10.0.0.4/31", "fd00::2/127"])
              if cidr.covers(n) and n != cidr]  # fmt: skip
    return IPBlock(cidr, tuple(draw(st.lists(st.sampled_from(inside), max_size=2))) if inside else ())


peers = st.one_of(ip_blocks(), st.builds(PodPeer, st.none() | selectors, selectors))
protocols = st.sampled_from([Protocol.TCP, Protocol.TCP, *Protocol])


@st.composite
def policy_ports(draw: st.DrawFn) -> PolicyPort:
    port = draw(st.sampled_from([None, 80, 81, "web", "dns"]))
    end = draw(st.sampled_from([None, 82])) if isinstance(port, int) else None
    return PolicyPort(draw(protocols), port, end)


rules = st.builds(PolicyRule, st.lists(peers, max_size=2).map(tuple), st.lists(policy_ports(), max_size=3).map(tuple))
policies = st.builds(
    NetworkPolicy,
    st.sampled_from(NAMESPACES),
    st.sampled_from(["p", "q"]),
    selectors,
    st.dictionaries(st.sampled_from(Direction), st.lists(rules, max_size=2).map(tuple), min_size=1),
    st.sampled_from([None, None, None, "spec: no good"]),
)
container_ports = st.builds(ContainerPort, st.sampled_from(["web", "dns"]), protocols, st.sampled_from([80, 81, 53]))


@st.composite
def endpoints(draw: st.DrawFn) -> Endpoint:
    namespace = draw(st.sampled_from(NAMESPACES))
    return Endpoint(
        f"{namespace}/{draw(st.sampled_from(['m', 'n', 'o']))}",
        namespace,
        tuple(draw(st.lists(st.sampled_from(ADDRESSES), min_size=1, max_size=2, unique=True))),
        local=draw(st.booleans()),
        standing=draw(st.sampled_from([Standing.POD, Standing.POD, Standing.POD, *Standing])),
        labels=draw(labels),
        ports=tuple(draw(st.lists(container_ports, max_size=2))),
    )
