"""Pods, namespaces, nodes and lists; and that no body makes the decoder raise."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from enforcer.kubernetes import validation
from enforcer.kubernetes.decoding import Decoded, decode
from enforcer.model.addresses import Network, parse_address
from enforcer.model.changes import Rejection
from enforcer.model.objects import ContainerPort, Namespace, NetworkPolicy, Node, Pod, Protocol


def pod(**parts: Any) -> dict[str, Any]:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "web-0", "namespace": "shop"}, **parts}


def one(whole: dict[str, Any]) -> Decoded:
    (value,) = decode(whole)
    assert decode(json.dumps(whole).encode()) == [value], "JSON and YAML read the same"
    return value


def reason(whole: dict[str, Any]) -> str:
    value = one(whole)
    assert isinstance(value, Rejection)
    return value.reason


def test_every_field_of_a_pod_is_read() -> None:
    assert one(
        pod(
            metadata={"name": "web-0", "namespace": "shop", "uid": "u1", "labels": {"app": "web"}},
            spec={
                "nodeName": "n1",
                "containers": [
                    {"ports": [{"name": "http", "containerPort": 80}, {"containerPort": 81}]},
                    {"ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
                ],
                "initContainers": [
                    {"ports": [{"name": "once", "containerPort": 1}]},
                    {"ports": [{"name": "side", "containerPort": 15001}], "restartPolicy": "Always"},
                ],
            },
            status={"phase": "Running", "podIP": "10.0.0.9", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]},
        )
    ) == Pod(
        "shop",
        "web-0",
        uid="u1",
        labels={"app": "web"},
        node="n1",
        addresses=(parse_address("10.0.0.1"), parse_address("fd00::1")),
        ports=(
            ContainerPort("http", Protocol.TCP, 80),
            ContainerPort("dns", Protocol.UDP, 53),
            ContainerPort("side", Protocol.TCP, 15001),
        ),
    )


def test_what_a_pod_leaves_out_has_its_default() -> None:
    assert one(pod(metadata={"name": "a"})) == Pod("default", "a")
    assert one(pod(metadata={"name": "a", "labels": None, "uid": None}, spec=None, status=None)) == Pod("default", "a")


@pytest.mark.parametrize("phase", ["Succeeded", "Failed"])
def test_a_pod_that_ended_is_completed(phase: str) -> None:
    value = one(pod(status={"phase": phase}))
    assert isinstance(value, Pod)
    assert value.completed


def test_a_host_network_pod_says_so_and_a_single_address_is_enough() -> None:
    value = one(pod(spec={"hostNetwork": True}, status={"podIP": "10.0.0.9"}))
    assert isinstance(value, Pod)
    assert value.host_network
    assert value.addresses == (parse_address("10.0.0.9"),)


def ports(**port: Any) -> dict[str, Any]:
    return pod(spec={"containers": [{"ports": [port]}]})


PORT = "spec.containers[0].ports[0]"

REFUSED_PODS = [
    (pod(metadata={"name": "Web"}), "metadata.name: 'Web' is no DNS subdomain"),
    (pod(metadata={"name": "a" * 254}), f"metadata.name: '{'a' * 78}… is no DNS subdomain"),
    (pod(metadata={}), "metadata.name: must be given"),
    (pod(metadata={"name": "a", "namespace": "a.b"}), "metadata.namespace: 'a.b' is no DNS label"),
    (pod(metadata={"name": "a", "labels": {"x": "-"}}), "metadata.labels['x']: '-' is no label value"),
    (pod(metadata={"name": "a", "labels": {"x": True}}), "metadata.labels[...]: expected str, got bool"),
    (pod(spec={"nodeName": "n 1"}), "spec.nodeName: 'n 1' is no DNS subdomain"),
    (pod(status={"podIP": "10.0.0"}), "status.podIP: '10.0.0' is no IP address"),
    (pod(status={"podIPs": [{"ip": "fe80::1%eth0"}]}), "status.podIPs[0].ip: 'fe80::1%eth0' is no IP address"),
    (pod(status={"podIP": "::ffff:10.0.0.1"}), "status.podIP: '::ffff:10.0.0.1' is no IP address"),
    (pod(status={"podIPs": [{}]}), "status.podIPs[0].ip: '' is no IP address"),
    (ports(name="http", containerPort=0), f"{PORT}.containerPort: 0 is not in 1-65535"),
    (ports(name="HTTP", containerPort=1), f"{PORT}.name: 'HTTP' is no port name"),
    (ports(name="http", containerPort=1, protocol="X"), f"{PORT}.protocol: 'X' is none of TCP, UDP, SCTP"),
    (ports(name="http", containerPort="80"), f"{PORT}.containerPort: expected int | null, got str"),
    (pod(kind="pod"), "kind: 'pod' is not Pod"),
    (pod(apiVersion="v2"), "apiVersion: 'v2' is not v1"),
    (pod(spec=[]), "spec: expected object | null, got array"),
]


@pytest.mark.parametrize(("whole", "expected"), REFUSED_PODS, ids=[reason for _, reason in REFUSED_PODS])
def test_an_invalid_pod_is_a_rejection_that_names_the_field(whole: dict[str, Any], expected: str) -> None:
    assert reason(whole) == expected


def test_a_rejection_says_which_object_it_is_as_far_as_that_can_be_read() -> None:
    assert one(pod(spec=[])) == Rejection("Pod", "shop", "web-0", "spec: expected object | null, got array")


def test_pods_with_equal_labels_share_one_mapping() -> None:
    first, second = (one(pod(metadata={"name": name, "labels": {"app": "shared"}})) for name in ("a", "b"))
    assert isinstance(first, Pod)
    assert isinstance(second, Pod)
    assert first.labels is second.labels


def test_sharing_labels_is_bounded_and_starts_anew() -> None:
    shared, errors = validation.Shared(), []  # type: tuple[validation.Shared, list[str]]
    first = shared.labels({"n": "0"}, "", errors)
    assert shared.labels({"n": "0"}, "", errors) is first
    for number in range(5000):
        shared.labels({"n": str(number)}, "", errors)
    again = shared.labels({"n": "0"}, "", errors)
    assert again == first
    assert again is not first


def test_a_namespace_has_the_label_of_its_name_whatever_it_says() -> None:
    metadata = {"name": "shop", "labels": {"team": "a", "kubernetes.io/metadata.name": "other"}}
    assert one({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}) == Namespace(
        "shop", {"team": "a", "kubernetes.io/metadata.name": "shop"}
    )


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({"name": "a.b"}, "metadata.name: 'a.b' is no DNS label"),
        ({"name": "a", "labels": {"-": ""}}, "metadata.labels: '-' is no label key"),
        ([], "metadata: expected object | null, got array"),
    ],
)
def test_an_invalid_namespace_is_a_rejection(metadata: Any, expected: str) -> None:
    assert reason({"apiVersion": "v1", "kind": "Namespace", "metadata": metadata}) == expected


@pytest.mark.parametrize(
    ("spec", "cidrs"),
    [
        ({"podCIDRs": ["10.1.0.0/24", "fd00::/64"], "podCIDR": "10.9.0.0/24"}, ("10.1.0.0/24", "fd00::/64")),
        ({"podCIDR": "10.9.0.0/24"}, ("10.9.0.0/24",)),
        ({}, ()),
        (None, ()),
    ],
)
def test_a_node_has_its_pod_networks(spec: Any, cidrs: tuple[str, ...]) -> None:
    node = {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1", "labels": {"x": "?"}}, "spec": spec}
    assert one(node) == Node("n1", tuple(map(Network.parse, cidrs)))


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ({"spec": {"podCIDRs": ["x"]}}, "spec.podCIDRs[0]: 'x' is no CIDR"),
        ({"spec": {"podCIDRs": ["::ffff:10.0.0.0/104"]}}, "spec.podCIDRs[0]: '::ffff:10.0.0.0/104' is no CIDR"),
        ({"spec": {"podCIDR": "10.0.0.0"}}, "spec.podCIDR: '10.0.0.0' is no CIDR"),
        ({"metadata": {"name": "_"}}, "metadata.name: '_' is no DNS subdomain"),
        ({"spec": {"podCIDRs": "x"}}, "spec.podCIDRs: expected array | null, got str"),
    ],
)
def test_an_invalid_node_is_a_rejection(parts: dict[str, Any], expected: str) -> None:
    assert reason({"apiVersion": "v1", "kind": "Node", "metadata": {"name": "n1"}, **parts}) == expected


def both(whole: Any) -> list[Decoded]:
    values = decode(whole)
    assert decode(json.dumps(whole).encode()) == values
    return values


def test_a_list_holds_objects_of_any_kind_and_lists() -> None:
    inner = {"apiVersion": "v1", "kind": "List", "items": [pod(), {"kind": "ConfigMap", "apiVersion": "v1"}]}
    outer = {"apiVersion": "v1", "kind": "List", "items": [inner, {"apiVersion": "v1", "kind": "Service"}, pod()]}
    assert both(outer) == [Pod("shop", "web-0")] * 2


@pytest.mark.parametrize(
    ("version", "kind", "expected"),
    [
        ("v1", "PodList", Pod("default", "a")),
        ("v1", "NamespaceList", Namespace("a", {"kubernetes.io/metadata.name": "a"})),
        ("v1", "NodeList", Node("a")),
    ],
)
def test_the_items_of_a_list_of_one_kind_need_not_say_theirs(version: str, kind: str, expected: Decoded) -> None:
    assert both({"apiVersion": version, "kind": kind, "items": [{"metadata": {"name": "a"}}]}) == [expected]


def test_the_items_of_a_list_of_policies_are_closed_if_the_version_is_not_served() -> None:
    items = [{"metadata": {"name": "a"}}]
    (good,) = both({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicyList", "items": items})
    (bad,) = both({"apiVersion": "networking.k8s.io/v9", "kind": "NetworkPolicyList", "items": items})
    assert isinstance(good, NetworkPolicy)
    assert isinstance(bad, NetworkPolicy)
    assert good.rejected is None
    assert bad.rejected


def test_a_bad_item_spoils_only_itself() -> None:
    values = both({"apiVersion": "v1", "kind": "PodList", "items": [pod(spec=3), None, pod()]})
    assert [type(value) for value in values] == [Rejection, Rejection, Pod]


def test_a_kind_that_is_known_from_elsewhere_need_not_be_said() -> None:
    assert decode(b'{"metadata":{"name":"a"}}', kind="Pod") == [Pod("default", "a")]


@pytest.mark.parametrize(
    ("whole", "expected"),
    [
        ({"metadata": {"name": "a"}}, Rejection("", "", "", "kind: must be given")),
        (["a"], Rejection("", "", "", "expected object, got array")),
        ({"kind": 3}, Rejection("", "", "", "kind: expected str | null, got int")),
        (
            {"apiVersion": "v1", "kind": "List", "items": 3},
            Rejection("List", "", "", "items: expected array | null, got int"),
        ),
        (
            {"apiVersion": "v1", "kind": "PodList", "items": {}},
            Rejection("PodList", "", "", "items: expected array | null, got object"),
        ),
    ],
)
def test_a_body_that_is_no_object_is_reported(whole: Any, expected: Rejection) -> None:
    assert both(whole) == [expected]


FIELDS = [
    "apiVersion", "kind", "metadata", "spec", "status", "items", "name", "namespace", "labels", "podSelector",
    "matchLabels", "matchExpressions", "key", "operator", "values", "policyTypes", "ingress", "egress", "from",
    "to", "ports", "port", "endPort", "protocol", "ipBlock", "cidr", "except", "nodeName", "hostNetwork",
    "containers", "initContainers", "podIP", "podIPs", "ip", "phase", "podCIDR", "podCIDRs", "restartPolicy",
    "containerPort", "app",
]  # fmt: skip
WORDS = [
    "v1", "networking.k8s.io/v1", "Pod", "Node", "Namespace", "NetworkPolicy", "List", "PodList",
    "NetworkPolicyList", "a", "web", "In", "Exists", "Ingress", "Egress", "TCP", "10.0.0.0/8", "10.1.0.0/16",
    "10.0.0.1", "::1", "http", "Always", "Failed",
]  # fmt: skip

scalars = (
    st.none()
    | st.booleans()
    | st.integers(-1, 70000)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(WORDS)
)
json_like = st.recursive(
    scalars | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=5)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=25,
)
KINDS = [("v1", "Pod"), ("v1", "Node"), ("v1", "Namespace"), ("networking.k8s.io/v1", "NetworkPolicy")]
of_our_kinds = st.builds(
    lambda kind, body: {"apiVersion": kind[0], "kind": kind[1], **body},
    st.sampled_from(KINDS),
    st.dictionaries(st.sampled_from(["metadata", "spec", "status", "items"]), json_like),
)


@given(json_like | of_our_kinds)
def test_no_body_makes_the_decoder_raise_and_json_and_yaml_read_the_same(body: Any) -> None:
    both(body)


@given(of_our_kinds)
def test_every_name_that_is_decoded_can_stand_in_a_ruleset(body: Any) -> None:
    for value in decode(body):
        if not isinstance(value, Rejection):
            assert validation.is_dns_subdomain(value.name)
            if isinstance(value, (Pod, NetworkPolicy)):
                assert validation.is_dns_label(value.namespace)


@given(st.dictionaries(st.sampled_from(["spec", "status", "items"]), json_like))
def test_no_policy_is_passed_over_whatever_its_spec(body: Any) -> None:
    metadata = {"name": "p"}
    (value,) = both({"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, **body})
    assert isinstance(value, NetworkPolicy)
    assert value.rules
