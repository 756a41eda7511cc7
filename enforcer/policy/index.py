"""The incremental twin of ``resolve``: objects go in, and what their meaning differs by comes out.

Two invariants keep it right. The outcome depends on the present state only. Each contribution is taken back by
computing it again from the value that made it, so every addition has one symmetric removal. Which group an address is
in is worked out once for all that happened since the last ``take``, however many policies changed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from enforcer.model.addresses import Address
from enforcer.model.objects import Direction, NetworkPolicy
from enforcer.model.selectors import Labels
from enforcer.policy.delta import PolicyDelta
from enforcer.policy.endpoints import Endpoint, Standing
from enforcer.policy.isolation import NAMED_POLICIES, Group, group_of, group_of_address, selects
from enforcer.policy.resolve import Cluster
from enforcer.policy.selector_index import SelectorIndex
from enforcer.policy.sets import Element, NamedPort, PodSelection, PodSet, sets_of

Contributions = Mapping[PodSet, tuple[Element, ...]]


@dataclass(slots=True)
class _Members:
    """A set in use: how many policies use it, and the endpoints that contribute each element."""

    users: int = 0
    owners: dict[Element, tuple[str, ...]] = field(default_factory=dict)


@dataclass(slots=True)
class _Selecting:
    """The policies that select an endpoint: all, those in force, and in order those that are rejected."""

    keys: set[str] = field(default_factory=set)
    accepted: set[str] = field(default_factory=set)
    rejected: dict[Direction, list[str]] = field(default_factory=lambda: {direction: [] for direction in Direction})

    def add(self, policy: NetworkPolicy) -> None:
        """Take in a policy that was not here."""
        self.keys.add(policy.key)
        if policy.rejected is None:
            self.accepted.add(policy.key)
            return
        for direction in policy.rules:
            insort(self.rejected[direction], policy.key)

    def remove(self, policy: NetworkPolicy) -> None:
        """Undo ``add``."""
        self.keys.remove(policy.key)
        if policy.rejected is None:
            self.accepted.remove(policy.key)
            return
        for direction in policy.rules:
            keys = self.rejected[direction]
            del keys[bisect_left(keys, policy.key)]

    def deciding(self, direction: Direction) -> Collection[str]:
        """The policies that decide in which isolation group the endpoint is: if one is rejected, few that are."""
        return self.rejected[direction][:NAMED_POLICIES] or self.accepted


class PolicyIndex:
    """Namespaces, endpoints and policies, and their meaning for this node, kept up to date.

    ``set_*`` take the new value or None; a value equal to the present one changes nothing.
    """

    def __init__(self) -> None:
        self._delta = PolicyDelta()
        self._namespaces: dict[str, Labels] = {}
        self._endpoints: dict[str, Endpoint] = {}
        self._by_namespace: dict[str, dict[str, Endpoint]] = {}
        self._policies: dict[str, NetworkPolicy] = {}
        # Policies by whom they select; the local endpoints that each one does select, and the reverse.
        self._subjects: SelectorIndex[str] = SelectorIndex()
        self._selected: dict[str, set[str]] = {}
        self._selecting: dict[str, _Selecting] = {}
        # The sets that policies in force use, and the ways to find those that an endpoint may be in.
        self._sets: dict[PodSet, _Members] = {}
        self._selections: SelectorIndex[PodSelection] = SelectorIndex()
        self._named_ports: dict[str, dict[NamedPort, None]] = {}
        # Local addresses: who claims them, how they are dispatched, and which are to be looked at.
        self._claims: dict[Address, dict[str, None]] = {}
        self._dispatch: dict[tuple[Direction, Address], tuple[Group, tuple[str, ...]]] = {}
        self._group_sizes: dict[Group, int] = {}
        self._touched: dict[Address, None] = {}

    @property
    def cluster(self) -> Cluster:
        """The present state, for ``resolve`` and ``verdict``: live views, to be read on the owner's thread."""
        return Cluster(self._namespaces, self._endpoints, self._policies)

    def selected(self, key: str) -> int:
        """How many endpoints of this node a policy selects."""
        return len(self._selected.get(key, ()))

    def set_namespace(self, name: str, labels: Labels | None) -> None:
        """Put or remove (None) a namespace object; its pods stay."""
        before = self._namespaces.get(name)
        if labels == before:
            return
        for pod_set in self._sets:
            if isinstance(pod_set, PodSelection) and pod_set.namespace is None:
                was, now = pod_set.matches_namespace(name, before), pod_set.matches_namespace(name, labels)
                if was != now:
                    for endpoint in self._by_namespace.get(name, {}).values():
                        elements = pod_set.elements(endpoint, labels if now else before)
                        self._own(pod_set, elements, endpoint.key, owned=now)
        if labels is None:
            del self._namespaces[name]
        else:
            self._namespaces[name] = labels

    def set_endpoint(self, key: str, endpoint: Endpoint | None) -> None:
        """Put or remove (None) an endpoint."""
        before = self._endpoints.get(key)
        if endpoint == before:
            return
        was = {} if before is None else self._contributions(before)
        now = {} if endpoint is None else self._contributions(endpoint)
        for pod_set, elements in was.items():
            self._own(pod_set, set(elements).difference(now.get(pod_set, ())), key, owned=False)
        for pod_set, elements in now.items():
            self._own(pod_set, set(elements).difference(was.get(pod_set, ())), key, owned=True)
        if before is not None:
            self._drop_endpoint(before)
        if endpoint is not None:
            self._endpoints[key] = endpoint
            self._by_namespace.setdefault(endpoint.namespace, {})[key] = endpoint
        self._update_local(before, endpoint)

    def set_policy(self, key: str, policy: NetworkPolicy | None) -> None:
        """Put or remove (None) a policy."""
        before = self._policies.get(key)
        if policy == before:
            return
        was_selected = self._selected.pop(key, set())
        now_selected: set[str] = set()
        if before is not None:
            self._subjects.remove(key, before.namespace, before.pod_selector)
            del self._policies[key]
        if policy is not None:
            self._policies[key] = policy
            self._subjects.add(key, policy.namespace, policy.pod_selector)
            now_selected = {
                endpoint.key
                for endpoint in self._by_namespace.get(policy.namespace, {}).values()
                if endpoint.local and selects(policy, endpoint)
            }
            if now_selected:
                self._selected[key] = now_selected
        if before is not None:
            for endpoint_key in was_selected:
                self._selecting[endpoint_key].remove(before)
        if policy is not None:
            for endpoint_key in now_selected:
                self._selecting[endpoint_key].add(policy)
        self._put_in_force(before if was_selected else None, policy if now_selected else None)
        for endpoint_key in was_selected | now_selected:
            self._touched.update(dict.fromkeys(self._endpoints[endpoint_key].addresses))

    def take(self) -> PolicyDelta:
        """What is different since the last call."""
        touched, self._touched = self._touched, {}
        for address in touched:
            self._redispatch(address)
        delta, self._delta = self._delta, PolicyDelta()
        return delta

    # Sets

    def _contributions(self, endpoint: Endpoint) -> Contributions:
        found: dict[PodSet, tuple[Element, ...]] = {}
        if endpoint.standing is not Standing.POD:
            return found
        labels = self._namespaces.get(endpoint.namespace)
        for selection in self._selections.candidates(endpoint.namespace, endpoint.labels):
            found[selection] = selection.elements(endpoint, labels)
        for name in {port.name for port in endpoint.ports}:
            for named_port in self._named_ports.get(name, ()):
                found[named_port] = named_port.elements(endpoint, labels)
        return found

    def _own(self, pod_set: PodSet, elements: Iterable[Element], key: str, *, owned: bool) -> None:
        owners = self._sets[pod_set].owners
        for element in elements:
            others = tuple(owner for owner in owners.get(element, ()) if owner != key)
            present = tuple(sorted((*others, key))) if owned else others
            if present:
                owners[element] = present
            else:
                del owners[element]
            self._delta.elements.setdefault(pod_set, {})[element] = present

    def _use_set(self, pod_set: PodSet) -> None:
        members = self._sets.get(pod_set)
        if members is None:
            members = self._sets[pod_set] = _Members()
            if isinstance(pod_set, PodSelection):
                self._selections.add(pod_set, pod_set.namespace, pod_set.pod_selector)
            else:
                for name in pod_set.names:
                    self._named_ports.setdefault(name, {})[pod_set] = None
            self._delta.add_set(pod_set)
            for endpoint in self._possible_members(pod_set):
                labels = self._namespaces.get(endpoint.namespace)
                self._own(pod_set, pod_set.elements(endpoint, labels), endpoint.key, owned=True)
        members.users += 1

    def _possible_members(self, pod_set: PodSet) -> Iterator[Endpoint]:
        if pod_set.namespace is not None:
            yield from self._by_namespace.get(pod_set.namespace, {}).values()
            return
        for namespace, endpoints in self._by_namespace.items():
            if isinstance(pod_set, NamedPort) or pod_set.matches_namespace(namespace, self._namespaces.get(namespace)):
                yield from endpoints.values()

    def _release_set(self, pod_set: PodSet) -> None:
        members = self._sets[pod_set]
        members.users -= 1
        if members.users:
            return
        if isinstance(pod_set, PodSelection):
            self._selections.remove(pod_set, pod_set.namespace, pod_set.pod_selector)
        else:
            for name in pod_set.names:
                del self._named_ports[name][pod_set]
                if not self._named_ports[name]:
                    del self._named_ports[name]
        del self._sets[pod_set]
        self._delta.remove_set(pod_set)

    # Policies in force: those that select a local endpoint and are not rejected

    def _put_in_force(self, before: NetworkPolicy | None, now: NetworkPolicy | None) -> None:
        """Take up the sets and rules of ``now`` in the place of those of ``before``."""
        was = before if before is not None and before.rejected is None else None
        new = now if now is not None and now.rejected is None else None
        if new is not None:
            for pod_set in sets_of(new):
                self._use_set(pod_set)
            if new != was:
                self._delta.policies[new.key] = new
        if was is not None:
            if new is None:
                self._delta.policies[was.key] = None
            for pod_set in sets_of(was):
                self._release_set(pod_set)

    # Local endpoints

    def _drop_endpoint(self, endpoint: Endpoint) -> None:
        del self._endpoints[endpoint.key]
        of_namespace = self._by_namespace[endpoint.namespace]
        del of_namespace[endpoint.key]
        if not of_namespace:
            del self._by_namespace[endpoint.namespace]

    def _update_local(self, before: Endpoint | None, now: Endpoint | None) -> None:
        was = before if before is not None and before.local else None
        new = now if now is not None and now.local else None
        present = was or new
        if present is None:
            return
        key = present.key
        selecting = self._selecting.pop(key, None) or _Selecting()
        was_selecting = set(selecting.keys)
        now_selecting = set() if new is None else self._policies_selecting(new)
        if new is not None:
            for policy in was_selecting - now_selecting:
                selecting.remove(self._policies[policy])
            for policy in now_selecting - was_selecting:
                selecting.add(self._policies[policy])
            self._selecting[key] = selecting
        for policy in now_selecting - was_selecting:
            if not self._selected.get(policy):
                self._put_in_force(None, self._policies[policy])
            self._selected.setdefault(policy, set()).add(key)
        for policy in was_selecting - now_selecting:
            self._selected[policy].discard(key)
            if not self._selected[policy]:
                del self._selected[policy]
                self._put_in_force(self._policies[policy], None)
        was_addresses = was.addresses if was else ()
        now_addresses = new.addresses if new else ()
        for address in dict.fromkeys((*was_addresses, *now_addresses)):
            if (address in was_addresses) != (address in now_addresses):
                self._claim(address, key, held=address in now_addresses)
            self._touched[address] = None

    def _claim(self, address: Address, key: str, *, held: bool) -> None:
        claims = self._claims.setdefault(address, {})
        if held:
            claims[key] = None
        else:
            del claims[key]
            if not claims:
                del self._claims[address]
        self._delta.local[address] = self._claimants(address)

    def _policies_selecting(self, endpoint: Endpoint) -> set[str]:
        if endpoint.standing is not Standing.POD:
            return set()
        return {
            key
            for key in self._subjects.candidates(endpoint.namespace, endpoint.labels)
            if selects(self._policies[key], endpoint)
        }

    def _claimants(self, address: Address) -> tuple[str, ...]:
        return tuple(sorted(self._claims.get(address, ())))

    def _redispatch(self, address: Address) -> None:
        """Work out the group of a local address anew."""
        claimants = self._claimants(address)
        for direction in Direction:
            before, keys = self._dispatch.get((direction, address), (None, ()))
            groups = [
                group_of(
                    self._endpoints[key],
                    [self._policies[policy] for policy in self._selecting[key].deciding(direction)],
                    direction,
                )
                for key in claimants
            ]
            group = group_of_address(groups, direction) if groups else None
            if group == before and (group is None or keys == claimants):
                continue
            if group is not None:
                if group not in self._group_sizes:
                    self._group_sizes[group] = 0
                    self._delta.add_group(group)
                self._group_sizes[group] += 1
                self._dispatch[direction, address] = group, claimants
            else:
                del self._dispatch[direction, address]
            self._delta.dispatch[direction, address] = group, claimants
            if before is not None:
                self._group_sizes[before] -= 1
                if self._group_sizes[before] == 0:
                    del self._group_sizes[before]
                    self._delta.remove_group(before)
