"""Frames that a pod must not send, by raw sockets: the guard drops each, and lets pass what is the pod's own."""

from __future__ import annotations

import re
import socket
import struct
from collections.abc import Callable

import pytest

from cni.node.bridge import BRIDGE_MAC
from cni.plugin.links import default_mac
from enforcer.demo.lab import Lab, Pod

pytestmark = pytest.mark.netns
GATEWAY, STRANGER = "10.99.0.1", "10.99.0.200"
FOREIGN_MAC = bytes.fromhex("0a0000000099")


def ethernet(source: bytes, kind: int, payload: bytes) -> bytes:
    return BRIDGE_MAC + source + struct.pack("!H", kind) + payload


def arp(hardware: bytes, sender: str) -> bytes:
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    return head + hardware + socket.inet_aton(sender) + bytes(6) + socket.inet_aton(GATEWAY)


def ipv4(source: str, destination: str = GATEWAY) -> bytes:
    body = struct.pack("!HHHH", 1000, 9, 8, 0)
    head = struct.pack(
        "!BBHHHBBH4s4s", 0x45, 0, 28, 1, 0, 64, 17, 0, socket.inet_aton(source), socket.inet_aton(destination)
    )
    total = sum(struct.unpack("!10H", head))
    total = (total & 0xFFFF) + (total >> 16)
    return head[:10] + struct.pack("!H", ~(total + (total >> 16)) & 0xFFFF) + head[12:] + body


def ipv6(source: str, *, next_header: int = 59, payload: bytes = b"") -> bytes:
    ends = socket.inet_pton(socket.AF_INET6, source) + socket.inet_pton(socket.AF_INET6, "fd99::1")
    return struct.pack("!IHBB", 6 << 28, len(payload), next_header, 255) + ends + payload


def icmpv6(kind: int) -> bytes:
    return struct.pack("!BBHI", kind, 0, 0, 0) + socket.inet_pton(socket.AF_INET6, "fd99::200")


Frame = Callable[[bytes, Pod], bytes]
FORGED: dict[str, Frame] = {
    "a foreign hardware address": lambda _, pod: ethernet(FOREIGN_MAC, 0x0800, ipv4(pod.addresses[0])),
    "a foreign IPv4 address": lambda mac, _: ethernet(mac, 0x0800, ipv4(STRANGER)),
    "a foreign IPv6 address": lambda mac, _: ethernet(mac, 0x86DD, ipv6("fd99::200")),
    "the loopback of the node": lambda mac, pod: ethernet(mac, 0x0800, ipv4(pod.addresses[0], "127.0.0.1")),
    "an ARP sender that is another": lambda mac, _: ethernet(mac, 0x0806, arp(mac, STRANGER)),
    "an ARP hardware address that is another": lambda mac, pod: ethernet(
        mac, 0x0806, arp(FOREIGN_MAC, pod.addresses[0])
    ),
    "an ARP frame from another hardware address": lambda mac, pod: ethernet(
        FOREIGN_MAC, 0x0806, arp(mac, pod.addresses[0])
    ),
    "an unsolicited neighbour advertisement": lambda mac, pod: ethernet(
        mac, 0x86DD, ipv6(pod.addresses[1], next_header=58, payload=icmpv6(136))
    ),
    "a router advertisement": lambda mac, pod: ethernet(
        mac, 0x86DD, ipv6(pod.addresses[1], next_header=58, payload=icmpv6(134))
    ),
    "a VLAN tag": lambda mac, pod: ethernet(mac, 0x8100, struct.pack("!HH", 5, 0x0800) + ipv4(pod.addresses[0])),
    "a priority tag": lambda mac, pod: ethernet(mac, 0x8100, struct.pack("!HH", 0, 0x0800) + ipv4(pod.addresses[0])),
    "a service tag": lambda mac, pod: ethernet(mac, 0x88A8, struct.pack("!HH", 5, 0x0800) + ipv4(pod.addresses[0])),
    "another ether type": lambda mac, _: ethernet(mac, 0x88CC, bytes(46)),
}  # fmt: skip
OWN: dict[str, Frame] = {
    "IPv4": lambda mac, pod: ethernet(mac, 0x0800, ipv4(pod.addresses[0])),
    "IPv6": lambda mac, pod: ethernet(mac, 0x86DD, ipv6(pod.addresses[1])),
    "ARP": lambda mac, pod: ethernet(mac, 0x0806, arp(mac, pod.addresses[0])),
}


def forged(lab: Lab) -> int:
    listed = lab.nft("list", "counter", "bridge", "drawbridge", "denied/forged")
    found = re.search(r"packets (\d+)", listed)
    assert found is not None
    return int(found[1])


def received(bridge: socket.socket) -> bytes:
    """The next frame that came in; the node's own answers are seen, too."""
    while True:
        frame, (_, _, kind, _, _) = bridge.recvfrom(2048)
        if kind != socket.PACKET_OUTGOING:
            return frame


def test_each_forged_frame_is_dropped_and_counted_and_each_own_one_arrives(lab: Lab) -> None:
    pod = lab.add_pod("x/web")
    mac = default_mac(pod.namespace, "eth0")
    with lab.inside(lab.descriptor):
        bridge = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
        bridge.bind(("drawbridge0", 3))
        bridge.settimeout(2)
    with lab.inside(pod.descriptor):
        sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        sender.bind(("eth0", 0))
    with bridge, sender:
        for name, frame in FORGED.items():
            before = forged(lab)
            sender.send(frame(mac, pod))
            # The pod's own kernel may add to it: it reports multicast groups without an address.
            assert forged(lab) > before, name
        for name, frame in OWN.items():
            sent = frame(mac, pod)
            sender.send(sent)
            # Had a forged one passed, it would be the first here.
            assert received(bridge)[: len(sent)] == sent, name
