"""The largest policies that a namespace may have: what a denied packet costs, and what other namespaces notice."""

from __future__ import annotations

import itertools
import socket
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from enforcer.demo.lab import Lab
from enforcer.kernel import nfnetlink
from tests.bench.common import namespace, node, pod, resident, selecting, write
from tests.bench.packets import UDP_PORT, Pair, build_pump

ROUNDS = 5
MANY = 10
_SO_RCVBUFFORCE = 33
_NEW_ELEMENT = 10 << 8 | 12
"""NFT_MSG_NEWSETELEM, as nfnetlink numbers it."""
_numbers = itertools.count(1)


def port(number: int | str) -> dict[str, Any]:
    return {"port": number, "protocol": "UDP"}


def none(number: int) -> dict[str, Any]:
    """A peer that no pod is."""
    return {"podSelector": {"matchLabels": {"app": f"none-{number}"}}}


def block(number: int, excepts: int, shift: int) -> dict[str, Any]:
    network = f"20.{number // 250}.{number % 250}"
    holes = [f"{network}.{(20 * e + shift) % 250}/32" for e in range(excepts)]
    return {"ipBlock": {"cidr": f"{network}.0/24", "except": holes}}


def largest(shift: int) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Rules of the largest policies, none of which allows the client; others for another ``shift``."""
    numbers = [port(UDP_PORT), *(port(10_000 + 2 * n + shift) for n in range(998))]
    named = [port("web"), *(port(f"p{n}-{shift}") for n in range(395))]
    peers = [none(1000 * shift + n) for n in range(390)]
    yield "390 selectors x 999 port numbers", [{"from": peers, "ports": numbers}]
    yield "390 selectors x 396 named ports", [{"from": peers, "ports": named}]
    yield (
        "150 entries of a selector, a named port and two numbers",
        [{"from": [peer], "ports": [port("web"), port(UDP_PORT), port(9 + shift)]} for peer in peers[:150]],
    )
    blocks = [block(n, 10, shift) for n in range(900)]
    yield "900 ipBlocks with 10 excepts", [{"from": blocks, "ports": [port(UDP_PORT)]}]
    excepts = [f"10.{shift}.{2 * n // 256}.{2 * n % 256}/32" for n in range(9_000)]
    yield "an ipBlock with 9,000 excepts", [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": excepts}}]}]
    yield (
        "1,200 selectors x 1,200 named ports (rejected)",
        [{"from": [none(n) for n in range(1200)], "ports": [port(f"p{n}") for n in range(1200)]}],
    )


def denied(pump: Path) -> None:
    """Processor time of a denied packet, beside a policy without rules."""
    each: dict[str, list[float]] = {}
    with Pair(pump) as pair:
        for _ in range(ROUNDS):
            for words, rules in (("a policy without rules", []), *largest(0)):
                pair.put(selecting("large", "x", rules, app="app-0"))
                each.setdefault(words, []).append(pair.send(UDP_PORT).each)
    for words, found in each.items():
        cost = statistics.median(found)
        share = f"{cost / 10:.1f} % of a core at 1,000 a second"
        print(f"a denied packet, {words}: {cost:.1f} us of processor time, {share}")


class Neighbours:
    """Adds a pod of another namespace and edits a policy of it, again and again, in the body."""

    def __init__(self, lab: Lab, folder: Path) -> None:
        self._lab = lab
        self._folder = folder
        self._over = threading.Event()
        self._threads = [threading.Thread(target=work) for work in (self._add, self._edit, self._watch)]
        with lab.inside(lab.descriptor):
            self._commits = nfnetlink.open_socket(1 << 6)
        self._commits.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, 64 << 20)
        self.adds: list[float] = []
        self.edits: list[float] = []
        self.resident = 0.0

    def __enter__(self) -> Neighbours:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join()
        self._commits.close()

    def _add(self) -> None:
        while not self._over.wait(0.02):
            begun = time.perf_counter()
            assert self._lab.cni("ADD", "b/comes").returncode == 0
            self.adds.append((time.perf_counter() - begun) * 1e3)
            self._lab.cni("DEL", "b/comes")

    def _edit(self) -> None:
        while not self._over.wait(0.02):
            begun = time.perf_counter()
            # No edit says what the one before did, so each is committed.
            rules = [{"ports": [port(next(_numbers))]}]
            write(self._folder / "edit.json", [selecting("edit", "b", rules, app="stays")])
            while not self._switched():
                pass
            self.edits.append((time.perf_counter() - begun) * 1e3)

    def _switched(self) -> bool:
        """Whether the next notification sends a pod of the namespace b to another chain."""
        try:
            data = self._commits.recv(1 << 18)
        except OSError:
            # Some were lost. Whoever has the status has waited for the edit.
            self._lab.status()
            return True
        return any(kind == _NEW_ELEMENT and b"ingress/b/edit/" in body for kind, body in nfnetlink.messages(data))

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.resident = max(self.resident, resident(self._lab))


def neighbours() -> None:
    """Other namespaces' ADDs and edits while many of the largest policies come."""
    here = [pod(f"pod-{n}", "a", "app-0") for n in range(5)]
    there = [pod(name, "b", name) for name in ("stays", "comes")]
    for number, (words, _) in enumerate(largest(0)):
        with node(namespace("a"), namespace("b"), *here, *there) as (lab, folder):
            for key in (*(f"a/pod-{n}" for n in range(5)), "b/stays", "b/comes"):
                lab.add_pod(key)
            lab.cni("DEL", "b/comes")
            with Neighbours(lab, folder) as before:
                time.sleep(2)
            with Neighbours(lab, folder) as meanwhile:
                begun = time.perf_counter()
                for n in range(MANY):
                    _, rules = list(largest(n))[number]
                    write(folder / f"large-{n}.json", [selecting(f"large-{n}", "a", rules, app="app-0")])
                status = lab.status(60)
                seconds = time.perf_counter() - begun
            print(
                f"{MANY} policies of {words}, {len(status['rejected'])} rejected: there after {seconds:.2f} s; "
                f"another namespace's ADD at most {max(meanwhile.adds):.0f} ms (before {max(before.adds):.0f}), "
                f"its policy's edit {max(meanwhile.edits):.0f} ms (before {max(before.edits):.0f}); "
                f"{meanwhile.resident:.0f} MB resident",
                flush=True,
            )


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        denied(build_pump(Path(folder)))
    neighbours()


if __name__ == "__main__":
    main()
