"""What policies may need of a node: told from the object, bounded by a limit each and one a namespace."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from enforcer.model.addresses import Network, parse_address
from enforcer.model.objects import Direction, IPBlock, NetworkPolicy, PodPeer, PolicyPort, PolicyRule
from enforcer.model.selectors import LabelSelector, Operator, Requirement
from enforcer.policy.budget import Budget, Cost, Limits, cost_of
from enforcer.policy.endpoints import Endpoint
from enforcer.policy.isolation import Group
from enforcer.ruleset.objects import Chain
from enforcer.translate.base import BaseSettings
from enforcer.translate.rules import FEW_POLICIES, policy_chains
from tests.support import strategies
from tests.support.model import Model

ALL = Cost(10**9, 10**9, 10**9, 10**9)


def put(budget: Budget, key: str, policy: NetworkPolicy | None) -> list[tuple[str, NetworkPolicy | None]]:
    budget.put(key, policy)
    return budget.take()


def large(name: str, peers: int, ports: int, *, named: bool = False, namespace: str = "x") -> NetworkPolicy:
    """One entry of selectors and of ports that do not touch."""
    selectors = (LabelSelector.of(Requirement(f"k{n}", Operator.IN, ("v",))) for n in range(peers))
    numbers = (PolicyPort(port=f"p{n}" if named else 1000 + 2 * n) for n in range(ports))
    rule = PolicyRule(tuple(PodPeer(None, selector) for selector in selectors), tuple(numbers))
    return NetworkPolicy(namespace, name, rules={Direction.INGRESS: (rule,)})


def written(policy: NetworkPolicy) -> Cost:
    """What the rendered chains of a policy really hold."""
    chains = [policy_chains(policy, direction, untracked=False) for direction in policy.rules]
    # What a packet may meet: ICMP errors have chains of their own.
    met = [chain for entry in chains for chain in entry.chains if "/related/" not in chain.name]
    rules = sum(len(chain.rules) for chain in met)
    sets = {of: elements for entry in chains for of, elements in entry.sets}
    words = {word for entry in chains for chain in entry.chains for line in chain.rules for word in line.split()}
    pods = {word for word in words if word.startswith(("@peer/", "@named/"))}
    return Cost(rules, len(sets) + len(pods), sum(map(len, sets.values())))


@settings(max_examples=200, deadline=None)
@given(strategies.policies)
def test_no_policy_is_written_with_more_than_it_is_said_to_cost_but_for_small_products(policy: NetworkPolicy) -> None:
    cost, found = cost_of(policy), written(policy)
    entries = sum(map(len, policy.rules.values()))
    assert found.elements <= cost.elements
    assert found.sets <= cost.sets
    # An entry of four rules or fewer is written out: two peers by two ports are four rules, and not two and two.
    assert found.rules <= cost.rules + entries + len(policy.rules)


def test_rules_grow_with_the_size_of_a_policy_and_not_with_peers_times_ports() -> None:
    for named in (False, True):
        small, double = (written(large("a", n, n, named=named)).rules for n in (200, 400))
        assert small <= 2 * 200 + 6
        assert double <= 2 * small


def test_many_blocks_are_one_set_whatever_their_number() -> None:
    def blocks(count: int) -> NetworkPolicy:
        found = (IPBlock(Network.parse(f"10.{n}.0.0/16"), (Network.parse(f"10.{n}.7.0/24"),)) for n in range(count))
        return NetworkPolicy("x", "a", rules={Direction.INGRESS: (PolicyRule(tuple(found)),)})

    few, many = written(blocks(4)), written(blocks(200))
    assert (few.rules, few.sets) == (4, 4)
    # The end of one and the beginning of the next touch.
    assert (many.rules, many.sets, many.elements) == (1, 1, 201)


def test_each_except_and_each_range_of_ports_is_an_element() -> None:
    block = IPBlock(Network.parse("10.0.0.0/8"), tuple(Network.parse(f"10.{n}.0.0/24") for n in range(9)))
    ports = large("b", 0, 7).rules[Direction.INGRESS][0].ports
    policy = NetworkPolicy("x", "a", rules={Direction.EGRESS: (PolicyRule((block,), ports),)})
    assert cost_of(policy).elements == 10 + 7
    assert written(policy).elements <= 17


def reason(policy: NetworkPolicy | None) -> str:
    """Why a policy is rejected; empty if it is there and accepted."""
    assert policy is not None
    return policy.rejected or ""


def test_a_policy_above_its_limit_is_rejected_with_the_figure_and_others_are_not() -> None:
    budget = Budget(Limits(policy=Cost(rules=100, sets=10**6, elements=100, bytes=10**6), namespace=ALL))
    ((key, rejected),) = put(budget, "x/big", large("big", 60, 1))
    assert key == "x/big"
    assert reason(rejected).startswith("it needs 131 rules, and a policy may have 100")
    ((_, accepted),) = put(budget, "x/small", large("small", 40, 1))
    assert reason(accepted) == ""
    ((_, accepted),) = put(budget, "x/big", large("big", 40, 1))
    assert reason(accepted) == ""


def test_a_namespace_above_its_limit_loses_what_is_last_by_name_and_other_namespaces_lose_nothing() -> None:
    budget = Budget(Limits(policy=ALL, namespace=Cost(200, 10**6, 10**6, 10**6)))
    assert [reason(p) for _, p in put(budget, "x/b", large("b", 40, 1))] == [""]
    assert [reason(p) for _, p in put(budget, "x/c", large("c", 40, 1))] == [""]
    # The first by name takes the place of the last.
    changed = dict(put(budget, "x/a", large("a", 40, 1)))
    assert {key for key, policy in changed.items() if reason(policy)} == {"x/c"}
    assert changed.keys() == {"x/a", "x/c"}
    assert "namespace x needs more than 200 rules" in reason(changed["x/c"])
    assert [reason(p) for _, p in put(budget, "y/z", large("z", 40, 1, namespace="y"))] == [""]
    assert not budget.unread
    # As soon as there is room, and it has been read again, it is accepted.
    changed = dict(put(budget, "x/b", None))
    assert changed["x/b"] is None
    assert changed["x/c"] is not None
    assert changed["x/c"].rules == {Direction.INGRESS: ()}
    assert "has not been read again" in reason(changed["x/c"])
    assert budget.unread == {"x/c"}
    ((_, accepted),) = put(budget, "x/c", large("c", 40, 1))
    assert accepted == large("c", 40, 1)
    assert not budget.unread


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(st.sampled_from("abcd"), st.none() | st.integers(1, 60)), max_size=4), max_size=8))
def test_what_is_rejected_depends_on_what_is_there_alone(events: list[list[tuple[str, int | None]]]) -> None:
    limits = Limits(policy=Cost(100, 10**6, 10**6, 10**6), namespace=Cost(150, 10**6, 10**6, 10**6))
    incremental = Budget(limits)
    present: dict[str, NetworkPolicy | None] = {}
    source: dict[str, NetworkPolicy | None] = {}
    for batch in events:
        for name, size in batch:
            source[f"x/{name}"] = None if size is None else large(name, size, 1)
            incremental.put(f"x/{name}", source[f"x/{name}"])
        present |= dict(incremental.take())
        for key in list(incremental.unread):
            incremental.put(key, source[key])
        present |= dict(incremental.take())
        assert not incremental.unread
    scratch = Budget(limits)
    for key, policy in source.items():
        scratch.put(key, policy)
    assert present == dict(scratch.take())
    # Room never comes for one that is only added.
    assert not scratch.unread


def test_what_is_over_the_limit_within_a_batch_only_rejects_nothing() -> None:
    budget = Budget(Limits(policy=ALL, namespace=Cost(100, 10**6, 10**6, 10**6)))
    put(budget, "x/c", large("c", 40, 1))
    budget.put("x/b", large("b", 40, 1))
    budget.put("x/c", None)
    assert budget.take() == [("x/b", large("b", 40, 1)), ("x/c", None)]


def test_ports_that_say_the_same_many_times_count_each() -> None:
    overlapping = tuple(PolicyPort(port=1, end_port=1 + n) for n in range(1000))
    policy = NetworkPolicy("x", "a", rules={Direction.INGRESS: (PolicyRule(ports=overlapping),)})
    assert cost_of(policy).elements == 1000


def group_chains(model: Model) -> list[Chain]:
    """The chains of isolation groups, and the parts of them that they share."""
    return [chain for chain in model.ruleset.chains.values() if chain.name.startswith(("ingress/x/", "part/"))]


def test_many_policies_that_select_the_same_pods_are_each_jumped_to_once() -> None:
    for pods, count, chains in ((10, FEW_POLICIES, 1), (10, 50, 17), (40, 50, 17), (40, 300, 17)):
        model = Model()
        for number in range(pods):
            address = parse_address(f"10.0.{number}.1")
            model.put(("endpoint", f"x/p{number}", Endpoint(f"x/p{number}", "x", (address,), local=True)))
        model.put(*(("policy", f"x/{n}", large(f"{n}", 3, 3)) for n in range(count)))
        found = group_chains(model)
        assert len(found) <= chains
        # A jump to each policy, one to each part, and the drop.
        assert count < sum(len(chain.rules) for chain in found) <= count + chains
        # A policy's own rules, its entry's, and the same for ICMP errors.
        assert sum(len(chain.rules) for chain in model.ruleset.chains.values() if "policy/" in chain.name) < 25 * count


def test_an_edit_of_a_policy_writes_one_part_of_each_group_again_whoever_else_is_left_out() -> None:
    pods, count = 60, 200
    # Whatever the names are: nobody who writes policies knows the secret.
    model = Model(settings=BaseSettings(secret=b"of this node"))
    for number in range(pods):
        address, labels = parse_address(f"10.0.{number}.1"), {"n": f"{number}"}
        model.put(("endpoint", f"x/p{number}", Endpoint(f"x/p{number}", "x", (address,), local=True, labels=labels)))

    def others(number: int, port: int) -> NetworkPolicy:
        """A policy that leaves one pod out."""
        selector = LabelSelector.of(Requirement("n", Operator.NOT_IN, (f"{number}",)))
        rule = PolicyRule(ports=(PolicyPort(port=port),))
        return NetworkPolicy("x", f"{number}", selector, {Direction.INGRESS: (rule,)})

    model.put(*(("policy", f"x/{number}", others(number, 80)) for number in range(count)))
    model.ruleset.take()
    model.put(("policy", "x/7", others(7, 81)))
    change = model.ruleset.take()
    written = [
        d.after for d in change.chains if d.after is not None and d.after.name.startswith(("ingress/x/", "part/"))
    ]
    # A group's chain has a jump to each part and the drop; a part has a sixteenth of the policies, more or less.
    assert len(written) > pods - 1
    assert sum(len(chain.rules) for chain in written) < pods * (17 + count // 4)
    assert sum(len(chain.rules) for chain in group_chains(model)) < pods * (17 + count // 4)


def test_a_rejected_policy_keeps_no_rules() -> None:
    peers = tuple(PodPeer(pod_selector=LabelSelector.of(Requirement(f"k{n}", Operator.EXISTS))) for n in range(2000))
    large = NetworkPolicy("x", "large", rules={Direction.INGRESS: (PolicyRule(peers),)})
    ((_, judged),) = put(Budget(Limits()), large.key, large)
    assert judged is not None
    assert judged.rejected
    assert judged.rules == {Direction.INGRESS: ()}


def test_a_rejected_policy_with_a_large_pod_selector_closes_its_namespace() -> None:
    many, few = (
        LabelSelector.of(Requirement("app", Operator.NOT_IN, tuple(f"v{n}" for n in range(count))))
        for count in (513, 511)
    )
    for why, budget in ((None, Budget(Limits(policy=Cost(rules=1)))), ("invalid", Budget(Limits()))):
        for selector, kept in ((many, LabelSelector()), (few, few)):
            policy = NetworkPolicy("x", "a", selector, {Direction.EGRESS: (PolicyRule(),)}, rejected=why)
            ((_, judged),) = put(budget, policy.key, policy)
            assert judged is not None
            assert judged.rejected
            assert ("closes the whole namespace" in judged.rejected) is (kept != selector)
            assert judged.pod_selector == kept
            assert judged.rules == {Direction.EGRESS: ()}


def test_rejected_policies_cost_a_pod_no_more_however_many_they_are() -> None:
    model, count = Model(), 2_000
    for number in range(20):
        address = parse_address(f"10.0.{number}.1")
        model.put(("endpoint", f"x/p{number}", Endpoint(f"x/p{number}", "x", (address,), local=True)))
    rejected = [NetworkPolicy("x", f"{n:05}", rules={Direction.INGRESS: ()}, rejected="too many") for n in range(count)]
    model.put(*(("policy", policy.key, policy) for policy in rejected[:-1]))
    (group,) = model.translator.denied.values()
    assert group == Group(Direction.INGRESS, ("x/00000", "x/00001", "x/00002"), closed=True)
    model.ruleset.take()
    model.put(("policy", rejected[-1].key, rejected[-1]))
    assert not model.ruleset.take()
    # The names of a closed group are of the present state only.
    model.put(*(("policy", policy.key, None) for policy in rejected[1:]))
    (group,) = model.translator.denied.values()
    assert group.policies == ("x/00000",)
    model.put(("policy", rejected[0].key, None))
    assert not model.translator.denied
