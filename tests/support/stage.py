"""A node with pods, a host outside of the cluster, and manifests that allow and forbid connections between them.

The ports ``CUT`` are those of connections that a change of policy forbids, the ports ``KEPT`` those of connections that
every policy here allows between the same ends.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from enforcer.demo.lab import NETNS, Lab, Pod
from tests.api.processes import run
from tests.e2e.conftest import EXECUTABLE, put
from tests.support import conntrack
from tests.support.connect import Connector
from tests.support.flow import FAMILIES, Flow, Kind
from tests.support.watch import CUT, Watch, nft

KEPT = range(20000, 30000)
NODE = ("10.99.0.1", "fd99::1")
OUTSIDE = ("192.0.2.9", "fd08::9")
SERVICE = ("10.96.0.1", "fd96::1")
"""An address that leads to the database, to the port that was asked for; to 8080 if that was 80."""
TRANSLATED = {"service": SERVICE, "local": ("192.0.2.2", "fd08::2"), "cluster": ("192.0.2.3", "fd08::3")}
"""What else leads to the database: a Service, and NodePorts of either external traffic policy."""

Manifest = dict[str, Any]
_numbers = itertools.count()

_TRANSLATION = """
table inet translation {{
	chain prerouting {{
		type nat hook prerouting priority dstnat;
		ip daddr 10.96.0.1 tcp dport 80 dnat ip to {db4}:8080
		ip6 daddr fd96::1 tcp dport 80 dnat ip6 to [{db6}]:8080
		ip daddr {{ 10.96.0.1, 192.0.2.2, 192.0.2.3 }} dnat ip to {db4}
		ip6 daddr {{ fd96::1, fd08::2, fd08::3 }} dnat ip6 to {db6}
	}}
	chain postrouting {{
		type nat hook postrouting priority srcnat;
		ct original ip daddr 192.0.2.3 masquerade
		ct original ip6 daddr fd08::3 masquerade
		ct original ip daddr 10.96.0.1 ct original ip saddr {db4} masquerade
		ct original ip6 daddr fd96::1 ct original ip6 saddr {db6} masquerade
	}}
}}
"""


def port_list(of: range) -> list[Manifest]:
    """A rule's ports: a range, of TCP and of UDP."""
    return [{"protocol": name, "port": of.start, "endPort": of.stop - 1} for name in ("TCP", "UDP")]


def blocks(addresses: Iterable[str]) -> list[Manifest]:
    """A peer for each of some addresses."""
    return [{"ipBlock": {"cidr": f"{address}/{128 if ':' in address else 32}"}} for address in addresses]


def pods(app: str, **namespace: str) -> Manifest:
    """The peer: pods with a label in namespaces with a label."""
    return {"podSelector": {"matchLabels": {"app": app}}, "namespaceSelector": {"matchLabels": namespace}}


WEB, DB = pods("web", team="a"), pods("db", team="b")


def policy(
    key: str,
    selected: Manifest,
    *,
    ingress: list[Manifest] | None = None,
    egress: list[Manifest] | None = None,
    ports: range = CUT,
) -> Manifest:
    """A policy, by namespace and name, that allows some ports to peers, and the ports ``KEPT`` to all."""
    namespace, name = key.split("/")
    spec: Manifest = {"podSelector": {"matchLabels": selected}, "policyTypes": []}
    for word, peer_word, peers in (("ingress", "from", ingress), ("egress", "to", egress)):
        if peers is not None:
            allowed = [{peer_word: peers, "ports": port_list(ports)}] if peers else []
            spec[word] = [*allowed, {"ports": port_list(KEPT)}]
            spec["policyTypes"].append(word.capitalize())
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": name, "namespace": namespace}, "spec": spec}  # fmt: skip


def namespace(name: str, **labels: str) -> Manifest:
    """A namespace."""
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


def pod(key: str, *addresses: str, node: str = "", **labels: str) -> Manifest:
    """A pod, by namespace and name; of the node that asks where no node is named."""
    of, name = key.split("/")
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": of, "labels": labels},
            "spec": {"containers": [{"name": "c"}]} | ({"nodeName": node} if node else {}),
            "status": {"podIPs": [{"ip": address} for address in addresses]}}  # fmt: skip


def world(
    *policies: Manifest, web: str = "web", db: str = "db", tier: str = "open", team: str = "a", far: str = ""
) -> list[Manifest]:
    """All objects: x/db and y/web, with labels that may be others; in either namespace former and later, to take turns.

    ``far`` is the label ``app`` of the pod of another node that has the addresses ``OUTSIDE``; none has if it is empty.
    """
    remote = [pod(f"y/far-{far}", *OUTSIDE, node="elsewhere", app=far)] if far else []
    return [namespace("x", team="b"), namespace("y", team=team),
            pod("x/db", app=db, tier=tier), pod("x/former", app="db"), pod("x/later", app="other"),
            pod("y/web", app=web), pod("y/former", app="web"), pod("y/later", app="other"),
            *remote, *policies]  # fmt: skip


