"""The tunnel between nodes: what its links and the rules for its packets must agree on."""

from __future__ import annotations

from dataclasses import dataclass

from enforcer.model.addresses import Family

LINK_PREFIX = "drawbridge-vx"
LINKS = {Family.V4: f"{LINK_PREFIX}4", Family.V6: f"{LINK_PREFIX}6"}
"""The VXLAN link of each family of the nodes' own addresses: a link of the kernel speaks one of them only."""
LINK_GROUP = 84
"""Marks our VXLAN links (``ip link show group 84``); one of our name in another group is another's."""
OVERHEAD = {Family.V4: 50, Family.V6: 70}
"""What the tunnel adds to a packet, bytes: Ethernet, VXLAN, UDP and IP header (RFC 7348, section 5)."""


@dataclass(frozen=True, slots=True)
class Vxlan:
    """The network identifier and the UDP port; the same on every node."""

    id: int
    port: int
