"""The kernel against the executable reading of the API: random policies, real packets of every pair."""

from __future__ import annotations

import itertools
import json
import re
import selectors
import socket
import struct
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from enforcer.demo.lab import Lab
from enforcer.model.addresses import format_address, parse_address
from enforcer.model.objects import ContainerPort, Direction, IPBlock, NetworkPolicy, Peer, PolicyRule, Protocol
from enforcer.model.selectors import LabelSelector, Operator
from enforcer.policy.endpoints import Endpoint
from enforcer.policy.resolve import Cluster
from enforcer.policy.verdict import Connection, verdict
from tests.support import strategies

pytestmark = pytest.mark.netns
PODS = {"x/m": {"app": "a", "tier": "a"}, "x/n": {"app": "b"}, "y/m": {"app": "a"}, "y/n": {"tier": "b"}}
NAMESPACES = {"x": {"app": "a"}, "y": {"tier": "b"}}
LISTENED = (80, 81)
TCP, UDP, SCTP, ICMP = 6, 17, 132, 1
SILENCE_SECONDS = 0.25
Probe = tuple[str, str, int, int | None]
"""Source and destination address, protocol and port."""
_cookies = itertools.count()

policies = st.lists(strategies.policies.filter(lambda policy: policy.rejected is None), min_size=1, max_size=4)


def selector(of: LabelSelector) -> dict[str, Any]:
    return {
        "matchExpressions": [
            {"key": r.key, "operator": r.operator.value}
            | ({"values": list(r.values)} if r.operator in {Operator.IN, Operator.NOT_IN} else {})
            for r in of.requirements
        ]
    }


def peer(of: Peer) -> dict[str, Any]:
    if isinstance(of, IPBlock):
        return {"ipBlock": {"cidr": str(of.cidr), "except": [str(e) for e in of.excepts]}}
    spaces = {} if of.namespace_selector is None else {"namespaceSelector": selector(of.namespace_selector)}
    return {"podSelector": selector(of.pod_selector)} | spaces


def rule(of: PolicyRule, word: str) -> dict[str, Any]:
    ports = [
        {"protocol": p.protocol.name}
        | ({} if p.port is None else {"port": p.port})
        | ({} if p.end_port is None else {"endPort": p.end_port})
        for p in of.ports
    ]
    return {word: [peer(p) for p in of.peers], "ports": ports}


def manifest(of: NetworkPolicy) -> dict[str, Any]:
    spec: dict[str, Any] = {
        "podSelector": selector(of.pod_selector),
        "policyTypes": [direction.value.capitalize() for direction in of.rules],
    }
    for direction, word in ((Direction.INGRESS, "from"), (Direction.EGRESS, "to")):
        if direction in of.rules:
            spec[direction.value] = [rule(r, word) for r in of.rules[direction]]
    head = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy"}
    return head | {"metadata": {"name": of.name, "namespace": of.namespace}, "spec": spec}


def pod_manifest(key: str) -> dict[str, Any]:
    namespace, name = key.split("/")
    ports = [{"name": "web", "containerPort": 80 if namespace == "x" else 81}]
    return {"apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": namespace, "labels": PODS[key]},
            "spec": {"containers": [{"name": "c", "ports": ports}]}}  # fmt: skip


def write(path: Path, items: list[dict[str, Any]]) -> None:
    scratch = path.with_suffix(".tmp")
    scratch.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))
    scratch.rename(path)


def _socket(key: selectors.SelectorKey) -> socket.socket:
    assert isinstance(key.fileobj, socket.socket)
    return key.fileobj


@dataclass
class Receivers:
    """What waits in each pod for datagrams: a socket a port for UDP, raw ones for what has no sockets here."""

    waiting: selectors.DefaultSelector

    @classmethod
    def open(cls, lab: Lab, stack: ExitStack) -> Receivers:
        waiting = stack.enter_context(selectors.DefaultSelector())
        for key, pod in lab.pods.items():
            with lab.inside(pod.descriptor):
                made: list[tuple[socket.socket, int, int | None]] = []
                for port in LISTENED:
                    made.append((socket.socket(socket.AF_INET6, socket.SOCK_DGRAM), UDP, port))
                    made[-1][0].bind(("::", port))
                for family in (socket.AF_INET, socket.AF_INET6):
                    made.append((socket.socket(family, socket.SOCK_RAW, SCTP), SCTP, None))
                    icmp = socket.IPPROTO_ICMP if family is socket.AF_INET else socket.IPPROTO_ICMPV6
                    made.append((socket.socket(family, socket.SOCK_RAW, icmp), ICMP, None))
            for receiver, protocol, number in made:
                stack.callback(receiver.close)
                receiver.setblocking(False)
                waiting.register(receiver, selectors.EVENT_READ, (key, protocol, number))
        return cls(waiting)

    def drain(self) -> list[bytes]:
        """All that has come, until nothing comes any more."""
        found = []
        while ready := self.waiting.select(SILENCE_SECONDS):
            found += [_socket(key).recv(2048) for key, _ in ready]
        return found


