"""nf_tables over a netlink socket of our own: element changes in one batch, the generation id, and what others change.

libnftables fetches the elements of every interval set of every table before it adds one element; a raw batch costs
tens of microseconds whatever else the kernel holds. Only elements go this way; structure goes as text.
Message and attribute numbers are those of linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator

from enforcer.kernel import nfnetlink
from enforcer.ruleset.objects import PLAIN, Element, Set, Table
from enforcer.ruleset.ruleset import Elements

_NFNLGRP_NFTABLES = 7
_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END, _BATCH_GENID = 0x10, 0x11, 1
_NEWSETELEM, _DELSETELEM, _NEWGEN, _GETGEN = (_SUBSYSTEM << 8 | n for n in (12, 14, 15, 16))
_GOTO = -4
_TABLE = "drawbridge"
_FAMILIES = {Table.POLICY: 1, Table.GUARD: 7}
# A message's elements are one attribute, whose length has 16 bits.
_BYTES_A_MESSAGE = 32 << 10

_be32 = struct.Struct(">I")


class BatchError(Exception):
    """The kernel refused a batch; nothing of it stands. ``errno`` is the first error's number."""

    def __init__(self, number: int) -> None:
        super().__init__(errno.errorcode.get(number, str(number)))
        self.errno = number


def _element(key: bytes, element: Element) -> bytes:
    parts = nfnetlink.nest(1, nfnetlink.attr(1, key))
    if element.goto is not None:
        verdict = nfnetlink.nest(2, nfnetlink.attr(1, struct.pack(">i", _GOTO)), nfnetlink.text(2, element.goto))
        parts += nfnetlink.nest(2, verdict)
    if element.comment:
        comment = element.comment.encode() + b"\0"
        parts += nfnetlink.attr(6, bytes([0, len(comment)]) + comment)
    return nfnetlink.nest(1, parts)


def _element_messages(kind: int, flags: int, of: Set, elements: Iterable[tuple[bytes, Element]]) -> Iterator[bytes]:
    where = nfnetlink.text(1, _TABLE) + nfnetlink.text(2, of.name)
    chunk: list[bytes] = []
    size = 0
    for packed in (_element(key, element) for key, element in elements):
        if size + len(packed) > _BYTES_A_MESSAGE:
            yield nfnetlink.message(kind, flags, _FAMILIES[of.table], where + nfnetlink.nest(3, *chunk))
            chunk, size = [], 0
        chunk.append(packed)
        size += len(packed)
    if chunk:
        yield nfnetlink.message(kind, flags, _FAMILIES[of.table], where + nfnetlink.nest(3, *chunk))


_OUR_TABLE = nfnetlink.text(1, _TABLE)


class ElementSocket:
    """Commits element changes, and reads the generation id. For one thread."""

    def __init__(self) -> None:
        self._socket = nfnetlink.open_socket()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def generation(self) -> int:
        """The id of the ruleset's present generation; each commit, of whomever, adds one."""
        self._socket.send(nfnetlink.message(_GETGEN, 0, 0, b""))
        for kind, payload in nfnetlink.messages(self._socket.recv(4096)):
            if kind == _NEWGEN:
                return _generation_id(payload)
        raise BatchError(errno.EPROTO)

    def commit(self, changes: Iterable[Elements], generation: int) -> None:
        """Remove and add elements in one transaction, which becomes generation ``generation + 1``.

        Raises:
            BatchError: nothing was changed. ERESTART: the present generation is another than ``generation``;
                ENOENT: a set, or an element to be removed, is not there.
        """
        batch = [
            nfnetlink.message(
                _BATCH_BEGIN, 0, 0, nfnetlink.attr(_BATCH_GENID, _be32.pack(generation)), resource=_SUBSYSTEM
            )
        ]
        for change in changes:
            batch += _element_messages(_DELSETELEM, 0, change.set, ((key, PLAIN) for key in change.removed))
            batch += _element_messages(_NEWSETELEM, nfnetlink.CREATE, change.set, change.added)
        # An acknowledgement of the last element tells a batch that was taken from one that was not read.
        last = bytearray(batch[-1])
        struct.pack_into("=H", last, 6, struct.unpack_from("=H", last, 6)[0] | nfnetlink.ACK)
        batch[-1] = bytes(last)
        batch.append(nfnetlink.message(_BATCH_END, 0, 0, b"", resource=_SUBSYSTEM))
        self._socket.send(b"".join(batch))
        self._read_replies()

    def _read_replies(self) -> None:
        # The kernel works a batch off within send(), so all replies are there.
        acknowledged = False
        failed = 0
        while True:
            try:
                data = self._socket.recv(1 << 16, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            for kind, payload in nfnetlink.messages(data):
                if kind == nfnetlink.ERROR:
                    number = nfnetlink.error_of(payload)
                    acknowledged = acknowledged or number == 0
                    failed = failed or number
        if failed or not acknowledged:
            raise BatchError(failed or errno.EPROTO)


def _generation_id(payload: bytes) -> int:
    """NFTA_GEN_ID, the first attribute of NFT_MSG_NEWGEN."""
    return int(_be32.unpack_from(payload, 8)[0])


class TableWatch:
    """Hears of every commit that touches our tables (NFNLGRP_NFTABLES), ours included. For one thread."""

    def __init__(self) -> None:
        self._socket = nfnetlink.open_socket(1 << (_NFNLGRP_NFTABLES - 1))
        self._touched = False

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def wait(self) -> int | None:
        """Block until a commit has touched our tables.

        Returns:
            The commit's generation; None if notifications were lost, so that any commit might have.

        Raises:
            OSError: the socket was closed.
        """
        while True:
            try:
                data = self._socket.recv(1 << 18)
            except OSError as error:
                if error.errno == errno.ENOBUFS:
                    self._touched = False
                    return None
                raise
            for kind, payload in nfnetlink.messages(data):
                if kind == _NEWGEN:
                    touched, self._touched = self._touched, False
                    if touched:
                        return _generation_id(payload)
                elif not self._touched:
                    # The first attribute of every other message is the name of its table.
                    self._touched = payload[0] in _FAMILIES.values() and payload.startswith(_OUR_TABLE, 4)
