"""What a node's kernel does, without a question to the agent: when it commits, and what it lets through."""

from __future__ import annotations

import re
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from enforcer.demo.lab import Lab
from enforcer.kernel import nfnetlink
from tests.api.processes import run
from tests.support.flow import wait_for

CUT = range(10000, 20000)
"""The servers' ports of the connections whose packets are counted."""

# linux/netfilter/nfnetlink.h, linux/netfilter/nf_tables.h
_NFNLGRP_NFTABLES = 7
_NFT_MSG_NEWGEN, _NFT_MSG_GETGEN = 10 << 8 | 15, 10 << 8 | 16
_NFT_MSG_NEWSETELEM = 10 << 8 | 12
# NFTA_SET_ELEM_LIST_SET: the set of the stamps that are trusted.
_OF_EPOCH = b"\x0a\x00\x02\x00epoch\x00"
_LOOK_SECONDS = 0.2

# Before and after all base chains of ours; errors are told by the connection that they are about.
_COUNTERS = "".join(
    f"""
	counter {name} {{ }}
	chain {name}-forward {{ type filter hook forward priority {priority}; goto {name}; }}
	chain {name}-input {{ type filter hook input priority {priority}; goto {name}; }}
	chain {name} {{
		icmp type destination-unreachable ct reply proto-src {CUT.start}-{CUT.stop - 1} counter name {name}
		icmpv6 type destination-unreachable ct reply proto-src {CUT.start}-{CUT.stop - 1} counter name {name}
		meta l4proto {{ tcp, udp }} th dport {CUT.start}-{CUT.stop - 1} counter name {name}
		meta l4proto {{ tcp, udp }} th sport {CUT.start}-{CUT.stop - 1} counter name {name}
	}}
"""
    for name, priority in (("came", -50), ("passed", 50))
)


@dataclass(frozen=True, slots=True)
class Commit:
    """A commit: the generation that it began, and when its notification was read, in nanoseconds (monotonic).

    That is never before the commit, and tens of microseconds after it where the machine is idle. One that
    ``begins_epoch`` comes some 10 ms after a change, and is none.
    """

    generation: int
    moment: int
    begins_epoch: bool


class Watch:
    """The commits of a node since it was made, and two counters; a context manager."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        with lab.inside(lab.descriptor):
            self._socket = nfnetlink.open_socket(1 << (_NFNLGRP_NFTABLES - 1))
            self._asking = nfnetlink.open_socket()
        self._socket.settimeout(_LOOK_SECONDS)
        self._commits: list[Commit] = []
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch")

    def __enter__(self) -> Self:
        self._thread.start()
        self.add_counters()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._socket.close()
        self._asking.close()

    def add_counters(self) -> None:
        """Count again, after a flush of the ruleset."""
        nft(self._lab, f"table inet watch {{{_COUNTERS}}}\n")

    def generation(self) -> int:
        """The present generation; of the commits until it, the notifications have been read."""
        self._asking.send(nfnetlink.message(_NFT_MSG_GETGEN, 0, 0, b""))
        ((kind, payload),) = nfnetlink.messages(self._asking.recv(1 << 12))
        assert kind == _NFT_MSG_NEWGEN
        present = _generation(payload)
        wait_for(lambda: bool(self._commits) and self._commits[-1].generation >= present, "notifications")
        return present

    def last_commit(self, after: int) -> int | None:
        """The moment of the last commit of a change after a generation, if there was one."""
        self.generation()
        moments = (c.moment for c in reversed(self._commits) if c.generation > after and not c.begins_epoch)
        return next(moments, None)

    def counted(self) -> tuple[int, int]:
        """How many packets of the connections to ports ``CUT`` came to our base chains, and how many passed them."""
        listed = self._lab.nft("list", "counters", "table", "inet", "watch")
        counts = {name: int(n) for name, n in re.findall(r"counter (\w+) \{\s+packets (\d+)", listed)}
        return counts["came"], counts["passed"]

    def _run(self) -> None:
        begins_epoch = False
        while not self._done.is_set():
            try:
                data = self._socket.recv(1 << 18)
            except TimeoutError:
                continue
            now = time.monotonic_ns()
            for kind, payload in nfnetlink.messages(data):
                if kind == _NFT_MSG_NEWSETELEM and _OF_EPOCH in payload:
                    begins_epoch = True
                elif kind == _NFT_MSG_NEWGEN:
                    self._commits.append(Commit(_generation(payload), now, begins_epoch))
                    begins_epoch = False


def _generation(payload: bytes) -> int:
    """NFTA_GEN_ID, the first attribute of NFT_MSG_NEWGEN."""
    return int.from_bytes(payload[8:12], "big")


def nft(lab: Lab, text: str) -> None:
    """Commit a text to a node's ruleset."""
    run("ip", "netns", "exec", lab.name, "nft", "-f", "-", stdin=text)
