"""Differences of policy in, differences of the ruleset out; and the same from scratch.

``Translator`` takes what the ``PolicyIndex`` says is different. ``translate`` gives a new translator everything that is
resolved: the specification of the incremental path.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from enforcer.model.addresses import Address, Family, Network, family_of
from enforcer.model.objects import Attachment, Direction, NetworkPolicy
from enforcer.nodes.ownership import Ownership
from enforcer.policy.delta import PolicyDelta
from enforcer.policy.isolation import Group
from enforcer.policy.resolve import Resolved
from enforcer.policy.sets import Element as Member
from enforcer.policy.sets import PodSet
from enforcer.ruleset.objects import Chain, Element, Set
from enforcer.ruleset.ruleset import Ruleset
from enforcer.translate import base, names, rules

_DEFAULT = base.BaseSettings()


@dataclass(slots=True)
class _Members:
    """An isolation group: its chains, once they are written, and its addresses with the endpoints that claim them.

    The last of the chains is the group's own.
    """

    chains: tuple[Chain, ...] = ()
    addresses: dict[Address, tuple[str, ...]] = field(default_factory=dict)


class Translator:
    """Keeps a ruleset equal to what policies mean.

    The ruleset shows what follows the epoch as of ``epoch``; in the kernel that is another.
    """

    def __init__(self, ruleset: Ruleset, settings: base.BaseSettings = _DEFAULT, *, epoch: int | None = None) -> None:
        self._ruleset = ruleset
        self.settings = settings
        self._networks: dict[str, set[bytes]] = {}
        self._nodes: dict[Address, Element] = {}
        # The sets of pods by what they describe, so that an element costs no wording.
        self._sets: dict[PodSet, dict[Family, Set]] = {}
        # What each policy in force has put, to take it away by; and how many of them use each set without pods.
        self._policies: dict[str, dict[Direction, rules.PolicyChains]] = {}
        self._set_users: dict[str, int] = {}
        # Isolation groups, those of each policy, what of them is to be written, and how many use each chain.
        self._groups: dict[Group, _Members] = {}
        self._groups_of: dict[str, dict[Group, None]] = {}
        self._stale: dict[Group, None] = {}
        self._chain_users: dict[str, int] = {}
        self._group_at: dict[tuple[Direction, Address], Group] = {}
        self._moved: dict[tuple[Direction, Address], Group | None] = {}
        for counter in base.static_counters(settings):
            ruleset.put_counter(counter)
        for static_set in base.static_sets(settings):
            ruleset.put_set(static_set)
        for chain in (base.stamp_chain(settings.mark, epoch), *base.base_chains(settings)):
            ruleset.put_chain(chain)
        if epoch is not None:
            for key, element in base.epoch_elements(settings.mark, epoch).items():
                ruleset.put_element(base.EPOCH.table, base.EPOCH.name, key, element)
        self.ownership_changed(Ownership())

    def ownership_changed(self, ownership: Ownership) -> None:
        """Say which addresses are nodes' own, and which networks are their pods'."""
        if self.settings.masquerade:
            networks = [network for owned in ownership.networks.values() for network in owned]
            self._put_networks(names.network_set, [*networks, *self.settings.not_masqueraded])
        if self.settings.tunnel is not None:
            self._put_nodes(ownership.addresses)

    def own_networks_changed(self, networks: Iterable[Network]) -> None:
        """Say which networks are this node's pods'."""
        if self.settings.close_own_networks:
            self._put_networks(names.own_network_set, [n for n in networks if n.length])

    def _put_networks(self, set_of: Callable[[Family], Set], networks: Collection[Network]) -> None:
        for family in Family:
            nft_set = set_of(family)
            present = self._networks.get(nft_set.name, set())
            wanted = set(base.network_elements(networks, family))
            for key in present - wanted:
                self._ruleset.remove_element(nft_set.table, nft_set.name, key)
            for key in wanted - present:
                self._ruleset.put_element(nft_set.table, nft_set.name, key)
            self._networks[nft_set.name] = wanted

    def _put_nodes(self, nodes: Mapping[str, Iterable[Address]]) -> None:
        names_of: dict[Address, list[str]] = {}
        for name, addresses in nodes.items():
            for address in dict.fromkeys(addresses):
                names_of.setdefault(address, []).append(name)
        wanted = {address: Element(names.address_comment(tuple(found))) for address, found in names_of.items()}
        for address in self._nodes.keys() - wanted.keys():
            nft_set = _NODES[family_of(address)]
            self._ruleset.remove_element(nft_set.table, nft_set.name, address)
        for address, element in wanted.items():
            if self._nodes.get(address) != element:
                nft_set = _NODES[family_of(address)]
                self._ruleset.put_element(nft_set.table, nft_set.name, address, element)
        self._nodes = wanted

    def apply(self, delta: PolicyDelta) -> None:
        """Write what is different."""
        for pod_set in delta.old_sets:
            self._remove_set(pod_set)
        for pod_set in delta.new_sets:
            self._add_set(pod_set)
        for pod_set, elements in delta.elements.items():
            for element, keys in elements.items():
                self._put_member(pod_set, element, keys)
        for key, policy in delta.policies.items():
            self._put_policy(key, policy)
        for group in delta.new_groups:
            self._add_group(group)
        for (direction, address), (present, keys) in delta.dispatch.items():
            self._put_dispatch(direction, address, present, keys)
        for group in delta.old_groups:
            self._remove_group(group)
        for address, keys in delta.local.items():
            self._put_local(address, keys)
        self._complete()

    # Sets of pods

    def _add_set(self, pod_set: PodSet) -> None:
        """Add the set of each family."""
        self._sets[pod_set] = {family: names.pod_set(pod_set, family) for family in Family}
        for nft_set in self._sets[pod_set].values():
            self._ruleset.put_set(nft_set)

    def _remove_set(self, pod_set: PodSet) -> None:
        """Remove the set of each family."""
        for nft_set in self._sets.pop(pod_set).values():
            self._ruleset.remove_set(nft_set.table, nft_set.name)

    def _put_member(self, pod_set: PodSet, element: Member, keys: tuple[str, ...]) -> None:
        """Put a member into the set of its family with the names of its pods, or (no keys) take it out."""
        nft_set = self._sets[pod_set][names.element_family(element)]
        key = names.set_element(nft_set, element)
        if keys:
            self._ruleset.put_element(nft_set.table, nft_set.name, key, _owned_by(keys))
        else:
            self._remove_if_there(nft_set, key)

    def _remove_if_there(self, nft_set: Set, key: bytes) -> None:
        """Remove an element; what came and went since the last delta was never there."""
        if key in self._ruleset.elements(nft_set):
            self._ruleset.remove_element(nft_set.table, nft_set.name, key)

    # Policies

    def _put_policy(self, key: str, policy: NetworkPolicy | None) -> None:
        """Put or remove (None) a policy's chains, its counters, and the sets that no pod is in."""
        before = self._policies.pop(key, {})
        if policy is None:
            self._withdraw(before, {})
            return
        untracked = not self.settings.pod_to_own_node
        now = {direction: rules.policy_chains(policy, direction, untracked=untracked) for direction in policy.rules}
        for direction, written in now.items():
            if direction not in before:
                self._ruleset.put_counter(written.counter)
            for nft_set, elements in written.sets:
                self._use_set(nft_set, elements)
            for chain in written.chains:
                self._ruleset.put_chain(chain)
        self._policies[key] = now
        self._withdraw(before, now)
        self._stale.update(self._groups_of.get(key, {}))

    def _withdraw(
        self, before: Mapping[Direction, rules.PolicyChains], now: Mapping[Direction, rules.PolicyChains]
    ) -> None:
        kept = {chain.name for written in now.values() for chain in written.chains}
        for direction, written in before.items():
            for chain in written.chains:
                if chain.name not in kept:
                    self._ruleset.remove_chain(chain.table, chain.name)
            for nft_set, _ in written.sets:
                self._release_set(nft_set)
            if direction not in now:
                self._ruleset.remove_counter(written.counter.table, written.counter.name)

    def _use_set(self, nft_set: Set, elements: tuple[bytes, ...]) -> None:
        users = self._set_users.get(nft_set.name, 0)
        if users == 0:
            self._ruleset.put_set(nft_set)
            for key in elements:
                self._ruleset.put_element(nft_set.table, nft_set.name, key)
        self._set_users[nft_set.name] = users + 1

    def _release_set(self, nft_set: Set) -> None:
        self._set_users[nft_set.name] -= 1
        if self._set_users[nft_set.name] == 0:
            del self._set_users[nft_set.name]
            self._ruleset.remove_set(nft_set.table, nft_set.name)

    # Groups and the addresses of this node

    @property
    def denied(self) -> dict[str, Group]:
        """The isolation groups by the names of the counters of what they are denied."""
        return {names.denied_counter(group): group for group in self._groups}

    def _add_group(self, group: Group) -> None:
        """Add a group, and the counter of what it is denied."""
        self._groups[group] = _Members()
        self._ruleset.put_counter(rules.group_counter(group))
        for key in group.policies:
            self._groups_of.setdefault(key, {})[group] = None
        self._stale[group] = None

    def _remove_group(self, group: Group) -> None:
        """Remove a group that no address is in, with its chain."""
        members = self._groups.pop(group)
        self._stale.pop(group, None)
        for key in group.policies:
            del self._groups_of[key][group]
            if not self._groups_of[key]:
                del self._groups_of[key]
        counter = rules.group_counter(group)
        self._ruleset.remove_counter(counter.table, counter.name)
        self._release_chains(members.chains)

    def _put_dispatch(self, direction: Direction, address: Address, group: Group | None, keys: tuple[str, ...]) -> None:
        """Send a local address to the chain of its group, or (None) past all."""
        before = self._group_at.pop((direction, address), None)
        if before is not None:
            del self._groups[before].addresses[address]
        if group is not None:
            self._group_at[direction, address] = group
            self._groups[group].addresses[address] = keys
        self._moved[direction, address] = group

    def _complete(self) -> None:
        """Write the chains of the groups that have changed, and where addresses are sent."""
        for group in self._stale:
            self._write_group(group)
        self._stale = {}
        for (direction, address), present in self._moved.items():
            self._write_dispatch(direction, address, present)
        self._moved = {}

    def _write_group(self, group: Group) -> None:
        members = self._groups[group]
        policies = () if group.closed else group.policies
        entries = {key: self._policies[key][group.direction].entry.name for key in policies}
        before, members.chains = members.chains, rules.group_chains(group, entries, self.settings.secret)
        if before == members.chains:
            return
        for chain in members.chains:
            users = self._chain_users.get(chain.name, 0)
            # Another content under a name that is in use is put, too: the plan refuses it.
            if self._ruleset.chains.get((chain.table, chain.name)) != chain:
                self._ruleset.put_chain(chain)
            self._chain_users[chain.name] = users + 1
        self._release_chains(before)
        for address in members.addresses:
            self._moved[group.direction, address] = group

    def _release_chains(self, chains: Iterable[Chain]) -> None:
        for chain in chains:
            self._chain_users[chain.name] -= 1
            if self._chain_users[chain.name] == 0:
                del self._chain_users[chain.name]
                self._ruleset.remove_chain(chain.table, chain.name)

    def _write_dispatch(self, direction: Direction, address: Address, group: Group | None) -> None:
        nft_set, isolated = _DISPATCH[direction, family_of(address)], _ISOLATED[direction, family_of(address)]
        if group is None:
            for each in (nft_set, isolated):
                self._ruleset.remove_element(each.table, each.name, address)
            return
        members = self._groups[group]
        owned = _owned_by(members.addresses[address])
        chain = members.chains[-1].name if members.chains else None
        self._ruleset.put_element(nft_set.table, nft_set.name, address, Element(owned.comment, chain))
        self._ruleset.put_element(isolated.table, isolated.name, address, owned)

    def _put_local(self, address: Address, keys: tuple[str, ...]) -> None:
        """Say whose a local address is; no keys: it is no pod's any more."""
        local, itself = _LOCAL[family_of(address)]
        pair = names.packed_self(address)
        if keys:
            self._ruleset.put_element(local.table, local.name, address, _owned_by(keys))
            self._ruleset.put_element(itself.table, itself.name, pair, _owned_by(keys))
        else:
            self._remove_if_there(local, address)
            self._remove_if_there(itself, pair)

    # Bridge ports

    def attached(self, attachment: Attachment) -> None:
        """Let a bridge port send with the addresses of its attachment."""
        for nft_set, key in _port_elements(attachment):
            self._ruleset.put_element(nft_set.table, nft_set.name, key, _owned_by((_whose(attachment),)))

    def detached(self, attachment: Attachment) -> None:
        """Undo ``attached``."""
        for nft_set, key in _port_elements(attachment):
            self._ruleset.remove_element(nft_set.table, nft_set.name, key)


