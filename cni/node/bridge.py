"""The node's side of the pod network: the bridge, its addresses, the node's settings, and the way back."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec

import structlog

from cni import netns
from cni.netlink.rtnetlink import NetlinkError
from cni.node.iproute import IPRoute
from cni.node.topology import gateway
from enforcer.model import tunnel
from enforcer.model.addresses import Address, Family, Network, family_of

BRIDGE = "drawbridge0"
BRIDGE_MAC = bytes.fromhex("0a5824000001")
"""Fixed and locally administered: pods have it as a permanent neighbour, so it must not follow the ports'."""
ROUTE_PROTOCOL = 84
"""Marks our routes (``ip route show proto 84``)."""
PORT_PREFIX = "dbr"
_FALLBACK_MTU = 1500
_TOLD_SECONDS = 60.0
_BRIDGE_NETFILTER = ("net/bridge/bridge-nf-call-iptables", "net/bridge/bridge-nf-call-ip6tables")
_SETTINGS = {
    "net/ipv4/ip_forward": "1",
    "net/ipv6/conf/all/forwarding": "1",
    # A pod's way to its neighbour leads out of the interface that it came in by; a redirect would say to go round us.
    "net/ipv4/conf/all/send_redirects": "0",
    f"net/ipv4/conf/{BRIDGE}/send_redirects": "0",
    f"net/ipv4/conf/{BRIDGE}/rp_filter": "0",
    f"net/ipv6/conf/{BRIDGE}/accept_ra": "0",
    f"net/ipv6/conf/{BRIDGE}/forwarding": "1",
}

P = ParamSpec("P")

log = structlog.get_logger()


class Bridge:
    """The bridge of a node, and the settings that pods need there.

    ``bridge_netfilter`` is ``disable`` or ``leave``. With ``tunnels``, what pods send may have to fit into a tunnel.

    Attributes:
        uplink_mtu: of the interfaces of the default routes, the least.
        mtu: of the bridge and the pods' links.
        bridge_index: of the bridge.
        networks: those that have, or may have, a route and the bridge's address from us.
    """

    def __init__(self, *, bridge_netfilter: str = "disable", tunnels: bool = False) -> None:
        self._disable_netfilter = bridge_netfilter == "disable"
        self._tunnels = tunnels
        self.uplink_mtu = self.mtu = _FALLBACK_MTU
        self.bridge_index = 0
        self.networks: tuple[Network, ...] = ()
        self._put_back: dict[str, tuple[str, float]] = {}

    def start(self, networks: Sequence[Network]) -> None:
        """Make the bridge and the settings, or find them; idempotent.

        Raises:
            NetlinkError: the kernel refused a step.
            OSError: a setting cannot be written.
        """
        uplinks = _uplinks()
        self.uplink_mtu = min(uplinks.values(), default=_FALLBACK_MTU)
        # Nodes that have IPv4 among them use it; where there is no default route at all, nothing speaks against it.
        underlay = Family.V6 if set(uplinks) == {Family.V6} else Family.V4
        self.mtu = self.uplink_mtu - (tunnel.OVERHEAD[underlay] if self._tunnels else 0)
        with IPRoute() as ip:
            try:
                ip.add_link(
                    BRIDGE, "bridge", mac=BRIDGE_MAC, mtu=self.mtu, br_forward_delay=0, br_stp_state=0,
                    br_mcast_snooping=0,
                )  # fmt: skip
            except NetlinkError as error:
                if error.errno != errno.EEXIST:
                    raise
            self.bridge_index = socket.if_nametoindex(BRIDGE)
            ip.forbid_link_local(BRIDGE, self.bridge_index, self.mtu)
            ip.raise_link(BRIDGE, self.bridge_index, self.mtu)
        self.set_networks(networks)
        self._apply_settings()

    def set_networks(self, networks: Sequence[Network]) -> None:
        """Give the bridge the gateway of each pod network, and make what is not allocated in it unreachable.

        A route that another has made to such a network stays, and so do the routes of pods in networks of before.

        Raises:
            NetlinkError: the kernel refused a step.
            ValueError: a network is every address.
        """
        for network in networks:
            if network.length == 0:
                raise ValueError(f"{network} cannot be a pod network: it is every address")
        families = {network.family for network in networks}
        # With its last address a link loses all routes of the family, and those of pods are on it: the old one goes
        # after the new one came, and stays where none comes.
        gone = [network for network in self.networks if network not in networks]
        kept = [network for network in gone if network.family not in families]
        self.networks = (*networks, *gone)
        with IPRoute() as ip:
            for network in networks:
                ip.add_address(gateway(network), self.bridge_index)
                ip.add_unreachable(network, ROUTE_PROTOCOL)
            # Also those of an agent of before; unreachable networks of its time are the routes' (cni.node.routes).
            stays = {gateway(network) for network in (*networks, *kept)}
            for address in ip.host_addresses(self.bridge_index):
                if address not in stays and family_of(address) in families:
                    _try(ip.remove_address, address, self.bridge_index)
            for network in set(gone) - set(kept):
                _try(ip.remove_unreachable, network, ROUTE_PROTOCOL)
        self.networks = (*networks, *kept)

    def put_back(self) -> list[str]:
        """Give settings the values again that ``start`` gave them; those that another changed within the last minute.

        Returns:
            Each with what it was, or with what hinders.
        """
        now = time.monotonic()
        for name, value in self._settings().items():
            try:
                before = netns.write_sysctl(name, value)
                told = f"was {before} and is put back"
            except OSError as error:
                before, told = "", f"cannot be put back: {error}"
            if before is not None:
                self._put_back[name] = (told, now)
        self._put_back = {name: (told, at) for name, (told, at) in self._put_back.items() if now - at < _TOLD_SECONDS}
        return [f"{name.replace('/', '.')} {told}" for name, (told, _) in self._put_back.items()]

    def _settings(self) -> dict[str, str]:
        links = tunnel.LINKS.values() if self._tunnels else ()
        tunnels = {name: value for link in links for name, value in link_settings(link).items()}
        bridged = dict.fromkeys(_BRIDGE_NETFILTER, "0") if self._disable_netfilter else {}
        return _SETTINGS | tunnels | bridged

    def _apply_settings(self) -> None:
        changed = {}
        for name, value in self._settings().items():
            before = netns.write_sysctl(name, value)
            if before is not None:
                changed[name.replace("/", ".")] = f"{before} -> {value}"
        if changed:
            log.info("node settings changed", **changed)


