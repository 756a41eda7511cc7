"""The text of manifests: YAML as Kubernetes reads it, errors with lines, and nothing open by accident."""

from __future__ import annotations

from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from enforcer.manifests.documents import Document, parse, read_yaml, scalar
from enforcer.model.objects import Direction, NetworkPolicy, Pod
from enforcer.model.selectors import EVERYTHING

POD = b"apiVersion: v1\nkind: Pod\nmetadata: {name: %s}\n"
POLICY = """apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: web
  namespace: shop
spec:
  podSelector: {}
"""


def only(text: bytes, *, path: str = "web.yaml", is_json: bool = False) -> Document:
    (document,) = parse(text, path=path, is_json=is_json)
    return document


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("~", None),
        ("null", None),
        ("Yes", True),
        ("on", True),
        ("y", True),
        ("no", False),
        ("OFF", False),
        ("nope", "nope"),
        ("yesterday", "yesterday"),
        ("80", 80),
        ("-1", -1),
        ("+1", 1),
        ("0", 0),
        ("010", 8),
        ("0o10", 8),
        ("08", 8.0),
        ("0x1F", 31),
        ("0b11", 3),
        ("1_000", 1000),
        ("1.5", 1.5),
        (".5", 0.5),
        ("1e3", 1000.0),
        ("1e999", "1e999"),
        ("2001-12-14", "2001-12-14"),
        ("2001-12-14T21:59:43Z", "2001-12-14T21:59:43Z"),
        ("22:30", "22:30"),
        ("10.244.0.5", "10.244.0.5"),
        ("10.0.0.0/8", "10.0.0.0/8"),
        ("5d4f8c", "5d4f8c"),
        ("0b_", "0b_"),
        ("-", "-"),
        (".", "."),
        ("9" * 5000, "9" * 5000),
    ],
)
def test_a_plain_scalar_is_what_kubernetes_makes_of_it(text: str, value: object) -> None:
    read = scalar(text)
    assert read == value
    assert type(read) is type(value)


def test_quotes_blocks_and_tags_make_text() -> None:
    text = "a: '1'\nb: \"yes\"\nc: !!str 2\nd: |\n  3\ne: !!int '4'\n"
    assert read_yaml(text) == [{"a": "1", "b": "yes", "c": "2", "d": "3\n", "e": 4}]


def test_keys_are_text_and_merge_keys_merge_under_what_is_there() -> None:
    text = "80: a\non: b\nbase: &base {x: 1, y: 2}\nmore: {<<: *base, y: 3}\nmost: {<<: [*base, {z: 4, x: 5}]}\n"
    assert read_yaml(text) == [
        {
            "80": "a",
            "on": "b",
            "base": {"x": 1, "y": 2},
            "more": {"x": 1, "y": 3},
            "most": {"x": 1, "y": 2, "z": 4},
        }
    ]


texts = st.text(alphabet=st.characters(codec="ascii", exclude_categories=["Cc"]) | st.sampled_from("é☃\n"), max_size=8)
# Kubernetes reads y, n and 1e3 as no text; PyYAML's writer does not quote them.
texts = texts.filter(lambda text: isinstance(scalar(text), str) or not isinstance(yaml.safe_load(text), str))
values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**64), 2**64) | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=20,
)


@given(st.lists(values, min_size=1, max_size=3), st.booleans())
def test_what_yaml_wrote_is_read_back(documents: list[Any], flow: bool) -> None:
    text = yaml.safe_dump_all(documents, default_flow_style=flow, explicit_start=True)
    if "<<" not in text:
        assert read_yaml(text) == documents


@pytest.mark.parametrize(
    ("text", "line", "reason"),
    [
        ("a: 1\nb: c: d\n", 2, "mapping values are not allowed in this context"),
        ("a: [1\n\nb: 2\n", 3, "did not find expected ',' or ']'"),
        ("a: 1\nb: 2\na: 3\n", 3, "key 'a' stands twice"),
        ("a: 1\nb: \x01\n", 2, "control characters are not allowed"),
        ("a: 1\nb: !!python/name:os.system x\n", 2, "has a tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("a: *b\n", 1, "found undefined alias"),
        ("? [a]\n: 1\n", 1, "a key is no scalar"),
        ("a: 1\nb: {<<: 3}\n", 2, "<< takes mappings"),
        ("a: 1\n\tb: 2\n", 2, "found a tab character that violates indentation"),
    ],
)
@pytest.mark.parametrize("before", ["", "kind: ConfigMap\n---\n"])
def test_an_error_names_the_line_in_the_file(text: str, line: int, reason: str, before: str) -> None:
    last = parse((before + text).encode(), path="x.yaml")[-1]
    assert last.error == (line + before.count("\n"), reason)


def test_text_that_is_no_utf8_is_an_error_on_its_line() -> None:
    assert only(b"a: 1\nb: \xff\n").error == (2, "is not UTF-8")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (b'{"a":\n1,}', 2),
        (b'{"a": [1,\n2\n', 3),
        (b'{"apiVersion":"v1","kind":"List","items":[\n{},\n{"kind":"Pod","x":tru}]}', 3),
        (b"\xff", 1),
    ],
)
def test_an_error_in_json_names_the_line(text: bytes, line: int) -> None:
    error = only(text, is_json=True).error
    assert error is not None
    assert error[0] == line


@pytest.mark.parametrize("deep", ["[" * 100_000, "{a: " * 100_000, "- " * 100_000, "a: &a [*a]"])
def test_yaml_nested_without_end_is_an_error_not_a_crash(deep: str) -> None:
    error = only(deep.encode()).error
    assert error is not None
    assert error[1] in {"is nested too deeply", "exceeded maximum nesting depth", "has too many aliases"}