@lru_cache(maxsize=1 << 14)
def _owned_by(keys: tuple[str, ...]) -> Element:
    return Element(names.address_comment(keys))


_DISPATCH = {(d, f): names.dispatch_map(d, f) for d in Direction for f in Family}
_ISOLATED = {(d, f): names.isolated_set(d, f) for d in Direction for f in Family}
_LOCAL = {family: (names.local_set(family), names.self_set(family)) for family in Family}
_NODES = {family: names.node_set(family) for family in Family}
_PORTS = {family: names.port_set(family) for family in Family}


def _whose(attachment: Attachment) -> str:
    return attachment.pod or attachment.key


def _port_elements(attachment: Attachment) -> list[tuple[Set, bytes]]:
    port = attachment.host_interface.encode()
    return [
        (nft_set, nft_set.pack(port, attachment.mac, address))
        for address in attachment.addresses
        for nft_set in (_PORTS[family_of(address)],)
    ]


def translate(
    resolved: Resolved, attachments: Iterable[Attachment] = (), settings: base.BaseSettings = _DEFAULT
) -> Ruleset:
    """The whole ruleset for what policies mean on this node."""
    ruleset = Ruleset()
    translator = Translator(ruleset, settings)
    dispatch: dict[tuple[Direction, Address], tuple[Group | None, tuple[str, ...]]] = {
        (direction, address): (group, resolved.local[address])
        for (direction, address), group in resolved.dispatch.items()
    }
    translator.apply(
        PolicyDelta(
            new_sets=dict.fromkeys(resolved.sets),
            elements={pod_set: dict(members) for pod_set, members in resolved.sets.items()},
            policies=dict(resolved.policies),
            new_groups=dict.fromkeys(resolved.dispatch.values()),
            dispatch=dispatch,
            local=dict(resolved.local),
        )
    )
    for attachment in attachments:
        translator.attached(attachment)
    return ruleset
