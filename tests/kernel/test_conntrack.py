"""The cleaner of stale stamps: what it changes in the connection table of a network namespace, and when it fails."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from pyroute2.netlink.nfnetlink.nfctsocket import nfct_msg

from enforcer.kernel import nfnetlink
from enforcer.kernel.conntrack import Conntrack
from tests.support import conntrack as table

STAMP = 0xFF000000
GROUP = {"value": 0x40000000, "mask": 0xC0000000, "bits": STAMP}
STALE, FRESH = 0x43000000, 0x83000000
NOBODY = 65534
DUMP_OF_ALL = nfnetlink.message(0x101, nfnetlink.DUMP, socket.AF_UNSPEC, b"")
NOTHING = struct.pack("=IHHII", 16, 1, 0, 0, 0)
"""NLMSG_NOOP."""
DONE = struct.pack("=IHHIIi", 20, 3, 2, 0, 0, 0)

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


@contextmanager
def unprivileged() -> Iterator[None]:
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


class Tapped(socket.socket):
    """A netlink socket with the test between it and the kernel: ``change`` says what is sent instead."""

    change: Callable[[bytes], bytes] | None = None

    def send(self, data: bytes, *flags: int) -> int:  # type: ignore[override]
        return super().send(self.change(data) if self.change else data, *flags)


@dataclass(frozen=True, slots=True)
class Taps:
    """A cleaner and its sockets."""

    conntrack: Conntrack
    listing: Tapped
    updates: Tapped


@pytest.fixture
def taps(network: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Taps]:
    listing, updates = (Tapped(fileno=nfnetlink.open_socket().detach()) for _ in range(2))
    made = [listing, updates]
    with monkeypatch.context() as patched:
        patched.setattr(nfnetlink, "open_socket", lambda: made.pop(0))
        conntrack = Conntrack()
    yield Taps(conntrack, listing, updates)
    conntrack.close()


def once(action: Callable[[], None]) -> Callable[[bytes], bytes]:
    """Do something before the first message goes on."""
    left = [action]

    def change(sent: bytes) -> bytes:
        if left:
            left.pop()()
        return sent

    return change


def clear(**what: int) -> int:
    conntrack = Conntrack()
    try:
        return conntrack.clear(**(what or GROUP))
    finally:
        conntrack.close()


@pytest.mark.netns
@pytest.mark.usefixtures("network")
def test_only_stale_stamps_are_cleared() -> None:
    before = {0: 3, 0x1234: 4, 0x3F00FFFF: 5, 0x40000000: 6, 0x41000000: 7, 0x7F000000: 8, FRESH: 9, 0xC1000000: 10}
    for number, (mark, count) in enumerate(before.items()):
        table.fill(count, mark=mark, first=1000 * number)
    assert clear() == 21
    assert table.marks() == {0: 24, 0x1234: 4, 0x3F00FFFF: 5, FRESH: 9, 0xC1000000: 10}
    assert clear() == 0


@pytest.mark.netns
@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("mark", "what", "after"),
    [
        (0x43FFFFFF, GROUP, 0x00FFFFFF),
        (0x5A5A8765, {"value": 0x00400000, "mask": 0x00C00000, "bits": 0x00FF0000}, 0x5A008765),
        (0xFFFFFFF4, {"value": 0x00000004, "mask": 0x0000000C, "bits": 0x0000000F}, 0xFFFFFFF0),
        (0x02000000, {"value": 0x02000000, "mask": 0xFFFFFFFF, "bits": 0x02000000}, 0),
    ],
)
def test_the_other_bits_of_a_mark_stay(mark: int, what: dict[str, int], after: int) -> None:
    table.fill(2, mark=mark)
    assert clear(**what) == 2
    assert table.marks() == {after: 2}


@pytest.mark.netns
@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("family", "protocol"),
    [
        *((socket.AF_INET, p) for p in (table.TCP, table.UDP, table.SCTP, table.ICMP, table.GENERIC)),
        *((socket.AF_INET6, p) for p in (table.TCP, table.UDP, table.SCTP, table.ICMPV6, table.GENERIC)),
    ],
)
def test_connections_of_each_family_and_protocol_are_cleared(family: int, protocol: int) -> None:
    table.fill(3, mark=STALE, family=family, protocol=protocol)
    table.fill(2, mark=FRESH, family=family, protocol=protocol, first=3)
    assert clear() == 3
    assert table.marks() == {0: 3, FRESH: 2}


@pytest.mark.netns
@pytest.mark.usefixtures("network")
def test_a_connection_with_address_translation_is_cleared_and_goes_on() -> None:
    rules = """
        table inet test {
            chain nat { type nat hook output priority -100; tcp dport 81 redirect to :80; }
            chain stamp { type filter hook output priority filter; ct state new ct mark set 0x43000055; }
        }"""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
    with socket.create_server(("127.0.0.1", 80)) as server, socket.create_connection(("127.0.0.1", 81)) as client:
        accepted = server.accept()[0]
        with accepted:
            assert table.marks() == {0x43000055: 1}
            assert clear() == 1
            client.sendall(b"x")
            assert accepted.recv(1) == b"x"
            assert table.marks() == {0x55: 1}


@pytest.mark.netns
@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize("zone_of", ["both", "original", "reply"])
def test_a_connection_in_a_zone_is_cleared_and_not_its_namesake_in_another(zone_of: str, family: int) -> None:
    table.fill(3, mark=STALE, family=family, zone=7, zone_of=zone_of)
    table.fill(3, mark=FRESH, family=family, zone=8)
    assert clear() == 3
    assert table.marks() == {0: 3, FRESH: 3}
    assert clear(value=0x80000000, mask=0xC0000000, bits=STAMP) == 3
    assert table.marks() == {0: 6}


@pytest.mark.netns
@pytest.mark.usefixtures("network")
def test_a_table_of_many_datagrams_is_cleared_to_its_end() -> None:
    table.fill(5_000, mark=STALE)
    table.fill(5_000, mark=FRESH, first=5_000)
    table.fill(5_000, mark=STALE, family=socket.AF_INET6, protocol=table.UDP)
    assert clear() == 10_000
    assert table.marks() == {0: 10_000, FRESH: 5_000}


@pytest.mark.netns
@pytest.mark.usefixtures("network")
def test_memory_does_not_grow_with_the_table() -> None:
    table.fill(20_000, mark=STALE)
    tracemalloc.start()
    try:
        assert clear() == 20_000
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


@pytest.mark.netns
def test_connections_that_end_before_their_update_are_not_counted(taps: Taps) -> None:
    table.fill(500, mark=STALE)
    taps.updates.change = once(lambda: table.end(400, first=100))
    assert taps.conntrack.clear(**GROUP) == 100
    assert table.marks() == {0: 100}


@pytest.mark.netns
def test_errors_that_the_kernel_could_not_deliver_leave_nothing_stale(taps: Taps) -> None:
    table.fill(500, mark=STALE)
    taps.updates.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
    taps.updates.change = once(lambda: table.end(400, first=100))
    assert taps.conntrack.clear(**GROUP) > 100, "no error was lost"
    assert table.marks() == {0: 100}


@pytest.mark.netns
def test_a_stamp_that_is_written_behind_the_walk_is_cleared(taps: Taps) -> None:
    table.fill(10, mark=STALE)
    taps.updates.change = once(lambda: table.fill(10, mark=STALE, first=10))
    assert taps.conntrack.clear(**GROUP) == 20
    assert table.marks() == {0: 20}


@pytest.mark.netns
def test_a_kernel_that_does_not_filter_has_only_stale_stamps_cleared(taps: Taps) -> None:
    table.fill(500, mark=STALE)
    table.fill(500, mark=FRESH, first=500)
    taps.listing.change = lambda _: DUMP_OF_ALL
    assert taps.conntrack.clear(**GROUP) == 500
    assert table.marks() == {0: 500, FRESH: 500}


@pytest.mark.netns
def test_stamps_that_stay_are_an_error(taps: Taps) -> None:
    table.fill(10, mark=STALE)
    taps.updates.change = lambda _: NOTHING
    with pytest.raises(OSError, match="busy"):
        taps.conntrack.clear(**GROUP)


@pytest.mark.netns
@pytest.mark.usefixtures("network")
def test_a_listing_that_is_refused_is_an_error() -> None:
    table.fill(10, mark=STALE)
    conntrack = Conntrack()
    with unprivileged(), pytest.raises(PermissionError):
        conntrack.clear(**GROUP)
    assert table.marks() == {STALE: 10}


@pytest.mark.netns
def test_an_update_that_is_refused_is_an_error_then_and_later(taps: Taps) -> None:
    table.fill(500, mark=STALE)
    taps.updates.change = lambda sent: sent[:16] + bytes([77]) + sent[17:]
    with pytest.raises(OSError, match="not supported"):
        taps.conntrack.clear(**GROUP)
    with pytest.raises(OSError, match="Bad file"):
        taps.conntrack.clear(**GROUP)


@pytest.mark.netns
@pytest.mark.usefixtures("network")
def test_a_closed_conntrack_is_an_error() -> None:
    conntrack = Conntrack()
    conntrack.close()
    with pytest.raises(OSError, match="Bad file"):
        conntrack.clear(**GROUP)


@pytest.mark.netns
@pytest.mark.usefixtures("network")
def test_the_namespace_is_the_one_in_which_it_was_made() -> None:
    table.fill(10, mark=STALE)
    conntrack = Conntrack()

    def clear_from_another() -> tuple[int, dict[int, int]]:
        assert _libc.unshare(_CLONE_NEWNET) == 0
        table.fill(20, mark=STALE)
        return conntrack.clear(**GROUP), table.marks()

    with ThreadPoolExecutor() as threads:
        assert threads.submit(clear_from_another).result() == (10, {STALE: 20})
    assert table.marks() == {0: 10}
    conntrack.close()


@pytest.mark.netns
@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    "what",
    [
        {"value": 0x40000000, "mask": 0x80000000, "bits": STAMP},
        {"value": 0x40000000, "mask": 0xC0000000, "bits": 0x00FFFFFF},
        {"value": 0, "mask": 0xC0000000, "bits": STAMP},
    ],
)
def test_marks_that_cannot_be_or_would_still_be_stale_are_a_mistake(what: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="cannot clear"):
        clear(**what)


class Recorded:
    """A netlink socket without a kernel."""

    def __init__(self, *answers: bytes | OSError) -> None:
        self.answers = list(answers)
        self.sent: list[bytes] = []

    def send(self, data: bytes) -> int:
        self.sent.append(data)
        return len(data)

    def recv(self, _: int) -> bytes:
        answer = self.answers.pop(0) if self.answers else BlockingIOError()
        if isinstance(answer, OSError):
            raise answer
        return answer

    def setblocking(self, _: bool) -> None: ...

    def close(self) -> None: ...


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Has the next ``Conntrack`` get sockets without a kernel."""

    def use(*sockets: Recorded) -> None:
        waiting = list(sockets)
        monkeypatch.setattr(nfnetlink, "open_socket", lambda: waiting.pop(0))

    return use