@pytest.mark.parametrize("deep", [b'{"a":' * 100_000, b'{"kind":"Pod","spec":' + b"[" * 100_000])
def test_json_nested_without_end_is_an_error_not_a_crash(deep: bytes) -> None:
    assert only(deep, is_json=True).error is not None


def test_aliases_of_aliases_are_bounded() -> None:
    lines = ["a0: &a0 [1,1,1,1,1,1,1,1,1]"]
    lines += [f"a{n}: &a{n} [{','.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    error = only("\n".join(lines).encode()).error
    assert error is not None
    assert error[1] == "has too many aliases"


def test_a_file_is_cut_at_its_document_lines_and_nowhere_else() -> None:
    text = b"# nothing\n---\n" + POD % b"a" + b"---   # next\n" + POD % b"b" + b"x: |\n  ---\n  no\n...\n---\n"
    documents = parse(text, path="x.yaml")
    assert [value for document in documents for value in document.decoded] == [
        Pod("default", "a"),
        Pod("default", "b"),
    ]
    assert [document.line for document in documents] == [1, 2, 6, 14]
    assert not any(document.error for document in documents)


@pytest.mark.parametrize("begin", [b"\xef\xbb\xbf", b"%YAML 1.1\n---\n", b"--- ", b"---\r\n"])
def test_a_mark_a_directive_or_a_start_before_the_first_document_is_fine(begin: bytes) -> None:
    document = only(begin + b'{"apiVersion": v1, kind: Pod, metadata: {name: a}}\n')
    assert (document.decoded, document.error) == ((Pod("default", "a"),), None)


def test_a_byte_order_mark_before_json_is_fine() -> None:
    text = b'\xef\xbb\xbf{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}'
    assert only(text, is_json=True).decoded == (Pod("default", "a"),)


def test_json_in_a_yaml_file_is_read() -> None:
    text = b'{"apiVersion":"v1","kind":"Pod","metadata":{"name":"a"}}\n---\n' + POD % b"b"
    assert [document.decoded for document in parse(text, path="x.yaml")] == [
        (Pod("default", "a"),),
        (Pod("default", "b"),),
    ]


def test_a_document_that_is_known_is_not_decoded_again() -> None:
    first = parse(POD % b"a" + b"---\n" + POD % b"b", path="x.yaml")
    again = parse(
        POD % b"c" + b"---\n" + POD % b"b",
        path="x.yaml",
        known={document.digest: document.decoded for document in first},
    )
    assert again[1].decoded[0] is first[1].decoded[0]
    assert again[0].decoded == (Pod("default", "c"),)


def closed(text: str, *, path: str = "policies/Web Shop.yaml", is_json: bool = False) -> list[tuple[str, str]]:
    """Namespace and name of what a text closes."""
    document = only(text.encode(), path=path, is_json=is_json)
    assert document.error is not None
    for policy in document.decoded:
        assert isinstance(policy, NetworkPolicy)
        assert policy.pod_selector is EVERYTHING
        assert policy.rules == {Direction.INGRESS: (), Direction.EGRESS: ()}
        assert policy.rejected == f"{path}:{document.error[0]}: {document.error[1]}"
    return [(policy.namespace, policy.name) for policy in document.decoded if isinstance(policy, NetworkPolicy)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (POLICY + "  ingress: [\n", [("shop", "web")]),
        (POLICY.replace("  namespace: shop\n", "") + "  ingress: [\n", [("default", "web")]),
        ("kind: NetworkPolicy\nspec: [\n", [("default", "web-shop.yaml")]),
        ('"kind" : "NetworkPolicy"\n"namespace": "a"\n[', [("a", "web-shop.yaml")]),
        (
            "kind: NetworkPolicyList\nitems:\n- kind: NetworkPolicy\n  metadata: {namespace: b}\n- [",
            [("b", "web-shop.yaml"), ("default", "web-shop.yaml")],
        ),
        ("# kind: NetworkPolicy\nkind: Pod\nx: [\n", []),
        ("kind: NetworkPolicy\napiVersion: crd.projectcalico.org/v1\nx: [\n", []),
        ("kind: Pod\nx: [\n", []),
        ("kind: NetworkPolicyPeer\nx: [\n", []),
    ],
)
def test_a_text_that_may_hold_a_policy_closes_its_namespace(text: str, expected: list[tuple[str, str]]) -> None:
    assert closed(text) == expected


def test_json_that_may_hold_a_policy_closes_its_namespace() -> None:
    text = '{"kind": "NetworkPolicy",\n"metadata": {"name": "web", "namespace": "shop"},'
    assert closed(text, path="p.json", is_json=True) == [("shop", "web")]


@given(st.integers(min_value=len("apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n"), max_value=len(POLICY)))
def test_a_policy_cut_short_anywhere_after_its_kind_closes_something(length: int) -> None:
    document = only(POLICY[:length].encode())
    assert document.decoded
    assert all(isinstance(value, NetworkPolicy) and value.rules for value in document.decoded)


@given(st.binary(max_size=60) | st.text(alphabet="-: []{}\"'#&*!|>%@`abk\n\t,?.<\\", max_size=60).map(str.encode))
def test_no_text_makes_the_parser_raise(text: bytes) -> None:
    for is_json in (False, True):
        for document in parse(text, path="x", is_json=is_json):
            assert document.error is None or document.error[0] <= text.count(b"\n") + 2
