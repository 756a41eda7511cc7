"""What the loop does when the kernel refuses: tables that refuse stand in for a kernel that does."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from enforcer.kernel.nftables import NftError
from enforcer.model.addresses import parse_address
from enforcer.model.changes import Change
from enforcer.model.objects import Direction, NetworkPolicy, Pod
from enforcer.reconcile.reconciler import NotReadyError, Reconciler, Settings
from enforcer.ruleset.ruleset import Ruleset, Transaction


class Tables:
    """Holds the chains' names of the last whole render or transaction that ``refuses`` let pass."""

    def __init__(self) -> None:
        self.refuses: Callable[[set[str]], bool] = lambda _: False
        self.chains: set[str] = set()
        self.wholes = 0

    def generation(self) -> int:
        return 0

    def is_own(self, generation: int) -> bool:
        return generation == 0

    def all_own_since(self, generation: int) -> bool:
        return True

    def replace(self, ruleset: Ruleset) -> None:
        self.wholes += 1
        self._put({chain.name for chain in ruleset.chains})

    def commit(self, transaction: Transaction) -> None:
        gone = {d.before.name for d in transaction.chains if d.after is None}
        self._put(self.chains - gone | {d.after.name for d in transaction.chains if d.after is not None})

    def _put(self, chains: set[str]) -> None:
        if self.refuses(chains):
            raise NftError("no")
        self.chains = chains


class Silent:
    def committed(self, **_: object) -> None: ...
    def failed(self) -> None: ...
    def repaired(self) -> None: ...
    def revoked(self, flows: int) -> None: ...


def policy(name: str) -> Change:
    return Change(NetworkPolicy, f"x/{name}", NetworkPolicy("x", name, rules={Direction.INGRESS: ()}))


@pytest.fixture
def tables() -> Tables:
    return Tables()


@pytest.fixture
def loop(tables: Tables):
    reconciler = Reconciler(tables, Settings("here"), Silent())
    reconciler.start()
    reconciler.changes([Change(Pod, "x/p", Pod("x", "p", addresses=(parse_address("10.0.0.1"),)))])
    reconciler.synced()
    assert reconciler.barrier(5)
    yield reconciler
    reconciler.stop()


def test_nothing_is_committed_before_the_source_was_read(tables: Tables) -> None:
    reconciler = Reconciler(tables, Settings("here"), Silent())
    reconciler.start()
    reconciler.changes([policy("a")])
    assert not reconciler.barrier(0.1)
    assert tables.wholes == 0
    reconciler.synced()
    assert reconciler.barrier(5)
    assert tables.wholes == 1
    reconciler.stop()


def test_a_refused_change_is_followed_by_a_whole_render(loop: Reconciler, tables: Tables) -> None:
    refusals = iter([True])
    tables.refuses = lambda _: next(refusals, False)
    loop.changes([policy("a")])
    assert loop.barrier(5)
    assert tables.wholes == 2
    assert "policy/x/a/ingress" in tables.chains


def test_a_policy_that_the_kernel_will_not_have_closes_its_pods_and_the_others_go_on(loop, tables: Tables) -> None:
    tables.refuses = lambda chains: "policy/x/bad/ingress" in chains
    loop.changes([policy("bad")])
    assert loop.barrier(5)
    assert any(name.startswith("ingress/x/_closed-") for name in tables.chains)
    assert [r.name for r in loop.call(loop.state).rejections] == ["bad"]
    loop.changes([policy("good")])
    assert loop.barrier(5)
    loop.changes([Change(NetworkPolicy, "x/bad", None)])
    assert loop.barrier(5)
    assert "policy/x/good/ingress" in tables.chains
    assert loop.call(loop.state).rejections == ()


def test_a_kernel_that_refuses_everything_is_reported_and_tried_again(loop: Reconciler, tables: Tables) -> None:
    refusing = [True]
    tables.refuses = lambda _: refusing[0]
    loop.changes([policy("a")])
    assert not loop.barrier(0.1)
    state = loop.call(loop.state)
    assert (state.synced, state.failure) == (False, "no")
    refusing[0] = False
    assert loop.barrier(5)
    assert loop.call(loop.state).synced


def test_a_change_of_another_process_is_followed_by_a_whole_render_and_an_own_one_is_not(loop, tables: Tables) -> None:
    loop.touched(0)
    assert loop.barrier(5)
    assert tables.wholes == 1
    loop.touched(99)
    assert loop.barrier(5)
    assert tables.wholes == 2


def test_detaching_what_is_not_there_is_no_mistake(loop: Reconciler) -> None:
    try:
        loop.detach("c/eth0")
    except NotReadyError:
        pytest.fail("a DEL must be idempotent")


def test_policies_are_not_blamed_for_a_refusal_that_has_another_cause(loop: Reconciler, tables: Tables) -> None:
    tables.refuses = lambda _: True
    loop.changes([policy("good")])
    assert not loop.barrier(0.3)
    assert loop.call(loop.state).rejections == ()
    tables.refuses = lambda _: False
    assert loop.barrier(5)
    assert loop.call(loop.state).rejections == ()
    assert "policy/x/good/ingress" in tables.chains


def test_who_follows_rejections_hears_all_of_them_when_others_are_rejected(tables: Tables) -> None:
    heard: list[set[tuple[str, str]]] = []
    reconciler = Reconciler(tables, Settings("here"), Silent())
    reconciler.follow_rejections(lambda now: heard.append({(r.name, r.uid) for r in now}))
    reconciler.start()
    reconciler.changes([Change(Pod, "x/p", Pod("x", "p", addresses=(parse_address("10.0.0.1"),)))])
    reconciler.synced()
    tables.refuses = lambda chains: "policy/x/bad/ingress" in chains
    written = NetworkPolicy("x", "octal", rules={Direction.INGRESS: ()}, rejected="spec: no", uid="1")
    for change in (policy("good"), Change(NetworkPolicy, "x/octal", written), policy("bad")):
        reconciler.changes([change])
        assert reconciler.barrier(5)
    for name in ("octal", "bad"):
        reconciler.changes([Change(NetworkPolicy, f"x/{name}", None)])
        assert reconciler.barrier(5)
    reconciler.stop()
    assert heard == [{("octal", "1")}, {("octal", "1"), ("bad", "")}, {("bad", "")}, set()]