def encoded(family: int, *attributes: tuple[str, Any]) -> bytes:
    """A connection of a listing, as pyroute2 writes it."""
    message = nfct_msg()
    message["header"]["type"] = 0x100
    message["nfgen_family"] = family
    message["attrs"] = list(attributes)
    message.encode()
    return bytes(message.data)


def decoded(data: bytes) -> list[tuple[int, int, int, Any]]:
    """Type, flags, family and attributes of messages, as pyroute2 reads them."""
    found = []
    while data:
        length = struct.unpack_from("=I", data)[0]
        message = nfct_msg(data[:length])
        message.decode()
        header = message["header"]
        found.append((header["type"], header["flags"], message["nfgen_family"], plain(message["attrs"])))
        data = data[length:]
    return found


def nested(**attributes: Any) -> dict[str, Any]:
    return {"attrs": list(attributes.items())}


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        value = value["attrs"]
    if isinstance(value, (list, tuple)):
        return {name: plain(inner) for name, inner in value}
    return value


def test_pyroute2_reads_the_request_and_the_updates_as_they_are_meant(recorded: Callable[..., None]) -> None:
    tcp = ("CTA_TUPLE_PROTO", nested(CTA_PROTO_NUM=6, CTA_PROTO_SRC_PORT=40000, CTA_PROTO_DST_PORT=80))
    echo = nested(CTA_PROTO_NUM=58, CTA_PROTO_ICMPV6_ID=9, CTA_PROTO_ICMPV6_TYPE=128, CTA_PROTO_ICMPV6_CODE=0)
    v4 = ("CTA_TUPLE_IP", nested(CTA_IP_V4_SRC="10.0.0.1", CTA_IP_V4_DST="10.0.0.2"))
    v6 = ("CTA_TUPLE_IP", nested(CTA_IP_V6_SRC="fd00::1", CTA_IP_V6_DST="fd00::2"))
    one, other = {"attrs": [v4, tcp]}, {"attrs": [v6, ("CTA_TUPLE_PROTO", echo)]}
    listed = (
        encoded(2, ("CTA_TUPLE_ORIG", one), ("CTA_TUPLE_REPLY", other), ("CTA_STATUS", 14), ("CTA_MARK", STALE | 5)),
        encoded(2, ("CTA_TUPLE_ORIG", one), ("CTA_TUPLE_REPLY", other), ("CTA_MARK", FRESH)),
        encoded(2, ("CTA_TUPLE_ORIG", one), ("CTA_TUPLE_REPLY", other)),
        encoded(10, ("CTA_MARK", STALE), ("CTA_ZONE", 7), ("CTA_TIMEOUT", 5), ("CTA_TUPLE_ORIG", other)),
    )
    listing, updates = Recorded(b"".join(listed), DONE, DONE), Recorded()
    recorded(listing, updates)
    assert clear() == 2
    request = (0x101, 0x301, 0, {"CTA_MARK": 0x40000000, "CTA_MARK_MASK": 0xC0000000})
    assert [decoded(sent) for sent in listing.sent] == [[request], [request]]
    cleared = {"CTA_MARK": 0, "CTA_MARK_MASK": STAMP}
    assert [decoded(sent) for sent in updates.sent] == [
        [
            (0x100, 0x1, 2, {"CTA_TUPLE_ORIG": plain(one)} | cleared),
            (0x100, 0x1, 10, {"CTA_TUPLE_ORIG": plain(other), "CTA_ZONE": 7} | cleared),
        ]
    ]


def test_a_listing_that_breaks_off_is_an_error(recorded: Callable[..., None]) -> None:
    refused = struct.pack("=IHHIIi", 36, 2, 0, 0, 0, -errno.ENOMEM) + DUMP_OF_ALL[:16]
    broken_off = DONE[:16] + struct.pack("=i", -errno.ENOMEM)
    for end in (refused, broken_off):
        recorded(Recorded(end), Recorded())
        with pytest.raises(OSError, match="allocate memory"):
            clear()


def test_an_error_of_a_socket_is_an_error(recorded: Callable[..., None]) -> None:
    failed = OSError(errno.EIO, "failed")
    for sockets in (Recorded(failed), Recorded()), (Recorded(encoded(2, ("CTA_MARK", STALE)), DONE), Recorded(failed)):
        recorded(*sockets)
        with pytest.raises(OSError, match="failed"):
            clear()
