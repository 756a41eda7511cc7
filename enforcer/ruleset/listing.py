"""Whole rulesets in the form of ``nft list table``: written for people, and read back from the kernel."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from enforcer.model.addresses import Network, parse_address
from enforcer.ruleset.objects import NAME, Chain, Counter, Element, Hook, KeyType, Set, Table, comment_of
from enforcer.ruleset.ruleset import Ruleset
from enforcer.ruleset.text import base_first, comment_lines, element_text

Named = TypeVar("Named", Counter, Set, Chain)

_HEAD = re.compile(r"\t(counter|set|map|chain) (\S+) \{")
_HOOK = re.compile(r"type (\S+) hook (\S+) priority (.+); policy (\S+);\Z")
_ELEMENT = re.compile(r'(?:"[^"]*"|[^,"])+')
_COMMENT = re.compile(r' comment "([^"]*)"')


def listing(ruleset: Ruleset) -> str:
    """A ruleset as ``nft list table`` prints it: counters, sets, then chains, base chains first.

    ``nft -f`` reads it, too. Unlike nft, the objects of a kind are in the order of their names.
    """
    return "".join(
        f"table {table} {{\n" + "\n\n".join(["\t" + f'comment "{table.comment}"', *_blocks(ruleset, table)]) + "\n}\n"
        for table in Table
    )


def _blocks(ruleset: Ruleset, table: Table) -> Iterator[str]:
    for counter in _of(table, ruleset.counters.values()):
        yield _block(f"counter {counter.name}", comment_lines(counter))
    for nft_set in _of(table, ruleset.sets.values()):
        elements = ruleset.elements(nft_set)
        body = [f"type {nft_set.type}", *(["flags interval"] if nft_set.interval else []), *comment_lines(nft_set)]
        if elements:
            words = ",\n\t\t\t     ".join(element_text(nft_set, key, elements[key]) for key in sorted(elements))
            body.append(f"elements = {{ {words} }}")
        yield _block(f"{nft_set.kind} {nft_set.name}", body)
    for chain in base_first(_of(table, ruleset.chains.values())):
        hook = [str(chain.hook)] if chain.hook else []
        yield _block(f"chain {chain.name}", [*comment_lines(chain), *hook, *chain.rules])


def _of(table: Table, objects: Iterable[Named]) -> list[Named]:
    return sorted((o for o in objects if o.table is table), key=lambda o: o.name)


def _block(head: str, body: Iterable[str]) -> str:
    return "\n".join([f"\t{head} {{", *(f"\t\t{line}" for line in body), "\t}"])


def read(listed: str, table: Table, desired: Ruleset, into: Ruleset) -> None:
    """Read a table as ``nft -s list table`` prints it.

    What is as desired becomes the desired object itself, so that two rulesets can be compared; comments of objects do
    not count, since the kernel cannot change them. Of sets that are not desired only their names are read.

    Args:
        listed: what nft printed.
        table: the table that it printed.
        desired: what the table should be.
        into: takes what was read.
    """
    for kind, name, body in _objects(listed):
        if not NAME.match(name):
            continue
        match kind:
            case "counter":
                into.put_counter(desired.counters.get((table, name), Counter(table, name)))
            case "chain":
                into.put_chain(_chain(table, name, body, desired))
            case _:
                _read_set(table, name, kind, body, desired, into)


def _objects(listed: str) -> Iterator[tuple[str, str, list[str]]]:
    body: list[str] = []
    head: re.Match[str] | None = None
    for line in listed.splitlines():
        if head is None:
            head, body = _HEAD.match(line), []
        elif line == "\t}":
            yield head[1], head[2], body
            head = None
        else:
            body.append(line.strip())


def _chain(table: Table, name: str, body: list[str], desired: Ruleset) -> Chain:
    wanted = desired.chains.get((table, name))
    comment = ""
    if body and body[0].startswith("comment "):
        comment = comment_of(body[0].split('"')[1])
        body = body[1:]
    hook = None
    if body and (found := _HOOK.match(body[0])):
        first, *body = body
        if wanted is not None and wanted.hook is not None and str(wanted.hook).rpartition("policy")[0] in first:
            hook = wanted.hook
            # A chain policy can be changed back: it is taken for a rule that is not ours.
            body = body if str(hook) == first else [first, *body]
        else:
            hook = Hook(found[2], found[3], 0, found[1])
    if wanted is not None and wanted.rules == tuple(body) and wanted.hook == hook:
        return wanted
    return Chain(
        table, name, tuple(body), wanted.comment if wanted else comment, hook, wanted.epoch if wanted else False
    )


def _read_set(table: Table, name: str, kind: str, body: list[str], desired: Ruleset, into: Ruleset) -> None:
    text = "\n".join(body)
    head, _, elements = text.partition("elements = {")
    words = [line for line in head.splitlines() if not line.startswith("comment ")]
    wanted = desired.sets.get((table, name))
    if wanted is None or words != [f"type {wanted.type}", *(["flags interval"] if wanted.interval else [])]:
        into.put_set(Set(table, name, (), verdicts=kind == "map"))
        return
    try:
        found = [_element(wanted, entry.strip()) for entry in _ELEMENT.findall(elements.rpartition("}")[0])]
    except ValueError:
        # Nothing of ours reads so: the set is replaced.
        into.put_set(Set(table, name, (), verdicts=kind == "map"))
        return
    into.put_set(wanted)
    for key, element in found:
        into.put_element(table, name, key, element)


def _element(nft_set: Set, text: str) -> tuple[bytes, Element]:
    comment = _COMMENT.search(text)
    key, _, verdict = _COMMENT.sub("", text).partition(" : ")
    verb, _, target = verdict.partition(" ")
    # Ours are jumps: a mark in the comment tells others from them.
    words = (comment[1] if comment else "") if verb in {"", "jump"} else verb
    return _key(nft_set, key.strip()), Element(comment_of(words), target or None)


def _key(nft_set: Set, text: str) -> bytes:
    if nft_set.interval:
        kind = nft_set.key[0]
        if "/" in text:
            width = kind.width
            first, last = Network.parse(text).interval
            return first.to_bytes(width, "big") + last.to_bytes(width, "big")
        first_text, _, last_text = text.partition("-")
        return _field(kind, first_text) + _field(kind, last_text or first_text)
    return nft_set.pack(*(_field(kind, word) for kind, word in zip(nft_set.key, text.split(" . "), strict=True)))


def _field(kind: KeyType, text: str) -> bytes:
    match kind:
        case KeyType.IPV4_ADDR | KeyType.IPV6_ADDR:
            return parse_address(text)
        case KeyType.INET_SERVICE:
            return int(text).to_bytes(2, "big")
        case KeyType.MARK:
            return int(text, 0).to_bytes(kind.width, sys.byteorder)
        case KeyType.IFNAME:
            return text.strip('"').encode().ljust(kind.width, b"\0")
        case KeyType.ETHER_ADDR:
            return bytes.fromhex(text.replace(":", ""))
