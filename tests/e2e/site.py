"""Several nodes, each with its agent, on segments that a router joins; all in namespaces that go with the test."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import socket
import subprocess
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from enforcer.demo.lab import Lab, Pod
from tests.api.processes import run, wait_until
from tests.e2e.conftest import EXECUTABLE, put

_numbers = itertools.count()
SECONDS = 10.0


def ip(namespace: str, *commands: str) -> str:
    """Run commands of ip(8) in a namespace and return what they print."""
    return run("ip", "-n", namespace, "-batch", "-", stdin="".join(f"{command}\n" for command in commands))


@dataclass
class Place:
    """Where a node is, and what its Node object says; both may change.

    ``host`` is its number on the segment ``segment``; ``families`` are those of its own addresses.
    """

    segment: int
    host: int
    families: tuple[int, ...] = (4, 6)
    pods: int = 0
    created: str = ""

    @property
    def addresses(self) -> list[str]:
        return [
            {4: f"10.8.{self.segment}.{self.host}", 6: f"fd08:{self.segment}::{self.host}"}[f] for f in self.families
        ]

    @property
    def cidrs(self) -> list[str]:
        return [f"10.244.{self.pods}.0/24", f"fd44:{self.pods}::/64"]


class NodeLab(Lab):
    """A node that is wired to its segment before its agent starts."""

    wire: Callable[[str], None]

    def start_agent(self) -> None:
        if "eth0" not in ip(self.name, "link show"):
            self.wire(self.name)
        super().start_agent()


@dataclass
class Site:
    """The nodes by name; a context manager. ``config`` is each agent's configuration."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._open = contextlib.ExitStack()
        self._name = f"dbtest-{os.getpid()}-site{next(_numbers)}"
        self.router = f"{self._name}-router"
        self.places: dict[str, Place] = {}
        self.labs: dict[str, NodeLab] = {}
        self._pods: dict[str, dict[str, Any]] = {}
        self.manifests = self.folder / "manifests"

    def __enter__(self) -> Site:
        self.manifests.mkdir()
        run("ip", "netns", "add", self.router)
        self._open.callback(run, "ip", "netns", "del", self.router)
        ip(self.router, "link set lo up")
        run("ip", "netns", "exec", self.router, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        run("ip", "netns", "exec", self.router, "sysctl", "-qw", "net.ipv6.conf.all.forwarding=1")
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def name(self, short: str) -> str:
        return f"{self._name}-{short}"

    def add(self, short: str, place: Place, **config: Any) -> NodeLab:
        """Add a node: its object, then its machine. ``short`` is what its name ends with."""
        name, place.pods = self.name(short), place.pods or len(self.places) + 1
        self.places[short] = place
        self.publish()
        path = self.folder / f"{short}.yaml"
        path.write_text(json.dumps(self.config | config))
        lab = NodeLab(name=name, source=("--source", self.manifests), run_dir=self.folder / short, config=path,
                      executable=EXECUTABLE, pod_cidrs=())  # fmt: skip
        lab.wire = lambda _: self._wire(short)
        self.labs[short] = self._open.enter_context(lab)
        return lab

    def publish(self, **extra: dict[str, Any]) -> None:
        """Write the Node objects as the places are now, and further ones."""
        items = [{"apiVersion": "v1", "kind": "Node",
                  "metadata": {"name": self.name(short)} | ({"creationTimestamp": p.created} if p.created else {}),
                  "spec": {"podCIDRs": p.cidrs},
                  "status": {"addresses": [{"type": "InternalIP", "address": a} for a in p.addresses]}}
                 for short, p in self.places.items()]  # fmt: skip
        items += extra.values()
        put(self.manifests / "nodes.json", json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))

    def settle(self) -> None:
        """Return when each agent has taken in what the manifests say."""
        for lab in self.labs.values():
            assert lab.status()["synced"]

    def readdress(self, short: str, place: Place) -> None:
        """Move a node to another place, with its object."""
        place.pods = self.places[short].pods
        ip(self.name(short), "link del eth0")
        self.places[short] = place
        self._wire(short)
        self.publish()

    def add_pod(self, short: str, name: str, **labels: str) -> Pod:
        """Attach a pod to a node, and have its object say where it is."""
        lab, key = self.labs[short], f"x/{name}"
        self._pods[name] = {"apiVersion": "v1", "kind": "Pod",
                            "metadata": {"name": name, "namespace": "x", "labels": {"app": name} | labels},
                            "spec": {"nodeName": lab.name, "containers": [{"name": "c"}]}}  # fmt: skip
        self._put_pods()
        pod = lab.add_pod(key)
        self._pods[name]["status"] = {"podIPs": [{"ip": address} for address in pod.addresses]}
        self._put_pods()
        return pod

    def _put_pods(self) -> None:
        namespace = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}}
        items = [namespace, *self._pods.values()]
        put(self.manifests / "pods.json", json.dumps({"apiVersion": "v1", "kind": "List", "items": items}))

    def _wire(self, short: str) -> None:
        place, name = self.places[short], self.name(short)
        bridge, port = f"seg{place.segment}", f"p-{short}"
        if bridge not in ip(self.router, "link show"):
            ip(self.router, f"link add {bridge} type bridge", f"link set {bridge} up",
               f"addr add 10.8.{place.segment}.254/24 dev {bridge}",
               f"addr add fd08:{place.segment}::fe/64 dev {bridge} nodad")  # fmt: skip
        ip(self.router, f"link add {port} type veth peer name eth0 netns {name}", f"link set {port} master {bridge} up")
        ip(name, "link set lo up", "link set eth0 up")
        for family, address in zip(place.families, place.addresses, strict=True):
            gateway = {4: f"10.8.{place.segment}.254", 6: f"fd08:{place.segment}::fe"}[family]
            length = {4: "24", 6: "64 nodad"}[family]
            ip(name, f"addr add {address}/{length} dev eth0", f"route add default via {gateway}")

    def inside(self, short: str, *words: str) -> str:
        """Run a program in a node and return what it prints."""
        return run("ip", "netns", "exec", self.name(short), *words)

    def log(self, short: str) -> str:
        """The log of a node's agent."""
        return (self.labs[short].run_dir / "agent.log").read_text()

    def shown(self, short: str, *words: str) -> str:
        """What ip(8) prints in a node."""
        return run("ip", "-n", self.name(short), *words)

    def until(self, condition: Callable[[], bool], what: str) -> None:
        wait_until(condition, what, seconds=SECONDS)


