"""Where isolated pods are sent between the two halves of a switch: to what old and new chains both allow. Pure.

An interim chain is a copy of a new one, in which whatever allows hands over to the pod's old chain, which then decides.
Which one that is, a map of its own says by address, so each new chain is copied once, however many pods and isolation
groups change with it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from enforcer.ruleset.objects import CONTENT_DIGITS, Chain, Element, Set, Use, digest
from enforcer.ruleset.ruleset import Elements, Id

_HANDOVER = "before/"
_TARGET = re.compile(r"\b(?P<verb>jump|goto) (?P<target>\S+)")


@dataclass(slots=True)
class Interim:
    """The objects of the interim.

    Args:
        chains: the chains of before and after.
        dispatch: for each dispatch map, the rules that look it up.
        before: the elements of before that are to be replaced, by their map.
        taken: names of maps that a killed agent left, perhaps incomplete.
    """

    chains: Mapping[Id, Chain]
    dispatch: Mapping[Set, tuple[str, ...]]
    before: Mapping[Set, Mapping[bytes, Element]]
    taken: frozenset[str]
    _copies: dict[str, Chain] = field(default_factory=dict)
    _copied: dict[str, str] = field(default_factory=dict)
    _handovers: dict[str, Chain] = field(default_factory=dict)
    _maps: dict[Set, Set] = field(default_factory=dict)
    _handed_over: dict[Set, dict[bytes, Element]] = field(init=False)
    _leading_back: dict[Id, bool] = field(default_factory=dict)
    _closed: Chain | None = None

    def __post_init__(self) -> None:
        self._handed_over = {
            nft_set: {
                key: element
                for key, element in elements.items()
                if not self._leads_back((nft_set.table, element.jump or ""))
            }
            for nft_set, elements in self.before.items()
        }

    def between(self, nft_set: Set, key: bytes, after: Chain) -> str:
        """The name of the chain that stands for a new one until the second half; its own where it allows nothing.

        A pod that is in an interim already, which an agent that was killed has left, is closed: what both allow depends
        on three policies then, and copies of copies would be deeper than the kernel allows.
        """
        if key in self._handed_over[nft_set]:
            return self._copy(after, self._direction(nft_set))
        if self._closed is None:
            name = f"{_HANDOVER}closed"
            while (nft_set.table, name) in self.chains:
                name += "-"
            self._closed = Chain(nft_set.table, name, ("drop",), "closed while policy changes")
        return self._closed.name

    def made(self) -> tuple[tuple[Chain, ...], tuple[Set, ...], tuple[Elements, ...]]:
        """The chains, each after those that it goes to, the maps, and their elements."""
        elements = tuple(Elements(new, added=self._handed_over[nft_set]) for nft_set, new in self._maps.items())
        closed = () if self._closed is None else (self._closed,)
        return (*closed, *self._handovers.values(), *self._copies.values()), tuple(self._maps.values()), elements

    def _leads_back(self, identity: Id) -> bool:
        """Whether a chain leads to where pods were sent before; each chain is looked through once."""
        if identity not in self._leading_back:
            chain = self.chains.get(identity)
            targets = [] if chain is None else [f["target"] for line in chain.rules for f in _TARGET.finditer(line)]
            table, name = identity
            self._leading_back[identity] = name.startswith(_HANDOVER) or any(
                self._leads_back((table, target)) for target in targets
            )
        return self._leading_back[identity]

    @staticmethod
    def _direction(nft_set: Set) -> str:
        return nft_set.name.rpartition("-")[0]

    def _copy(self, chain: Chain, direction: str) -> str:
        if chain.name not in self._copied:
            lines = tuple(_TARGET.sub(lambda f: self._target(chain, f, direction), line) for line in chain.rules)
            if lines == chain.rules:
                self._copied[chain.name] = chain.name
            else:
                stem = chain.name.rpartition("/")[0]
                name = f"{stem}/{digest(chr(10).join((chain.comment, *lines)), CONTENT_DIGITS)}"
                self._copied[chain.name] = name
                self._copies[name] = dataclasses.replace(chain, name=name, rules=lines)
        return self._copied[chain.name]

    def _target(self, chain: Chain, found: re.Match[str], direction: str) -> str:
        target = self.chains[chain.table, found["target"]]
        if target.rules[-1:] == ("accept",):
            return f"goto {self._handover(chain, direction)}"
        return f"{found['verb']} {self._copy(target, direction)}"

    def _handover(self, chain: Chain, direction: str) -> str:
        """The chain that sends each pod to its old chain."""
        if direction not in self._handovers:
            lines: list[str] = []
            for nft_set in (
                nft_set
                for nft_set, found in self._handed_over.items()
                if found and self._direction(nft_set) == direction
            ):
                self._maps[nft_set] = new = self._map(nft_set)
                lines += [rule.replace(f"@{nft_set.name}", f"@{new.name}") for rule in self.dispatch[nft_set]]
            lines.append("drop")
            name = f"{_HANDOVER}{direction}/{digest(chr(10).join(lines), CONTENT_DIGITS)}"
            self._handovers[direction] = Chain(chain.table, name, tuple(lines), "where pods were sent before")
        return self._handovers[direction].name

    def _map(self, nft_set: Set) -> Set:
        content = sorted((key.hex(), element.jump or "") for key, element in self._handed_over[nft_set].items())
        name = f"{_HANDOVER}{nft_set.name}/{digest(repr(content), CONTENT_DIGITS)}"
        while name in self.taken:
            name += "-"
        return dataclasses.replace(nft_set, name=name, comment="where pods were sent before", use=Use.OTHER)
