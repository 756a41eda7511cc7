"""Packets and bytes from pod to pod on one node: behind policies, without any rules, and while epochs pass.

Packets are counted by the processor time that they take, which other programs on the machine change little.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from tests.api.processes import run
from tests.bench.common import namespace, node, pod, remote_pod, selecting, write
from tests.support.flow import wait_for

ROUNDS = 10
POLICIES = (0, 1, 10, 100)
FLOWS, EPOCHS = 10_000, 20
TCP_PORT, UDP_PORT, ONE_WAY_PORT = 5201, 5202, 5203
_SOURCE = Path(__file__).with_name("pump.c")
_CLIENT, _ONE, _OTHER = ({"podSelector": {"matchLabels": {"app": app}}} for app in ("app-1", "app-2", "app-3"))


def build_pump(folder: Path) -> Path:
    """Compile the sender and its server into a folder."""
    program = folder / "pump"
    run("cc", "-std=c17", "-O2", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-o", program, _SOURCE)
    return program


def policies(count: int, port: int, name: str = "policy") -> list[dict[str, Any]]:
    """Policies that select the server; the last one allows the client's packets."""
    return [
        selecting(
            f"{name}-{n:03}",
            "x",
            [{"from": [_CLIENT], "ports": [{"port": p, "protocol": protocol} for protocol in ("TCP", "UDP")]}],
            app="app-0",
        )
        for n, p in enumerate([*[80] * (count - 1), port][:count])
    ]


@dataclass(frozen=True, slots=True)
class Sent:
    """Datagrams that were sent, and the seconds that they took, by the clock and of the processor."""

    datagrams: int
    seconds: float
    processor: float

    @property
    def each(self) -> float:
        """Microseconds of the processor for one."""
        return self.processor / self.datagrams * 1e6


class Pair:
    """A server and a client on one node; a context manager."""

    def __init__(self, pump: Path, *, flows: int = 1) -> None:
        self._pump = pump
        self._flows = flows
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        server = pod("server", "x", "app-0")
        server["spec"]["containers"][0]["ports"] = [{"name": "web", "containerPort": UDP_PORT, "protocol": "UDP"}]
        self.lab, self.folder = self._stack.enter_context(node(namespace("x"), server, pod("client", "x", "app-1")))
        self.server, self.client = self.lab.add_pod("x/server"), self.lab.add_pod("x/client")
        # A connection is tracked on through rounds in which others are measured.
        for setting in ("udp_timeout", "udp_timeout_stream"):
            _inside(self.lab.name, "sysctl", "-qw", f"net.netfilter.nf_conntrack_{setting}=3600")
        self._serve("iperf3", "--server", "--port", str(TCP_PORT))
        for port, answered in ((UDP_PORT, self._flows), (ONE_WAY_PORT, 0)):
            serving = self._serve(self._pump, "serve", str(port), str(answered))
            assert serving.stdout is not None
            assert serving.stdout.readline() == "ready\n"
        while not self.lab.connects(self.client, self.server.addresses[0], TCP_PORT):
            pass
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _serve(self, *words: str | Path) -> subprocess.Popen[str]:
        command = ["ip", "netns", "exec", self.server.namespace, *words]
        serving = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._stack.callback(serving.wait)
        self._stack.callback(serving.kill)
        return serving

    def put(self, *objects: dict[str, Any]) -> None:
        """Have these policies, or other objects, in the kernel, and connections stamped."""
        write(self.folder / "policies.json", objects)
        wait_for(lambda: self.lab.status()["stamps"]["epoch"] is not None, "an epoch has begun")

    def send(self, port: int, *, rate: int = 0, seconds: float = 0.3) -> Sent:
        """Send datagrams in all flows to the server, as many as one processor gets through or (``rate``) a second."""
        words = ["send", self.server.addresses[0], str(port), str(self._flows), str(rate), str(seconds)]
        datagrams, clock, processor = map(int, _inside(self.client.namespace, self._pump, *words).split())
        return Sent(datagrams, clock / 1e9, processor / 1e9)

    def gigabits(self) -> float:
        """Gbit/s of one TCP stream over 2 s."""
        words = ["--client", self.server.addresses[0], "--port", str(TCP_PORT), "--time", "2", "--json"]
        done = json.loads(_inside(self.client.namespace, "iperf3", *words))
        return float(done["end"]["sum_received"]["bits_per_second"]) / 1e9

    @contextlib.contextmanager
    def without_rules(self) -> Iterator[None]:
        """No rules in the node, and so no connections tracked, in the body."""
        self.lab.stop_agent()
        self.lab.nft("flush", "ruleset")
        yield
        self.lab.start_agent()


