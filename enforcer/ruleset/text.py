"""The ruleset as nft reads and prints it.

``transaction`` words differences, ``replacement`` a full render over whatever an earlier agent left, and ``listing`` a
ruleset in the form of ``nft list table``.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from enforcer.model.addresses import family_of, format_address, format_interval
from enforcer.ruleset.objects import Chain, Counter, Element, KeyType, Set, Table
from enforcer.ruleset.ruleset import Id, Ruleset, Transaction

Named = TypeVar("Named", Counter, Set, Chain)

_PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp"}


def key_text(of: Set, key: bytes) -> str:
    """The key of an element as nft prints it."""
    if of.interval:
        half = len(key) // 2
        return format_interval(
            (int.from_bytes(key[:half], "big"), int.from_bytes(key[half:], "big")), family_of(key[:half])
        )
    return " . ".join(_field_text(kind, value) for kind, value in zip(of.key, of.unpack(key), strict=True))


def _field_text(kind: KeyType, value: bytes) -> str:
    match kind:
        case KeyType.IPV4_ADDR | KeyType.IPV6_ADDR:
            return format_address(value)
        case KeyType.INET_PROTO:
            return _PROTOCOLS.get(value[0], str(value[0]))
        case KeyType.INET_SERVICE:
            return str(int.from_bytes(value, "big"))
        case KeyType.IFNAME:
            return '"' + value.rstrip(b"\0").decode() + '"'
        case KeyType.ETHER_ADDR:
            return value.hex(":")


def element_text(of: Set, key: bytes, element: Element) -> str:
    """An element as nft prints it: key, comment, verdict."""
    text = key_text(of, key)
    if element.comment:
        text += f' comment "{element.comment}"'
    if element.goto is not None:
        text += f" : goto {element.goto}"
    return text


def transaction(change: Transaction) -> str:
    """Commands that carry a ruleset over a change.

    The order keeps every reference whole: new sets with their elements, removals from maps, chains and rules, new map
    elements, then the chains, sets and counters that nothing refers to any more.
    """
    lines: list[str] = []
    new_sets = {(d.after.table, d.after.name) for d in change.sets if d.after is not None}
    lines += [_add_counter(d.after) for d in change.counters if d.after is not None]
    lines += [_add_set(d.after) for d in change.sets if d.after is not None and d.before is None]
    fresh = [e for e in change.elements if (e.set.table, e.set.name) in new_sets and not e.set.verdicts]
    lines += [line for e in fresh for line in _add_elements(e.set, e.added)]
    later = [e for e in change.elements if e not in fresh]
    lines += [line for e in later for line in _delete_elements(e.set, e.removed)]
    for difference in change.chains:
        chain = difference.after
        if chain is not None:
            lines.append(_add_chain(chain) if difference.before is None else f"flush chain {_id(chain)}")
    lines += [line for d in change.chains if d.after is not None for line in _add_rules(d.after)]
    lines += [line for e in later for line in _add_elements(e.set, e.added)]
    ended = [d.before for d in change.chains if d.after is None and d.before is not None]
    lines += [f"flush chain {_id(chain)}" for chain in ended]
    lines += [f"delete chain {_id(chain)}" for chain in ended]
    lines += [f"delete {d.before.kind} {_id(d.before)}" for d in change.sets if d.after is None and d.before]
    lines += [f"delete counter {_id(d.before)}" for d in change.counters if d.after is None and d.before]
    return "\n".join(lines) + "\n"


@dataclass(slots=True)
class Present:
    """What the kernel holds of our tables, by name.

    Base chains come with their hook and priority (None for other chains), sets with their ``type`` and whether they
    hold intervals.
    """

    chains: dict[Id, tuple[str, int] | None] = field(default_factory=dict)
    sets: dict[Id, tuple[str, bool]] = field(default_factory=dict)
    counters: set[Id] = field(default_factory=set)


def replacement(ruleset: Ruleset, present: Present) -> str:
    """Commands that put a whole ruleset in the place of what is present, in one transaction.

    Base chains, and sets and maps of the same type, are flushed and refilled, never deleted: a packet that is under way
    then finds either the old elements or the new ones, where in a new map it would find none and pass. Counters keep
    their counts.
    """
    lines = [f'add table {table} {{ comment "{table.comment}"; }}' for table in Table]
    wanted_sets = {(s.table, s.name): (s.type, s.interval) for s in ruleset.sets}
    wanted_chains = {(c.table, c.name): _attached(c) for c in ruleset.chains}
    kept_chains = {i for i, hook in present.chains.items() if i in wanted_chains and wanted_chains[i] == hook}
    wanted_counters = {(c.table, c.name) for c in ruleset.counters}
    lines += [f"flush chain {table} {name}" for table, name in present.chains]
    lines += [f"flush {_kind(kind)} {table} {name}" for (table, name), (kind, _) in present.sets.items()]
    lines += [
        f"delete {_kind(present.sets[identity][0])} {identity[0]} {identity[1]}"
        for identity in sorted_ids(i for i, kind in present.sets.items() if wanted_sets.get(i) != kind)
    ]
    lines += [f"delete chain {table} {name}" for table, name in sorted_ids(present.chains.keys() - kept_chains)]
    lines += [f"delete counter {table} {name}" for table, name in sorted_ids(present.counters - wanted_counters)]
    lines += [_add_counter(c) for c in ruleset.counters if (c.table, c.name) not in present.counters]
    lines += [_add_set(s) for s in ruleset.sets if present.sets.get((s.table, s.name)) != (s.type, s.interval)]
    # A base chain that stays is said again: its policy may have been changed.
    lines += [_add_chain(c) for c in ruleset.chains if c.hook or (c.table, c.name) not in kept_chains]
    lines += [line for chain in ruleset.chains for line in _add_rules(chain)]
    lines += [line for s in ruleset.sets for line in _add_elements(s, ruleset.elements(s).items())]
    return "\n".join(lines) + "\n"


def listing(ruleset: Ruleset) -> str:
    """The ruleset as ``nft list table`` prints it, each kind of object in order of name; ``nft -f`` reads it, too."""
    return "".join(
        f"table {table} {{\n" + "\n\n".join(["\t" + f'comment "{table.comment}"', *_blocks(ruleset, table)]) + "\n}\n"
        for table in Table
    )


def sorted_ids(identities: Iterable[Id]) -> list[Id]:
    """Identities in order of table and name."""
    return sorted(identities, key=lambda identity: (identity[0].family, identity[1]))


def _blocks(ruleset: Ruleset, table: Table) -> Iterator[str]:
    for counter in _of(table, ruleset.counters):
        yield _block(f"counter {counter.name}", _comment(counter))
    for of in _of(table, ruleset.sets):
        elements = ruleset.elements(of)
        body = [f"type {of.type}", *(["flags interval"] if of.interval else []), *_comment(of)]
        if elements:
            words = ",\n\t\t\t     ".join(element_text(of, key, elements[key]) for key in sorted(elements))
            body.append(f"elements = {{ {words} }}")
        yield _block(f"{of.kind} {of.name}", body)
    for chain in _of(table, ruleset.chains):
        hook = [str(chain.hook)] if chain.hook else []
        yield _block(f"chain {chain.name}", [*_comment(chain), *hook, *chain.rules])


def _of(table: Table, objects: Iterable[Named]) -> list[Named]:
    return sorted((o for o in objects if o.table is table), key=lambda o: o.name)


def _block(head: str, body: Iterable[str]) -> str:
    return "\n".join([f"\t{head} {{", *(f"\t\t{line}" for line in body), "\t}"])


def _comment(of: Counter | Set | Chain) -> list[str]:
    return [f'comment "{of.comment}"'] if of.comment else []


def _id(of: Counter | Set | Chain) -> str:
    return f"{of.table} {of.name}"


def _kind(set_type: str) -> str:
    return "map" if " : " in set_type else "set"


def _attached(chain: Chain) -> tuple[str, int] | None:
    return (chain.hook.name, chain.hook.number) if chain.hook else None


def _body(words: Iterable[str]) -> str:
    text = " ".join(words)
    return f" {{ {text} }}" if text else ""


def _add_counter(counter: Counter) -> str:
    return f"add counter {_id(counter)}" + _body(f"{line};" for line in _comment(counter))


def _add_set(of: Set) -> str:
    flags = ["flags interval;"] if of.interval else []
    return f"add {of.kind} {_id(of)}" + _body([f"type {of.type};", *flags, *(f"{c};" for c in _comment(of))])


def _add_chain(chain: Chain) -> str:
    hook = [str(chain.hook)] if chain.hook else []
    return f"add chain {_id(chain)}" + _body([*hook, *(f"{line};" for line in _comment(chain))])


def _add_rules(chain: Chain) -> list[str]:
    return [f"add rule {_id(chain)} {rule}" for rule in chain.rules]


def _add_elements(of: Set, elements: Iterable[tuple[bytes, Element]]) -> list[str]:
    words = ", ".join(element_text(of, key, element) for key, element in elements)
    return [f"add element {_id(of)} {{ {words} }}"] if words else []


def _delete_elements(of: Set, keys: Iterable[bytes]) -> list[str]:
    words = ", ".join(key_text(of, key) for key in keys)
    return [f"delete element {_id(of)} {{ {words} }}"] if words else []
