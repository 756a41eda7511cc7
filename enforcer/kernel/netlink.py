"""nf_tables over a netlink socket of our own: batches, the generation id, and what others change.

libnftables fetches the elements of every interval set of every table before it adds one element; a raw batch costs
tens of microseconds whatever else the kernel holds. Elements, the rules of the epoch and removals go this way; what is
new goes as text. Message and attribute numbers are those of linux/netfilter/nf_tables.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterable, Iterator
from functools import lru_cache

from enforcer.kernel import nfnetlink
from enforcer.ruleset.objects import PLAIN, Chain, Counter, Element, Set, Table
from enforcer.ruleset.plan import Step

_NFNLGRP_NFTABLES = 7
_SUBSYSTEM = 10
_BATCH_BEGIN, _BATCH_END, _BATCH_GENID = 0x10, 0x11, 1
_DELCHAIN, _NEWRULE, _DELRULE, _DELSET, _NEWSETELEM, _DELSETELEM, _NEWGEN, _GETGEN, _GETOBJ, _DELOBJ = (
    _SUBSYSTEM << 8 | n for n in (5, 6, 8, 11, 12, 14, 15, 16, 19, 20)
)
_JUMP = -3
_INTERVAL_END = 1
_COUNTER_OBJECT = 1
_CT_MARK, _REGISTER = 3, 1
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


def _number(kind: int, value: int) -> bytes:
    return nfnetlink.attr(kind, struct.pack(">I", value))


def _expression(name: str, *data: bytes) -> bytes:
    return nfnetlink.nest(1, nfnetlink.text(1, name), nfnetlink.nest(2, *data))


def _register_value(kind: int, value: int) -> bytes:
    # The mark is in the byte order of the machine, in the packet's register as in the connection.
    return nfnetlink.nest(kind, nfnetlink.attr(1, struct.pack("=I", value)))


_LOAD_MARK = _expression("ct", _number(1, _REGISTER), _number(2, _CT_MARK))
_STORE_MARK = _expression("ct", _number(2, _CT_MARK), _number(4, _REGISTER))


def stamp_expressions(mask: int, value: int) -> bytes:
    """The expressions of ``ct mark set ct mark & … | …``, as libnftables would encode it.

    There is no verdict among them, for which the kernel would check every chain of the table.
    """
    registers = (_number(1, _REGISTER), _number(2, _REGISTER), _number(3, 4))
    bits = (_register_value(4, ~mask & 0xFFFFFFFF), _register_value(5, value))
    return _LOAD_MARK + _expression("bitwise", *registers, *bits) + _STORE_MARK


def _of(table: Table, kind: int, flags: int, name_kind: int, name: str, *more: bytes) -> bytes:
    """A message about a named object of a table, or (chain names of rules) what is in it."""
    body = nfnetlink.text(1, _TABLE) + nfnetlink.text(name_kind, name) + b"".join(more)
    return nfnetlink.message(kind, flags, _FAMILIES[table], body)


def _refill(chain: Chain) -> Iterator[bytes]:
    yield _of(chain.table, _DELRULE, 0, 2, chain.name)
    if chain.stamp is not None:
        expressions = nfnetlink.nest(4, stamp_expressions(*chain.stamp))
        yield _of(chain.table, _NEWRULE, nfnetlink.CREATE | nfnetlink.APPEND, 2, chain.name, expressions)


def _packed(nft_set: Set, key: bytes, element: Element) -> bytes:
    """An element or, in an interval set, the two that begin an interval and that begin what comes after it."""
    if not nft_set.interval:
        return _element(key, element)
    half = len(key) // 2
    first, last = key[:half], key[half:]
    following = int.from_bytes(last, "big") + 1
    # Nothing comes after the last of all keys.
    end = b"" if following >> 8 * half else _element(following.to_bytes(half, "big"), PLAIN, flags=_INTERVAL_END)
    return _element(first, element) + end


@lru_cache(maxsize=32)
def _around_key(length: int, flags: int) -> tuple[bytes, bytes]:
    """What is before and after the key of an element without a comment: sets of ranges have thousands of them."""
    packed = _pack_element(bytes(length), PLAIN, flags)
    start = 3 * nfnetlink.HEADER
    return packed[:start], packed[start + length :]


def _element(key: bytes, element: Element, *, flags: int = 0) -> bytes:
    if element is PLAIN:
        before, after = _around_key(len(key), flags)
        return before + key + after
    return _pack_element(key, element, flags)


def _pack_element(key: bytes, element: Element, flags: int) -> bytes:
    parts = nfnetlink.nest(1, nfnetlink.attr(1, key))
    if flags:
        parts += _number(3, flags)
    if element.jump is not None:
        verdict = nfnetlink.nest(2, nfnetlink.attr(1, struct.pack(">i", _JUMP)), nfnetlink.text(2, element.jump))
        parts += nfnetlink.nest(2, verdict)
    if element.comment:
        comment = element.comment.encode() + b"\0"
        parts += nfnetlink.attr(6, bytes([0, len(comment)]) + comment)
    return nfnetlink.nest(1, parts)


def _element_messages(
    kind: int, flags: int, nft_set: Set, elements: Iterable[tuple[bytes, Element]]
) -> Iterator[bytes]:
    where = nfnetlink.text(1, _TABLE) + nfnetlink.text(2, nft_set.name)
    chunk: list[bytes] = []
    size = 0
    for packed in (_packed(nft_set, key, element) for key, element in elements):
        if size + len(packed) > _BYTES_A_MESSAGE:
            yield nfnetlink.message(kind, flags, _FAMILIES[nft_set.table], where + nfnetlink.nest(3, *chunk))
            chunk, size = [], 0
        chunk.append(packed)
        size += len(packed)
    if chunk:
        yield nfnetlink.message(kind, flags, _FAMILIES[nft_set.table], where + nfnetlink.nest(3, *chunk))


_OUR_TABLE = nfnetlink.text(1, _TABLE)


def messages(step: Step) -> Iterator[bytes]:
    """The messages of a step that adds no object: elements, rules of the epoch, removals."""
    for change in step.elements:
        yield from _element_messages(_DELSETELEM, 0, change.set, ((key, PLAIN) for key in change.removed))
        yield from _element_messages(_NEWSETELEM, nfnetlink.CREATE, change.set, change.added.items())
    for chain in step.refilled:
        yield from _refill(chain)
    for chain in step.old_chains:
        yield _of(chain.table, _DELRULE, 0, 2, chain.name)
    # A map that is not ours may lead to a chain that is not ours.
    for nft_set in step.old_sets:
        yield _of(nft_set.table, _DELSET, 0, 2, nft_set.name)
    for chain in step.old_chains:
        yield _of(chain.table, _DELCHAIN, 0, 3, chain.name)
    for counter in step.old_counters:
        yield _of(counter.table, _DELOBJ, 0, 2, counter.name, _number(3, _COUNTER_OBJECT))


class BatchSocket:
    """Commits batches, and reads the generation id and counters. For one thread."""

    def __init__(self) -> None:
        self._socket = nfnetlink.open_socket()

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _ask(self, request: bytes) -> Iterator[tuple[int, bytes]]:
        try:
            self._socket.send(request)
            return nfnetlink.messages(self._socket.recv(4096))
        except OSError as error:
            raise BatchError(error.errno or errno.EIO) from error

    def generation(self) -> int:
        """The id of the ruleset's present generation; each commit, of whomever, adds one."""
        for kind, payload in self._ask(nfnetlink.message(_GETGEN, 0, 0, b"")):
            if kind == _NEWGEN:
                return _generation_id(payload)
        raise BatchError(errno.EPROTO)

    def counter(self, counter: Counter) -> tuple[int, int]:
        """Packets and bytes of a counter.

        Raises:
            BatchError: it is not there.
        """
        request = _of(counter.table, _GETOBJ, 0, 2, counter.name, _number(3, _COUNTER_OBJECT))
        for kind, payload in self._ask(request):
            if kind == nfnetlink.ERROR:
                raise BatchError(nfnetlink.error_of(payload))
            counts = nfnetlink.attributes(nfnetlink.attributes(payload[4:])[4])
            return int.from_bytes(counts[2], "big"), int.from_bytes(counts[1], "big")
        raise BatchError(errno.EPROTO)

    def commit(self, batch: Iterable[bytes], generation: int) -> None:
        """Commit messages in one transaction, which becomes generation ``generation + 1``.

        Raises:
            BatchError: nothing was changed. ERESTART: the present generation is another than ``generation``;
                ENOENT: a set, or an element to be removed, is not there.
        """
        begin = nfnetlink.attr(_BATCH_GENID, _be32.pack(generation))
        messages = [nfnetlink.message(_BATCH_BEGIN, 0, 0, begin, resource=_SUBSYSTEM), *batch]
        # An acknowledgement of the last message tells a batch that was taken from one that was not read.
        last = bytearray(messages[-1])
        struct.pack_into("=H", last, 6, struct.unpack_from("=H", last, 6)[0] | nfnetlink.ACK)
        messages[-1] = bytes(last)
        messages.append(nfnetlink.message(_BATCH_END, 0, 0, b"", resource=_SUBSYSTEM))
        try:
            self._socket.send(b"".join(messages))
            self._read_replies()
        except OSError as error:
            # Too large for the socket's buffer, or the kernel has no memory for it.
            raise BatchError(error.errno or errno.EIO) from error

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
