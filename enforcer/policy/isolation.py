"""Isolation groups: the pods that the same policies isolate share one group, and so one chain in the kernel."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from heapq import nsmallest

from enforcer.model.objects import Direction, NetworkPolicy
from enforcer.policy.endpoints import Endpoint, Standing

NAMED_POLICIES = 3
"""As many rejected policies a closed group names; their number has no bound."""


@dataclass(frozen=True, slots=True)
class Group:
    """Why addresses are isolated in one direction.

    ``policies`` are the keys of all policies that isolate, in order. A ``closed`` group allows nothing: its
    ``policies`` are the first of those that are rejected, at most ``NAMED_POLICIES``; or it has none, where it is not
    known what its addresses may do.
    """

    direction: Direction
    policies: tuple[str, ...]
    closed: bool


def group_of(endpoint: Endpoint, policies: Collection[NetworkPolicy], direction: Direction) -> Group | None:
    """The isolation group of an endpoint that ``policies`` select; None if nothing isolates it.

    "If no policies exist that select the pod in a direction, it is not isolated in that direction."
    """
    match endpoint.standing:
        case Standing.UNKNOWN:
            return Group(direction, (), closed=True)
        case Standing.GUEST:
            return None
        case Standing.POD:
            isolating = [policy for policy in policies if direction in policy.rules]
            rejected = nsmallest(NAMED_POLICIES, (policy.key for policy in isolating if policy.rejected is not None))
            if rejected:
                return Group(direction, tuple(rejected), closed=True)
            keys = tuple(sorted(policy.key for policy in isolating))
            return Group(direction, keys, closed=False) if keys else None


def group_of_address(groups: Collection[Group | None], direction: Direction) -> Group | None:
    """The group of an address, given the group of each local endpoint that claims it.

    An address that two pods claim is closed: one of them must be wrong, and it cannot be told which.
    """
    if len(groups) == 1:
        return next(iter(groups))
    return Group(direction, (), closed=True)


def selects(policy: NetworkPolicy, endpoint: Endpoint) -> bool:
    """Whether a policy applies to an endpoint (``spec.podSelector``, in the policy's own namespace)."""
    return (
        endpoint.standing is Standing.POD
        and policy.namespace == endpoint.namespace
        and policy.pod_selector.matches(endpoint.labels)
    )
