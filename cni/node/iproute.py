"""pyroute2 as the node's network uses it: typed, with addresses as bytes, and with the errors of ``cni.netlink``.

It does what happens when the agent starts or the node's own networks change. What each pod or each other node costs is
packed in ``cni.netlink``, because pyroute2 takes ten times as long for a message.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from cni.netlink.rtnetlink import (
    IFA_F_NODAD,
    IFA_F_NOPREFIXROUTE,
    IFF_UP,
    IN6_ADDR_GEN_MODE_NONE,
    NetlinkError,
)
from enforcer.model.addresses import Address, Family, Network, family_of, format_address, parse_address

_LEAST_IPV6_MTU = 1280


@dataclass(frozen=True, slots=True)
class Link:
    """A link as the kernel has it; ``data`` are the attributes of its kind, by pyroute2's names."""

    index: int
    kind: str
    up: bool
    mtu: int
    mac: bytes
    group: int
    data: dict[str, Any]


class IPRoute:
    """Requests in the network namespace that the calling thread is in at construction. For one thread.

    Every method raises ``NetlinkError`` if the kernel refuses.
    """

    def __init__(self) -> None:
        # Here, because it takes 18 MB, which an agent without a network of its own does without.
        import pyroute2  # noqa: PLC0415

        self._refused = pyroute2.NetlinkError
        self._ip = pyroute2.IPRoute()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._ip.close()

    def find(self, name: str) -> Link | None:
        """The link of a name; None if there is none."""
        try:
            (found,) = self._run(f"look for {name}", self._ip.link, "get", ifname=name)
        except NetlinkError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        data = found.get(("linkinfo", "data"))
        return Link(
            index=found["index"],
            kind=found.get(("linkinfo", "kind")) or "",
            up=bool(found["flags"] & IFF_UP),
            mtu=found.get("mtu"),
            mac=bytes.fromhex((found.get("address") or "").replace(":", "")),
            group=found.get("group") or 0,
            data=dict(data["attrs"]) if data else {},
        )

    def add_link(self, name: str, kind: str, *, mac: bytes, mtu: int, group: int = 0, **data: Any) -> int:
        """Make a link, which is down; its index. ``data`` are attributes of its kind, as ``pyroute2`` names them."""
        self._run(f"make link {name}", self._ip.link, "add", ifname=name, kind=kind, address=mac.hex(":"), mtu=mtu,
             IFLA_GROUP=group, **data)  # fmt: skip
        return socket.if_nametoindex(name)

    def forbid_link_local(self, name: str, index: int, mtu: int) -> None:
        """Keep the kernel from giving a link an address of its own choice."""
        if has_ipv6(mtu):
            mode = {"attrs": [("IFLA_INET6_ADDR_GEN_MODE", IN6_ADDR_GEN_MODE_NONE)]}
            self._run(f"set up link {name}", self._ip.link, "set", index=index,
                 IFLA_AF_SPEC={"attrs": [("AF_INET6", mode)]})  # fmt: skip

    def raise_link(self, name: str, index: int, mtu: int) -> None:
        """Set a link's MTU and raise it."""
        self._run(f"raise link {name}", self._ip.link, "set", index=index, mtu=mtu, state="up")

    def remove_link(self, name: str, index: int) -> None:
        """Remove a link."""
        self._run(f"remove link {name}", self._ip.link, "del", index=index)

    def host_addresses(self, index: int) -> set[Address]:
        """The addresses of a link that have no network: /32 and /128."""
        listed = self._run("list addresses", self._ip.get_addr, index=index)
        found = ((parse_address(a.get("local") or a.get("address")), a["prefixlen"]) for a in listed)
        return {address for address, length in found if length == family_of(address).bits}

    def add_address(self, address: Address, index: int) -> None:
        """Give a link a host address that is usable at once; nothing if it has it."""
        flags = IFA_F_NOPREFIXROUTE | (IFA_F_NODAD if family_of(address) is Family.V6 else 0)
        with _tolerating(errno.EEXIST):
            self._run(f"add address {format_address(address)}", self._ip.addr, "add", IFA_FLAGS=flags,
                 **_host(address, index))  # fmt: skip

    def remove_address(self, address: Address, index: int) -> None:
        """Take a host address from a link."""
        self._run(f"remove address {format_address(address)}", self._ip.addr, "del", **_host(address, index))

    def add_unreachable(self, network: Network, protocol: int) -> None:
        """Make a network unreachable where no narrower route leads; nothing if another has made a route to it."""
        with _tolerating(errno.EEXIST):
            self._run(f"add route of {network}", self._ip.route, "add", **_unreachable(network, protocol))

    def remove_unreachable(self, network: Network, protocol: int) -> None:
        """Undo ``add_unreachable``."""
        self._run(f"remove route of {network}", self._ip.route, "del", **_unreachable(network, protocol))

    def remove_routes(self, protocol: int) -> int:
        """Remove all routes that carry a protocol number; how many there were."""
        removed = 0
        for family in (socket.AF_INET, socket.AF_INET6):
            for route in self._run("list routes", self._ip.get_routes, family=family, proto=protocol):
                network = f"{route.get('dst')}/{route['dst_len']}"
                with _tolerating(errno.ESRCH):
                    self._run(f"remove route of {network}", self._ip.route, "del", family=family, dst=network,
                              table=route.get("table"), scope=route["scope"], proto=protocol)  # fmt: skip
                removed += 1
        return removed

    def _run(self, step: str, request: Callable[..., Any], *arguments: object, **named: object) -> Any:
        try:
            return request(*arguments, **named)
        except self._refused as error:
            raise NetlinkError(step, error.code) from error


def has_ipv6(mtu: int) -> bool:
    """Whether a link has IPv6: not if the kernel's is off, or the MTU is below its least (RFC 8200, section 5)."""
    return mtu >= _LEAST_IPV6_MTU and Path("/proc/sys/net/ipv6").exists()


@contextlib.contextmanager
def _tolerating(number: int) -> Iterator[None]:
    try:
        yield
    except NetlinkError as error:
        if error.errno != number:
            raise


def _host(address: Address, index: int) -> dict[str, Any]:
    return {"index": index, "address": format_address(address), "prefixlen": family_of(address).bits}


def _unreachable(network: Network, protocol: int) -> dict[str, Any]:
    family = socket.AF_INET if network.family is Family.V4 else socket.AF_INET6
    return {"dst": str(network), "family": family, "type": "unreachable", "proto": protocol}
