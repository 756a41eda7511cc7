"""Differences of policy in, differences of the ruleset out; and the same from scratch.

``Translator`` hears the ``PolicyIndex`` and words each difference. ``translate`` gives a new translator everything that
is resolved: the specification of the incremental path.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping

from enforcer.model.addresses import Address, Family, Network, family_of
from enforcer.model.nodes import Claims
from enforcer.model.objects import Attachment, Direction, IPBlock, NetworkPolicy
from enforcer.policy.isolation import Group
from enforcer.policy.resolve import Resolved
from enforcer.policy.sets import Element as Member
from enforcer.policy.sets import PodSet
from enforcer.ruleset.objects import Element, Set, Table
from enforcer.ruleset.ruleset import Ruleset
from enforcer.translate import names, rules

_DEFAULT = rules.BaseSettings()


class Translator:
    """Keeps a ruleset equal to what it has heard; a ``policy.index.Listener``."""

    def __init__(self, ruleset: Ruleset, settings: rules.BaseSettings = _DEFAULT) -> None:
        self._ruleset = ruleset
        self._settings = settings
        self._networks: dict[str, set[bytes]] = {}
        self._nodes: dict[Address, Element] = {}
        # The sets of pods by what they describe, so that an element costs no wording.
        self._sets: dict[PodSet, dict[Family, Set]] = {}
        # What each policy in force has put, to take it away by; and how many policies use each ipBlock's set.
        self._policies: dict[str, NetworkPolicy] = {}
        self._block_users: dict[str, int] = {}
        for counter in rules.static_counters(settings):
            ruleset.put_counter(counter)
        for static_set in rules.static_sets(settings):
            ruleset.put_set(static_set)
        for chain in rules.base_chains(settings):
            ruleset.put_chain(chain)
        self.nodes_changed(Claims({}, {}, frozenset()))

    def nodes_changed(self, claims: Claims) -> None:
        """Say what is believed of nodes: their own addresses, and the networks of their pods."""
        if self._settings.masquerade:
            networks = [network for of in claims.networks.values() for network in of]
            self._put_networks(names.network_set, [*networks, *self._settings.not_masqueraded])
        if self._settings.tunnel is not None:
            self._put_nodes(claims.addresses)

    def own_networks_changed(self, networks: Iterable[Network]) -> None:
        """Say which networks are this node's pods'."""
        if self._settings.close_own_networks:
            self._put_networks(names.own_network_set, [n for n in networks if n.length])

    def _put_networks(self, set_of: Callable[[Family], Set], networks: Collection[Network]) -> None:
        for family in Family:
            of = set_of(family)
            present = self._networks.get(of.name, set())
            wanted = set(rules.network_elements(networks, family))
            for key in present - wanted:
                self._ruleset.remove_element(of.table, of.name, key)
            for key in wanted - present:
                self._ruleset.put_element(of.table, of.name, key)
            self._networks[of.name] = wanted

    def _put_nodes(self, nodes: Mapping[str, Iterable[Address]]) -> None:
        names_of: dict[Address, list[str]] = {}
        for name, addresses in nodes.items():
            for address in dict.fromkeys(addresses):
                names_of.setdefault(address, []).append(name)
        wanted = {address: Element(names.address_comment(tuple(found))) for address, found in names_of.items()}
        for address in self._nodes.keys() - wanted.keys():
            of = _NODES[family_of(address)]
            self._ruleset.remove_element(of.table, of.name, address)
        for address, element in wanted.items():
            if self._nodes.get(address) != element:
                of = _NODES[family_of(address)]
                self._ruleset.put_element(of.table, of.name, address, element)
        self._nodes = wanted

    # Sets of pods

    def set_added(self, pod_set: PodSet) -> None:
        """Add the set of each family."""
        self._sets[pod_set] = {family: names.pod_set(pod_set, family) for family in Family}
        for of in self._sets[pod_set].values():
            self._ruleset.put_set(of)

    def set_removed(self, pod_set: PodSet) -> None:
        """Remove the set of each family."""
        for of in self._sets.pop(pod_set).values():
            self._ruleset.remove_set(of.table, of.name)

    def element_added(self, pod_set: PodSet, element: Member) -> None:
        """Add a member to the set of its family."""
        of = self._sets[pod_set][names.element_family(element)]
        self._ruleset.put_element(of.table, of.name, names.set_element(of, element))

    def element_removed(self, pod_set: PodSet, element: Member) -> None:
        """Remove a member from the set of its family."""
        of = self._sets[pod_set][names.element_family(element)]
        self._ruleset.remove_element(of.table, of.name, names.set_element(of, element))

    # Policies

    def policy_changed(self, policy: NetworkPolicy) -> None:
        """Put a policy's chains and counters, and the sets of its ipBlocks."""
        before = self._policies.get(policy.key)
        for block in rules.blocks_of(policy):
            self._use_block(block)
        chains = set()
        for chain, counter in rules.policy_chains(policy):
            chains.add(chain.name)
            self._ruleset.put_counter(counter)
            self._ruleset.put_chain(chain)
        self._policies[policy.key] = policy
        if before is not None:
            self._withdraw(before, keep=chains)

    def policy_removed(self, key: str) -> None:
        """Remove a policy's chains, counters and the ipBlock sets that no other policy uses."""
        self._withdraw(self._policies.pop(key), keep=())

    def _withdraw(self, policy: NetworkPolicy, keep: Iterable[str]) -> None:
        for direction in policy.rules:
            name = names.policy_chain(policy.key, direction)
            if name not in keep:
                self._ruleset.remove_chain(Table.POLICY, name)
                self._ruleset.remove_counter(Table.POLICY, name)
        for block in rules.blocks_of(policy):
            self._release_block(block)

    def _use_block(self, block: IPBlock) -> None:
        of = names.block_set(block)
        users = self._block_users.get(of.name, 0)
        if users == 0:
            self._ruleset.put_set(of)
            for key in rules.block_elements(block):
                self._ruleset.put_element(of.table, of.name, key)
        self._block_users[of.name] = users + 1

    def _release_block(self, block: IPBlock) -> None:
        of = names.block_set(block)
        self._block_users[of.name] -= 1
        if self._block_users[of.name] == 0:
            del self._block_users[of.name]
            self._ruleset.remove_set(of.table, of.name)

    # Groups and the addresses of this node

    def group_added(self, group: Group) -> None:
        """Add the chain that decides for a group."""
        self._ruleset.put_chain(rules.group_chain(group))

    def group_removed(self, group: Group) -> None:
        """Remove the chain of a group that no address is in."""
        self._ruleset.remove_chain(Table.POLICY, names.group_chain(group))

    def dispatch_changed(
        self, direction: Direction, address: Address, group: Group | None, keys: tuple[str, ...]
    ) -> None:
        """Send a local address to the chain of its group, or (None) past all."""
        of = _DISPATCH[direction, family_of(address)]
        if group is None:
            self._ruleset.remove_element(of.table, of.name, address)
        else:
            element = Element(names.address_comment(keys), names.group_chain(group))
            self._ruleset.put_element(of.table, of.name, address, element)

    def local_changed(self, address: Address, keys: tuple[str, ...]) -> None:
        """Say whose a local address is; no keys: it is no pod's any more."""
        local, itself = _LOCAL[family_of(address)]
        pair = names.packed_self(address)
        if keys:
            self._ruleset.put_element(local.table, local.name, address, Element(names.address_comment(keys)))
            self._ruleset.put_element(itself.table, itself.name, pair)
        else:
            self._ruleset.remove_element(local.table, local.name, address)
            self._ruleset.remove_element(itself.table, itself.name, pair)

    # Bridge ports

    def attached(self, attachment: Attachment) -> None:
        """Let a bridge port send with the addresses of its attachment."""
        for of, key in _port_elements(attachment):
            self._ruleset.put_element(of.table, of.name, key, Element(names.address_comment((_whose(attachment),))))

    def detached(self, attachment: Attachment) -> None:
        """Undo ``attached``."""
        for of, key in _port_elements(attachment):
            self._ruleset.remove_element(of.table, of.name, key)


