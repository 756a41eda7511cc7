"""Keeps the kernel's routes to the pods of other nodes, and the tunnels that some need, equal to what nodes own.

A route of ours carries our protocol number and, other than those to the pods of this node, a gateway: the other node's
own address where it is on a segment with this one, else the network's first address, which is a neighbour on the
tunnel. A network to which there is no way, or none yet, is unreachable: what is sent to its pods must not leave by the
default route. Whoever removes a route, a link or an entry of a link, it is put back. What another has made is left
alone.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import structlog

from cni.netlink import rtnetlink
from cni.netlink.rtnetlink import Flag, Message, Netlink, NetlinkError, Rtm
from cni.node import topology, vxlan
from cni.node.bridge import BRIDGE, PORT_PREFIX, ROUTE_PROTOCOL, Bridge
from cni.node.topology import KernelState, Routing
from enforcer.model.addresses import Address, Network, family_of, format_address
from enforcer.model.tunnel import Vxlan
from enforcer.nodes.ownership import Machine, Ownership

log = structlog.get_logger()

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
_RETRY_SECONDS = 10.0
Ways = dict[Network, tuple[Address, int] | None]
"""The gateway to each network, and the index of the link that it is on; None: it is unreachable."""


@dataclass(slots=True)
class _Routes:
    """The kernel's routes: ours by other nodes; and of the rest what a plan must know."""

    ours: Ways = field(default_factory=dict)
    networks: set[Network] = field(default_factory=set)
    addresses: set[Address] = field(default_factory=set)
    gateways: set[Address] = field(default_factory=set)

    @property
    def machine(self) -> Machine:
        """What of it decides who owns which network."""
        return Machine(frozenset(self.addresses), frozenset(self.gateways))


