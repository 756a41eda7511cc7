"""What the kernel of this node must hold, worked out from scratch.

This is the specification of ``PolicyIndex``: plain loops over everything, too slow to run on each change and too
simple to be wrong.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from enforcer.model.addresses import Address
from enforcer.model.objects import Direction, NetworkPolicy
from enforcer.model.selectors import Labels
from enforcer.policy.endpoints import Endpoint
from enforcer.policy.isolation import Group, group_of, group_of_address, selects
from enforcer.policy.sets import Element, PodSet, sets_of


@dataclass(frozen=True, slots=True)
class Cluster:
    """Everything that policy depends on: namespaces' labels, endpoints and policies, by key."""

    namespaces: Mapping[str, Labels] = field(default_factory=dict)
    endpoints: Mapping[str, Endpoint] = field(default_factory=dict)
    policies: Mapping[str, NetworkPolicy] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Resolved:
    """The policies in force on this node and all that their rules refer to.

    ``local`` maps each local address to the keys of its endpoints, ``dispatch`` each isolated one to its group,
    ``sets`` each set to its elements, with the keys of the endpoints that they are of.
    """

    local: Mapping[Address, tuple[str, ...]]
    dispatch: Mapping[tuple[Direction, Address], Group]
    policies: Mapping[str, NetworkPolicy]
    sets: Mapping[PodSet, Mapping[Element, tuple[str, ...]]]


def resolve(cluster: Cluster) -> Resolved:
    """Work out what a cluster's policies mean for the local endpoints."""
    claims: defaultdict[Address, list[Endpoint]] = defaultdict(list)
    selected: dict[str, list[NetworkPolicy]] = {}
    for endpoint in cluster.endpoints.values():
        if endpoint.local:
            selected[endpoint.key] = [p for p in cluster.policies.values() if selects(p, endpoint)]
            for address in endpoint.addresses:
                claims[address].append(endpoint)
    dispatch = {}
    for direction in Direction:
        for address, claimants in claims.items():
            groups = [group_of(claimant, selected[claimant.key], direction) for claimant in claimants]
            group = group_of_address(groups, direction)
            if group is not None:
                dispatch[direction, address] = group
    policies = {p.key: p for of_pod in selected.values() for p in of_pod if p.rejected is None}
    sets = {
        pod_set: _owned(
            (element, endpoint.key)
            for endpoint in cluster.endpoints.values()
            for element in pod_set.elements(endpoint, cluster.namespaces.get(endpoint.namespace))
        )
        for policy in policies.values()
        for pod_set in sets_of(policy)
    }
    local = {address: tuple(sorted(e.key for e in claimants)) for address, claimants in claims.items()}
    return Resolved(local, dispatch, policies, sets)


def _owned(pairs: Iterable[tuple[Element, str]]) -> Mapping[Element, tuple[str, ...]]:
    owners: defaultdict[Element, set[str]] = defaultdict(set)
    for element, key in pairs:
        owners[element].add(key)
    return {element: tuple(sorted(keys)) for element, keys in owners.items()}
