"""What the dataplane needs of the kernel, asked of the kernel itself before the first transaction. Changes nothing.

nf_tables is asked by transactions that are checked and never committed (what ``nft -c`` does), of a table that is
nobody's; ctnetlink by a listing that nothing matches, and an update of a connection that is not there. docs/kernels.md
says what follows where something is missing.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import nftables

from enforcer.kernel import grace, nfnetlink

_TABLE = "drawbridge-probe"
_OBJECTS = f"""
add table inet {_TABLE}
add set inet {_TABLE} peers {{ type ipv4_addr; comment "a set"; }}
add set inet {_TABLE} pairs {{ type ipv4_addr . ipv4_addr; }}
add set inet {_TABLE} networks {{ type ipv6_addr; flags interval; }}
add counter inet {_TABLE} denied {{ comment "a counter"; }}
add chain inet {_TABLE} decide {{ comment "a chain"; }}
add map inet {_TABLE} dispatch {{ type ipv4_addr : verdict; }}
add chain inet {_TABLE} judge
"""

_NFT_SUBSYSTEM, _CT_SUBSYSTEM = 10, 1
_BATCH_BEGIN, _BATCH_END, _BATCH_GENID = 0x10, 0x11, 1
_GETGEN, _NEWGEN, _NEWFLOWTABLE, _GETFLOWTABLE = (_NFT_SUBSYSTEM << 8 | n for n in (16, 15, 22, 23))
_CT_NEW, _CT_GET = (_CT_SUBSYSTEM << 8 | n for n in (0, 1))
_TUPLE_ORIG, _MARK, _MARK_MASK = 1, 8, 21
_NO_PROTOCOL = 255

Answer = TypeVar("Answer")

_LOOSE = Path("/proc/sys/net/netfilter/nf_conntrack_tcp_loose")


@dataclass(frozen=True, slots=True)
class Missing:
    """Something that the dataplane does not do without.

    Attributes:
        what: that is missing, in a few words.
        consequence: what follows for the node.
        hint: what to do about it.
        detail: the kernel's answer.
    """

    what: str
    consequence: str
    hint: str
    detail: str

    def __str__(self) -> str:
        return f"{self.what} ({self.detail}): {self.consequence}; {self.hint}"


@dataclass(frozen=True, slots=True)
class Note:
    """Something that the dataplane does with, and an operator may want to know. ``hint`` may be empty."""

    what: str
    consequence: str
    hint: str = ""

    def __str__(self) -> str:
        return "; ".join(part for part in (f"{self.what}: {self.consequence}", self.hint) if part)


@dataclass(frozen=True, slots=True)
class Findings:
    """What was found of a kernel. With anything ``missing``, policy cannot be enforced here as it is written."""

    release: str
    missing: tuple[Missing, ...]
    notes: tuple[Note, ...]


@dataclass(frozen=True, slots=True)
class _Probe:
    what: str
    ruleset: str
    hint: str


_NO_POLICY = "no policy is enforced on this node"

_PROBES = (
    _Probe(
        "nf_tables with the family inet, sets, verdict maps, named counters and comments",
        _OBJECTS + f"add element inet {_TABLE} dispatch {{ 192.0.2.1 : jump decide }}\n",
        "load the module nf_tables, or use a kernel with CONFIG_NF_TABLES_INET, 5.15 or later",
    ),
    _Probe(
        "the family bridge of nf_tables",
        f"add table bridge {_TABLE}\nadd chain bridge {_TABLE} guard\n"
        f"add rule bridge {_TABLE} guard ether type 8021q counter drop\n",
        "use a kernel with CONFIG_NF_TABLES_BRIDGE",
    ),
    _Probe(
        "the addresses of a connection in rules (ct original ip saddr)",
        _OBJECTS
        + f"add rule inet {_TABLE} judge ct original ip saddr @peers counter name denied goto decide\n"
        + f"add rule inet {_TABLE} judge ct original ip6 saddr @networks goto decide\n"
        + f"add rule inet {_TABLE} judge ct original ip saddr . ct reply ip saddr @pairs goto decide\n"
        + f"add rule inet {_TABLE} judge ct reply ip saddr vmap @dispatch\n",
        "load the module nft_ct, or use a kernel with CONFIG_NFT_CT, 5.15 or later",
    ),
    _Probe(
        "the port of a connection's server in rules (ct reply proto-src)",
        _OBJECTS + f"add rule inet {_TABLE} judge meta l4proto tcp ct reply proto-src 8000-8010 goto decide\n",
        "load the module nft_ct, or use a kernel with CONFIG_NFT_CT, 5.15 or later",
    ),
    _Probe(
        "the names of protocols (/etc/protocols)",
        _OBJECTS + f"add rule inet {_TABLE} judge meta l4proto ipv6-icmp ct protocol sctp goto decide\n",
        "install the package netbase, or whichever has that file",
    ),
    _Probe(
        "the connection mark (ct mark)",
        _OBJECTS
        + f"add rule inet {_TABLE} judge ct mark & 0xff000000 == 0x41000000 accept\n"
        + f"add rule inet {_TABLE} judge ct mark set ct mark & 0x00ffffff | 0x41000000 accept\n",
        "use a kernel with CONFIG_NF_CONNTRACK_MARK",
    ),
)


# "netfilter: nf_tables: restart set lookup on base_seq change": the first release, and the stable ones that have it.
_REPEATED_FROM = (6, 17)
_REPEATED_SINCE = {(6, 12): 48, (6, 16): 8}


def inspect(mask: int, release: str | None = None) -> Findings:
    """Ask the kernel of this network namespace.

    Args:
        mask: the bits of the connection mark that are the dataplane's.
        release: what the kernel calls itself; None asks it.
    """
    release = os.uname().release if release is None else release
    missing = tuple(_missing_of_transactions()) or (*_missing_of_nftables(), *_missing_of_ctnetlink(mask))
    notes = (*_notes_of_release(release), *_notes_of_flowtables(), *_notes_of_conntrack(), *_notes_of_membarrier())
    return Findings(release, missing, notes)


def repeats_lookups(release: str) -> bool | None:
    """Whether a kernel looks up again when a commit comes between (``nft_lookup_should_retry``), by its number.

    Distributions may have the change under an older number. None: the number cannot be read.
    """
    found = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if found is None:
        return None
    major, minor, patch = (int(part or 0) for part in found.groups())
    if (major, minor) in _REPEATED_SINCE:
        return patch >= _REPEATED_SINCE[major, minor]
    return (major, minor) >= _REPEATED_FROM


def _missing_of_nftables() -> Iterator[Missing]:
    nft = nftables.Nftables()
    nft.set_dry_run(True)
    for probe in _PROBES:
        status, _, error = nft.cmd(probe.ruleset)
        if status != 0:
            first = next(iter(error.strip().splitlines()), "refused")
            yield Missing(probe.what, _NO_POLICY, probe.hint, first.removeprefix("Error: "))


def _missing_of_transactions() -> Iterator[Missing]:
    """Asked first: without the right to change the ruleset, nothing else would have an answer either."""
    try:
        answer = _asked(_stale_batch)
    except OSError as error:
        answer = error.errno or errno.EPROTO
    detail = os.strerror(answer) if answer else "no error"
    if answer == errno.EPERM:
        hint = "run the agent as root, with CAP_NET_ADMIN, in the host's network namespace"
        yield Missing("the right to change the ruleset", _NO_POLICY, hint, detail)
    elif answer != errno.ERESTART:
        hint = "load the module nf_tables, or use a kernel with CONFIG_NF_TABLES, 5.15 or later"
        yield Missing("nf_tables, with the generation in its transactions", _NO_POLICY, hint, detail)


def _stale_batch(opened: socket.socket) -> int:
    """The answer to an empty transaction that names a generation of before."""
    opened.send(nfnetlink.message(_GETGEN, 0, 0, b""))
    kind, payload = next(nfnetlink.messages(opened.recv(1 << 16)))
    if kind != _NEWGEN:
        return nfnetlink.error_of(payload)
    (generation,) = struct.unpack_from(">I", payload, 8)
    before = nfnetlink.attr(_BATCH_GENID, struct.pack(">I", generation + (1 << 31) & 0xFFFFFFFF))
    opened.send(
        nfnetlink.message(_BATCH_BEGIN, 0, 0, before, resource=_NFT_SUBSYSTEM)
        + nfnetlink.message(_BATCH_END, 0, 0, b"", resource=_NFT_SUBSYSTEM)
    )
    # The kernel works a batch off within send(), so the answer is there.
    try:
        data = opened.recv(1 << 16, socket.MSG_DONTWAIT)
    except BlockingIOError:
        return 0
    return next((nfnetlink.error_of(p) for kind, p in nfnetlink.messages(data) if kind == nfnetlink.ERROR), 0)


def _missing_of_ctnetlink(mask: int) -> Iterator[Missing]:
    consequence = "stamps of old epochs cannot be cleared, so every packet of a pod is judged (slow, not open)"
    hint = "load the module nf_conntrack_netlink, or use a kernel with CONFIG_NF_CT_NETLINK, 5.15 or later"
    try:
        others = _asked(lambda opened: _not_matching(opened, mask))
    except OSError as error:
        yield Missing("the list of connections by mark (ctnetlink)", consequence, hint, _named(error))
        return
    if others:
        detail = f"{others} others were listed"
        yield Missing("the filter by mark of the list of connections", consequence, hint, detail)
    answer = _asked(_update_of_none)
    if answer != errno.ENOENT:
        detail = os.strerror(answer) if answer else "no error"
        yield Missing("the update of single bits of a connection's mark", consequence, hint, detail)


def _not_matching(opened: socket.socket, mask: int) -> int:
    """How many connections are listed that were not asked for: those "judged" in epoch 0, which no rule ever writes."""
    value = mask & -mask
    opened.send(nfnetlink.message(_CT_GET, nfnetlink.DUMP, 0, _mark(value, mask)))
    others = 0
    while True:
        for kind, payload in nfnetlink.messages(opened.recv(1 << 18)):
            if kind == nfnetlink.DONE:
                return others
            if kind == nfnetlink.ERROR:
                number = nfnetlink.error_of(payload)
                raise OSError(number, os.strerror(number))
            mark = int.from_bytes(nfnetlink.attributes(payload[4:]).get(_MARK, b""), "big")
            others += mark & mask != value


def _update_of_none(opened: socket.socket) -> int:
    """The answer to a change of the mark of a connection that cannot be: its protocol is reserved."""
    addresses = nfnetlink.nest(1, nfnetlink.attr(1, bytes(4)), nfnetlink.attr(2, bytes(4)))
    protocol = nfnetlink.nest(2, nfnetlink.attr(1, bytes([_NO_PROTOCOL])))
    which = nfnetlink.nest(_TUPLE_ORIG, addresses, protocol)
    opened.send(nfnetlink.message(_CT_NEW, nfnetlink.ACK, socket.AF_INET, which + _mark(0, 0)))
    kind, payload = next(nfnetlink.messages(opened.recv(1 << 16)))
    return nfnetlink.error_of(payload) if kind == nfnetlink.ERROR else 0


def _notes_of_release(release: str) -> Iterator[Note]:
    if repeats_lookups(release) is False:
        yield Note(
            f"kernel {release}",
            "by its number it may miss an element of a set that is replaced at that instant; nothing is open by it, and"
            " a change may cost a packet of an allowed connection",
            "6.12.48, 6.16.8, 6.17 and later do not",
        )


def _notes_of_flowtables() -> Iterator[Note]:
    try:
        names = _asked(_flowtables)
    except OSError:
        return
    if names:
        yield Note(
            f"flowtables: {', '.join(names)}",
            "connections that they carry pass by every rule, so policy ends none of them while they last",
            "do not offload connections of pods",
        )


def _flowtables(opened: socket.socket) -> list[str]:
    opened.send(nfnetlink.message(_GETFLOWTABLE, nfnetlink.DUMP, 0, b""))
    found: list[str] = []
    while True:
        for kind, payload in nfnetlink.messages(opened.recv(1 << 18)):
            if kind in {nfnetlink.DONE, nfnetlink.ERROR}:
                # A kernel without flowtables answers with an error.
                return found
            if kind == _NEWFLOWTABLE:
                attributes = nfnetlink.attributes(payload[4:])
                found.append("/".join(attributes[n].rstrip(b"\0").decode(errors="replace") for n in (1, 2)))


def _notes_of_conntrack() -> Iterator[Note]:
    try:
        loose = _LOOSE.read_text().strip()
    except OSError:
        return
    if loose != "0":
        yield Note(
            "net.netfilter.nf_conntrack_tcp_loose is not 0",
            "when the kernel has lost its list of connections, a TCP connection that goes on is taken for one that its"
            " next sender begins",
            "set it to 0 to have such connections closed",
        )


def _notes_of_membarrier() -> Iterator[Note]:
    if not grace.is_available():
        yield Note(
            "membarrier(2) is refused",
            f"a change that takes from some pods and gives to others waits {grace.SUBSTITUTE_SECONDS:.0f} s for packets"
            " under way, and so does each new epoch",
            "do not start the kernel with nohz_full on this node, and let the container's seccomp profile allow it",
        )


def _mark(value: int, mask: int) -> bytes:
    return nfnetlink.attr(_MARK, struct.pack(">I", value)) + nfnetlink.attr(_MARK_MASK, struct.pack(">I", mask))


def _named(error: OSError) -> str:
    return os.strerror(error.errno) if error.errno else str(error)


def _asked(question: Callable[[socket.socket], Answer]) -> Answer:
    with nfnetlink.open_socket() as opened:
        return question(opened)