class NodeRoutes:
    """The routes of one node, on a thread of its own, which makes the newest ownership so.

    Routes are made only for an ownership that was worked out with the present addresses of this machine; others are
    reported, and a newer ownership is awaited.

    Args:
        own: this node's name.
        bridge: the node's bridge and MTU; it is started before ownership is known.
        routing: ``auto`` takes the direct way where there is one, ``direct`` no other, ``vxlan`` the tunnel always.
        tunnel: the parameters of the tunnel.
        set_pod_cidrs: is called on the thread with this node's own pod networks when they are others.
        report: is called on the thread when this machine's addresses or gateways are others.
    """

    def __init__(
        self,
        *,
        own: str,
        bridge: Bridge,
        routing: Routing,
        tunnel: Vxlan,
        set_pod_cidrs: Callable[[tuple[Network, ...]], None],
        report: Callable[[Machine], None],
    ) -> None:
        self._own, self._bridge, self._routing, self._tunnel = own, bridge, routing, tunnel
        self._set_pod_cidrs, self._report = set_pod_cidrs, report
        self._events = rtnetlink.Events()
        self._thread = threading.Thread(target=self._run, name="routes", daemon=True)
        # The newest ownership, the number of it, and the number of the last that was made so.
        self._changed = threading.Condition()
        self._ownership: Ownership | None = None
        self._asked = self._made = 0
        # The thread's own.
        self._pod_cidrs: tuple[Network, ...] | None = None
        self._reported: Machine | None = None
        self._links: frozenset[int] = frozenset()
        self._networks: frozenset[Network] = frozenset()
        self._refused: frozenset[str] = frozenset()
        self._failures: frozenset[str] = frozenset()

    def start(self) -> None:
        """Start the thread, in the network namespace in which this was made."""
        self._thread.start()

    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def set_ownership(self, ownership: Ownership) -> None:
        """Have an ownership made so soon, instead of those before it; any thread."""
        with self._changed:
            self._ownership = ownership
            self._asked += 1
        self._events.wake()

    def barrier(self, seconds: float) -> bool:
        """Wait until the newest ownership of now, or a newer one, was made so; False if that takes longer."""
        with self._changed:
            asked = self._asked
            return self._changed.wait_for(lambda: self._made >= asked, seconds)

    def _run(self) -> None:
        while True:
            try:
                happened = self._events.wait(_RETRY_SECONDS if self._failures else None)
            except OSError:
                # Events were lost, so anything may have happened; or it is time to try again what failed.
                happened = None
            with self._changed:
                ownership, asked, made = self._ownership, self._asked, self._made
            if ownership is None:
                # Routes of an earlier agent stand until it is known which nodes there are.
                continue
            concerned = happened is None or any(self._concerns_us(kind, payload) for kind, payload in happened)
            if (asked != made or concerned) and self._sync(ownership):
                with self._changed:
                    self._made = asked
                    self._changed.notify_all()

    def _concerns_us(self, kind: int, payload: bytes) -> bool:
        """Whether an event may be about our routes and links; those of this node's own pods are not."""
        match kind:
            case Rtm.NEWADDR | Rtm.DELADDR:
                return True
            case Rtm.NEWROUTE | Rtm.DELROUTE:
                return self._route_concerns_us(payload, gone=kind == Rtm.DELROUTE)
            case Rtm.NEWNEIGH | Rtm.DELNEIGH:
                return rtnetlink.NEIGHBOUR_HEADER.unpack_from(payload)[1] in self._links
            case Rtm.NEWLINK | Rtm.DELLINK:
                found = rtnetlink.attributes_of(payload[rtnetlink.LINK_HEADER.size :])
                name = found.get(rtnetlink.Ifla.IFNAME, b"").rstrip(b"\0").decode(errors="replace")
                return not name.startswith(PORT_PREFIX) and name != BRIDGE
            case _:
                return False

    def _route_concerns_us(self, payload: bytes, *, gone: bool) -> bool:
        _, length, _, _, _, protocol, _, _, _ = rtnetlink.ROUTE_HEADER.unpack_from(payload)
        attributes = rtnetlink.attributes_of(payload[rtnetlink.ROUTE_HEADER.size :])
        destination = attributes.get(rtnetlink.Rta.DST)
        if destination is not None and Network(destination, length) in self._networks:
            return True
        if protocol == ROUTE_PROTOCOL:
            return False
        if gone:
            # The gateways of other routes that go are forgotten with the next change.
            return destination is None
        known = self._reported.gateways if self._reported is not None else frozenset()
        return not rtnetlink.gateways_of(attributes) <= known

    def _sync(self, ownership: Ownership) -> bool:
        """Make an ownership so, as far as the kernel takes it; False if it is out of date, or if that is not known."""
        if ownership.pod_cidrs is not None and ownership.pod_cidrs != self._pod_cidrs:
            self._pod_cidrs = ownership.pod_cidrs
            self._set_pod_cidrs(ownership.pod_cidrs)
        found: _Routes | None = None
        failures: frozenset[str]
        try:
            with Netlink() as nl:
                found = _routes(nl)
                if found.machine != self._reported:
                    self._reported = found.machine
                    self._report(found.machine)
                if found.machine != ownership.machine:
                    return False
                failures = self._sync_with(nl, ownership, found)
        except (NetlinkError, OSError) as error:
            failures = frozenset({str(error)})
        if failures - self._failures:
            log.error("routes not set", errors=sorted(failures))
        self._failures = failures
        return found is not None

    def _sync_with(self, nl: Netlink, ownership: Ownership, found: _Routes) -> frozenset[str]:
        """Make everything as it is wanted; what could not be done, in words."""
        kernel = KernelState(self._links_to(nl, ownership), frozenset(found.networks))
        wanted = topology.plan(ownership, own=self._own, routing=self._routing, kernel=kernel)
        if wanted.refused - self._refused:
            log.error("no route to pods", nodes=sorted(wanted.refused))
        self._refused = wanted.refused
        # Before anything is changed: what comes of it may be heard at once.
        self._networks = frozenset(network for networks in ownership.networks.values() for network in networks)
        indexes, failures = vxlan.sync(nl, wanted.tunnels, vxlan=self._tunnel, uplink_mtu=self._bridge.uplink_mtu)
        self._links = frozenset(indexes.values())
        ways: Ways = {**wanted.direct, **dict.fromkeys(wanted.unreachable)}
        for family, tunnel in wanted.tunnels.items():
            index = indexes.get(family)
            ways |= {network: None if index is None else (network.first, index) for network in tunnel.peers}
        return failures | _make(nl, ways, self._ours(_routes(nl).ours))

    def _ours(self, found: Ways) -> Ways:
        """Without what the bridge's set-up made unreachable; all of that, while it is not known what it is."""
        own = self._bridge.networks
        return {network: way for network, way in found.items() if way is not None or (own and network not in own)}

    def _links_to(self, nl: Netlink, ownership: Ownership) -> dict[Address, int]:
        """The links that other nodes' addresses are directly on."""
        addresses = {a for name, of_node in ownership.addresses.items() if name != self._own for a in of_node}
        return {address: link for address in addresses if (link := _link_to(nl, address))}


