"""Changes of the ruleset in nft's words: one step of a plan, or a whole ruleset in the place of another."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping

from enforcer.model.addresses import family_of, format_address, format_interval
from enforcer.ruleset.objects import Chain, Counter, Element, KeyType, Set, Table
from enforcer.ruleset.plan import Step
from enforcer.ruleset.ruleset import Elements, Ruleset


def key_text(nft_set: Set, key: bytes) -> str:
    """The key of an element as nft prints it."""
    if nft_set.interval:
        half = len(key) // 2
        first, last = key[:half], key[half:]
        if nft_set.key[0] is KeyType.INET_SERVICE:
            return format_ports((int.from_bytes(first, "big"), int.from_bytes(last, "big")))
        return format_interval((int.from_bytes(first, "big"), int.from_bytes(last, "big")), family_of(first))
    return " . ".join(_field_text(kind, value) for kind, value in zip(nft_set.key, nft_set.unpack(key), strict=True))


def format_ports(ports: tuple[int, int]) -> str:
    """A range of ports as nft prints it."""
    return str(ports[0]) if ports[0] == ports[1] else f"{ports[0]}-{ports[1]}"


def _field_text(kind: KeyType, value: bytes) -> str:
    match kind:
        case KeyType.IPV4_ADDR | KeyType.IPV6_ADDR:
            return format_address(value)
        case KeyType.INET_SERVICE:
            return str(int.from_bytes(value, "big"))
        case KeyType.MARK:
            return f"0x{int.from_bytes(value, sys.byteorder):08x}"
        case KeyType.IFNAME:
            return '"' + value.rstrip(b"\0").decode() + '"'
        case KeyType.ETHER_ADDR:
            return value.hex(":")


def element_text(nft_set: Set, key: bytes, element: Element) -> str:
    """An element as nft prints it: key, comment, verdict."""
    text = key_text(nft_set, key)
    if element.comment:
        text += f' comment "{element.comment}"'
    if element.jump is not None:
        text += f" : jump {element.jump}"
    return text


def commands(step: Step, *, elements: bool) -> list[str]:
    """The commands of one transaction, in an order that keeps every reference whole.

    Args:
        step: the transaction.
        elements: whether elements are in it, too.
    """
    changes = step.elements if elements else ()
    return [
        *(_add_counter(counter) for counter in step.new_counters),
        *(_add_set(nft_set) for nft_set in step.new_sets),
        *(_add_chain(chain) for chain in step.new_chains),
        *(line for chain in step.new_chains for line in _add_rules(chain)),
        *(line for entry in changes for line in _change_elements(entry.set, entry)),
        # A base chain is said again: its policy may have been changed.
        *(_add_chain(chain) for chain in step.refilled if chain.hook),
        *(line for chain in step.refilled for line in (f"flush chain {_id(chain)}", *_add_rules(chain))),
        *(f"flush chain {_id(chain)}" for chain in step.old_chains),
        # A map that is not ours may lead to a chain that is not ours.
        *(f"delete {nft_set.kind} {_id(nft_set)}" for nft_set in step.old_sets),
        *(f"delete chain {_id(chain)}" for chain in step.old_chains),
        *(f"delete counter {_id(counter)}" for counter in step.old_counters),
    ]


def tables() -> list[str]:
    """The commands that make both tables, where they are not there."""
    return [f'add table {table} {{ comment "{table.comment}"; }}' for table in Table]


def rebuild(ruleset: Ruleset, present: Ruleset) -> list[str]:
    """Commands that put a ruleset in the place of another in one transaction, whatever types its objects have.

    It is not what ``plan`` is: packets under way may meet new sets by old rules. Counters keep their counts.
    """
    kept = present.counters.keys() & ruleset.counters.keys()
    return [
        *tables(),
        *(f"flush chain {_id(chain)}" for chain in present.chains.values()),
        *(f"flush {nft_set.kind} {_id(nft_set)}" for nft_set in present.sets.values()),
        *(f"delete {nft_set.kind} {_id(nft_set)}" for nft_set in present.sets.values()),
        *(f"delete chain {_id(chain)}" for chain in present.chains.values()),
        *(f"delete counter {_id(counter)}" for identity, counter in present.counters.items() if identity not in kept),
        *(_add_counter(counter) for identity, counter in ruleset.counters.items() if identity not in kept),
        *(_add_set(nft_set) for nft_set in ruleset.sets.values()),
        *(_add_chain(chain) for chain in base_first(ruleset.chains.values())),
        *(line for chain in ruleset.chains.values() for line in _add_rules(chain)),
        *(line for nft_set in ruleset.sets.values() for line in _add_elements(nft_set, ruleset.elements(nft_set))),
    ]


def base_first(chains: Iterable[Chain]) -> list[Chain]:
    """Chains with the base chains first, in the order of their hooks."""
    return sorted(chains, key=lambda chain: (chain.hook.name, chain.hook.number) if chain.hook else ("~", 0))


def comment_lines(item: Counter | Set | Chain) -> list[str]:
    """The comment of an object as nft prints it, if it has one."""
    return [f'comment "{item.comment}"'] if item.comment else []


def _id(item: Counter | Set | Chain) -> str:
    return f"{item.table} {item.name}"


def _body(words: Iterable[str]) -> str:
    text = " ".join(words)
    return f" {{ {text} }}" if text else ""


def _add_counter(counter: Counter) -> str:
    return f"add counter {_id(counter)}" + _body(f"{line};" for line in comment_lines(counter))


def _add_set(nft_set: Set) -> str:
    flags = ["flags interval;"] if nft_set.interval else []
    return f"add {nft_set.kind} {_id(nft_set)}" + _body(
        [f"type {nft_set.type};", *flags, *(f"{c};" for c in comment_lines(nft_set))]
    )


def _add_chain(chain: Chain) -> str:
    hook = [str(chain.hook)] if chain.hook else []
    return f"add chain {_id(chain)}" + _body([*hook, *(f"{line};" for line in comment_lines(chain))])


def _add_rules(chain: Chain) -> list[str]:
    return [f"add rule {_id(chain)} {rule}" for rule in chain.rules]


def _change_elements(nft_set: Set, entry: Elements) -> list[str]:
    return [*_delete_elements(nft_set, entry.removed), *_add_elements(nft_set, entry.added)]


def _add_elements(nft_set: Set, elements: Mapping[bytes, Element]) -> list[str]:
    words = ", ".join(element_text(nft_set, key, element) for key, element in elements.items())
    return [f"add element {_id(nft_set)} {{ {words} }}"] if words else []


def _delete_elements(nft_set: Set, keys: Iterable[bytes]) -> list[str]:
    words = ", ".join(key_text(nft_set, key) for key in keys)
    return [f"delete element {_id(nft_set)} {{ {words} }}"] if words else []