def _inside(namespace: str, *words: str | Path) -> str:
    return run("ip", "netns", "exec", namespace, *words)


def behind_policies(pump: Path) -> None:
    """Each number of policies, and no rules at all, in turns."""
    rates: dict[tuple[str, int | None], list[float]] = {}
    ports = {"UDP": UDP_PORT, "UDP that is never answered": ONE_WAY_PORT, "TCP": TCP_PORT}

    def measure(pair: Pair, count: int | None) -> None:
        for what, port in ports.items():
            if count is not None:
                pair.put(*policies(count, port))
            rate = pair.gigabits() if port == TCP_PORT else 1e6 / pair.send(port).each
            rates.setdefault((what, count), []).append(rate)

    with Pair(pump) as pair:
        for _ in range(ROUNDS):
            for count in POLICIES:
                measure(pair, count)
            with pair.without_rules():
                measure(pair, None)
    for (what, number), found in rates.items():
        rate, none = statistics.median(found), statistics.median(rates[what, None])
        unit = "Gbit/s" if what == "TCP" else "packets a second of processor time"
        words = "no rules" if number is None else f"{number} policies"
        print(f"{what}, {words}: median {rate:,.1f} {unit}, {rate / none:.2f} of no rules", flush=True)


class Epochs:
    """Ends epochs at a rate in the body: a pod elsewhere is one of a rule's peers, and then of another's."""

    def __init__(self, pair: Pair, rate: int) -> None:
        self._pair = pair
        self._rate = rate
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.count = 0

    def __enter__(self) -> Self:
        if self._rate:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._rate:
            self._thread.join()

    def _run(self) -> None:
        due = time.monotonic()
        while not self._over.wait(max(0.0, due - time.monotonic())):
            self.count += 1
            write(self._pair.folder / "elsewhere.json", [remote_pod(1, "x", 2 + self.count % 2)])
            due += 1 / self._rate


def while_epochs_pass(pump: Path) -> None:
    """Many flows behind many policies, with and without epochs that end, in turns."""
    rules = [{"from": [peer], "ports": [{"port": 80}]} for peer in (_ONE, _OTHER)]
    beside = selecting("beside", "x", rules, app="app-0")
    each: dict[int, list[float]] = {}
    gigabits: dict[int, list[float]] = {}
    with Pair(pump, flows=FLOWS) as pair:
        pair.put(beside, *policies(POLICIES[-1], UDP_PORT), *policies(1, TCP_PORT, "tcp"))
        for _ in range(ROUNDS):
            for rate in (0, EPOCHS):
                with Epochs(pair, rate):
                    each.setdefault(rate, []).append(pair.send(UDP_PORT, seconds=2).each)
                with Epochs(pair, rate):
                    gigabits.setdefault(rate, []).append(pair.gigabits())
    for rate, found in each.items():
        packets, bits = 1e6 / statistics.median(found), statistics.median(gigabits[rate])
        ratios = packets * statistics.median(each[0]) / 1e6, bits / statistics.median(gigabits[0])
        print(f"{FLOWS:,} flows, {POLICIES[-1]} policies, {rate} epochs a second: {packets:,.0f} UDP packets a second "
              f"of processor time, {ratios[0]:.2f} of none; one TCP stream {bits:.1f} Gbit/s, {ratios[1]:.2f}",
              flush=True)  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        pump = build_pump(Path(folder))
        behind_policies(pump)
        while_epochs_pass(pump)


if __name__ == "__main__":
    main()