def datagrams(lab: Lab, receivers: Receivers) -> set[Probe]:
    """The UDP, SCTP and ICMP probes that arrive, of every pair and port, sent at once."""
    sent: dict[bytes, Probe] = {}
    for source in lab.pods.values():
        for destination in lab.pods.values():
            for index, address in enumerate(destination.addresses if source is not destination else ()):
                family = (socket.AF_INET, socket.AF_INET6)[index]
                for protocol, port in ((UDP, 80), (UDP, 81), (SCTP, 80), (SCTP, 81), (ICMP, None)):
                    cookie = f"probe-{next(_cookies):010}".encode()
                    sent[cookie] = (source.addresses[index], address, protocol, port)
                    with lab.inside(source.descriptor):
                        send(family, protocol, (address, port or 0), cookie)
    arrived = receivers.drain()
    found = (re.search(rb"probe-\d{10}", data) for data in arrived)
    return {sent[match[0]] for match in found if match is not None and match[0] in sent}


def send(family: int, protocol: int, to: tuple[str, int], cookie: bytes) -> None:
    address, port = to
    match protocol:
        case 17:
            with socket.socket(family, socket.SOCK_DGRAM) as sender:
                sender.sendto(cookie, (address, port))
        case 132:
            # A common header and an INIT chunk (RFC 9260) with the cookie in its parameters.
            number = int(cookie[-10:])
            head = struct.pack("!HHI", 1024 + number % 60000, port, 0)
            chunk = struct.pack("!BBHIIHHI", 1, 0, 40, number, 1500, 1, 1, number)
            chunk += struct.pack("!HH", 0x8001, 20) + cookie
            # With a wrong checksum it would be INVALID to conntrack, and no connection.
            body = head + struct.pack("<I", crc32c(head + bytes(4) + chunk)) + chunk
            with socket.socket(family, socket.SOCK_RAW, SCTP) as sender:
                sender.sendto(body, (address, 0))
        case _:
            kind, number = (8, socket.IPPROTO_ICMP) if family == socket.AF_INET else (128, socket.IPPROTO_ICMPV6)
            head = struct.pack("!BBHHH", kind, 0, 0, int(cookie[-10:]) % 65536, 1)
            body = head[:2] + checksum(head + cookie).to_bytes(2, "big") + head[4:] + cookie
            with socket.socket(family, socket.SOCK_RAW, number) as sender:
                sender.sendto(body, (address, 0))


def crc32c(data: bytes) -> int:
    """The checksum of SCTP (RFC 9260, appendix A)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def checksum(data: bytes) -> int:
    total = sum(struct.unpack(f"!{len(data) // 2}H", data[: len(data) // 2 * 2]))
    total = (total & 0xFFFF) + (total >> 16)
    return int(~(total + (total >> 16)) & 0xFFFF)


@dataclass
class Flows:
    """UDP flows of every pair and port that go on while policies change: sockets of both ends by the client's probe."""

    ends: dict[Probe, tuple[socket.socket, socket.socket]]

    @classmethod
    def open(cls, lab: Lab, receivers: Receivers, stack: ExitStack) -> Flows:
        servers = {(key.data[0], key.data[2]): _socket(key) for key in receivers.waiting.get_map().values()
                   if key.data[1] == UDP}  # fmt: skip
        ends: dict[Probe, tuple[socket.socket, socket.socket]] = {}
        for source in lab.pods.values():
            for destination in lab.pods.values():
                for index, address in enumerate(destination.addresses if source is not destination else ()):
                    for port in LISTENED:
                        with lab.inside(source.descriptor):
                            client = socket.socket((socket.AF_INET, socket.AF_INET6)[index], socket.SOCK_DGRAM)
                        stack.callback(client.close)
                        client.setblocking(False)
                        client.connect((address, port))
                        receivers.waiting.register(client, selectors.EVENT_READ, (source.key, None, None))
                        ends[source.addresses[index], address, UDP, port] = client, servers[destination.key, port]
        return cls(ends)

    def passing(self, receivers: Receivers) -> dict[str, set[Probe]]:
        """The flows of which a datagram of the client, and of the server, arrives."""
        sent: dict[bytes, tuple[str, Probe]] = {}
        for probe, (client, server) in self.ends.items():
            for side in ("client", "server"):
                cookie = f"probe-{next(_cookies):010}".encode()
                sent[cookie] = side, probe
                if side == "client":
                    client.send(cookie)
                else:
                    address, port = client.getsockname()[:2]
                    server.sendto(cookie, (address if ":" in address else f"::ffff:{address}", port))
        passed: dict[str, set[Probe]] = {"client": set(), "server": set()}
        for data in receivers.drain():
            found = re.search(rb"probe-\d{10}", data)
            if found is not None and found[0] in sent:
                side, probe = sent[found[0]]
                passed[side].add(probe)
        return passed


