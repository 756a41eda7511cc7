"""A fake of nftables: applies the text of transactions to tables of its own, and refuses what nft refuses.

It knows the verbs and objects that ``enforcer.ruleset.text`` writes. ``tests/kernel/test_nft.py`` compares it with the
kernel.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from enforcer.ruleset.objects import COMMENT_BYTES, NAME_CHARACTERS

T = TypeVar("T")

VERBS = ("add", "delete", "flush")
OBJECTS = ("table", "counter", "set", "map", "chain", "rule", "element")

_COMMAND = re.compile(r"(\w+) (\w+) (\w+ \w+)(?: ([^\s{]+))?(?: (.*))?\Z")
_COMMENT = re.compile(r'comment "([^"]*)"')
_ELEMENT = re.compile(r'(?:"[^"]*"|[^,"])+')
_REFERENCES = re.compile(r'(jump|goto|vmap|counter name|@)\s*"?@?([\w./-]+)"?')


class Refused(Exception):  # noqa: N818 - as nft says it
    """A command that nft refuses; nothing of its transaction stands."""


@dataclass
class Set:
    """A set, or a map: the attributes that its maker gave it, and verdicts (or "") by keys."""

    kind: str
    type: str
    interval: bool
    elements: dict[str, str] = field(default_factory=dict)


@dataclass
class Chain:
    """A chain; ``hook`` is "" unless it is a base chain."""

    hook: str
    rules: list[str] = field(default_factory=list)


@dataclass
class Table:
    """What a table holds, by name."""

    chains: dict[str, Chain] = field(default_factory=dict)
    sets: dict[str, Set] = field(default_factory=dict)
    counters: set[str] = field(default_factory=set)


class Nft:
    """All tables, by family and name."""

    def __init__(self) -> None:
        self.tables: dict[str, Table] = {}

    def run(self, commands: Iterable[str]) -> None:
        """Apply one transaction, or nothing of it.

        Raises:
            Refused: with the command.
        """
        before = copy.deepcopy(self.tables)
        try:
            for command in commands:
                self._command(command)
        except Refused:
            self.tables = before
            raise

    def _command(self, command: str) -> None:
        parsed = _COMMAND.match(command)
        if parsed is None:
            raise Refused(f"syntax: {command}")
        verb, noun, table, name, rest = parsed.groups(default="")
        comment = _COMMENT.search(rest)
        if len(name) > NAME_CHARACTERS or (comment and len(comment[1]) > COMMENT_BYTES):
            raise Refused(f"too long: {command}")
        match verb, noun:
            case "add", "table":
                self.tables.setdefault(table, Table())
            case "delete", "table":
                self._take(self.tables, table, command)
            case "flush", "table":
                for chain in self._table(table, command).chains.values():
                    chain.rules.clear()
            case "add", _:
                self._add(noun, self._table(table, command), name, rest, command)
            case "delete", _:
                self._delete(noun, self._table(table, command), name, rest, command)
            case "flush", "chain":
                self._get(self._table(table, command).chains, name, command).rules.clear()
            case "flush", "set" | "map":
                self._set(self._table(table, command), name, noun, command).elements.clear()
            case _:
                raise Refused(f"syntax: {command}")

    def _add(self, noun: str, table: Table, name: str, rest: str, command: str) -> None:
        match noun:
            case "counter":
                table.counters.add(name)
            case "set" | "map":
                kind = re.search(r"type ([^;]+);", rest)
                if kind is None:
                    raise Refused(f"no type: {command}")
                made = Set(noun, kind[1], "flags interval;" in rest)
                there = table.sets.setdefault(name, made)
                if (there.kind, there.type, there.interval) != (made.kind, made.type, made.interval):
                    raise Refused(f"exists: {command}")
            case "chain":
                hook = re.search(r"type [^;]+;", rest)
                there_chain = table.chains.setdefault(name, Chain(hook[0] if hook else ""))
                if hook and there_chain.hook != hook[0]:
                    raise Refused(f"exists: {command}")
            case "rule":
                for verdict, target in _REFERENCES.findall(rest):
                    self._refer(table, verdict, target, command)
                self._get(table.chains, name, command).rules.append(rest)
            case "element":
                self._add_elements(table, self._get(table.sets, name, command), rest, command)

    def _add_elements(self, table: Table, into: Set, rest: str, command: str) -> None:
        for element in _elements(rest):
            key, _, verdict = element.partition(" : ")
            key = _COMMENT.sub("", key).strip()
            if bool(verdict) is not (into.kind == "map"):
                raise Refused(f"type: {command}")
            if verdict:
                self._refer(table, "jump", verdict.removeprefix("jump ").strip(), command)
            if into.elements.get(key, verdict) != verdict:
                raise Refused(f"exists: {command}")
            into.elements[key] = verdict

    def _delete(self, noun: str, table: Table, name: str, rest: str, command: str) -> None:
        rules = [rule for chain in table.chains.values() for rule in chain.rules]
        match noun:
            case "counter":
                if name not in table.counters or any(f'counter name "{name}"' in rule for rule in rules):
                    raise Refused(f"missing or in use: {command}")
                table.counters.remove(name)
            case "set" | "map":
                self._set(table, name, noun, command)
                if any(re.search(rf"@{re.escape(name)}(?![\w./-])", rule) for rule in rules):
                    raise Refused(f"in use: {command}")
                del table.sets[name]
            case "chain":
                self._get(table.chains, name, command)
                others = [rule for other, chain in table.chains.items() if other != name for rule in chain.rules]
                verdicts = [verdict for entry in table.sets.values() for verdict in entry.elements.values()]
                if any(re.search(rf"(jump|goto) {re.escape(name)}(?![\w./-])", text) for text in others + verdicts):
                    raise Refused(f"in use: {command}")
                del table.chains[name]
            case "element":
                held = self._get(table.sets, name, command).elements
                for element in _elements(rest):
                    self._take(held, element.strip(), command)
            case _:
                # nft deletes a rule by its handle only.
                raise Refused(f"syntax: {command}")

    def _refer(self, table: Table, word: str, target: str, command: str) -> None:
        match word:
            case "counter name":
                found = target in table.counters
            case "vmap":
                found = target in table.sets and table.sets[target].kind == "map"
            case "@":
                found = target in table.sets and table.sets[target].kind == "set"
            case _:
                found = target in table.chains and not table.chains[target].hook
        if not found:
            raise Refused(f"{word} {target} is not there: {command}")

    def _table(self, name: str, command: str) -> Table:
        return self._get(self.tables, name, command)

    def _set(self, table: Table, name: str, kind: str, command: str) -> Set:
        found = self._get(table.sets, name, command)
        if found.kind != kind:
            raise Refused(f"no {kind}: {command}")
        return found

    @staticmethod
    def _get(held: dict[str, T], name: str, command: str) -> T:
        if name not in held:
            raise Refused(f"missing: {command}")
        return held[name]

    @classmethod
    def _take(cls, held: dict[str, T], name: str, command: str) -> None:
        cls._get(held, name, command)
        del held[name]


def _elements(text: str) -> Iterator[str]:
    yield from (element.strip() for element in _ELEMENT.findall(text.strip().removeprefix("{").removesuffix("}")))
