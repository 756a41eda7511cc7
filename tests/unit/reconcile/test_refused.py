"""What the loop does when the kernel refuses: tables that refuse stand in for a kernel that does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest

from enforcer.kernel.nftables import NftError
from enforcer.model.addresses import parse_address
from enforcer.model.changes import Change
from enforcer.model.objects import Attachment, Direction, NetworkPolicy, Pod
from enforcer.reconcile.epochs import StampKernel
from enforcer.reconcile.reconciler import NotReadyError, Reconciler
from enforcer.reconcile.settings import Settings
from enforcer.reconcile.state import Followers
from enforcer.ruleset.objects import Counter
from enforcer.ruleset.plan import Purpose, Step
from enforcer.ruleset.ruleset import Ruleset
from tests.api.processes import wait_until


class Tables:
    """Holds the ruleset after the last steps that ``refuses``, asked with the names of chains, let pass."""

    def __init__(self) -> None:
        self.refuses: Callable[[set[str]], bool] = lambda _: False
        self.held = Ruleset()
        self.readings = 0

    @property
    def chains(self) -> set[str]:
        return {chain.name for chain in self.held.chains.values()}

    def holds(self, stem: str) -> bool:
        """Whether a chain is there whose name begins with these words."""
        return any(name.startswith(stem) for name in self.chains)

    def generation(self) -> int:
        return 0

    def is_own(self, generation: int) -> bool:
        return generation == 0

    def all_own_since(self, generation: int) -> bool:
        return True

    def make(self) -> None: ...

    def rebuild(self, ruleset: Ruleset, present: Ruleset) -> None:
        raise NotImplementedError

    def counter(self, counter: Counter) -> tuple[int, int]:
        return 0, 0

    def present(self, desired: Ruleset) -> Ruleset:
        self.readings += 1
        return copy.deepcopy(self.held)

    def commit(self, step: Step) -> None:
        held = copy.deepcopy(self.held)
        for nft_set in step.new_sets:
            held.put_set(nft_set)
        for counter in step.new_counters:
            held.put_counter(counter)
        for chain in (*step.new_chains, *step.refilled):
            held.put_chain(chain)
        for entry in step.elements:
            for key in entry.removed:
                held.remove_element(entry.set.table, entry.set.name, key)
            for key, element in entry.added.items():
                held.put_element(entry.set.table, entry.set.name, key, element)
        for chain in step.old_chains:
            held.remove_chain(chain.table, chain.name)
        for nft_set in step.old_sets:
            held.remove_set(nft_set.table, nft_set.name)
        for counter in step.old_counters:
            held.remove_counter(counter.table, counter.name)
        if self.refuses({chain.name for chain in held.chains.values()}):
            raise NftError("no")
        self.held = held


NO_STAMPS = StampKernel(clear=lambda **_: 0, wait_for_packets=lambda: None)


class Silent:
    def committed(self, **_: object) -> None: ...
    def failed(self) -> None: ...
    def repaired(self) -> None: ...
    def cleared(self, connections: int) -> None: ...


def policy(name: str) -> Change:
    return Change(NetworkPolicy, f"x/{name}", NetworkPolicy("x", name, rules={Direction.INGRESS: ()}))


@pytest.fixture
def tables() -> Tables:
    return Tables()


@pytest.fixture
def loop(tables: Tables) -> Iterator[Reconciler]:
    reconciler = Reconciler(tables, Settings("here"), Silent(), stamps=NO_STAMPS)
    reconciler.start()
    reconciler.changes([Change(Pod, "x/p", Pod("x", "p", addresses=(parse_address("10.0.0.1"),)))])
    reconciler.synced()
    assert reconciler.barrier(5)
    yield reconciler
    reconciler.stop()


def test_nothing_is_committed_before_the_source_was_read(tables: Tables) -> None:
    reconciler = Reconciler(tables, Settings("here"), Silent(), stamps=NO_STAMPS)
    reconciler.start()
    reconciler.changes([policy("a")])
    assert not reconciler.barrier(0.1)
    assert tables.readings == 0
    reconciler.synced()
    assert reconciler.barrier(5)
    assert tables.readings == 1
    reconciler.stop()


def test_a_refused_change_is_followed_by_a_whole_render(loop: Reconciler, tables: Tables) -> None:
    refusals = iter([True])
    tables.refuses = lambda _: next(refusals, False)
    loop.changes([policy("a")])
    assert loop.barrier(5)
    assert tables.readings == 2
    assert tables.holds("policy/x/a/ingress/")


def test_a_policy_that_the_kernel_will_not_have_closes_its_pods_and_the_others_go_on(
    loop: Reconciler, tables: Tables
) -> None:
    tables.refuses = lambda chains: any(name.startswith("policy/x/bad/") for name in chains)
    loop.changes([policy("bad")])
    assert loop.barrier(5)
    assert tables.holds("closed/ingress/x/bad/")
    assert [r.name for r in loop.call(loop.state).rejections] == ["bad"]
    loop.changes([policy("good")])
    assert loop.barrier(5)
    loop.changes([Change(NetworkPolicy, "x/bad", None)])
    assert loop.barrier(5)
    assert tables.holds("policy/x/good/ingress/")
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


def test_a_change_of_another_process_is_followed_by_a_whole_render_and_an_own_one_is_not(
    loop: Reconciler, tables: Tables
) -> None:
    loop.ruleset_changed(0)
    assert loop.barrier(5)
    assert tables.readings == 1
    loop.ruleset_changed(99)
    assert loop.barrier(5)
    assert tables.readings == 2


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
    # Between two transactions: of one that is refused and one that is not, the policies in between would be blamed.
    loop.call(lambda: setattr(tables, "refuses", lambda _: False))
    assert loop.barrier(5)
    assert loop.call(loop.state).rejections == ()
    assert tables.holds("policy/x/good/ingress/")


def rejected(loop: Reconciler) -> set[str]:
    return {rejection.name for rejection in loop.call(loop.state).rejections}


def test_of_all_policies_at_the_start_only_those_that_the_kernel_refuses_stay_closed(tables: Tables) -> None:
    tables.refuses = lambda chains: any(name.startswith(("policy/x/bad-1/", "policy/x/bad-2/")) for name in chains)
    reconciler = Reconciler(tables, Settings("here"), Silent(), stamps=NO_STAMPS)
    written = NetworkPolicy("x", "octal", rules={Direction.INGRESS: ()}, rejected="spec: no")
    pod = Change(Pod, "x/p", Pod("x", "p", addresses=(parse_address("10.0.0.1"),)))
    good = [policy(f"good-{number}") for number in range(20)]
    reconciler.changes([pod, *good, policy("bad-1"), policy("bad-2"), Change(NetworkPolicy, "x/octal", written)])
    reconciler.start()
    reconciler.synced()
    try:
        wait_until(lambda: rejected(reconciler) == {"bad-1", "bad-2", "octal"}, "the others are in force", seconds=20)
        reasons = {rejection.name: rejection.reason for rejection in reconciler.call(reconciler.state).rejections}
        assert reasons["octal"] == "spec: no"
        assert "the kernel refused a change with it: no" in reasons["bad-1"]
        # Its pod is closed by them, and is no more when they are gone.
        reconciler.changes([Change(NetworkPolicy, f"x/{name}", None) for name in ("bad-1", "bad-2", "octal")])
        assert reconciler.barrier(5)
        assert rejected(reconciler) == set()
        assert tables.holds("policy/x/good-19/ingress/")
    finally:
        reconciler.stop()


def test_a_policy_that_was_refused_for_a_passing_reason_is_tried_again(loop: Reconciler, tables: Tables) -> None:
    refusals = iter([True, True])
    tables.refuses = lambda _: next(refusals, False)
    loop.changes([policy("good")])
    assert loop.barrier(5)
    assert rejected(loop) == {"good"}
    wait_until(lambda: rejected(loop) == set(), "it is in force", seconds=20)
    assert tables.holds("policy/x/good/ingress/")


def test_a_policy_that_is_refused_only_when_a_pod_comes_closes_that_pod_and_holds_up_nobody(
    loop: Reconciler, tables: Tables
) -> None:
    tables.refuses = lambda chains: any(name.startswith("policy/y/bad/") for name in chains)
    loop.changes([Change(NetworkPolicy, "y/bad", NetworkPolicy("y", "bad", rules={Direction.INGRESS: ()}))])
    loop.changes([policy(f"good-{number}") for number in range(20)])
    assert loop.barrier(5)
    assert rejected(loop) == set()
    loop.changes([Change(Pod, "y/p", Pod("y", "p", addresses=(parse_address("10.0.0.2"),)))])
    loop.changes([policy("last")])
    assert loop.barrier(5)
    attachment = Attachment("c", "eth0", None, "", (parse_address("10.0.0.3"),), bytes(6), "dbr1")
    loop.attach(attachment)
    wait_until(lambda: rejected(loop) == {"bad"}, "the others are in force", seconds=20)
    assert tables.holds("policy/x/last/ingress/")
    assert tables.holds("closed/ingress/y/bad/")


@pytest.mark.parametrize("purpose", [p for p in Purpose if p is not Purpose.EPOCH])
def test_whichever_step_is_refused_no_pod_of_another_policy_is_ever_closed(purpose: Purpose) -> None:
    class Watched(Tables):
        """Refuses one kind of step while ``refusing``, and notes whether y/q was ever sent to a closed chain."""

        refusing = False
        innocent_closed = False
        refusals = 0

        def commit(self, step: Step) -> None:
            if self.refusing and step.purpose is purpose:
                self.refusals += 1
                raise NftError("no")
            super().commit(step)
            self.innocent_closed |= self.holds("closed/ingress/y/g")

    tables = Watched()
    loop = Reconciler(tables, Settings("here"), Silent(), stamps=NO_STAMPS)
    loop.start()
    isolating = NetworkPolicy("y", "g", rules={Direction.INGRESS: ()})
    try:
        loop.changes([Change(Pod, "y/q", Pod("y", "q", addresses=(parse_address("10.0.0.9"),)))])
        loop.changes([Change(NetworkPolicy, "y/g", isolating)])
        loop.synced()
        assert loop.barrier(5)
        tables.refusing = True
        loop.changes([Change(Pod, "x/p", Pod("x", "p", addresses=(parse_address("10.0.0.1"),))), policy("a")])
        loop.barrier(1)
        loop.changes([Change(NetworkPolicy, "x/a", None)])
        loop.barrier(1)
        tables.refusing = False
        loop.changes([policy("b")])
        assert loop.barrier(15)
        assert tables.holds("policy/x/b/ingress/")
        assert not tables.holds("policy/x/a/ingress/")
        assert not tables.innocent_closed
    finally:
        loop.stop()


def test_a_refusal_while_suspects_are_tried_again_does_not_forget_them(loop: Reconciler, tables: Tables) -> None:
    refusals = iter([True, True, False, True, True])

    def change() -> None:
        tables.refuses = lambda _: next(refusals, False)
        loop.desired.apply([policy("a"), policy("b")])

    loop.call(change)
    wait_until(lambda: next(refusals, None) is None, "all refusals have come", seconds=20)
    wait_until(lambda: rejected(loop) == set(), "both are in force", seconds=20)
    assert loop.barrier(5)
    assert tables.holds("policy/x/a/ingress/") and tables.holds("policy/x/b/ingress/")


def test_who_follows_rejections_hears_all_of_them_when_others_are_rejected(tables: Tables) -> None:
    heard: list[set[tuple[str, str]]] = []
    reconciler = Reconciler(tables, Settings("here"), Silent(), stamps=NO_STAMPS)
    reconciler.follow(Followers(rejections=lambda now: heard.append({(r.name, r.uid) for r in now})))
    reconciler.start()
    reconciler.changes([Change(Pod, "x/p", Pod("x", "p", addresses=(parse_address("10.0.0.1"),)))])
    reconciler.synced()
    tables.refuses = lambda chains: any(name.startswith("policy/x/bad/") for name in chains)
    written = NetworkPolicy("x", "octal", rules={Direction.INGRESS: ()}, rejected="spec: no", uid="1")
    for change in (policy("good"), Change(NetworkPolicy, "x/octal", written), policy("bad")):
        reconciler.changes([change])
        assert reconciler.barrier(5)
    for name in ("octal", "bad"):
        reconciler.changes([Change(NetworkPolicy, f"x/{name}", None)])
        assert reconciler.barrier(5)
    reconciler.stop()
    assert heard == [{("octal", "1")}, {("octal", "1"), ("bad", "")}, {("bad", "")}, set()]
