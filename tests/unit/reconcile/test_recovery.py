"""``Recovery`` by itself: what it closes, and when it tries again, on a clock of the test."""

from __future__ import annotations

from collections.abc import Callable

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
    """A desired state with one pod, and transactions that take a second and are refused for some policies."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.tries = 0
        self.bad: Callable[[set[str]], bool] = lambda _: False
        self.desired = Desired(Settings("here"))
        self.desired.apply([Change(Pod, "x/p", Pod("x", "p", addresses=(parse_address("10.0.0.1"),)))])
        self.recovery = Recovery(self.desired, Drift(Tables(), Silent()), Silent(), lambda: self.seconds)

    def put(self, *names: str) -> None:
        policies = [NetworkPolicy("x", name, rules={Direction.INGRESS: ()}) for name in names]
        self.desired.apply([Change(NetworkPolicy, policy.key, policy) for policy in policies])
        self.desired.apply_limits()

    def transact(self) -> None:
        self.tries += 1
        self.seconds += 1
        self.desired.complete()
        closed = {rejection.name for rejection in self.desired.rejections}
        if self.bad({policy.name for policy in self.desired.policies.values()} - closed):
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


def test_trying_again_takes_at_most_half_of_the_time() -> None:
    bench = Bench()
    bench.bad = lambda in_force: any(name.startswith("bad") for name in in_force)
    bench.put(*(f"bad{number}" for number in range(40)))
    bench.run()
    begun, waited = bench.seconds, 0.0
    while bench.seconds - begun < 300:
        wait = bench.recovery.wait_seconds or 0.0
        waited += wait
        bench.seconds += wait
        before = bench.tries
        bench.run()
        # The transaction of the run itself, the try, and the render without it.
        assert bench.tries - before <= 3
    # Each of those transactions took a second, and the two of a try are followed by as long a pause.
    assert waited > (bench.seconds - begun) / 3


def test_a_refusal_that_lasts_is_blamed_on_the_policy_that_did_not_change() -> None:
    bench = Bench()
    bench.put("bad", *(f"good{number}" for number in range(7)))
    bench.run()
    bench.bad = lambda in_force: "bad" in in_force
    bench.put("new")
    bench.run()
    assert (bench.recovery.failure, bench.closed) == ("no", set())
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
        pauses.append(bench.recovery.wait_seconds)
    assert pauses == sorted(pauses, key=lambda pause: pause or 0.0)
    assert pauses[-1] == 10.0
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
