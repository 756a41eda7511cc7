"""The incremental twin of ``resolve``: told what changed, it says what must change in the kernel.

Three invariants keep it right. The outcome depends on the present state only. Each contribution is taken back by
computing it again from the value that made it, so every addition has one symmetric removal. The listener hears of a set
or a group before anything refers to it, and of its end after.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Protocol

from enforcer.model.addresses import Address
from enforcer.model.objects import Direction, NetworkPolicy
from enforcer.model.selectors import Labels
from enforcer.policy.endpoints import Endpoint, Standing
from enforcer.policy.isolation import Group, group_of, group_of_address, selects
from enforcer.policy.resolve import Cluster
from enforcer.policy.selector_index import SelectorIndex
from enforcer.policy.sets import Element, NamedPort, PodSelection, PodSet, sets_of


class Listener(Protocol):
    """What hears of each difference; ``translate`` is the one that matters."""

    def set_added(self, pod_set: PodSet) -> None:
        """A set is used from now on; it is empty."""

    def set_removed(self, pod_set: PodSet) -> None:
        """A set is used no more; it has been emptied, or goes with what it holds."""

    def element_added(self, pod_set: PodSet, element: Element) -> None:
        """An element is in a set now."""

    def element_removed(self, pod_set: PodSet, element: Element) -> None:
        """An element is not in a set any more."""

    def policy_changed(self, policy: NetworkPolicy) -> None:
        """A policy is in force, or is in force with other rules."""

    def policy_removed(self, key: str) -> None:
        """A policy is not in force any more."""

    def group_added(self, group: Group) -> None:
        """The first address is about to join a group."""

    def group_removed(self, group: Group) -> None:
        """The last address has left a group."""

    def dispatch_changed(
        self, direction: Direction, address: Address, group: Group | None, keys: tuple[str, ...]
    ) -> None:
        """A local address, claimed by the endpoints ``keys``, is in another group now (None: isolated no more)."""

    def local_changed(self, address: Address, keys: tuple[str, ...]) -> None:
        """The endpoints that claim a local address are these now."""


@dataclass(slots=True)
class _Members:
    """A set in use: how many policies use it, and how many endpoints contribute each element."""

    users: int = 0
    counts: dict[Element, int] = field(default_factory=dict)


class PolicyIndex:
    """Namespaces, endpoints and policies, and their meaning for this node, kept up to date.

    ``set_*`` take the new value or None; a value equal to the present one changes nothing.
    """

    def __init__(self, listener: Listener) -> None:
        self._listener = listener
        self._namespaces: dict[str, Labels] = {}
        self._endpoints: dict[str, Endpoint] = {}
        self._by_namespace: dict[str, dict[str, Endpoint]] = {}
        self._policies: dict[str, NetworkPolicy] = {}
        # Policies by whom they select; and the local endpoints that each one does select.
        self._subjects: SelectorIndex[str] = SelectorIndex()
        self._selected: dict[str, set[str]] = {}
        # The sets that policies in force use, and the ways to find those that an endpoint may be in.
        self._sets: dict[PodSet, _Members] = {}
        self._selections: SelectorIndex[PodSelection] = SelectorIndex()
        self._named_ports: dict[str, dict[NamedPort, None]] = {}
        # Local addresses: who claims them, and how they are dispatched.
        self._claims: dict[Address, dict[str, None]] = {}
        self._dispatch: dict[tuple[Direction, Address], Group] = {}
        self._group_sizes: dict[Group, int] = {}
        # Addresses of which a flow may be judged otherwise than before.
        self._affected: set[Address] = set()

    @property
    def cluster(self) -> Cluster:
        """The present state, for ``resolve`` and ``verdict``: live views, to be read on the owner's thread."""
        return Cluster(self._namespaces, self._endpoints, self._policies)

    def selected(self, key: str) -> int:
        """How many endpoints of this node a policy selects."""
        return len(self._selected.get(key, ()))

    def group(self, direction: Direction, address: Address) -> Group | None:
        """Why a local address is isolated; None if it is not, or is not local."""
        return self._dispatch.get((direction, address))

    def holds(self, pod_set: PodSet, element: Element) -> bool:
        """Whether a set in use holds an element."""
        return element in self._sets[pod_set].counts

    def take_affected(self) -> set[Address]:
        """The addresses of which a flow may be judged otherwise than at the last call: as its pod's, or as a peer's."""
        affected, self._affected = self._affected, set()
        return affected

    def set_namespace(self, name: str, labels: Labels | None) -> None:
        """Put or remove (None) a namespace object; its pods stay."""
        before = self._namespaces.get(name)
        if labels == before:
            return
        for pod_set in self._sets:
            if isinstance(pod_set, PodSelection) and pod_set.namespace is None:
                was, now = pod_set.matches_namespace(name, before), pod_set.matches_namespace(name, labels)
                if was == now:
                    continue
                for endpoint in self._by_namespace.get(name, {}).values():
                    self._affected.update(endpoint.addresses)
                    if now:
                        self._contribute(pod_set, pod_set.elements(endpoint, labels))
                    else:
                        self._withdraw(pod_set, pod_set.elements(endpoint, before))
        if labels is None:
            del self._namespaces[name]
        else:
            self._namespaces[name] = labels

    def set_endpoint(self, key: str, endpoint: Endpoint | None) -> None:
        """Put or remove (None) an endpoint."""
        before = self._endpoints.get(key)
        if endpoint == before:
            return
        # The sets that the new value is in come first, so that no element goes only to come back.
        if endpoint is not None:
            for pod_set, elements in self._contributions(endpoint):
                self._affected.update(endpoint.addresses)
                self._contribute(pod_set, elements)
        if before is not None:
            for pod_set, elements in self._contributions(before):
                self._affected.update(before.addresses)
                self._withdraw(pod_set, elements)
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
        was_in_force = before if was_selected else None
        now_in_force = policy if now_selected else None
        self._put_in_force(was_in_force, now_in_force)
        for endpoint_key in was_selected | now_selected:
            self._affected.update(self._endpoints[endpoint_key].addresses)
            for address in self._endpoints[endpoint_key].addresses:
                self._redispatch(address)
        self._end_in_force(was_in_force, now_in_force)

    # Sets

    def _contributions(self, endpoint: Endpoint) -> Iterator[tuple[PodSet, tuple[Element, ...]]]:
        if endpoint.standing is not Standing.POD:
            return
        labels = self._namespaces.get(endpoint.namespace)
        for selection in self._selections.candidates(endpoint.namespace, endpoint.labels):
            yield selection, selection.elements(endpoint, labels)
        # One name may stand for several protocols' ports: each named port is asked once, and answers for all.
        for name in {port.name for port in endpoint.ports}:
            for named_port in self._named_ports.get(name, ()):
                yield named_port, named_port.elements(endpoint, labels)

    def _contribute(self, pod_set: PodSet, elements: tuple[Element, ...]) -> None:
        counts = self._sets[pod_set].counts
        for element in elements:
            count = counts.get(element, 0)
            counts[element] = count + 1
            if count == 0:
                self._listener.element_added(pod_set, element)

    def _withdraw(self, pod_set: PodSet, elements: tuple[Element, ...]) -> None:
        counts = self._sets[pod_set].counts
        for element in elements:
            counts[element] -= 1
            if counts[element] == 0:
                del counts[element]
                self._listener.element_removed(pod_set, element)

    def _use_set(self, pod_set: PodSet) -> None:
        members = self._sets.get(pod_set)
        if members is None:
            members = self._sets[pod_set] = _Members()
            if isinstance(pod_set, PodSelection):
                self._selections.add(pod_set, pod_set.namespace, pod_set.pod_selector)
            else:
                self._named_ports.setdefault(pod_set.name, {})[pod_set] = None
            self._listener.set_added(pod_set)
            for endpoint in self._possible_members(pod_set):
                labels = self._namespaces.get(endpoint.namespace)
                self._contribute(pod_set, pod_set.elements(endpoint, labels))
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
            named = self._named_ports[pod_set.name]
            del named[pod_set]
            if not named:
                del self._named_ports[pod_set.name]
        del self._sets[pod_set]
        self._listener.set_removed(pod_set)

    # Policies in force: those that select a local endpoint and are not rejected

    def _put_in_force(self, before: NetworkPolicy | None, now: NetworkPolicy | None) -> None:
        """Take up the sets and rules of ``now``; what ``before`` alone used stays until ``_end_in_force``."""
        if now is not None and now.rejected is None:
            for pod_set in sets_of(now):
                self._use_set(pod_set)
            if now != before:
                self._listener.policy_changed(now)

    def _end_in_force(self, before: NetworkPolicy | None, now: NetworkPolicy | None) -> None:
        if before is not None and before.rejected is None:
            if now is None or now.rejected is not None:
                self._listener.policy_removed(before.key)
            for pod_set in sets_of(before):
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
        was_selecting, now_selecting = self._selecting(was), self._selecting(new)
        started = [policy for policy in now_selecting if not self._selected.get(policy)]
        for policy in was_selecting - now_selecting:
            self._selected[policy].discard(key)
        for policy in now_selecting - was_selecting:
            self._selected.setdefault(policy, set()).add(key)
        ended = [policy for policy in was_selecting if not self._selected[policy]]
        for policy in started:
            self._put_in_force(None, self._policies[policy])
        was_addresses = was.addresses if was else ()
        now_addresses = new.addresses if new else ()
        for address in dict.fromkeys((*was_addresses, *now_addresses)):
            reclaimed = (address in was_addresses) != (address in now_addresses)
            if reclaimed:
                self._claim(address, key, held=address in now_addresses)
            self._redispatch(address, reclaimed=reclaimed)
        for policy in ended:
            del self._selected[policy]
            self._end_in_force(self._policies[policy], None)

    def _claim(self, address: Address, key: str, *, held: bool) -> None:
        claims = self._claims.setdefault(address, {})
        if held:
            claims[key] = None
        else:
            del claims[key]
            if not claims:
                del self._claims[address]
        self._listener.local_changed(address, self._claimants(address))

    def _selecting(self, endpoint: Endpoint | None) -> set[str]:
        if endpoint is None or endpoint.standing is not Standing.POD:
            return set()
        return {
            key
            for key in self._subjects.candidates(endpoint.namespace, endpoint.labels)
            if selects(self._policies[key], endpoint)
        }

    def _claimants(self, address: Address) -> tuple[str, ...]:
        return tuple(sorted(self._claims.get(address, ())))

    def _redispatch(self, address: Address, *, reclaimed: bool = False) -> None:
        """Work out the group of a local address anew; ``reclaimed`` says that other endpoints claim it than before."""
        claimants = self._claimants(address)
        selecting = [
            (self._endpoints[key], [self._policies[policy] for policy in self._selecting(self._endpoints[key])])
            for key in claimants
        ]
        for direction in Direction:
            before = self._dispatch.get((direction, address))
            groups = [group_of(endpoint, policies, direction) for endpoint, policies in selecting]
            group = group_of_address(groups, direction) if groups else None
            if group == before and not (reclaimed and group):
                continue
            if group is not None:
                if group not in self._group_sizes:
                    self._group_sizes[group] = 0
                    self._listener.group_added(group)
                self._group_sizes[group] += 1
                self._dispatch[direction, address] = group
            else:
                del self._dispatch[direction, address]
            self._affected.add(address)
            self._listener.dispatch_changed(direction, address, group, claimants)
            if before is not None:
                self._group_sizes[before] -= 1
                if self._group_sizes[before] == 0:
                    del self._group_sizes[before]
                    self._listener.group_removed(before)
