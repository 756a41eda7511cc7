"""What a ruleset does with a packet of a connection, told from the text of its rules.

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
_NO_MARK = "0x00000000"
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
    """How a packet left a base chain: the verdict, and the chain and rule that gave it (None: the chain's policy).

    A rule that goes to a chain which accepts right away counts as the one that gave the verdict. ``mark`` is the
    connection's mark after it.
    """

    accepted: bool
    chain: str
    rule: str | None
    mark: int


class RulesetView:
    """The policy table of a ruleset that does not change meanwhile, as a ``View``."""

    def __init__(self, ruleset: Ruleset) -> None:
        self._ruleset = ruleset
        self._chains = {c.name: c.rules for c in ruleset.chains.values() if c.table is Table.POLICY}
        self._sets = {s.name: s for s in ruleset.sets.values() if s.table is Table.POLICY}
        self._words: dict[str, dict[str, bytes]] = {}

    def rules(self, chain: str) -> Sequence[str]:
        """The rules of a chain."""
        return self._chains.get(chain, ())

    def element(self, name: str, key: str) -> str | None:
        """The element that holds a key."""
        nft_set: Set = self._sets[name]
        elements = self._ruleset.elements(nft_set)
        if name not in self._words:
            self._words[name] = {key_text(nft_set, packed): packed for packed in elements}
        words = self._words[name]
        packed = words.get(key)
        if packed is None and nft_set.interval:
            packed = next((packed for text, packed in words.items() if _in_range(key, text)), None)
        return None if packed is None else element_text(nft_set, packed, elements[packed])


def evaluate(view: View, chain: str, packet: Mapping[str, str]) -> Outcome:
    """Run a packet through a base chain.

    Args:
        view: where the rules are.
        chain: the base chain's name.
        packet: values by the field's name in nft (``ip saddr``, ``ct original ip saddr``, ``ct mark``); what a packet
            does not have (an IPv4 packet's ``ip6 saddr``, an untracked one's ``ct mark``) is left out, and matches
            nothing.

    Raises:
        UnknownStatementError: a rule on the way says what this product does not write.
    """
    fields = dict(packet)
    found = _run(view, chain, fields)
    accepted, where, rule = (True, chain, None) if found is None else found
    return Outcome(accepted, where, rule, int(fields.get("ct mark", _NO_MARK), 0))


def _run(view: View, chain: str, packet: dict[str, str]) -> tuple[bool, str, str] | None:
    """Whether a chain accepts or drops, and the chain and rule that do; None if its end is reached."""
    for rule in view.rules(chain):
        verdict = _verdict(view, rule, packet)
        match verdict:
            case None:
                continue
            case ["accept"]:
                return True, chain, rule
            case ["drop"]:
                return False, chain, rule
            case ["jump", target]:
                found = _run(view, target, packet)
                if found is not None:
                    return found
            case ["goto", target]:
                found = _run(view, target, packet)
                accepts = found is not None and found[:2] == (True, target)
                return (True, chain, rule) if accepts else found
    return None


def _verdict(view: View, rule: str, packet: dict[str, str]) -> list[str] | None:
    """The verdict of a rule as words; None if a match fails. It may set the connection's mark on the way."""
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
        if words[:3] == ["ct", "mark", "set"]:
            _set_mark(words, rule, packet)
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
    # It only sets something.
    return None


def _set_mark(words: list[str], rule: str, packet: dict[str, str]) -> None:
    """Carry out ``ct mark set ct mark & A | B``, with or without ``| B``, and take its words away."""
    if words[3:6] != ["ct", "mark", "&"]:
        raise UnknownStatementError(rule)
    kept, added = int(words[6], 0), 0
    del words[:7]
    if words[:1] == ["|"]:
        added = int(words[1], 0)
        del words[:2]
    if "ct mark" in packet:
        packet["ct mark"] = f"0x{int(packet['ct mark'], 0) & kept | added:08x}"


def _take_field(words: list[str], rule: str) -> str:
    if words[:2] in (["ct", "original"], ["ct", "reply"]):
        length = 4 if words[2:3] in (["ip"], ["ip6"]) else 3
    else:
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
    if key.startswith("0x"):
        value, _, length = entry.partition("/")
        ignored = 32 - int(length or 32)
        return int(key, 0) >> ignored == int(value, 0) >> ignored
    try:
        if "/" in entry:
            return ip_address(key) in ip_network(entry)
        first, dash, last = entry.partition("-")
        return bool(dash) and _between(first, key, last)
    except ValueError:
        # Words with a dash, such as nd-redirect, are no ranges.
        return False


def _between(first: str, key: str, last: str) -> bool:
    if key.isdecimal():
        return int(first) <= int(key) <= int(last)
    address, low, high = ip_address(key), ip_address(first), ip_address(last)
    return low.version == address.version and int(low) <= int(address) <= int(high)
