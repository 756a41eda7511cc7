"""Every message payload that cni.netlink packs, as pyroute2 decodes it."""

from __future__ import annotations

import inspect
import socket
import struct
from typing import Any

import pytest
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.ndmsg import ndmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from cni.netlink import rtnetlink

MAC, MAC_TEXT = bytes.fromhex("0a0000000001"), "0a:00:00:00:00:01"
V4, V6 = socket.inet_aton("10.0.0.1"), socket.inet_pton(socket.AF_INET6, "fd00::1")
HELPERS = {"attribute", "nested", "text", "u8", "u32"}
"""They pack attributes, which the payloads consist of."""

CASES: list[tuple[str, bytes, type, dict[str, Any], dict[str, Any]]] = [
    (
        "link",
        rtnetlink.link(
            rtnetlink.text(rtnetlink.Ifla.IFNAME, "p0"), rtnetlink.u32(rtnetlink.Ifla.MTU, 1400), index=7, up=True
        ),
        ifinfmsg,
        {"family": 0, "index": 7, "flags": 1, "change": 1},
        {"IFLA_IFNAME": "p0", "IFLA_MTU": 1400},
    ),
    (
        "address",
        rtnetlink.address(V4, index=7),
        ifaddrmsg,
        {"family": socket.AF_INET, "prefixlen": 32, "index": 7, "scope": 0},
        {"IFA_LOCAL": "10.0.0.1", "IFA_ADDRESS": "10.0.0.1", "IFA_FLAGS": 0x200},
    ),
    (
        "address",
        rtnetlink.address(V6, index=7),
        ifaddrmsg,
        {"family": socket.AF_INET6, "prefixlen": 128, "index": 7},
        {"IFA_LOCAL": "fd00::1", "IFA_ADDRESS": "fd00::1", "IFA_FLAGS": 0x202},
    ),
    (
        "Route",
        rtnetlink.Route(V4, 24, 84).payload(),
        rtmsg,
        {"family": socket.AF_INET, "dst_len": 24, "table": 254, "proto": 84, "scope": 0, "type": 7, "flags": 0},
        {"RTA_DST": "10.0.0.1"},
    ),
    (
        "Route",
        rtnetlink.Route(V6, 64, 84, index=7, gateway=V6).payload(),
        rtmsg,
        {"family": socket.AF_INET6, "dst_len": 64, "proto": 84, "scope": 0, "type": 1, "flags": 4},
        {"RTA_DST": "fd00::1", "RTA_GATEWAY": "fd00::1", "RTA_OIF": 7},
    ),
    (
        "neighbour",
        rtnetlink.neighbour(V4, MAC, index=7),
        ndmsg,
        {"family": socket.AF_INET, "ifindex": 7, "state": 0x80, "flags": 0},
        {"NDA_DST": "10.0.0.1", "NDA_LLADDR": MAC_TEXT},
    ),
    (
        "forwarding_entry",
        rtnetlink.forwarding_entry(MAC, index=7),
        ndmsg,
        {"family": socket.AF_BRIDGE, "ifindex": 7, "state": 0x40, "flags": 4},
        {"NDA_LLADDR": MAC_TEXT},
    ),
    (
        "tunnel_entry",
        rtnetlink.tunnel_entry(MAC, V4, index=7),
        ndmsg,
        {"family": socket.AF_BRIDGE, "ifindex": 7, "state": 0x80, "flags": 2},
        {"NDA_LLADDR": MAC_TEXT, "NDA_DST": "10.0.0.1"},
    ),
]


NESTED: list[tuple[str, bytes, dict[tuple[str, ...], Any]]] = [
    (
        "veth",
        rtnetlink.veth("dbr1", mtu=1400, bridge=3, peer="eth0", mac=MAC, peer_netns=9),
        {
            ("ifname",): "dbr1",
            ("mtu",): 1400,
            ("master",): 3,
            ("linkinfo", "kind"): "veth",
            ("linkinfo", "data", "VETH_INFO_PEER", "ifname"): "eth0",
            ("linkinfo", "data", "VETH_INFO_PEER", "mtu"): 1400,
            ("linkinfo", "data", "VETH_INFO_PEER", "address"): MAC_TEXT,
            ("linkinfo", "data", "VETH_INFO_PEER", "net_ns_fd"): 9,
        },
    ),
    (
        "isolated_port",
        rtnetlink.isolated_port(index=7),
        {
            ("index",): 7,
            ("linkinfo", "slave_kind"): "bridge",
            ("linkinfo", "slave_data", "isolated"): 1,
            ("linkinfo", "slave_data", "learning"): 0,
            ("linkinfo", "slave_data", "unicast_flood"): 0,
            ("linkinfo", "slave_data", "mcast_flood"): 0,
            ("linkinfo", "slave_data", "bcast_flood"): 0,
        },
    ),
    (
        "no_link_local",
        rtnetlink.no_link_local(index=7),
        {("index",): 7, ("af_spec", "af_inet6", "inet6_addr_gen_mode"): 1},
    ),
]


def decoded(decoder: type, payload: bytes) -> Any:
    message = decoder(struct.pack("=IHHII", len(payload) + 16, 0, 0, 0, 0) + payload)
    message.decode()
    return message


@pytest.mark.parametrize(("name", "payload", "values"), NESTED)
def test_pyroute2_decodes_what_is_nested(name: str, payload: bytes, values: dict[tuple[str, ...], Any]) -> None:
    message = decoded(ifinfmsg, payload)
    assert {path: message.get(path) if len(path) > 1 else message.get(path[0]) for path in values} == values, name


@pytest.mark.parametrize(("name", "payload", "decoder", "fields", "attributes"), CASES)
def test_pyroute2_decodes_what_is_packed(
    name: str, payload: bytes, decoder: type, fields: dict[str, Any], attributes: dict[str, Any]
) -> None:
    message = decoded(decoder, payload)
    assert {field: message[field] for field in fields} == fields, name
    assert dict(message["attrs"]) == attributes, name


def test_every_packing_function_has_a_case() -> None:
    packing = {
        name
        for name, function in inspect.getmembers(rtnetlink, inspect.isfunction)
        if not name.startswith("_") and inspect.signature(function).return_annotation == "bytes"
    }
    assert packing - HELPERS | {"Route"} == {name for name, *_ in (*CASES, *NESTED)}
