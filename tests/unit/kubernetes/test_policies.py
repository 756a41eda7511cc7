"""NetworkPolicies: validated as the API server does, and closed where it would refuse them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from enforcer.kubernetes.decoding import decode
from enforcer.model.addresses import Network
from enforcer.model.changes import Rejection
from enforcer.model.objects import (
    Direction,
    IPBlock,
    NetworkPolicy,
    PodPeer,
    PolicyPort,
    PolicyRule,
    Protocol,
)
from enforcer.model.selectors import EVERYTHING, LabelSelector, Operator, Requirement

WEB = LabelSelector.of(Requirement("app", Operator.IN, ("web",)))
INGRESS, EGRESS = Direction.INGRESS, Direction.EGRESS
EVERY_RULE = (PolicyRule(),)


def body(spec: Any, **metadata: Any) -> dict[str, Any]:
    meta = {"name": "p", "namespace": "shop", **metadata}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": spec}


def decoded(whole: dict[str, Any]) -> NetworkPolicy:
    (value,) = decode(whole)
    assert decode(json.dumps(whole).encode()) == [value], "JSON and YAML read the same"
    assert isinstance(value, NetworkPolicy)
    return value


def from_peer(peer: Any) -> dict[str, Any]:
    return {"podSelector": {}, "ingress": [{"from": [peer]}]}


def to_port(port: Any) -> dict[str, Any]:
    return {"podSelector": {}, "egress": [{"ports": [port]}]}


def block(cidr: Any, *excepts: Any) -> dict[str, Any]:
    return from_peer({"ipBlock": {"cidr": cidr, "except": list(excepts)}})


def expression(**fields: Any) -> dict[str, Any]:
    return {"podSelector": {"matchExpressions": [fields]}}


PEER, PORT, EXPRESSION = "spec.ingress[0].from[0]", "spec.egress[0].ports[0]", "spec.podSelector.matchExpressions[0]"

REFUSED = [
    (block("10.0.0.0/33"), f"{PEER}.ipBlock.cidr: '10.0.0.0/33' is no CIDR"),
    (block("10.0.0.1"), f"{PEER}.ipBlock.cidr: '10.0.0.1' is no CIDR"),
    (block("010.0.0.0/8"), f"{PEER}.ipBlock.cidr: '010.0.0.0/8' is no CIDR"),
    (block("fe80::%eth0/64"), f"{PEER}.ipBlock.cidr: 'fe80::%eth0/64' is no CIDR"),
    (block(""), f"{PEER}.ipBlock.cidr: must be given"),
    (block(8), f"{PEER}.ipBlock.cidr: expected str | null, got int"),
    (block("10.1.0.0/16", "10.2.0.0/16"), f"{PEER}.ipBlock.except[0]: 10.2.0.0/16 is not within 10.1.0.0/16"),
    (block("10.1.0.0/16", "::/0"), f"{PEER}.ipBlock.except[0]: ::/0 is not within 10.1.0.0/16"),
    (block("10.1.0.0/16", "10.0.0.0/8"), f"{PEER}.ipBlock.except[0]: 10.0.0.0/8 is not within 10.1.0.0/16"),
    (
        block("10.1.0.0/16", "10.1.2.0/24", "10.1.3.4/16"),
        f"{PEER}.ipBlock.except[1]: 10.1.0.0/16 leaves nothing of 10.1.0.0/16: it must be a strict subset",
    ),
    (block("10.1.0.0/16", "x"), f"{PEER}.ipBlock.except[0]: 'x' is no CIDR"),
    (from_peer({}), f"{PEER}: must specify a peer"),
    (from_peer({"podSelector": None}), f"{PEER}: must specify a peer"),
    (from_peer(None), f"{PEER}: expected object, got null"),
    (
        from_peer({"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": {}}),
        f"{PEER}: may not specify both ipBlock and another peer",
    ),
    (
        from_peer({"ipBlock": {"cidr": "10.0.0.0/8"}, "namespaceSelector": {}}),
        f"{PEER}: may not specify both ipBlock and another peer",
    ),
    (
        from_peer({"namespaceSelector": {"matchLabels": {"-": "x"}}}),
        f"{PEER}.namespaceSelector.matchLabels: '-' is no label key",
    ),
    (from_peer({"ipBlock": {"cidr": "::ffff:0:0/96"}}), f"{PEER}.ipBlock.cidr: '::ffff:0:0/96' is no CIDR"),
    (to_port({"port": 0}), f"{PORT}.port: 0 is not in 1-65535"),
    (to_port({"port": 65536}), f"{PORT}.port: 65536 is not in 1-65535"),
    (to_port({"port": "80"}), f"{PORT}.port: '80' is no port name"),
    (to_port({"port": "a--b"}), f"{PORT}.port: 'a--b' is no port name"),
    (to_port({"port": "sixteen-letters-"}), f"{PORT}.port: 'sixteen-letters-' is no port name"),
    (to_port({"port": ""}), f"{PORT}.port: '' is no port name"),
    (to_port({"port": True}), f"{PORT}.port: expected int | str | null, got bool"),
    (to_port({"port": 80, "endPort": 79}), f"{PORT}.endPort: 79 is below port 80"),
    (to_port({"port": 80, "endPort": 65536}), f"{PORT}.endPort: 65536 is not in 1-65535"),
    (to_port({"endPort": 80}), f"{PORT}.endPort: may not be given without port"),
    (to_port({"port": "http", "endPort": 80}), f"{PORT}.endPort: may not be given with a named port"),
    (to_port({"protocol": "ICMP"}), f"{PORT}.protocol: 'ICMP' is none of TCP, UDP, SCTP"),
    (to_port({"protocol": "tcp"}), f"{PORT}.protocol: 'tcp' is none of TCP, UDP, SCTP"),
    (to_port({"protocol": ""}), f"{PORT}.protocol: '' is none of TCP, UDP, SCTP"),
    (to_port({"prot": 53}), f"{PORT}: unknown field prot"),
    (expression(key="a", operator="Is"), f"{EXPRESSION}.operator: 'Is' is none of In, NotIn, Exists, DoesNotExist"),
    (expression(key="a", operator="In"), f"{EXPRESSION}.values: must be given with In"),
    (expression(key="a", operator="NotIn", values=[]), f"{EXPRESSION}.values: must be given with NotIn"),
    (expression(key="a", operator="Exists", values=["x"]), f"{EXPRESSION}.values: must not be given with Exists"),
    (
        expression(key="a", operator="DoesNotExist", values=["x"]),
        f"{EXPRESSION}.values: must not be given with DoesNotExist",
    ),
    (expression(operator="Exists"), f"{EXPRESSION}.key: '' is no label key"),
    (expression(key="a b", operator="Exists"), f"{EXPRESSION}.key: 'a b' is no label key"),
    (expression(key="a", operator="In", values=["a", "-"]), f"{EXPRESSION}.values[1]: '-' is no label value"),
    ({"podSelector": {"matchLabels": {"/x": "y"}}}, "spec.podSelector.matchLabels: '/x' is no label key"),
    ({"podSelector": {"matchLabels": {"UP/x": "y"}}}, "spec.podSelector.matchLabels: 'UP/x' is no label key"),
    ({"podSelector": {"matchLabels": {"x": "y\n"}}}, "spec.podSelector.matchLabels['x']: 'y\\n' is no label value"),
    ({"podSelector": {"matchLabels": {"x": 1}}}, "spec.podSelector.matchLabels[...]: expected str, got int"),
    ({"podSelector": []}, "spec.podSelector: expected object | null, got array"),
    ({"policyTypes": ["ingress"]}, "spec.policyTypes[0]: 'ingress' is none of Ingress, Egress"),
    ({"policyTypes": ["Ingress"] * 3}, "spec.policyTypes: may not hold more than two"),
    ({"policyTypes": "Ingress"}, "spec.policyTypes: expected array | null, got str"),
    ({"ingress": [{"from": "all"}]}, "spec.ingress[0].from: expected array | null, got str"),
    ({"ingress": [{"to": []}]}, "spec.ingress[0]: unknown field to"),
    ({"ingress": [None]}, "spec.ingress[0]: expected object, got null"),
    ({"egres": []}, "spec: unknown field egres"),
    ("all", "spec: expected object | null, got str"),
]


@pytest.mark.parametrize(("spec", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_what_the_api_server_refuses_is_rejected_with_a_reason_that_names_the_field(spec: Any, reason: str) -> None:
    policy = decoded(body(spec))
    assert policy.rejected == reason
    assert all(rules == () for rules in policy.rules.values())


def test_what_a_rule_says_twice_is_kept_once() -> None:
    peers = [{"podSelector": {}}, {"ipBlock": {"cidr": "10.0.0.0/8"}}]
    (rule,) = decoded(body({"ingress": [{"from": peers * 1000, "ports": [{}, {"port": 80}] * 1000}]})).rules[
        Direction.INGRESS
    ]
    assert (len(rule.peers), len(rule.ports)) == (2, 2)


def test_a_reason_names_five_errors_and_counts_the_others() -> None:
    spec = {"ingress": [{"ports": [{"port": 0}] * 20_000}]}
    reason = decoded(body(spec)).rejected
    assert reason is not None
    assert reason.count("is not in 1-65535") == 5
    assert reason.endswith("; and 19995 more")


def test_every_error_of_a_policy_is_in_its_reason() -> None:
    spec = {**from_peer({}), **to_port({"port": 0, "protocol": "X"}), "policyTypes": ["All"]}
    assert decoded(body(spec)).rejected == "; ".join(
        [
            f"{PEER}: must specify a peer",
            f"{PORT}.protocol: 'X' is none of TCP, UDP, SCTP",
            f"{PORT}.port: 0 is not in 1-65535",
            "spec.policyTypes[0]: 'All' is none of Ingress, Egress",
        ]
    )


BAD_INGRESS: dict[str, Any] = {"ingress": [{"from": [{}]}]}
WRONG_TYPE: dict[str, Any] = {"ingress": [{"from": 1}]}


@pytest.mark.parametrize("broken", [BAD_INGRESS, WRONG_TYPE], ids=["bad value", "wrong type"])
@pytest.mark.parametrize(
    ("spec", "closed"),
    [
        ({}, {INGRESS}),
        ({"egress": [{}]}, {INGRESS, EGRESS}),
        ({"egress": []}, {INGRESS}),
        ({"policyTypes": []}, {INGRESS}),
        ({"policyTypes": ["Egress"]}, {EGRESS}),
        ({"policyTypes": ["Egress", "Ingress"]}, {INGRESS, EGRESS}),
        ({"policyTypes": ["Egress", "?"]}, {INGRESS, EGRESS}),
    ],
)
def test_a_rejected_policy_closes_what_it_selects_in_the_directions_that_it_would_have_isolated(
    spec: dict[str, Any], closed: set[Direction], broken: dict[str, Any]
) -> None:
    policy = decoded(body({"podSelector": {"matchLabels": {"app": "web"}}, **spec, **broken}))
    assert policy.rejected
    assert policy.pod_selector == WEB
    assert policy.rules == dict.fromkeys(closed, ())


@pytest.mark.parametrize("selector", [[], {"matchLabels": {"app": "-"}}, {"matchLabel": {"app": "web"}}])
@pytest.mark.parametrize("broken", [BAD_INGRESS, WRONG_TYPE], ids=["bad value", "wrong type"])
def test_a_policy_whose_selector_is_invalid_closes_its_namespace(selector: Any, broken: dict[str, Any]) -> None:
    assert decoded(body({"podSelector": selector, **broken})).pod_selector is EVERYTHING


@pytest.mark.parametrize("spec", [[], "all", {"policyTypes": {"Egress": True}}, {"egres": [{}]}])
def test_a_policy_whose_types_cannot_be_read_closes_both_directions(spec: Any) -> None:
    assert decoded(body(spec)).rules == {INGRESS: (), EGRESS: ()}


@pytest.mark.parametrize("name", ["Web", "a" * 254, "x y", 'x"; flush ruleset', "", None, 7])
def test_a_policy_of_an_impossible_name_closes_its_pods_under_a_name_that_can_stand_in_a_ruleset(name: Any) -> None:
    policy = decoded(body({"podSelector": {"matchLabels": {"app": "web"}}}, name=name))
    assert policy.rejected
    assert policy.rejected.startswith("metadata.name: ")
    assert policy.name.startswith("invalid-")
    assert policy.pod_selector == WEB


def test_policies_without_a_name_close_what_each_of_them_selects() -> None:
    bodies = [
        {"podSelector": {"matchLabels": {"app": "web"}}},
        {"podSelector": {"matchLabels": {"app": "db"}}},
        {"podSelector": {"matchLabels": {"app": "db"}}, "policyTypes": ["Egress"]},
    ]
    assert len({decoded(body(spec, name=None)).key for spec in bodies}) == 3


@pytest.mark.parametrize(("kind", "whole"), [("networkpolicy", {}), ("NetworkpolicyList", {"items": [{}]})])
def test_a_policy_whose_kind_is_in_the_wrong_case_is_closed_not_passed_over(kind: str, whole: Any) -> None:
    policy = decoded({**body({}), **whole, "kind": kind})
    assert policy.rejected
    assert policy.rejected.startswith(f"kind: {kind.removesuffix('List')!r} is not NetworkPolicy")


@pytest.mark.parametrize("namespace", ["Shop", "a.b", "a" * 64, 7])
def test_a_policy_of_a_namespace_that_cannot_be_is_a_rejection(namespace: Any) -> None:
    whole = body({"podSelector": {}}, namespace=namespace)
    for form in (whole, json.dumps(whole).encode()):
        (value,) = decode(form)
        assert isinstance(value, Rejection)
        assert value.reason.startswith("metadata.namespace: ")


@pytest.mark.parametrize("version", ["extensions/v1beta1", "networking.k8s.io/v2", "v1", None])
def test_a_policy_of_a_version_that_is_not_served_is_closed_not_passed_over(version: str | None) -> None:
    policy = decoded({**body({"podSelector": {"matchLabels": {"app": "web"}}}), "apiVersion": version})
    assert policy.rejected == f"apiVersion: {version or ''!r} is not networking.k8s.io/v1"
    assert policy.pod_selector == WEB


@pytest.mark.parametrize("kind", ["NetworkPolicy", "NetworkPolicyList"])
def test_a_policy_of_another_group_is_not_ours(kind: str) -> None:
    whole = {**body({"selector": "all()"}), "apiVersion": "crd.projectcalico.org/v1", "kind": kind}
    assert decode(whole) == decode(json.dumps(whole).encode()) == []


@pytest.mark.parametrize(
    ("spec", "rules"),
    [
        (None, {INGRESS: ()}),
        ({}, {INGRESS: ()}),
        ({"podSelector": None, "ingress": None, "policyTypes": None}, {INGRESS: ()}),
        ({"ingress": []}, {INGRESS: ()}),
        ({"ingress": [{}]}, {INGRESS: EVERY_RULE}),
        ({"ingress": [{"from": [], "ports": None}]}, {INGRESS: EVERY_RULE}),
        ({"egress": []}, {INGRESS: ()}),
        ({"egress": [{"to": None}]}, {INGRESS: (), EGRESS: EVERY_RULE}),
        ({"policyTypes": ["Egress"], "ingress": [{}]}, {EGRESS: ()}),
        ({"policyTypes": ["Egress", "Egress"]}, {EGRESS: ()}),
        ({"policyTypes": ["Ingress"], "egress": [{}]}, {INGRESS: ()}),
    ],
)
def test_what_is_left_out_defaults_as_in_the_api(spec: Any, rules: Any) -> None:
    policy = decoded(body(spec))
    assert (policy.rejected, policy.pod_selector, dict(policy.rules)) == (None, EVERYTHING, rules)


def test_a_policy_without_namespace_is_in_default() -> None:
    assert decoded(body({}, namespace=None)).key == "default/p"


def test_every_field_of_a_policy_is_read() -> None:
    selector = {
        "matchLabels": {"app": "web"},
        "matchExpressions": [
            {"key": "tier", "operator": "In", "values": ["b", "a", "b"]},
            {"key": "env", "operator": "NotIn", "values": ["test"]},
            {"key": "example.com/x", "operator": "Exists"},
            {"key": "y", "operator": "DoesNotExist", "values": []},
        ],
    }
    spec = {
        "podSelector": selector,
        "policyTypes": ["Ingress", "Egress"],
        "ingress": [
            {
                "from": [
                    {"podSelector": {}},
                    {"namespaceSelector": {}, "podSelector": {"matchLabels": {"app": "web"}}},
                    {"namespaceSelector": {"matchLabels": {"app": "web"}}},
                    {"ipBlock": {"cidr": "10.0.0.1/8", "except": ["10.1.0.0/16", "10.2.0.0/16"]}},
                ],
                "ports": [
                    {"port": 80},
                    {"port": "http", "protocol": "UDP"},
                    {"protocol": "SCTP"},
                    {"port": 1, "endPort": 65535},
                    {},
                ],
            }
        ],
        "egress": [{"to": [{"ipBlock": {"cidr": "::/0", "except": None}}]}],
    }
    policy = decoded(body(spec, labels={"a": "b"}))
    assert policy == NetworkPolicy(
        "shop",
        "p",
        LabelSelector.of(
            Requirement("app", Operator.IN, ("web",)),
            Requirement("tier", Operator.IN, ("a", "b")),
            Requirement("env", Operator.NOT_IN, ("test",)),
            Requirement("example.com/x", Operator.EXISTS),
            Requirement("y", Operator.DOES_NOT_EXIST),
        ),
        {
            INGRESS: (
                PolicyRule(
                    (
                        PodPeer(None, EVERYTHING),
                        PodPeer(EVERYTHING, WEB),
                        PodPeer(WEB, EVERYTHING),
                        IPBlock(
                            Network.parse("10.0.0.0/8"), (Network.parse("10.1.0.0/16"), Network.parse("10.2.0.0/16"))
                        ),
                    ),
                    (
                        PolicyPort(Protocol.TCP, 80),
                        PolicyPort(Protocol.UDP, "http"),
                        PolicyPort(Protocol.SCTP),
                        PolicyPort(Protocol.TCP, 1, 65535),
                        PolicyPort(Protocol.TCP),
                    ),
                ),
            ),
            EGRESS: (PolicyRule((IPBlock(Network.parse("::/0")),)),),
        },
    )
