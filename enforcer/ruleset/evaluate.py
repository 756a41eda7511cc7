"""What a ruleset does with a packet, told from the text of its rules.

It knows only the statements that this product writes, and takes the rules as nft prints them: those of the kernel, to
explain what it would do, or of a ``Ruleset`` that is not in the kernel. A statement that it does not know is an error,
never a guess.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Protocol

from enforcer.ruleset.objects import Set, Table
from enforcer.ruleset.ruleset import Ruleset
from enforcer.ruleset.text import element_text, key_text

_TOKEN = re.compile(r'"[^"]*"|\{[^}]*\}|\S+')
_FIELD_WORDS = {"iifname": 1}
_VERDICTS = {"accept", "drop", "jump", "goto"}


class UnknownStatementError(Exception):
    """A rule says something that this product does not write; the text holds the rule."""


class View(Protocol):
    """Rules and elements, as nft prints them."""

    def rules(self, chain: str) -> Sequence[str]:
        """The rules of a chain; none if there is no such chain."""

    def element(self, name: str, key: str) -> str | None:
        """The element of a set or map that holds a key, None if none does."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a packet left a base chain: the verdict, and the chain and rule that gave it (None: the chain's policy)."""

    accepted: bool
    chain: str
    rule: str | None


class RulesetView:
    """The policy table of a ruleset, as a ``View``."""

    def __init__(self, ruleset: Ruleset) -> None:
        self._ruleset = ruleset
        self._chains = {c.name: c.rules for c in ruleset.chains if c.table is Table.POLICY}
        self._sets = {s.name: s for s in ruleset.sets if s.table is Table.POLICY}

    def rules(self, chain: str) -> Sequence[str]:
        """The rules of a chain."""
        return self._chains.get(chain, ())

    def element(self, name: str, key: str) -> str | None:
        """The element that holds a key."""
        of: Set = self._sets[name]
        for packed, element in self._ruleset.elements(of).items():
            text = key_text(of, packed)
            if text == key or (of.interval and _in_range(key, text)):
                return element_text(of, packed, element)
        return None


def evaluate(view: View, chain: str, packet: Mapping[str, str]) -> Outcome:
    """Run a packet through a base chain.

    Args:
        view: where the rules are.
        chain: the base chain's name.
        packet: values by the field's name in nft (``ip saddr``, ``meta l4proto``, ``tcp dport``); what a packet does
            not have (an IPv4 packet's ``ip6 saddr``) is left out, and matches nothing.

    Raises:
        UnknownStatementError: a rule on the way says what this product does not write.
    """
    return _run(view, chain, packet) or Outcome(accepted=True, chain=chain, rule=None)


def _run(view: View, chain: str, packet: Mapping[str, str]) -> Outcome | None:
    for rule in view.rules(chain):
        verdict = _verdict(view, rule, packet)
        match verdict:
            case None:
                continue
            case ["accept"]:
                return Outcome(accepted=True, chain=chain, rule=rule)
            case ["drop"]:
                return Outcome(accepted=False, chain=chain, rule=rule)
            case ["jump", target]:
                outcome = _run(view, target, packet)
                if outcome is not None:
                    return outcome
            case ["goto", target]:
                return _run(view, target, packet)
    return None


def _verdict(view: View, rule: str, packet: Mapping[str, str]) -> list[str] | None:
    """The verdict of a rule as words; None if a match fails."""
    words = _TOKEN.findall(rule)
    if words[:1] in (["type"], ["comment"]):
        # The head of a chain in nft's listing, not a rule.
        return None
    while words:
        if words[0] in _VERDICTS:
            return words[: 2 if words[0] in {"jump", "goto"} else 1]
        if words[0] == "counter":
            words = words[3:]
            continue
        fields = [_take_field(words, rule)]
        while words[:1] == ["."]:
            words.pop(0)
            fields.append(_take_field(words, rule))
        key = None if any(f not in packet for f in fields) else " . ".join(packet[f] for f in fields)
        if words[:1] == ["&"]:
            if words[2:3] != ["=="]:
                raise UnknownStatementError(rule)
            key = None if key is None else f"0x{int(key, 0) & int(words[1], 0):08x}"
            del words[:3]
        if words[:1] == ["vmap"]:
            element = None if key is None else view.element(words[1].removeprefix("@"), key)
            return None if element is None else element.rpartition(" : ")[2].split()
        wanted = words[:1] != ["!="]
        if not wanted:
            words.pop(0)
        if not words:
            raise UnknownStatementError(rule)
        value = words.pop(0)
        if key is None or _holds(view, value, key) is not wanted:
            return None
    raise UnknownStatementError(rule)


def _take_field(words: list[str], rule: str) -> str:
    length = _FIELD_WORDS.get(words[0], 2)
    if len(words) <= length:
        raise UnknownStatementError(rule)
    field = " ".join(words[:length])
    del words[:length]
    return field


def _holds(view: View, value: str, key: str) -> bool:
    if value.startswith("@"):
        return view.element(value[1:], key) is not None
    return any(_in_range(key, entry.strip()) for entry in value.strip("{} ").split(","))


def _in_range(key: str, entry: str) -> bool:
    """Whether a value is, or lies in, one that nft prints: a word, a number, an address, a prefix, a range."""
    if key == entry or (entry.endswith('*"') and key.startswith(entry[:-2])):
        return True
    try:
        if "/" in entry:
            return ip_address(key) in ip_network(entry)
        first, dash, last = entry.partition("-")
        if not dash:
            return False
        if key.isdecimal():
            return int(first) <= int(key) <= int(last)
        address, low, high = ip_address(key), ip_address(first), ip_address(last)
        return low.version == address.version and int(low) <= int(address) <= int(high)
    except ValueError:
        # Words with a dash, such as nd-redirect, are no ranges.
        return False
