"""Routes to the pod networks of other nodes, where both stand on one segment; whoever removes one, it is put back.

The routes carry our protocol number and, other than those to the pods of this node, a gateway: the other node's own
address.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Mapping

import structlog

from cni import netlink
from cni.netlink import Flag, Message, Netlink, NetlinkError, Rtm
from cni.node import BRIDGE, PORT_PREFIX, ROUTE_PROTOCOL
from enforcer.model.addresses import Address, Network, family_of, format_address
from enforcer.model.objects import Node

log = structlog.get_logger()

_FAMILIES = (socket.AF_INET, socket.AF_INET6)
Ways = dict[Network, tuple[Address, int]]
"""The gateway to each network, and the index of the link that it is on."""


class NodeRoutes:
    """Keeps the routes equal to what the Node objects say. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._nodes: dict[str, Node] | None = None
        self._unreachable: frozenset[str] = frozenset()

    def start(self) -> None:
        """Watch routes and links on a thread of its own, in the calling thread's network namespace."""
        self._thread = threading.Thread(target=self._watch, args=(netlink.Events(),), name="routes", daemon=True)
        self._thread.start()

    def alive(self) -> bool:
        """Whether the thread runs, if it was started."""
        return self._thread is None or self._thread.is_alive()

    def set_nodes(self, nodes: Mapping[str, Node | None]) -> None:
        """Take in the present state of other nodes; None: there is no such node."""
        with self._lock:
            known = self._nodes or {}
            self._nodes = {name: node for name, node in {**known, **nodes}.items() if node is not None}
            self._sync()

    def _watch(self, events: netlink.Events) -> None:
        while True:
            try:
                relevant = any(_concerns_us(kind, payload) for kind, payload in events.wait())
            except OSError:
                # Events were lost: anything may have happened.
                relevant = True
            if relevant:
                with self._lock:
                    self._sync()

    def _sync(self) -> None:
        if self._nodes is None:
            # Routes of an earlier agent stand until it is known which nodes there are.
            return
        try:
            with Netlink() as nl:
                present, foreign = _present(nl)
                wanted = self._wanted(nl, self._nodes, foreign)
                for network, (gateway, index) in present.items():
                    if network not in wanted:
                        _delete(nl, network, gateway, index)
                for network, way in wanted.items():
                    if present.get(network) != way:
                        _replace(nl, network, *way)
        except (NetlinkError, OSError) as error:
            log.error("routes to other nodes cannot be set", error=str(error))
            return
        if wanted != present:
            log.info("routes to other nodes", networks=len(wanted), before=len(present))

    def _wanted(self, nl: Netlink, nodes: Mapping[str, Node], foreign: set[Network]) -> Ways:
        wanted: Ways = {}
        unreachable = set()
        links: dict[Address, int] = {}
        for name, node in nodes.items():
            for network in node.pod_cidrs:
                gateway = next((a for a in node.addresses if family_of(a) is network.family), None)
                if gateway is not None and gateway not in links:
                    links[gateway] = _link_to(nl, gateway)
                if gateway is None or not links[gateway] or gateway in network or network in foreign:
                    unreachable.add(f"{name} ({network})")
                else:
                    wanted[network] = (gateway, links[gateway])
        if unreachable - self._unreachable:
            log.error(
                "no route to pods: the node has no address of the family or is not on a segment with this one, "
                "or the network has another's route or holds the node itself",
                nodes=sorted(unreachable),
            )
        self._unreachable = frozenset(unreachable)
        return wanted


def _concerns_us(kind: int, payload: bytes) -> bool:
    """Whether an event may be about our routes: one is gone, or an address or a link that is no pod's has changed."""
    if kind in {Rtm.NEWADDR, Rtm.DELADDR}:
        return True
    if kind == Rtm.DELROUTE:
        return bool(netlink.ROUTE_HEADER.unpack_from(payload)[5] == ROUTE_PROTOCOL)
    if kind != Rtm.NEWLINK:
        return False
    name = netlink.attributes_of(payload[netlink.LINK_HEADER.size :]).get(netlink.Ifla.IFNAME, b"").rstrip(b"\0")
    return not name.startswith(PORT_PREFIX.encode()) and name != BRIDGE.encode()


def _present(nl: Netlink) -> tuple[Ways, set[Network]]:
    """Our routes by other nodes, and the networks that have another route: of this node's own pods, or not ours."""
    found: Ways = {}
    foreign = set()
    for family in _FAMILIES:
        head = netlink.ROUTE_HEADER.pack(family, 0, 0, 0, 0, 0, 0, 0, 0)
        for payload in nl.dump(Message("list routes", Rtm.GETROUTE, Flag(0), head)):
            header = netlink.ROUTE_HEADER.unpack_from(payload)
            attributes = netlink.attributes_of(payload[netlink.ROUTE_HEADER.size :])
            gateway, destination = attributes.get(netlink.Rta.GATEWAY), attributes.get(netlink.Rta.DST)
            if destination is None or header[4] != netlink.RT_TABLE_MAIN:
                continue
            network = Network(destination, header[1])
            if header[5] != ROUTE_PROTOCOL or gateway is None:
                foreign.add(network)
            else:
                found[network] = (gateway, int.from_bytes(attributes.get(netlink.Rta.OIF, b""), "little"))
    return found, foreign


def _link_to(nl: Netlink, address: Address) -> int:
    """The index of the link that an address is directly on; 0 if it is on none."""
    family = socket.AF_INET if len(address) == 4 else socket.AF_INET6  # noqa: PLR2004 - the width of an IPv4 address
    head = netlink.ROUTE_HEADER.pack(family, len(address) * 8, 0, 0, 0, 0, 0, 0, 0)
    request = Message(
        f"way to {format_address(address)}", Rtm.GETROUTE, Flag(0), head + netlink.attribute(netlink.Rta.DST, address)
    )
    try:
        payload = nl.get(request)
    except NetlinkError:
        return 0
    kind = netlink.ROUTE_HEADER.unpack_from(payload)[7]
    attributes = netlink.attributes_of(payload[netlink.ROUTE_HEADER.size :])
    if kind != netlink.RTN_UNICAST or netlink.Rta.GATEWAY in attributes:
        return 0
    return int.from_bytes(attributes.get(netlink.Rta.OIF, b""), "little")


def _route(network: Network, gateway: Address, index: int) -> netlink.Route:
    return netlink.Route(network.first, network.length, ROUTE_PROTOCOL, index=index, gateway=gateway)


def _replace(nl: Netlink, network: Network, gateway: Address, index: int) -> None:
    payload = _route(network, gateway, index).payload()
    nl.run(Message(f"route to {network}", Rtm.NEWROUTE, Flag.CREATE | Flag.REPLACE, payload))


def _delete(nl: Netlink, network: Network, gateway: Address, index: int) -> None:
    try:
        nl.run(Message(f"remove route to {network}", Rtm.DELROUTE, Flag(0), _route(network, gateway, index).payload()))
    except NetlinkError as error:
        log.debug("route gone already", network=str(network), error=str(error))