_DISPATCH = {(d, f): names.dispatch_map(d, f) for d in Direction for f in Family}
_LOCAL = {family: (names.local_set(family), names.self_set(family)) for family in Family}
_NODES = {family: names.node_set(family) for family in Family}
_PORTS = {family: names.port_set(family) for family in Family}


def _whose(attachment: Attachment) -> str:
    return attachment.pod or attachment.key


def _port_elements(attachment: Attachment) -> list[tuple[Set, bytes]]:
    port = attachment.port.encode()
    return [
        (of, of.pack(port, attachment.mac, address))
        for address in attachment.addresses
        for of in (_PORTS[family_of(address)],)
    ]


def translate(
    resolved: Resolved, attachments: Iterable[Attachment] = (), settings: rules.BaseSettings = _DEFAULT
) -> Ruleset:
    """The whole ruleset for what policies mean on this node."""
    ruleset = Ruleset()
    translator = Translator(ruleset, settings)
    for pod_set, members in resolved.sets.items():
        translator.set_added(pod_set)
        for member in members:
            translator.element_added(pod_set, member)
    for policy in resolved.policies.values():
        translator.policy_changed(policy)
    for group in set(resolved.dispatch.values()):
        translator.group_added(group)
    for address, keys in resolved.local.items():
        translator.local_changed(address, keys)
        for direction in Direction:
            if (direction, address) in resolved.dispatch:
                translator.dispatch_changed(direction, address, resolved.dispatch[direction, address], keys)
    for attachment in attachments:
        translator.attached(attachment)
    return ruleset