def connections(lab: Lab) -> set[Probe]:
    """The TCP connections that are made, of every pair and port, tried at once."""
    made = set()
    with selectors.DefaultSelector() as waiting:
        for source in lab.pods.values():
            for destination in lab.pods.values():
                for index, address in enumerate(destination.addresses):
                    for port in LISTENED if source is not destination else ():
                        with lab.inside(source.descriptor):
                            family = socket.AF_INET6 if ":" in address else socket.AF_INET
                            probe = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
                        probe.connect_ex((address, port))
                        waiting.register(probe, selectors.EVENT_WRITE, (source.addresses[index], address, TCP, port))
        last = time.monotonic()
        while time.monotonic() - last < SILENCE_SECONDS and waiting.get_map():
            for ready, _ in waiting.select(SILENCE_SECONDS):
                last = time.monotonic()
                if _socket(ready).getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    made.add(ready.data)
                waiting.unregister(ready.fileobj)
                _socket(ready).close()
        for left in list(waiting.get_map().values()):
            _socket(left).close()
    return made


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "manifests"
    folder.mkdir()
    spaces = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": n, "labels": labels}}
        for n, labels in NAMESPACES.items()
    ]
    write(folder / "pods.json", spaces + [pod_manifest(key) for key in PODS])
    return folder


def test_the_kernel_decides_as_the_api_reads(lab: Lab, source: Path) -> None:
    for key in PODS:
        pod = lab.add_pod(key)
        for port in LISTENED:
            lab.listen(pod, port)
    endpoints = {
        key: Endpoint(
            key,
            key[0],
            tuple(map(parse_address, lab.pods[key].addresses)),
            local=True,
            labels=PODS[key],
            ports=(ContainerPort("web", Protocol.TCP, 80 if key[0] == "x" else 81),),
        )
        for key in PODS
    }
    with ExitStack() as stack:
        receivers = Receivers.open(lab, stack)
        # Without policies every probe arrives, so one that is missing later was denied.
        flows = [(TCP, 80), (TCP, 81), (UDP, 80), (UDP, 81), (SCTP, 80), (SCTP, 81), (ICMP, None)]
        everything = len(PODS) * (len(PODS) - 1) * 2 * len(flows)
        assert any(len(connections(lab) | datagrams(lab, receivers)) == everything for _ in range(10))
        going = Flows.open(lab, receivers, stack)
        everywhere = set(going.ends)
        assert any(going.passing(receivers) == {"client": everywhere, "server": everywhere} for _ in range(10))
        addresses = [[endpoint.addresses[family] for endpoint in endpoints.values()] for family in (0, 1)]

        @settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
        @given(policies)
        def decides(found: list[NetworkPolicy]) -> None:
            of_key = {policy.key: policy for policy in found}
            write(source / "policies.json", [manifest(policy) for policy in of_key.values()])
            status = lab.status()
            assert status["synced"]
            assert status["rejected"] == []
            cluster = Cluster(NAMESPACES, endpoints, of_key)
            expected = {
                (format_address(source), format_address(destination), protocol, port)
                for of_family in addresses
                for source in of_family
                for destination in of_family
                for protocol, port in flows
                if source != destination
                and all(d.allowed for d in verdict(cluster, Connection(source, destination, protocol, port)))
            }
            assert connections(lab) | datagrams(lab, receivers) == expected
            # What was begun before this policy, and maybe judged by others in between, is judged by this one.
            still = everywhere & expected
            assert going.passing(receivers) == {"client": still, "server": still}

        decides()
