"""The kernel against the executable reading of the API: random policies, real connections of every pair."""

from __future__ import annotations

import json
import selectors
import socket
import time
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
from enforcer.policy.verdict import Packet, verdict
from tests.policy import strategies

pytestmark = pytest.mark.netns
PODS = {"x/m": {"app": "a", "tier": "a"}, "x/n": {"app": "b"}, "y/m": {"app": "a"}, "y/n": {"tier": "b"}}
NAMESPACES = {"x": {"app": "a"}, "y": {"tier": "b"}}
LISTENED = (80, 81)
SILENCE_SECONDS = 0.25

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


def connected(lab: Lab) -> set[tuple[str, str, int]]:
    """Source and destination address and port of all connections that are made, tried at once."""
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
                        waiting.register(probe, selectors.EVENT_WRITE, (source.addresses[index], address, port))
        last = time.monotonic()
        while time.monotonic() - last < SILENCE_SECONDS and waiting.get_map():
            for ready, _ in waiting.select(SILENCE_SECONDS):
                last = time.monotonic()
                if ready.fileobj.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                    made.add(ready.data)
                waiting.unregister(ready.fileobj)
                ready.fileobj.close()
        for left in list(waiting.get_map().values()):
            left.fileobj.close()
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
    # Without policies every pair connects, so a connection that is missing later was denied.
    everything = len(PODS) * (len(PODS) - 1) * len(LISTENED) * 2
    assert any(len(connected(lab)) == everything for _ in range(10))
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
            (format_address(source), format_address(destination), port)
            for of_family in addresses
            for source in of_family
            for destination in of_family
            for port in LISTENED
            if source != destination
            and all(d.allowed for d in verdict(cluster, Packet(source, destination, Protocol.TCP.number, port)))
        }
        assert connected(lab) == expected

    decides()
