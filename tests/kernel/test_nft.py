"""The fake of nftables accepts and refuses what the kernel's accepts and refuses: each verb on each object."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Iterator

import pytest

from tests.support.nft import OBJECTS, VERBS, Nft, Refused

pytestmark = pytest.mark.netns

T = "inet drawbridge"
THERE = [
    f'add table {T} {{ comment "t"; }}',
    f"add counter {T} used",
    f"add counter {T} free",
    f"add set {T} used {{ type ipv4_addr; }}",
    f"add set {T} free {{ type ipv4_addr; }}",
    f"add set {T} ranges {{ type ipv4_addr; flags interval; }}",
    f"add map {T} used-map {{ type ipv4_addr : verdict; }}",
    f"add map {T} free-map {{ type ipv4_addr : verdict; }}",
    f"add chain {T} base {{ type filter hook forward priority filter; policy accept; }}",
    f"add chain {T} used-by-rule",
    f"add chain {T} used-by-map",
    f"add chain {T} free",
    f"add rule {T} free accept",
    f'add rule {T} base ip saddr @used counter name "used" jump used-by-rule',
    f"add rule {T} base ip saddr vmap @used-map",
    f'add element {T} used {{ 10.0.0.1 comment "x/a" }}',
    f"add element {T} used-map {{ 10.0.0.1 : jump used-by-map }}",
]
CASES: dict[tuple[str, str], list[str]] = {
    ("add", "table"): [f"add table {T}", "add table bridge drawbridge"],
    ("delete", "table"): [f"delete table {T}", "delete table bridge drawbridge"],
    ("flush", "table"): [f"flush table {T}", "flush table bridge drawbridge"],
    ("add", "counter"): [
        f"add counter {T} new", f"add counter {T} used", f'add counter {T} new {{ comment "{"c" * 129}"; }}',
        "add counter bridge drawbridge new",
    ],
    ("delete", "counter"): [f"delete counter {T} {name}" for name in ("free", "used", "none")],
    ("flush", "counter"): [f"flush counter {T} free"],
    ("add", "set"): [
        f"add set {T} new {{ type ipv4_addr; }}", f"add set {T} used {{ type ipv4_addr; }}",
        f"add set {T} used {{ type ipv6_addr; }}", f"add set {T} used-map {{ type ipv4_addr; }}",
        f"add set {T} used {{ type ipv4_addr; flags interval; }}",
    ],
    ("delete", "set"): [f"delete set {T} {name}" for name in ("free", "used", "none")],
    ("flush", "set"): [f"flush set {T} {name}" for name in ("used", "free", "none")],
    ("add", "map"): [
        f"add map {T} new {{ type ipv4_addr : verdict; }}", f"add map {T} used {{ type ipv4_addr : verdict; }}",
    ],
    ("delete", "map"): [f"delete map {T} {name}" for name in ("free-map", "used-map", "none")],
    ("flush", "map"): [f"flush map {T} {name}" for name in ("used-map", "none")],
    ("add", "chain"): [
        f"add chain {T} new", f"add chain {T} free", f"add chain {T} {'n' * 256}",
        f"add chain {T} base {{ type filter hook forward priority filter; policy accept; }}",
        f"add chain {T} base {{ type filter hook input priority filter; policy accept; }}",
        f"add chain {T} free {{ type filter hook forward priority filter; policy accept; }}",
    ],
    ("delete", "chain"): [
        f"delete chain {T} {name}" for name in ("free", "used-by-rule", "used-by-map", "base", "none")
    ],
    ("flush", "chain"): [f"flush chain {T} {name}" for name in ("base", "free", "none")],
    ("add", "rule"): [
        f"add rule {T} free drop", f"add rule {T} none drop", f"add rule {T} free jump used-by-rule",
        f"add rule {T} free jump none", f"add rule {T} free jump base", f"add rule {T} free ip saddr @none drop",
        f"add rule {T} free ip saddr @free drop", f"add rule {T} free ip saddr vmap @free-map",
        f"add rule {T} free ip saddr vmap @none", f'add rule {T} free counter name "free" drop',
        f'add rule {T} free counter name "none" drop',
    ],
    ("delete", "rule"): [f"delete rule {T} free accept"],
    ("flush", "rule"): [f"flush rule {T} free"],
    ("add", "element"): [
        f"add element {T} used {{ 10.0.0.2 }}", f"add element {T} used {{ 10.0.0.1 }}",
        f"add element {T} none {{ 10.0.0.2 }}", f"add element {T} used-map {{ 10.0.0.2 }}",
        f"add element {T} used {{ 10.0.0.2 : jump free }}", f"add element {T} used-map {{ 10.0.0.2 : jump free }}",
        f"add element {T} used-map {{ 10.0.0.1 : jump free }}",
        f"add element {T} used-map {{ 10.0.0.1 : jump used-by-map }}",
        f"add element {T} used-map {{ 10.0.0.2 : jump none }}", f"add element {T} used-map {{ 10.0.0.2 : jump base }}",
        f'add element {T} ranges {{ 10.0.0.0/24 comment "a, b", 10.0.2.0-10.0.2.7 }}',
    ],
    ("delete", "element"): [
        f"delete element {T} used {{ 10.0.0.1 }}", f"delete element {T} used {{ 10.0.0.9 }}",
        f"delete element {T} used-map {{ 10.0.0.1 }}", f"delete element {T} none {{ 10.0.0.1 }}",
    ],
    ("flush", "element"): [f"flush element {T} used {{ 10.0.0.1 }}"],
}  # fmt: skip
TOGETHER = {
    "a rule's target comes before it": [f"add chain {T} new", f"add rule {T} free jump new"],
    "a rule's target comes after it": [f"add rule {T} free jump new", f"add chain {T} new"],
    "a chain goes after what leads to it": [f"flush chain {T} base", f"delete chain {T} used-by-rule"],
    "a chain goes before what leads to it": [f"delete chain {T} used-by-rule", f"flush chain {T} base"],
    "an element is replaced": [
        f"delete element {T} used-map {{ 10.0.0.1 }}",
        f"add element {T} used-map {{ 10.0.0.1 : jump free }}",
    ],
    "a good command before one that is refused": [f"add chain {T} new", f"delete chain {T} none"],
}


@pytest.fixture(scope="module")
def namespace() -> Iterator[str]:
    name = f"dbtest-{os.getpid()}-nft"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield name
    subprocess.run(["ip", "netns", "del", name], check=True)


def accepted(namespace: str, commands: list[str]) -> bool:
    text = "\n".join(commands) + "\n"
    done = subprocess.run(["ip", "netns", "exec", namespace, "nft", "-f", "-"], input=text, capture_output=True,
                          text=True, check=False)  # fmt: skip
    return done.returncode == 0


def held(namespace: str) -> dict[str, dict[str, int]]:
    """The chains with their number of rules, the sets with their number of elements, and the counters."""
    listed = subprocess.run(["ip", "netns", "exec", namespace, "nft", "-j", "list", "ruleset"], capture_output=True,
                            text=True, check=True).stdout  # fmt: skip
    found: dict[str, dict[str, int]] = {"tables": {}, "chains": {}, "sets": {}, "counters": {}}
    for entry in json.loads(listed)["nftables"]:
        for kind, told in entry.items():
            match kind:
                case "table":
                    found["tables"][f"{told['family']} {told['name']}"] = 1
                case "chain":
                    found["chains"][told["name"]] = 0
                case "rule":
                    found["chains"][told["chain"]] += 1
                case "set" | "map":
                    found["sets"][told["name"]] = len(told.get("elem", ()))
                case "counter":
                    found["counters"][told["name"]] = 1
    return found


def held_by(nft: Nft) -> dict[str, dict[str, int]]:
    tables = nft.tables.values()
    return {
        "tables": dict.fromkeys(nft.tables, 1),
        "chains": {name: len(chain.rules) for table in tables for name, chain in table.chains.items()},
        "sets": {name: len(found.elements) for table in tables for name, found in table.sets.items()},
        "counters": {name: 1 for table in tables for name in table.counters},
    }


def compare(namespace: str, commands: list[str]) -> None:
    fake = Nft()
    fake.run(THERE)
    assert accepted(namespace, ["flush ruleset", *THERE])
    assert held(namespace) == held_by(fake)
    refusal = ""
    try:
        fake.run(commands)
    except Refused as error:
        refusal = str(error)
    assert accepted(namespace, commands) is not bool(refusal), (commands, refusal)
    assert held(namespace) == held_by(fake), commands


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("noun", OBJECTS)
def test_the_fake_takes_and_refuses_a_command_as_the_kernel_does(namespace: str, verb: str, noun: str) -> None:
    for command in CASES[verb, noun]:
        compare(namespace, [command])


@pytest.mark.parametrize("case", TOGETHER)
def test_the_fake_takes_and_refuses_a_transaction_as_the_kernel_does(namespace: str, case: str) -> None:
    compare(namespace, TOGETHER[case])


def test_every_verb_is_tried_on_every_object_with_a_command_of_that_verb_and_object() -> None:
    assert CASES.keys() == set(itertools.product(VERBS, OBJECTS))
    for (verb, noun), commands in CASES.items():
        assert commands
        assert all(command.startswith(f"{verb} {noun} ") for command in commands)
