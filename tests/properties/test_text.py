"""The text of any change, applied by the fake of nftables, makes the tables what the ruleset says."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.ruleset import text
from enforcer.ruleset.plan import plan
from enforcer.ruleset.ruleset import Ruleset, difference
from enforcer.translate.base import EPOCH
from tests.properties.test_oracles import events
from tests.support.model import Event, Model
from tests.support.nft import Nft, Refused


def check(nft: Nft, ruleset: Ruleset) -> None:
    """Compare what the fake holds with a ruleset; the epoch's elements do not come with the text of a change."""
    tables = nft.tables
    chains = {(str(c.table), c.name): list(c.rules) for c in ruleset.chains.values()}
    assert {(t, name): chain.rules for t, table in tables.items() for name, chain in table.chains.items()} == chains
    counters = {(str(c.table), c.name) for c in ruleset.counters.values()}
    assert {(t, name) for t, table in tables.items() for name in table.counters} == counters
    assert sum(len(table.sets) for table in tables.values()) == len(ruleset.sets)
    for nft_set in ruleset.sets.values():
        held = tables[str(nft_set.table)].sets[nft_set.name]
        assert (held.kind, held.type, held.interval) == (nft_set.kind, nft_set.type, nft_set.interval)
        if nft_set != EPOCH:
            elements = ruleset.elements(nft_set)
            wanted = {text.key_text(nft_set, key): element.jump for key, element in elements.items()}
            assert {key: verdict.removeprefix("jump ") or None for key, verdict in held.elements.items()} == wanted


def whole(ruleset: Ruleset) -> Nft:
    nft = Nft()
    nft.run(text.tables())
    for step in plan(difference(Ruleset(), ruleset), ruleset, repair=True, upgrade=True):
        nft.run(text.commands(step, elements=True))
    return nft


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(events, max_size=4), max_size=6))
def test_the_text_of_each_step_is_accepted_and_ends_in_the_ruleset(batches: list[list[Event]]) -> None:
    model = Model()
    nft = whole(model.ruleset)
    model.ruleset.take()
    for batch in batches:
        model.put(*batch)
        for step in model.steps():
            nft.run(text.commands(step, elements=True))
        check(nft, model.ruleset)


@settings(max_examples=50, deadline=None)
@given(st.lists(events, max_size=8), st.lists(events, max_size=8))
def test_the_text_that_rebuilds_a_ruleset_replaces_any_other(before: list[Event], after: list[Event]) -> None:
    present, wanted = Model(), Model()
    present.put(*before)
    wanted.put(*after)
    nft = whole(present.ruleset)
    nft.run(text.rebuild(wanted.ruleset, present.ruleset))
    check(nft, wanted.ruleset)


@settings(max_examples=50, deadline=None)
@given(st.lists(events, min_size=1, max_size=8))
def test_a_chain_cannot_go_before_what_leads_to_it(sequence: list[Event]) -> None:
    model = Model()
    model.put(*sequence)
    nft = whole(model.ruleset)
    for chain in model.ruleset.chains.values():
        used = any(f" {chain.name}" in f"{rule} " for other in model.ruleset.chains.values() for rule in other.rules)
        if used:
            try:
                nft.run([f"delete chain {chain.table} {chain.name}"])
            except Refused:
                continue
            raise AssertionError(f"{chain.name} went although a rule leads to it")
