"""Clears stale stamps: bits of the connection mark, in the kernel's connection table, over ctnetlink.

In goes what a stale mark looks like, out comes how many connections had one. No entry is made, removed or otherwise
changed, and no other bit of a mark. Message and attribute numbers are those of linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from pathlib import Path

from enforcer.kernel import nfnetlink

_NEW, _GET = 0x100, 0x101
_TUPLE_ORIG, _MARK, _ZONE, _MARK_MASK = 1, 8, 18, 21
_NETFILTER_HEADER = 4
_TYPE_MASK = 0x3FFF
"""What of an attribute's type is its number: NLA_TYPE_MASK of linux/netlink.h."""

# The kernel fills what is asked for, from 8 KB on: some 70 connections. They are looked through without another thread
# of this process getting a turn, which takes 0.2 ms.
_DATAGRAM = 16 << 10
_WALKS = 5
_FILTERED_CONNECTIONS = 20_000
_COUNT = Path("/proc/sys/net/netfilter/nf_conntrack_count")

_attribute = struct.Struct("=HH")


class Conntrack:
    """The connections of the network namespace that it was made in. For one thread.

    Raises:
        OSError: the kernel gives no socket.
    """

    def __init__(self) -> None:
        self._listing, self._updates = nfnetlink.open_socket(), nfnetlink.open_socket()
        self._updates.setblocking(False)

    def close(self) -> None:
        """Close the sockets."""
        self._listing.close()
        self._updates.close()

    def clear(self, *, value: int, mask: int, bits: int) -> int:
        """Clear ``bits`` of the mark of each connection whose mark & ``mask`` is ``value``.

        The table is walked until no such connection is found. A mark that a packet or another program writes at the
        same moment can win over the update: the next walk finds it.

        Returns:
            How many were cleared.

        Raises:
            OSError: the kernel has no ctnetlink or no connection marks, or it refuses; EBUSY if there are still such
                connections after several walks. Some may have been cleared; the object is closed.
            ValueError: no mark can match, or one that does would still do so with ``bits`` cleared.
        """
        if value & ~mask or not value & bits:
            raise ValueError(f"cannot clear bits {bits:#x} of marks {value:#x}/{mask:#x}")
        cleared = 0
        try:
            for _ in range(_WALKS):
                found, ended = self._walk(value, mask, bits)
                cleared += found - ended
                if not found:
                    return cleared
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        except BaseException:
            # A walk that was not read to its end would be taken for the answer to the next request.
            self.close()
            raise

    def _walk(self, value: int, mask: int, bits: int) -> tuple[int, int]:
        """Clear what one walk through the table lists; how many that is, and how many of them had ended by then."""
        # While the kernel looks for what the filter lets pass, that CPU handles no packets: 50 ms at 200,000 entries.
        # Unfiltered, it fills datagram after datagram, and what is not stale is passed over here.
        wanted = _mark(value, mask) if _connections() <= _FILTERED_CONNECTIONS else b""
        self._listing.send(nfnetlink.message(_GET, nfnetlink.DUMP, socket.AF_UNSPEC, wanted))
        cleared = _mark(0, bits)
        found = ended = 0
        done = False
        while not done:
            updates = []
            for kind, body in nfnetlink.messages(self._listing.recv(_DATAGRAM)):
                if kind in {nfnetlink.DONE, nfnetlink.ERROR}:
                    _check(nfnetlink.error_of(body))
                    done = True
                elif (connection := _stale(body, value, mask)) is not None:
                    updates.append(nfnetlink.message(_NEW, 0, body[0], connection + cleared))
            if updates:
                found += len(updates)
                ended += self._update(updates)
        return found, ended

    def _update(self, updates: list[bytes]) -> int:
        """Send updates, which are carried out when this returns; how many were of connections that had ended."""
        self._updates.send(b"".join(updates))
        ended = 0
        while True:
            try:
                answer = self._updates.recv(_DATAGRAM)
            except BlockingIOError:
                return ended
            except OSError as error:
                # Answers found no place. Only their count is lost: the next walk lists what is still to be cleared.
                if error.errno != errno.ENOBUFS:
                    raise
                continue
            for _, body in nfnetlink.messages(answer):
                _check(nfnetlink.error_of(body), errno.ENOENT)
                ended += 1


def _stale(body: bytes, value: int, mask: int) -> bytes | None:
    """The attributes that name a connection of IPCTNL_MSG_CT_NEW, as they are; None if its mark is another.

    A zone of one direction is inside the tuple. The mark is looked at whatever the kernel's filter did.
    """
    stale = False
    names = b""
    offset, end = _NETFILTER_HEADER, len(body)
    while offset < end:
        length, kind = _attribute.unpack_from(body, offset)
        following = offset + (length + 3 & ~3)
        kind &= _TYPE_MASK
        if kind == _MARK:
            stale = int.from_bytes(body[offset + 4 : following], "big") & mask == value
        elif kind in {_TUPLE_ORIG, _ZONE}:
            names += body[offset:following]
        offset = following
    return names if stale else None


def _connections() -> int:
    """How many connections the namespace of the calling thread has; 0 if that cannot be read."""
    try:
        return int(_COUNT.read_text())
    except OSError:
        return 0


def _mark(value: int, mask: int) -> bytes:
    return nfnetlink.attr(_MARK, struct.pack(">I", value)) + nfnetlink.attr(_MARK_MASK, struct.pack(">I", mask))


def _check(number: int, *tolerated: int) -> None:
    if number and number not in tolerated:
        raise OSError(number, os.strerror(number))
