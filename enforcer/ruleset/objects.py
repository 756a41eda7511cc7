"""nftables' own nouns as values: table, counter, set, verdict map, element, chain.

An object validates itself when it is made, so nothing that nft would refuse (or worse, read as something else) is ever
written. Names and comments come from people; the rest from ``translate``.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from enum import Enum

COMMENT_BYTES = 128
NAME_CHARACTERS = 255
NAME = re.compile(r"[A-Za-z0-9_.][A-Za-z0-9_./-]*\Z")
"""What the names of our objects look like."""
_UNQUOTABLE = re.compile(r'[^ -~]|["\\]')


class Table(Enum):
    """The two tables: pod policy, and the guard against forged addresses on bridge ports."""

    POLICY = ("inet", "NetworkPolicy for the pods of this node")
    GUARD = ("bridge", "pods send with their own addresses only")

    def __init__(self, family: str, comment: str) -> None:
        self.family = family
        self.comment = comment

    def __str__(self) -> str:
        return f"{self.family} drawbridge"


class KeyType(Enum):
    """The data types of set keys: nft's name and the width in bytes."""

    IPV4_ADDR = ("ipv4_addr", 4)
    IPV6_ADDR = ("ipv6_addr", 16)
    INET_SERVICE = ("inet_service", 2)
    MARK = ("mark", 4)
    IFNAME = ("ifname", 16)
    ETHER_ADDR = ("ether_addr", 6)

    def __init__(self, label: str, width: int) -> None:
        self.label = label
        self.width = width

    @property
    def padded(self) -> int:
        """The width in a concatenation, where each field starts on a register of 4 bytes."""
        return -(-self.width // 4) * 4


def comment_of(text: str) -> str:
    """Text that can stand in nft's quotes: printable ASCII, no quote or backslash, 128 bytes at most."""
    text = _UNQUOTABLE.sub("?", text)
    return text if len(text) <= COMMENT_BYTES else text[: COMMENT_BYTES - 3] + "..."


def digest(text: str, digits: int = 32) -> str:
    """Hexadecimal digits that stand for a text in a name.

    128 bits where nothing else tells two objects apart: whoever writes policies or labels must not be able to find two
    texts with the same digits. The names of chains have 64: two contents with the same are found out, and refused.
    """
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


CONTENT_DIGITS = 16


def _check_name(name: str) -> None:
    if len(name) > NAME_CHARACTERS or not NAME.match(name):
        raise ValueError(f"{name!r} cannot be the name of an nftables object")


def _check_comment(comment: str) -> None:
    if comment != comment_of(comment):
        raise ValueError(f"{comment!r} cannot be an nftables comment")


@dataclass(frozen=True, slots=True)
class Counter:
    """A named counter."""

    table: Table
    name: str
    comment: str = ""

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_comment(self.comment)


class Use(Enum):
    """What an element of a set does, which decides in which step of a change it comes and goes."""

    PERMISSION = "permission"
    """It allows: a peer, a port, a pod's own address."""
    DISPATCH = "dispatch"
    """It sends an isolated pod to the chain that decides, or closes."""
    LOCAL = "local"
    """It says that an address is a pod's of this node."""
    EPOCH = "epoch"
    """It has the stamp of the present epoch; it follows the epoch, not the policy."""
    OTHER = "other"
    """No verdict on a connection between pods follows from it."""


@dataclass(frozen=True, slots=True)
class Set:
    """A named set or, with ``verdicts``, a verdict map. ``interval`` sets hold ranges and have one key field."""

    table: Table
    name: str
    key: tuple[KeyType, ...]
    comment: str = ""
    use: Use = Use.OTHER
    interval: bool = False
    verdicts: bool = False

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_comment(self.comment)
        if self.interval and len(self.key) != 1:
            raise ValueError(f"set {self.name}: an interval set has one key field")

    @property
    def kind(self) -> str:
        """The keyword for it."""
        return "map" if self.verdicts else "set"

    @property
    def type(self) -> str:
        """The ``type`` statement."""
        key = " . ".join(field.label for field in self.key)
        return f"{key} : verdict" if self.verdicts else key

    def pack(self, *fields: bytes) -> bytes:
        """The key of an element as the kernel has it: fields padded to registers, unless there is only one."""
        if len(self.key) == 1:
            return fields[0]
        return b"".join(field.ljust(key.padded, b"\0") for key, field in zip(self.key, fields, strict=True))

    def unpack(self, key: bytes) -> list[bytes]:
        """Undo ``pack``."""
        if len(self.key) == 1:
            return [key]
        fields = []
        for field in self.key:
            fields.append(key[: field.width])
            key = key[field.padded :]
        return fields


@dataclass(frozen=True, slots=True)
class Element:
    """What goes with a key in a set: a comment, and in a verdict map the chain to jump to."""

    comment: str = ""
    jump: str | None = None

    def __post_init__(self) -> None:
        _check_comment(self.comment)


PLAIN = Element()
"""An element that is only its key."""


@dataclass(frozen=True, slots=True)
class Hook:
    """Where a base chain is attached; ``priority`` is as nft prints it, ``number`` what it stands for."""

    name: str
    priority: str
    number: int
    type: str = "filter"

    def __str__(self) -> str:
        return f"type {self.type} hook {self.name} priority {self.priority}; policy accept;"


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain, always whole. With a ``hook`` it is a base chain.

    What a chain is named for never changes under it: another content is another chain. The chain of the epoch
    (``epoch``) is the exception: it is refilled in place, and its one rule sets the bits ``stamp`` (mask, value) of the
    connection mark; None: it has no rule.
    """

    table: Table
    name: str
    rules: tuple[str, ...]
    comment: str = ""
    hook: Hook | None = None
    epoch: bool = False
    stamp: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_comment(self.comment)


def rule(*matches: str, verdict: str, counter: str = "", comment: str = "") -> str:
    """A rule: matches, then the counter, then the verdict, worded exactly as ``nft list`` prints it."""
    words = list(matches)
    if counter:
        words.append(f'counter name "{counter}"')
    words.append(verdict)
    if comment:
        words.append(f'comment "{comment_of(comment)}"')
    return " ".join(words)
