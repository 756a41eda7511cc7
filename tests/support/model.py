"""The product's pure half put together, a kernel that applies the steps of a plan, and connections that cross it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from enforcer.control.explain import connection_fields
from enforcer.model.marks import GROUPS, Epochs
from enforcer.policy.index import PolicyIndex
from enforcer.policy.verdict import Connection, verdict
from enforcer.ruleset.evaluate import RulesetView, View, evaluate
from enforcer.ruleset.objects import Chain, Use
from enforcer.ruleset.plan import Purpose, Step, plan
from enforcer.ruleset.ruleset import Ruleset, difference
from enforcer.translate.base import EPOCH, BaseSettings, epoch_elements, stamp_chain
from enforcer.translate.translator import Translator

PROTOCOLS = {6: "tcp", 17: "udp", 132: "sctp", 1: "icmp"}
Event = tuple[str, str, Any]
LEVELS = 16
"""How many chains deep a packet may be sent (``NFT_JUMP_STACK_SIZE``)."""


@dataclass
class Model:
    """Events in, steps out."""

    ruleset: Ruleset = field(default_factory=Ruleset)
    settings: BaseSettings = field(default_factory=BaseSettings)

    def __post_init__(self) -> None:
        self.translator = Translator(self.ruleset, self.settings)
        self.index = PolicyIndex()

    def put(self, *events: Event) -> None:
        for kind, key, value in events:
            puts: dict[str, Callable[[str, Any], None]] = {
                "endpoint": self.index.set_endpoint,
                "policy": self.index.set_policy,
                "namespace": self.index.set_namespace,
            }
            puts[kind](key, value)
        self.translator.apply(self.index.take())

    def steps(self) -> list[Step]:
        return plan(self.ruleset.take(), self.ruleset)

    def allows(self, connection: Connection) -> bool:
        """What the API says, as far as pods of this node decide."""
        endpoints = self.index.cluster.endpoints
        decisions = verdict(self.index.cluster, connection)
        return all(d.allowed for d in decisions if any(endpoints[key].local for key in d.endpoints))


class Kernel:
    """Applies steps to a ruleset of its own, and refuses what the kernel refuses, or what would leak."""

    def __init__(self, model: Model) -> None:
        self.held = Ruleset()
        self.epochs = Epochs(model.translator.settings.mark, clean=frozenset(GROUPS))
        for step in plan(difference(self.held, model.ruleset), model.ruleset, repair=True, upgrade=True):
            self.apply(step)
        model.ruleset.take()

    def apply(self, step: Step) -> None:
        self._check(step)
        for counter in step.new_counters:
            self.held.put_counter(counter)
        for nft_set in step.new_sets:
            assert (nft_set.table, nft_set.name) not in self.held.sets
            self.held.put_set(nft_set)
        for chain in step.new_chains:
            assert (chain.table, chain.name) not in self.held.chains
            self._check_references(chain.rules)
            self.held.put_chain(chain)
        for entry in step.elements:
            held = self.held.elements(entry.set)
            for key, element in entry.removed.items():
                assert held[key] == element
                self.held.remove_element(entry.set.table, entry.set.name, key)
            for key, element in entry.added.items():
                assert key not in held
                assert element.jump is None or (entry.set.table, element.jump) in self.held.chains
                self.held.put_element(entry.set.table, entry.set.name, key, element)
        if step.ends_epoch:
            for key in list(self.held.elements(EPOCH)):
                self.held.remove_element(EPOCH.table, EPOCH.name, key)
        for chain in step.refilled:
            assert (chain.table, chain.name) in self.held.chains
            self.held.put_chain(chain)
        for chain in step.old_chains:
            self.held.remove_chain(chain.table, chain.name)
        for nft_set in step.old_sets:
            self.held.remove_set(nft_set.table, nft_set.name)
        for counter in step.old_counters:
            self.held.remove_counter(counter.table, counter.name)
        self._check_all_references()
        self._check_levels()
        self.held.take()

    def begin_epoch(self) -> None:
        """As the agent does a grace period after a change."""
        # A connection of a test carries no old stamp: each test has few epochs.
        if self.held.elements(EPOCH):
            return
        epoch = self.epochs.advance()
        assert epoch is not None
        self.held.put_chain(stamp_chain(self.epochs.mark, epoch))
        for key, element in epoch_elements(self.epochs.mark, epoch).items():
            self.held.put_element(EPOCH.table, EPOCH.name, key, element)
        self.held.take()

    def _check(self, step: Step) -> None:
        """What must be apart is apart."""
        permits = [entry for entry in step.elements if entry.set.use is Use.PERMISSION]
        match step.purpose:
            case Purpose.LEAVES:
                assert not any(entry.added for entry in step.elements)
                assert step.ends_epoch or not permits
            case Purpose.JOINS:
                assert not any(entry.removed for entry in step.elements)
            case Purpose.PREPARATION:
                used = {f"@{nft_set.name}" for nft_set in self.held.sets.values()}
                assert not any(f"@{entry.set.name}" in used for entry in step.elements)
                assert not (step.ends_epoch or step.refilled or step.old_chains or step.old_sets or step.old_counters)
                return
            case Purpose.SWITCH:
                # Elements that permit change their owner in a switch, never whether they are there.
                assert all(entry.removed.keys() == entry.added.keys() for entry in permits)
                assert not (step.new_chains or step.new_sets or step.refilled)
                return
            case _:
                return
        assert not (step.new_chains or step.new_sets or step.new_counters or step.refilled)
        assert not (step.old_chains or step.old_sets or step.old_counters)

    def _check_references(self, rules: tuple[str, ...]) -> None:
        sets = {nft_set.name for nft_set in self.held.sets.values()}
        counters = {counter.name for counter in self.held.counters.values()}
        for rule in rules:
            words = rule.split()
            for word, after in zip(words, (*words[1:], ""), strict=True):
                if word.startswith("@") and not word.startswith("@th"):
                    assert word[1:] in sets, rule
                if word == "name":
                    assert after.strip('"') in counters, rule

    def _check_all_references(self) -> None:
        names = {chain.name for chain in self.held.chains.values()}
        for chain in self.held.chains.values():
            self._check_references(chain.rules)
            for rule in chain.rules:
                words = rule.split()
                for word, target in itertools.pairwise(words):
                    assert word not in {"jump", "goto"} or target in names, rule
        for nft_set in self.held.sets.values():
            for element in self.held.elements(nft_set).values():
                assert element.jump is None or element.jump in names

    def _check_levels(self) -> None:
        """The kernel refuses chains that are more than ``LEVELS`` deep (``NFT_JUMP_STACK_SIZE``), with EMLINK."""
        chains = {chain.name: chain for chain in self.held.chains.values()}
        maps = {f"@{nft_set.name}": nft_set for nft_set in self.held.sets.values() if nft_set.verdicts}
        depths: dict[str, int] = {}

        def depth(name: str) -> int:
            if name not in depths:
                depths[name] = 1 + max(map(depth, targets(chains[name])), default=0)
            return depths[name]

        def targets(chain: Chain) -> Iterator[str]:
            for word, after in itertools.pairwise(" ".join(chain.rules).split()):
                if word in {"jump", "goto"}:
                    yield after
                elif word == "vmap":
                    yield from {e.jump for e in self.held.elements(maps[after]).values() if e.jump is not None}

        deepest = max(chains, key=depth)
        assert depth(deepest) <= LEVELS, f"{deepest} leads {depth(deepest)} chains deep"

    def view(self) -> RulesetView:
        return RulesetView(self.held)


@dataclass
class Tracked:
    """A connection as conntrack has it in the forward hook: its tuple, and the mark that it carries."""

    connection: Connection
    mark: str = "0x00000000"

    def passes(self, egress: View, ingress: View | None = None, *, reply: bool = False, error: bool = False) -> bool:
        """Whether a packet passes both base chains, or an ICMP error about the connection.

        ``ingress`` is another state, if a commit came between the two.
        """
        fields = connection_fields(self.connection, PROTOCOLS[self.connection.protocol]) | {"ct mark": self.mark}
        if error:
            icmp = "icmp" if "ip saddr" in fields else "ipv6-icmp"
            fields |= {"meta l4proto": icmp, "ct state": "related"}
        if reply:
            ip = "ip" if "ip saddr" in fields else "ip6"
            fields[f"{ip} saddr"], fields[f"{ip} daddr"] = fields[f"{ip} daddr"], fields[f"{ip} saddr"]
        for chain, view in (("from-pod", egress), ("to-pod", ingress or egress)):
            outcome = evaluate(view, chain, fields | {"ct mark": self.mark})
            self.mark = f"0x{outcome.mark:08x}"
            if not outcome.accepted:
                return False
        return True