def write(folder: Path, objects: Sequence[Manifest]) -> None:
    """Have a directory source hold objects."""
    put(folder / "world.json", json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def attach(lab: Lab, key: str, *addresses: str) -> Pod:
    """Attach a pod, or attach it anew; with addresses of the caller's choice if there are any."""
    made = lab.pods.get(key) or lab.add_pod(key)
    detach(lab, key)
    config = {"runtimeConfig": {"ips": [f"{a}/{64 if ':' in a else 24}" for a in addresses]}} if addresses else {}
    done = lab.cni("ADD", key, config=config)
    assert done.returncode == 0, done.stdout
    made.addresses = [ip["address"].partition("/")[0] for ip in json.loads(done.stdout)["ips"]]
    return made


def detach(lab: Lab, key: str) -> None:
    """Detach a pod; its namespace stays."""
    assert lab.cni("DEL", key).returncode == 0


class Stage:
    """The node, its agent, and the ends of connections by name; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.source = folder / "manifests"
        self.source.mkdir()
        self._open = contextlib.ExitStack()
        self._name = f"dbtest-{os.getpid()}-stage{next(_numbers)}"
        self._ports = {CUT: itertools.count(CUT.start), KEPT: itertools.count(KEPT.start)}
        self.lab = Lab(name=self._name, source=("--source", self.source), run_dir=folder / "run",
                       executable=EXECUTABLE, pod_cidrs=("10.99.0.0/24", "fd99::/64"))  # fmt: skip
        self.ends: dict[str, Pod] = {}

    def __enter__(self) -> Self:
        try:
            write(self.source, world())
            self._open.enter_context(self.lab)
            self.watch = self._open.enter_context(Watch(self.lab))
            self.ends = {"db": self.lab.add_pod("x/db"), "web": self.lab.add_pod("y/web"),
                         "node": Pod("node", self.lab.name, self.lab.descriptor, list(NODE)),
                         "outside": self._add_outside()}  # fmt: skip
            self._translate()
            self.lab.listen(self.ends["db"], 8080)
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def _add_outside(self) -> Pod:
        name = f"{self._name}-outside"
        run("ip", "netns", "add", name)
        self._open.callback(run, "ip", "netns", "del", name)
        descriptor = os.open(NETNS / name, os.O_RDONLY | os.O_CLOEXEC)
        self._open.callback(os.close, descriptor)
        self._ip(name, f"link add eth0 type veth peer name up0 netns {self.lab.name}", "link set eth0 up",
                 "addr add 192.0.2.9/24 dev eth0", "addr add fd08::9/64 dev eth0 nodad")  # fmt: skip
        self._ip(self.lab.name, "link set up0 up",
                 *(f"addr add 192.0.2.{n}/24 dev up0" for n in (1, 2, 3)),
                 *(f"addr add fd08::{n}/64 dev up0 nodad" for n in (1, 2, 3)))  # fmt: skip
        self._ip(name, "route add 10.99.0.0/24 via 192.0.2.1", "route add fd99::/64 via fd08::1")
        return Pod("outside", name, descriptor, list(OUTSIDE))

    @staticmethod
    def _ip(namespace: str, *commands: str) -> None:
        run("ip", "-n", namespace, "-batch", "-", stdin="".join(f"{command}\n" for command in commands))

    def add_tables(self) -> None:
        """Translate addresses and count packets again, after a flush of the ruleset."""
        self._translate()
        self.watch.add_counters()

    def _translate(self) -> None:
        db4, db6 = self.ends["db"].addresses
        nft(self.lab, _TRANSLATION.format(db4=db4, db6=db6))

    @contextlib.contextmanager
    def others(self, count: int) -> Iterator[None]:
        """Have the node track further connections for the body."""
        with self.lab.inside(self.lab.descriptor):
            conntrack.fill(count)
        try:
            yield
        finally:
            with self.lab.inside(self.lab.descriptor):
                conntrack.end(count)

    def settle(self, objects: Sequence[Manifest]) -> None:
        """Have the agent take in a world, and return when the kernel has it."""
        write(self.source, objects)
        assert self.lab.status()["synced"]

    def port(self, of: range) -> int:
        """A port that no connection has used yet."""
        return next(self._ports[of])

    def fresh(self, of: range) -> range:
        """The ports that no connection has used yet."""
        return range(self.port(of) + 1, of.stop)

    def flows(
        self, connector: Connector, of: range, pairs: Iterable[str], kinds: Iterable[Kind],
        families: Iterable[int] = FAMILIES,
    ) -> list[Flow]:  # fmt: skip
        """A connection of each kind and family between each pair of ends, to ports of a range.

        A pair is ``client-server``, or ``client-server by service`` where the client knows another address of it.
        """
        made: list[Flow] = []
        for pair, kind, family in itertools.product(pairs, kinds, families):
            names, _, by = pair.partition(" by ")
            to = TRANSLATED[by][FAMILIES.index(family)] if by else None
            client, server = (self.ends[name] for name in names.split("-"))
            made += connector.flows(kind, client, server, family, self.port(of), name=pair, to=to)
        return made
