"""What one policy, and the policies of one namespace, may ask of a node: above it a policy is rejected. Pure.

A packet that is denied meets every rule of a policy, and a node holds the rules of all namespaces, so both are bounded.
The cost of a policy is told from its object alone, before anything is rendered.
"""

from __future__ import annotations

import dataclasses
from bisect import bisect_left, insort
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from enforcer.model.addresses import Family
from enforcer.model.objects import IPBlock, NetworkPolicy, PodPeer, PolicyRule, Protocol
from enforcer.model.selectors import EVERYTHING, LabelSelector

# A policy is a jump in the chain of each isolation group that it is in, of which its pods may be as many.
_RULES_A_POLICY = 10
FEW_BLOCKS = 4
"""As many ipBlocks of an entry and family are rules of their own; more are one set of all their intervals."""
# A rejected policy keeps no larger pod selector than that, since there may be any number of them.
_KEPT_SELECTOR_BYTES, _KEPT_SELECTOR_VALUES = 16 << 10, 512


@dataclass(frozen=True, slots=True)
class Cost:
    """Rules that one packet may meet, sets, set elements without those that are pods, and bytes of selectors.

    In the kernel are up to four times as many rules: ICMP errors, and what is not tracked, have rules of their own.
    """

    rules: int = 0
    sets: int = 0
    elements: int = 0
    bytes: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(*(ours + theirs for ours, theirs in zip(self._figures, other._figures, strict=True)))

    def __sub__(self, other: Cost) -> Cost:
        return Cost(*(ours - theirs for ours, theirs in zip(self._figures, other._figures, strict=True)))

    @property
    def _figures(self) -> tuple[int, ...]:
        return self.rules, self.sets, self.elements, self.bytes

    def excess(self, limit: Cost) -> str | None:
        """The first figure that is above a limit (``rules``, ``sets``, ``elements``, ``bytes``); None if none is."""
        for entry in dataclasses.fields(self):
            if getattr(self, entry.name) > getattr(limit, entry.name):
                return entry.name
        return None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a policy may cost, and all policies of a namespace together."""

    policy: Cost = Cost(rules=800, sets=800, elements=10_000, bytes=256 << 10)
    namespace: Cost = Cost(rules=4_000, sets=2_000, elements=20_000, bytes=2 << 20)


def cost_of(policy: NetworkPolicy) -> Cost:
    """What a policy asks of a node at most; it grows with the size of the object."""
    entries = [entry for rules in policy.rules.values() for entry in rules]
    costs = (_entry_cost(entry) for entry in entries)
    return sum(costs, Cost(rules=_RULES_A_POLICY, bytes=_selector_bytes(policy.pod_selector)))


def _entry_cost(entry: PolicyRule) -> Cost:
    rules = sets = elements = size = 0
    blocks = [peer for peer in entry.peers if isinstance(peer, IPBlock)]
    for family in Family:
        of_family = [block for block in blocks if block.cidr.family is family]
        # A few are rules of their own, more are one set. Each except leaves one interval more at most.
        few = len(of_family) <= FEW_BLOCKS
        with_set = [block for block in of_family if block.excepts or not few]
        rules += len(of_family) if few else 1
        sets += len(with_set) if few else 1
        elements += sum(len(block.excepts) + 1 for block in with_set)
    for peer in entry.peers:
        if isinstance(peer, PodPeer):
            rules += len(Family)
            sets += len(Family)
            size += _selector_bytes(peer.pod_selector)
            size += _selector_bytes(peer.namespace_selector) if peer.namespace_selector else 0
    for protocol in Protocol:
        ports = [port for port in entry.ports if port.protocol is protocol]
        # Ranges that overlap are merged in the kernel, but the agent keeps each.
        numbers = [port for port in ports if isinstance(port.port, int)]
        named = sum(len(port.port) for port in ports if isinstance(port.port, str))
        rules += 1 if numbers or any(port.port is None for port in ports) else 0
        rules += len(Family) if named else 0
        sets += len(Family) if named else 0
        sets += 1 if len(numbers) > 1 else 0
        elements += len(numbers)
        size += named
    return Cost(max(rules, 1), sets, elements, size)


def _selector_bytes(selector: LabelSelector) -> int:
    return sum(len(r.key) + sum(map(len, r.values)) for r in selector.requirements)


@dataclass(slots=True)
class _Namespace:
    """The policies of a namespace.

    ``order`` are the names of those that are within the limits of one, ``costs`` what they cost, ``cutoff`` the first
    for which nothing is left, ``too_large`` why the others are rejected, ``reduced`` those within the limits of one
    that are no longer kept as they are, ``widened`` those whose pod selector was too large to be kept.
    """

    policies: dict[str, NetworkPolicy] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    costs: dict[str, Cost] = field(default_factory=dict)
    total: Cost = field(default_factory=Cost)
    cutoff: str | None = None
    too_large: dict[str, str] = field(default_factory=dict)
    reduced: set[str] = field(default_factory=set)
    widened: set[str] = field(default_factory=set)


class Budget:
    """Policies, and which of them are within the limits.

    In a namespace that asks for too much, policies are counted in the order of their names up to the first for which
    nothing is left: it and those after it are rejected. So a policy's fate depends on its own namespace alone, and not
    on what was before.

    Of a rejected policy only what it closes is kept, since a namespace's owner may write any number of them. One that
    has room again stays closed until it has been read again (see ``unread``).
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._namespaces: dict[str, _Namespace] = {}
        self._touched: dict[str, dict[str, None]] = {}
        self._unread: dict[str, None] = {}

    @property
    def unread(self) -> AbstractSet[str]:
        """The policies to ``put`` again, as the source has them: there is room for them, and their rules are gone."""
        return self._unread.keys()

    def put(self, key: str, policy: NetworkPolicy | None) -> None:
        """Put or remove (None) a policy."""
        name = key.partition("/")[0]
        namespace = self._namespaces.setdefault(name, _Namespace())
        self._touched.setdefault(name, {})[key] = None
        self._replace(namespace, key, policy)

    def take(self) -> list[tuple[str, NetworkPolicy | None]]:
        """The policies that were put since the last call, and others whose fate has changed by it.

        Returns:
            Keys and policies, rejected if above the limits; None for one that is gone.
        """
        touched, self._touched = self._touched, {}
        judged: list[tuple[str, NetworkPolicy | None]] = []
        for name, keys in touched.items():
            namespace = self._namespaces[name]
            before, namespace.cutoff = namespace.cutoff, self._cutoff(namespace)
            changed = keys | dict.fromkeys(_between(namespace.order, before, namespace.cutoff))
            judged += [(key, self._judged(name, namespace, key)) for key in changed]
            if not namespace.policies:
                del self._namespaces[name]
        return judged

    def _replace(self, namespace: _Namespace, key: str, policy: NetworkPolicy | None) -> None:
        if key in namespace.costs:
            namespace.total -= namespace.costs.pop(key)
            del namespace.order[bisect_left(namespace.order, key)]
        namespace.too_large.pop(key, None)
        namespace.policies.pop(key, None)
        namespace.reduced.discard(key)
        namespace.widened.discard(key)
        if policy is None:
            return
        if policy.rejected is not None:
            # It costs nothing, and has its reason.
            _reduce(namespace, policy)
            return
        cost = cost_of(policy)
        excess = cost.excess(self._limits.policy)
        if excess is not None:
            found, most = getattr(cost, excess), getattr(self._limits.policy, excess)
            namespace.too_large[key] = (
                f"it needs {found} {excess}, and a policy may have {most}: split it, or configure a higher limit"
            )
            # Nothing makes it smaller but another event.
            _reduce(namespace, policy)
        else:
            namespace.policies[key] = policy
            namespace.costs[key] = cost
            namespace.total += cost
            insort(namespace.order, key)

    def _cutoff(self, namespace: _Namespace) -> str | None:
        """The first policy for which nothing is left; it takes as long as there are policies before it."""
        if namespace.total.excess(self._limits.namespace) is None:
            return None
        spent = Cost()
        for key in namespace.order:
            spent += namespace.costs[key]
            if spent.excess(self._limits.namespace) is not None:
                return key
        return None

    def _judged(self, name: str, namespace: _Namespace, key: str) -> NetworkPolicy | None:
        policy = namespace.policies.get(key)
        self._unread.pop(key, None)
        if policy is None:
            return None
        reason = namespace.too_large.get(key) or policy.rejected
        if key in namespace.costs and namespace.cutoff is not None and key >= namespace.cutoff:
            if key not in namespace.reduced:
                _reduce(namespace, policy)
                namespace.reduced.add(key)
                policy = namespace.policies[key]
            most = ", ".join(f"{figure} {word}" for word, figure in dataclasses.asdict(self._limits.namespace).items())
            reason = f"up to here namespace {name} needs more than {most}: remove some, or configure a higher limit"
        elif key in namespace.reduced:
            self._unread[key] = None
            reason = f"namespace {name} has room for it again, and it has not been read again yet"
        if reason is not None and key in namespace.widened:
            reason += f"; its podSelector is above {_KEPT_SELECTOR_BYTES >> 10} KiB, so it closes the whole namespace"
        return policy if reason is None else dataclasses.replace(policy, rejected=reason)


def _reduce(namespace: _Namespace, policy: NetworkPolicy) -> None:
    """Keep of a policy what it closes, without the memory that its rules take.

    With a pod selector too large to be kept, it closes every pod of its namespace.
    """
    values = sum(1 + len(requirement.values) for requirement in policy.pod_selector.requirements)
    selector = policy.pod_selector
    if values > _KEPT_SELECTOR_VALUES or _selector_bytes(selector) > _KEPT_SELECTOR_BYTES:
        selector = EVERYTHING
        namespace.widened.add(policy.key)
    rules = dict.fromkeys(policy.rules, ())
    namespace.policies[policy.key] = dataclasses.replace(policy, pod_selector=selector, rules=rules)


def _between(order: list[str], before: str | None, after: str | None) -> list[str]:
    """The names from one cutoff to the other; None is after all."""
    places = sorted(len(order) if cutoff is None else bisect_left(order, cutoff) for cutoff in (before, after))
    return order[slice(*places)]