def reaches(lab: Lab, source: Pod, target: Pod, port: int, *, seconds: float = SECONDS) -> list[bool]:
    """Whether a pod connects to each address of another."""
    return [lab.connects(source, address, port, seconds=seconds) for address in target.addresses]


def seen_from(lab: Lab, source: Pod, target: Pod, address: str) -> str:
    """The address by which a pod sees another connect."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with lab.inside(target.descriptor):
        server = socket.create_server((address, 9997), family=family)
    with server:
        server.settimeout(SECONDS)
        assert lab.connects(source, address, 9997, seconds=SECONDS)
        accepted, peer = server.accept()
        accepted.close()
        return str(peer[0])


def transferred(lab: Lab, sender: Pod, receiver: Pod, address: str, amount: int) -> int:
    """Send bytes over TCP from pod to pod; how many have come within the time."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with lab.inside(receiver.descriptor):
        server = socket.create_server((address, 9999), family=family)
    with lab.inside(sender.descriptor):
        client = socket.socket(family, socket.SOCK_STREAM)
    with server, client:
        for end in (server, client):
            end.settimeout(SECONDS)
        client.connect((address, 9999))
        accepted, _ = server.accept()
        with accepted:
            accepted.settimeout(SECONDS)

            def send() -> None:
                with contextlib.suppress(OSError):
                    client.sendall(bytes(amount))
                    client.shutdown(socket.SHUT_WR)

            thread = threading.Thread(target=send)
            thread.start()
            came = 0
            with contextlib.suppress(TimeoutError):
                while data := accepted.recv(1 << 18):
                    came += len(data)
            thread.join()
            return came


def datagram_arrives(lab: Lab, sender: Pod, receiver: Pod, address: str, size: int) -> bool:
    """Whether an IP packet of a size, not to be fragmented on the way, comes from pod to pod."""
    six = ":" in address
    family, head = (socket.AF_INET6, 48) if six else (socket.AF_INET, 28)
    with lab.inside(receiver.descriptor):
        there = socket.socket(family, socket.SOCK_DGRAM)
    with lab.inside(sender.descriptor):
        here = socket.socket(family, socket.SOCK_DGRAM)
    with there, here:
        there.bind((address, 9998))
        there.settimeout(0.5)
        # IP_MTU_DISCOVER and IPV6_MTU_DISCOVER: DO, so that what is too large is refused and not fragmented.
        here.setsockopt(*((socket.IPPROTO_IPV6, 23, 2) if six else (socket.IPPROTO_IP, 10, 2)))
        try:
            here.sendto(bytes(size - head), (address, 9998))
            return len(there.recv(1 << 16)) == size - head
        except OSError:
            return False


def mtu_of(pod: Pod) -> int:
    shown = subprocess.run(["ip", "-n", pod.namespace, "-j", "link", "show", "eth0"], capture_output=True, check=True)
    return int(json.loads(shown.stdout)[0]["mtu"])