def link_settings(link: str) -> dict[str, str]:
    """The settings of a link that pods' packets come in by from elsewhere."""
    return {
        # What comes in is judged by our rules; loose here, as the way back may be another.
        f"net/ipv4/conf/{link}/rp_filter": "0",
        f"net/ipv4/conf/{link}/send_redirects": "0",
        f"net/ipv6/conf/{link}/accept_ra": "0",
        f"net/ipv6/conf/{link}/forwarding": "1",
    }


def gateways(networks: Sequence[Network]) -> dict[Family, Address]:
    """The gateway of each family: that of its first network."""
    found: dict[Family, Address] = {}
    for network in networks:
        found.setdefault(network.family, gateway(network))
    return found


def bridged_past_policy() -> list[str]:
    """Why pods of one bridge reach each other past policy, in words: the forward hook does not see what it switches.

    For pods that another pod network attaches: those of ``drawbridge0`` meet policy without this setting.
    """
    off = [name for name in _BRIDGE_NETFILTER if netns.read_sysctl(name) != "1"]
    bridges = ", ".join(sorted(filter(_switches, os.listdir("/sys/class/net")))) if off else ""  # noqa: PTH208 - names
    return [
        f"{name.replace('/', '.')} = {netns.read_sysctl(name) or 'missing'}: pods on {bridges} reach each other past "
        "policy; load br_netfilter and set it to 1"
        for name in (off if bridges else ())
    ]


def _switches(link: str) -> bool:
    """Whether a link is a bridge with more than one port."""
    try:
        return len(os.listdir(f"/sys/class/net/{link}/brif")) > 1  # noqa: PTH208 - a number, not paths
    except OSError:
        return False


def remove_all() -> list[str]:
    """Remove the bridge, its ports, the tunnels and our routes, for ``drawbridge uninstall``.

    Returns:
        What was removed, in words.
    """
    removed = []
    # Told before the bridge goes, without which a port is not known for one.
    ours = [(index, name) for index, name in socket.if_nameindex()
            if name == BRIDGE or _is_port(name) or _is_tunnel(name)]  # fmt: skip
    with IPRoute() as ip:
        for index, name in ours:
            _try(ip.remove_link, name, index)
            removed.append(f"link {name}")
        removed += ["route"] * ip.remove_routes(ROUTE_PROTOCOL)
    return removed


def _is_port(name: str) -> bool:
    return name.startswith(PORT_PREFIX) and Path("/sys/class/net", name, "brport").exists()


def _is_tunnel(name: str) -> bool:
    group = Path("/sys/class/net", name, "netdev_group")
    return name in tunnel.LINKS.values() and group.read_text().strip() == str(tunnel.LINK_GROUP)


def _try(remove: Callable[P, None], *arguments: P.args, **named: P.kwargs) -> None:
    """Remove what another may have removed meanwhile."""
    try:
        remove(*arguments, **named)
    except NetlinkError as error:
        log.warning("not removed", step=error.step, error=str(error))


def _uplinks() -> dict[Family, int]:
    """The least MTU of the interfaces of the default routes of each family that has any."""
    tables = Path("/proc/thread-self/net")
    names: dict[Family, set[str]] = {family: set() for family in Family}
    for line in (tables / "route").read_text().splitlines()[1:]:
        interface, destination, *_ = line.split()
        if destination == "00000000":
            names[Family.V4].add(interface)
    ipv6 = tables / "ipv6_route"
    for line in ipv6.read_text().splitlines() if ipv6.exists() else ():
        destination, length, *_, interface = line.split()
        if (destination, length) == ("0" * 32, "00") and interface != "lo":
            names[Family.V6].add(interface)
    return {
        family: min(int(Path("/sys/class/net", name, "mtu").read_text()) for name in found - {"*"})
        for family, found in names.items()
        if found - {"*"}
    }
