"""What has changed in the meaning of policies: the value that ``policy.index`` hands to ``translate``."""

from __future__ import annotations

from dataclasses import dataclass, field

from enforcer.model.addresses import Address
from enforcer.model.objects import Direction, NetworkPolicy
from enforcer.policy.isolation import Group
from enforcer.policy.sets import Element, PodSet

Keys = tuple[str, ...]
"""Keys of endpoints, in order."""


@dataclass(slots=True)
class PolicyDelta:
    """Differences from one state to a later one; what came and went in between is not there.

    Attributes:
        old_sets: sets that are no longer used; one that is in ``new_sets`` too has been emptied meanwhile.
        new_sets: sets that are used from now on.
        elements: the endpoints of each element of a set that is different; none: it is not in the set.
        policies: policies that are in force, by key, with their present rules; None: not in force any more.
        old_groups: isolation groups that no address is in any more.
        new_groups: isolation groups that addresses have joined.
        dispatch: the group of a local address, None if nothing isolates it, and the endpoints that claim the address.
        local: the endpoints that claim a local address; none: no endpoint of this node has it.
    """

    old_sets: dict[PodSet, None] = field(default_factory=dict)
    new_sets: dict[PodSet, None] = field(default_factory=dict)
    elements: dict[PodSet, dict[Element, Keys]] = field(default_factory=dict)
    policies: dict[str, NetworkPolicy | None] = field(default_factory=dict)
    old_groups: dict[Group, None] = field(default_factory=dict)
    new_groups: dict[Group, None] = field(default_factory=dict)
    dispatch: dict[tuple[Direction, Address], tuple[Group | None, Keys]] = field(default_factory=dict)
    local: dict[Address, Keys] = field(default_factory=dict)

    def add_set(self, pod_set: PodSet) -> None:
        """A set is used from now on; it is empty."""
        self.new_sets[pod_set] = None

    def remove_set(self, pod_set: PodSet) -> None:
        """A set is not used any more; it goes with what it holds."""
        self.elements.pop(pod_set, None)
        if pod_set in self.new_sets:
            del self.new_sets[pod_set]
        else:
            self.old_sets[pod_set] = None

    def add_group(self, group: Group) -> None:
        """The first address joins a group."""
        if group in self.old_groups:
            del self.old_groups[group]
        else:
            self.new_groups[group] = None

    def remove_group(self, group: Group) -> None:
        """The last address has left a group."""
        if group in self.new_groups:
            del self.new_groups[group]
        else:
            self.old_groups[group] = None
