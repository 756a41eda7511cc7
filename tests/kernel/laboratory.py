"""A node with two pods as network namespaces, and a flood from the one pod to the other.

The pods are on routed veth pairs, as any pod network might attach them. Only the rules of the node's namespace stand
between them, and whoever commits those does so from a thread that visits the node.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import nftables

from cni import netns
from tests.api.processes import run

CLIENT, SERVER = "client", "server"
FORBIDDEN, STEADY = 7001, 7002
"""Ports of the server: what no state allows, and what every state allows."""
NETWORKS = {"v4": "10.77.{pod}.{host}", "v6": "fd77:{pod}::{host}"}
PODS = {CLIENT: 1, SERVER: 2, "third": 3, "fourth": 4}
"""Each pod's number in NETWORKS; of the third and the fourth there is no more than their addresses."""

_SOURCE = Path(__file__).with_name("flood.c")
_SECONDS = 3 * 3600
"""That a flood may take."""
_numbers = itertools.count()


def build_flood(folder: Path) -> Path:
    """Compile the flooder into a folder."""
    program = folder / "flood"
    run("cc", "-std=c17", "-O2", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-o", program, _SOURCE)
    return program


def address(number: int, family: str) -> str:
    """The address of the pod with a number."""
    return NETWORKS[family].format(pod=number, host=2)


@dataclass(frozen=True, slots=True)
class Count:
    """Datagrams of one class: how many were sent, how many came, and how many were lost between the pods."""

    sent: int
    received: int
    lost: int


class Laboratory:
    """The namespaces; a context manager that removes them. Its body runs in the node's.

    Attributes:
        flooding: the last flood.
    """

    flooding: Flood

    def __init__(self, flood: Path) -> None:
        self._program = flood
        self._name = f"dbtest-{os.getpid()}-kernel{next(_numbers)}"
        self._open = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            node = self._add_namespace(stack, "node")
            home = netns.open_own()
            stack.callback(os.close, home)
            for pod in (CLIENT, SERVER):
                self._add_namespace(stack, pod)
            stack.enter_context(netns.visit(node, home=home))
            for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                netns.write_sysctl(f"net/{setting}", "1")
            for pod in (CLIENT, SERVER):
                self._attach(pod, PODS[pod])
            # A socket stays in the namespace that it was opened in.
            self._nft = nftables.Nftables()
            self._open = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def nft(self, commands: str) -> str:
        """Run commands of nft in the node, as another program would, and return what they print."""
        code, output, error = self._nft.cmd(commands)
        assert code == 0, error
        return str(output)

    def _add_namespace(self, stack: contextlib.ExitStack, short: str) -> int:
        name = f"{self._name}-{short}"
        run("ip", "netns", "add", name)
        stack.callback(run, "ip", "netns", "del", name)
        descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        stack.callback(os.close, descriptor)
        return descriptor

    def _attach(self, pod: str, number: int) -> None:
        """Join a pod to the node, each with a permanent entry for the other: no neighbour discovery loses a packet."""
        inside = ["ip", "-n", f"{self._name}-{pod}"]
        here, there = f"02:00:00:00:01:{number:02x}", f"02:00:00:00:02:{number:02x}"
        peer = ["type", "veth", "peer", "name", "eth0", "address", there, "netns", inside[-1]]
        run("ip", "link", "add", pod, "address", here, *peer)
        run("ip", "link", "set", pod, "up")
        run(*inside, "link", "set", "eth0", "up")
        for network, length in zip(NETWORKS.values(), ("24", "64"), strict=True):
            gateway, own = (network.format(pod=number, host=host) for host in (1, 2))
            for command, end, device, other, mac in (
                (["ip"], gateway, pod, own, there),
                (inside, own, "eth0", gateway, here),
            ):
                nodad = ["nodad"] if ":" in end else []
                run(*command, "address", "add", f"{end}/{length}", "dev", device, *nodad)
                run(*command, "neigh", "replace", other, "lladdr", mac, "nud", "permanent", "dev", device)
            run(*inside, "route", "add", "default", "via", gateway)

    @contextlib.contextmanager
    def flood(self, family: str) -> Iterator[Flood]:
        """Flood the server from the client in the body."""
        with self._start(SERVER) as receiver, self._start(CLIENT, address(PODS[SERVER], family)) as sender:
            self.flooding = Flood(sender, receiver)
            yield self.flooding

    @contextlib.contextmanager
    def _start(self, pod: str, *target: str) -> Iterator[subprocess.Popen[str]]:
        words: list[str | Path] = [self._program, str(_SECONDS), str(FORBIDDEN), str(STEADY), *target]
        command: list[str | Path] = ["ip", "netns", "exec", f"{self._name}-{pod}", *words]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            try:
                assert process.stdout is not None
                assert process.stdout.readline() == "ready\n"
                yield process
            finally:
                process.kill()


class Flood:
    """A flood that runs; ``counts`` ends it."""

    def __init__(self, sender: subprocess.Popen[str], receiver: subprocess.Popen[str]) -> None:
        self._sender = sender
        self._receiver = receiver

    @contextlib.contextmanager
    def halted(self) -> Iterator[None]:
        """Send nothing in the body; the node has taken in all that was sent before."""
        self._tell_sender("halted\n")
        yield
        self._tell_sender("")

    def _tell_sender(self, answer: str) -> None:
        assert self._sender.stdin is not None
        assert self._sender.stdout is not None
        self._sender.stdin.write(".")
        self._sender.stdin.flush()
        assert not answer or self._sender.stdout.readline() == answer

    def counts(self) -> tuple[Count, Count]:
        """What came of the forbidden and of the steady flow.

        Raises:
            AssertionError: the flood had ended before.
        """
        assert self._sender.poll() is None
        assert self._receiver.poll() is None
        # The sender goes first: the receiver counts what has come before it ends.
        sent = self._sender.communicate()[0].split()
        came = self._receiver.communicate()[0].splitlines()
        forbidden, steady = (self._count(int(s), *map(int, c.split())) for s, c in zip(sent, came, strict=True))
        return forbidden, steady

    @staticmethod
    def _count(sent: int, received: int, following: int, overflow: int) -> Count:
        return Count(sent, received, max(following - received - overflow, 0))
