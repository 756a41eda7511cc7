"""The node's links and addresses by pyroute2, in network namespaces of the test."""

from __future__ import annotations

import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni import netns
from cni.netlink.rtnetlink import NetlinkError
from cni.node.bridge import BRIDGE, Bridge, remove_all
from cni.node.iproute import IPRoute
from enforcer.model.addresses import Network, parse_address

pytestmark = pytest.mark.netns

V4, V6 = Network.parse("10.0.0.0/24"), Network.parse("fd00::/64")


@pytest.fixture
def node() -> Iterator[str]:
    """A network namespace in which the test runs."""
    name = f"dbtest-{os.getpid()}-iproute"
    subprocess.run(["ip", "netns", "add", name], check=True)
    home = netns.open_own()
    try:
        with Path("/run/netns", name).open("rb") as file, netns.visit(file.fileno(), home=home):
            yield name
    finally:
        os.close(home)
        subprocess.run(["ip", "netns", "del", name], check=True)


def test_what_was_made_is_found_and_made_again_without_an_error(node: str) -> None:
    with IPRoute() as ip:
        index = ip.add_link("t0", "vxlan", mac=bytes.fromhex("0a0000000001"), mtu=1400, group=84, vxlan_id=7,
                            vxlan_port=4789, vxlan_local="192.0.2.1", vxlan_learning=False)  # fmt: skip
        ip.raise_link("t0", index, 1390)
        found = ip.find("t0")
        assert found is not None
        assert (found.index, found.kind, found.up, found.mtu, found.group) == (index, "vxlan", True, 1390, 84)
        assert (found.mac.hex(), found.data["IFLA_VXLAN_PORT"]) == ("0a0000000001", 4789)
        for _ in range(2):
            ip.add_address(parse_address("10.0.0.1"), index)
            ip.add_address(parse_address("fd00::1"), index)
        assert ip.host_addresses(index) == {parse_address("10.0.0.1"), parse_address("fd00::1")}
        ip.remove_link("t0", index)
        assert ip.find("t0") is None


def test_all_routes_of_a_protocol_go_and_no_others(node: str) -> None:
    def run(command: str) -> str:
        return subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout

    with IPRoute() as ip:
        index = ip.add_link("b0", "bridge", mac=bytes.fromhex("0a0000000001"), mtu=1500)
        ip.raise_link("b0", index, 1500)
        for command in (
            "ip addr add 192.0.2.1/24 dev b0",
            "ip -6 addr add fd01::1/64 dev b0 nodad",
            "ip route add unreachable 10.0.0.0/24 proto 84",
            "ip route add 10.1.0.0/24 via 192.0.2.9 proto 84",
            "ip route add 10.2.0.0/24 dev b0 proto 84 table 100",
            "ip route add 10.3.0.0/24 dev b0 proto 4",
            "ip -6 route add unreachable fd02::/64 proto 84",
            "ip -6 route add fd03::/64 via fd01::9 proto 84",
        ):
            run(command)
        assert ip.remove_routes(84) == 5
        assert ip.remove_routes(84) == 0
    assert run("ip route show table all proto 84") + run("ip -6 route show table all proto 84") == ""
    assert "10.3.0.0/24" in run("ip route show proto 4")


def test_a_refusal_names_the_step_and_has_the_kernels_number(node: str) -> None:
    with IPRoute() as ip, pytest.raises(NetlinkError, match="remove link gone") as refused:
        ip.remove_link("gone", 4711)
    assert (refused.value.step, refused.value.errno) == ("remove link gone", errno.ENODEV)


def test_a_node_is_set_up_and_cleared_again_and_again_without_leaving_a_descriptor_or_a_thread(node: str) -> None:
    def cycle() -> tuple[int, int]:
        bridge = Bridge()
        bridge.start((V4, V6))
        bridge.set_networks((V4,))
        with IPRoute() as ip:
            assert ip.host_addresses(bridge.bridge_index) >= {parse_address("10.0.0.1")}
        assert f"link {BRIDGE}" in remove_all()
        return len(os.listdir("/proc/self/fd")), threading.active_count()  # noqa: PTH208 - a number, not paths

    before = cycle()
    assert [cycle() for _ in range(5)] == [before] * 5
