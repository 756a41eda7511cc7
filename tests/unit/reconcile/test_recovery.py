"""``Recovery`` by itself: what it closes, and when it tries again, on a clock of the test."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from enforcer.kernel.nftables import NftError
from enforcer.model.addresses import parse_address
from enforcer.model.changes import Change
from enforcer.model.objects import Direction, NetworkPolicy, Pod
from enforcer.reconcile.desired import Desired
from enforcer.reconcile.drift import Drift
from enforcer.reconcile.recovery import Recovery
from enforcer.reconcile.settings import Settings
from tests.unit.reconcile.test_refused import Silent, Tables


class Bench:
    """A desired state with one pod, and transactions that take a second and are refused while ``bad`` says so.

    ``bad`` is asked with the names of the policies that are in force, which are those that select a pod and are open.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tries = 0
        self.bad: Callable[[set[str]], bool] = lambda _: False
        self.desired = Desired(Settings("here"))
        self.add_pod("x/p", "10.0.0.1")
        self.recovery = Recovery(self.desired, Drift(Tables(), Silent()), Silent(), lambda: self.seconds)

    def add_pod(self, key: str, address: str) -> None:
        namespace, name = key.split("/")
        self.desired.apply([Change(Pod, key, Pod(namespace, name, addresses=(parse_address(address),)))])

    def put(self, *names: str, namespace: str = "x") -> None:
        policies = [NetworkPolicy(namespace, name, rules={Direction.INGRESS: ()}) for name in names]
        self.desired.apply([Change(NetworkPolicy, policy.key, policy) for policy in policies])
        self.desired.apply_limits()

    def transact(self) -> None:
        self.tries += 1
        self.seconds += 1
        self.desired.complete()
        in_force = {policy.name for key, policy in self.desired.policies.items() if self.desired.selected(key)}
        if self.bad(in_force - self.closed):
            raise NftError("no")

    def run(self) -> None:
        self.recovery.run(self.transact)
        if self.recovery.failure is None:
            self.desired.changed_policies.clear()

    def run_until_quiet(self, most: int = 200) -> None:
        for _ in range(most):
            self.run()
            wait = self.recovery.wait_seconds
            if wait is None or wait > 200:
                return
            self.seconds += wait
        raise AssertionError("it goes on trying")

    @property
    def closed(self) -> set[str]:
        return {rejection.name for rejection in self.desired.rejections}


def test_without_a_refusal_there_is_one_transaction_and_nothing_to_wait_for() -> None:
    bench = Bench()
    bench.put("a")
    bench.run()
    assert (bench.tries, bench.recovery.failure, bench.recovery.wait_seconds) == (1, None, None)


def test_of_many_only_the_policies_that_are_refused_by_themselves_stay_closed() -> None:
    bench = Bench()
    bench.bad = lambda in_force: bool(in_force & {"p3", "p17"})
    bench.put(*(f"p{number}" for number in range(32)))
    bench.run_until_quiet()
    assert bench.closed == {"p3", "p17"}
    assert bench.recovery.failure is None


def test_however_many_policies_are_refused_trying_takes_at_most_half_of_the_time() -> None:
    bench = Bench()
    bench.bad = lambda in_force: any(name.startswith("bad") for name in in_force)
    bench.put(*(f"bad{number}" for number in range(40)))
    bench.run()
    begun, waited = bench.seconds, 0.0
    while bench.seconds - begun < 300:
        wait = bench.recovery.wait_seconds or 0.0
        waited += wait
        bench.seconds += wait
        bench.run()
    # A run begins with a transaction of its own; the two of a try are followed by as long a rest.
    assert waited > (bench.seconds - begun) / 3


def test_however_much_happens_while_the_kernel_refuses_trying_takes_at_most_half_of_the_time() -> None:
    bench = Bench()
    bench.bad = lambda _: True
    bench.put("a")
    bench.run()
    begun, tries = bench.seconds, bench.tries
    while bench.seconds - begun < 100:
        bench.seconds += 0.01
        bench.put("a")
        bench.run()
    assert 30 < bench.tries - tries <= 51


def test_a_policy_that_is_refused_when_its_first_pod_comes_is_closed_alone() -> None:
    bench = Bench()
    bench.put("bad", namespace="y")
    bench.put(*(f"good{number}" for number in range(7)))
    bench.bad = lambda in_force: "bad" in in_force
    bench.run()
    assert (bench.tries, bench.closed) == (1, set())
    bench.add_pod("y/p", "10.0.0.2")
    bench.put("new")
    bench.run_until_quiet()
    assert (bench.recovery.failure, bench.closed) == (None, {"bad"})


def test_a_policy_whose_first_pod_comes_while_the_kernel_refuses_is_found() -> None:
    bench = Bench()
    refusing = [True]
    bench.bad = lambda in_force: refusing[0] or "bad" in in_force
    bench.put("bad", namespace="y")
    bench.run()
    bench.add_pod("y/p", "10.0.0.2")
    for _ in range(3):
        bench.seconds += bench.recovery.wait_seconds or 0.0
        bench.run()
    refusing[0] = False
    bench.run_until_quiet()
    assert (bench.recovery.failure, bench.closed) == (None, {"bad"})


def test_a_refusal_that_no_policy_causes_closes_none_and_is_tried_again_with_growing_pauses() -> None:
    bench = Bench()
    bench.put("a", "b")
    bench.bad = lambda _: True
    pauses = []
    for _ in range(8):
        bench.run()
        assert bench.closed == set()
        pauses.append(bench.recovery.wait_seconds or 0.0)
        bench.seconds += 20
    # At first as long as the transactions took, a second each.
    assert pauses == pytest.approx([4.0, 3.0, 3.0, 3.2, 6.4, 10.0, 10.0, 10.0])
    bench.bad = lambda _: False
    bench.run()
    assert (bench.recovery.failure, bench.recovery.wait_seconds) == (None, None)


def test_a_suspect_that_is_edited_is_judged_as_it_is_now() -> None:
    bench = Bench()
    bench.bad = lambda in_force: "a" in in_force
    bench.put("a")
    bench.run_until_quiet()
    assert bench.closed == {"a"}
    bench.bad = lambda _: False
    bench.put("a")
    bench.run()
    assert (bench.closed, bench.recovery.wait_seconds) == (set(), None)