def _routes(nl: Netlink) -> _Routes:
    routes = _Routes()
    for family in _FAMILIES:
        head = rtnetlink.ROUTE_HEADER.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        for payload in nl.dump(Message("list routes", Rtm.GETROUTE, Flag(0), head)):
            _, length, _, _, table, protocol, _, kind, _ = rtnetlink.ROUTE_HEADER.unpack_from(payload)
            attributes = rtnetlink.attributes_of(payload[rtnetlink.ROUTE_HEADER.size :])
            gateway, destination = attributes.get(rtnetlink.Rta.GATEWAY), attributes.get(rtnetlink.Rta.DST)
            if table == rtnetlink.RT_TABLE_LOCAL and kind == rtnetlink.RTN_LOCAL and destination is not None:
                routes.addresses.add(destination)
            if table != rtnetlink.RT_TABLE_MAIN:
                continue
            if protocol == ROUTE_PROTOCOL and kind == rtnetlink.RTN_UNREACHABLE and destination is not None:
                routes.ours[Network(destination, length)] = None
                continue
            if protocol == ROUTE_PROTOCOL and gateway is not None and destination is not None:
                link = int.from_bytes(attributes.get(rtnetlink.Rta.OIF, b""), "little")
                routes.ours[Network(destination, length)] = (gateway, link)
                continue
            routes.gateways |= rtnetlink.gateways_of(attributes)
            if destination is not None:
                routes.networks.add(Network(destination, length))
    return routes


def _link_to(nl: Netlink, address: Address) -> int:
    """The index of the link that an address is directly on; 0 if it is on none."""
    bits = family_of(address).bits
    head = rtnetlink.ROUTE_HEADER.pack(rtnetlink.family_number(address), bits, 0, 0, 0, 0, 0, 0, 0)
    request = Message(
        f"way to {format_address(address)}",
        Rtm.GETROUTE,
        Flag(0),
        head + rtnetlink.attribute(rtnetlink.Rta.DST, address),
    )
    try:
        payload = nl.get(request)
    except NetlinkError:
        return 0
    kind = rtnetlink.ROUTE_HEADER.unpack_from(payload)[7]
    attributes = rtnetlink.attributes_of(payload[rtnetlink.ROUTE_HEADER.size :])
    if kind != rtnetlink.RTN_UNICAST or rtnetlink.Rta.GATEWAY in attributes:
        return 0
    return int.from_bytes(attributes.get(rtnetlink.Rta.OIF, b""), "little")


def _make(nl: Netlink, wanted: Ways, present: Ways) -> frozenset[str]:
    """Make routes from those that are there; one that is refused harms no other. What was refused, in words."""
    failures = set()
    for network in present.keys() - wanted.keys():
        _delete(nl, network, present[network])
    for network, way in wanted.items():
        before = present.get(network)
        if network in present and before == way:
            continue
        # IPv6 takes no gateway on another link than that which the route has now (ip6_route_check_nh_onlink), so
        # between two ways, as before the first, there is none. What came here meanwhile is another's, and stays.
        at_once = way is None or (network in present and (before is None or before[1] == way[1]))
        place = Flag.REPLACE if network in present else Flag.EXCL
        try:
            for step in (way,) if at_once else (None, way):
                payload = _route(network, step).payload()
                nl.run(Message(f"route to {network}", Rtm.NEWROUTE, Flag.CREATE | place, payload))
                place = Flag.REPLACE
        except NetlinkError as error:
            failures.add(str(error))
    if wanted != present:
        log.info("routes changed", networks=len(wanted) - len(failures), before=len(present))
    return frozenset(failures)


def _delete(nl: Netlink, network: Network, way: tuple[Address, int] | None) -> None:
    try:
        nl.run(Message(f"remove route to {network}", Rtm.DELROUTE, Flag(0), _route(network, way).payload()))
    except NetlinkError as error:
        log.debug("route gone already", network=str(network), error=str(error))


def _route(network: Network, way: tuple[Address, int] | None) -> rtnetlink.Route:
    gateway, index = way or (None, 0)
    return rtnetlink.Route(network.first, network.length, ROUTE_PROTOCOL, index=index, gateway=gateway)
