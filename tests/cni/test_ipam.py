"""Allocation of addresses: next-fit, never twice, never a reserved one, and remembered by the next process."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import chain, count
from pathlib import Path

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cni.plugin.links import default_mac
from cni.plugin.protocol import CniError
from cni.plugin.store import Record, Store
from enforcer.model.addresses import Address, Network, format_address, parse_address
from enforcer.model.objects import Attachment

SMALL = (Network.parse("10.0.0.0/29"), Network.parse("10.0.1.0/30"), Network.parse("fd00::/125"))


def record(name: str, addresses: tuple[bytes, ...]) -> Record:
    return Record(
        Attachment(name, "eth0", None, "", addresses, default_mac(name, "eth0"), f"dbr{name}"),
        "net",
        b"{}",
        {},
        ready=False,
    )


def reserve(
    store: Store, name: str, networks: tuple[Network, ...] = SMALL, requested: tuple[Address, ...] = ()
) -> tuple[bytes, ...]:
    chosen = store.choose(networks, requested)
    store.reserve(record(name, chosen), requested=requested)
    return chosen


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path / "state.db")
    yield made
    made.close()


def test_network_gateway_and_broadcast_are_never_given(store: Store) -> None:
    given = []
    with pytest.raises(CniError, match="no free address"):
        for n in count():
            given.append(format_address(reserve(store, str(n), (Network.parse("10.0.0.0/29"),))[0]))
    assert given == [f"10.0.0.{n}" for n in range(2, 7)]


def test_a_full_network_says_how_many_are_in_use_and_gives_again_what_is_freed(store: Store) -> None:
    only = (Network.parse("10.0.0.0/30"),)
    held = record("a", reserve(store, "a", only))
    with pytest.raises(CniError, match="1 are in use"):
        store.choose(only, ())
    store.release(held.attachment)
    assert store.choose(only, ()) == held.attachment.addresses


def test_a_freed_address_rests_until_the_others_were_given_also_over_a_restart(tmp_path: Path) -> None:
    network = (Network.parse("10.0.0.0/29"),)
    store = Store(tmp_path / "state.db")
    first = reserve(store, "a", network)
    store.release(record("a", first).attachment)
    store.close()
    store = Store(tmp_path / "state.db")
    later = [reserve(store, str(n), network) for n in range(4)]
    assert first not in later
    assert reserve(store, "last", network) == first
    store.close()


def test_a_hardware_address_belongs_to_one_attachment(store: Store) -> None:
    first, second = record("a", (parse_address("10.0.0.2"),)), record("b", (parse_address("10.0.0.3"),))
    stolen = dataclasses.replace(second.attachment, mac=first.attachment.mac)
    store.reserve(first, requested=())
    with pytest.raises(CniError, match="is the hardware address of a"):
        store.reserve(dataclasses.replace(second, attachment=stolen), requested=())


@pytest.mark.parametrize("wanted", ["10.0.0.0", "10.0.0.1", "10.0.0.7", "10.9.9.9"])
def test_a_requested_address_that_cannot_be_given_is_refused(store: Store, wanted: str) -> None:
    with pytest.raises(CniError, match="cannot be given"):
        store.choose((Network.parse("10.0.0.0/29"),), (parse_address(wanted),))


class Allocations(RuleBasedStateMachine):
    """The store against a plain dictionary."""

    folder: Path
    numbers: Iterator[int]

    @initialize()
    def open(self) -> None:
        self.path = Path(self.folder, f"{next(self.numbers)}.db")
        self.store = Store(self.path)
        self.held: dict[str, tuple[bytes, ...]] = {}

    @rule(requested=st.sampled_from([(), (), (), (parse_address("10.0.0.3"),), (parse_address("fd00::3"),)]))
    def add(self, requested: tuple[Address, ...]) -> None:
        taken = set(chain.from_iterable(self.held.values()))
        name = str(next(self.numbers))
        try:
            chosen = reserve(self.store, name, requested=requested)
        except CniError:
            free4 = {f"10.0.0.{n}" for n in range(2, 7)} | {"10.0.1.2"}
            free6 = {f"fd00::{n}" for n in range(2, 8)}
            left = [free - {format_address(a) for a in taken} for free in (free4, free6)]
            assert not all(left) or any(address in taken for address in requested)
            return
        assert [len(address) for address in sorted(chosen, key=len)] == [4, 16]
        assert not taken & set(chosen)
        assert set(requested) <= set(chosen)
        self.held[name] = chosen

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(sorted(self.held)))
        self.store.release(record(name, self.held.pop(name)).attachment)

    @rule()
    def restart(self) -> None:
        self.store.close()
        self.store = Store(self.path)

    @invariant()
    def knows_what_is_held(self) -> None:
        if hasattr(self, "store"):
            found = {r.attachment.container_id: r.attachment.addresses for r in self.store.records()}
            assert found == self.held

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()


def test_allocations_are_those_that_a_dictionary_would_hold(tmp_path_factory: pytest.TempPathFactory) -> None:
    Allocations.folder = tmp_path_factory.mktemp("stores")
    Allocations.numbers = count()
    Allocations.TestCase.settings = settings(max_examples=30, stateful_step_count=25, deadline=None)
    Allocations.TestCase().runTest()
