"""Addresses and networks of both IP families, and the interval arithmetic of ``ipBlock``.

An address is its 4 or 16 bytes in network order: compact, hashable, ordered within its family, and exactly what the
kernel wants in a set element. Intervals are pairs of integers, both ends included.
"""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

Address = bytes
"""4 bytes (IPv4) or 16 bytes (IPv6), network order."""

Interval = tuple[int, int]
"""First and last address of a range as integers, both included."""


class Family(Enum):
    """An IP family: its short name in set names, and its width in bits."""

    V4 = ("v4", 32)
    V6 = ("v6", 128)

    def __init__(self, label: str, bits: int) -> None:
        self.label = label
        self.bits = bits


def family_of(address: Address) -> Family:
    """The family of an address, told by its length."""
    return Family.V4 if len(address) == Family.V4.bits // 8 else Family.V6


def parse_address(text: str) -> Address:
    """Read an IPv4 or IPv6 address.

    Raises:
        ValueError: ``text`` is neither (zone indices and IPv4 octets with leading zeros included).
    """
    address = ipaddress.ip_address(text)
    if isinstance(address, ipaddress.IPv6Address) and address.scope_id is not None:
        raise ValueError(f"{text!r} has a zone index")
    return address.packed


def format_address(address: Address) -> str:
    """The canonical text of an address (RFC 5952 for IPv6), as nft prints it."""
    return socket.inet_ntop(socket.AF_INET if len(address) == Family.V4.bits // 8 else socket.AF_INET6, address)


@dataclass(frozen=True, slots=True, order=True)
class Network:
    """A CIDR prefix. ``first`` is the network address; host bits of the text are dropped, as the API server allows."""

    first: Address
    length: int

    @classmethod
    def parse(cls, text: str) -> Network:
        """Read ``address/length``.

        Raises:
            ValueError: ``text`` has no prefix length, or is no prefix of either family.
        """
        address, _, digits = text.rpartition("/")
        if not (digits.isascii() and digits.isdecimal()):
            raise ValueError(f"{text!r} has no prefix length")
        # A policy may have ten thousand: this takes a quarter of the time of ``ipaddress``.
        try:
            packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
        except OSError:
            raise ValueError(f"{address!r} is no address") from None
        length, bits = int(digits), len(packed) * 8
        if length > bits:
            raise ValueError(f"{text!r} has too long a prefix")
        host = (1 << (bits - length)) - 1
        return cls((int.from_bytes(packed, "big") & ~host).to_bytes(len(packed), "big"), length)

    @property
    def family(self) -> Family:
        """The family of the prefix."""
        return family_of(self.first)

    @property
    def interval(self) -> Interval:
        """All addresses of the prefix."""
        first = int.from_bytes(self.first, "big")
        return first, first + (1 << (len(self.first) * 8 - self.length)) - 1

    def covers(self, other: Network) -> bool:
        """Whether ``other`` lies within this prefix (equal counts)."""
        host_bits = len(self.first) * 8 - self.length
        return (
            len(other.first) == len(self.first)
            and other.length >= self.length
            and int.from_bytes(other.first, "big") >> host_bits == int.from_bytes(self.first, "big") >> host_bits
        )

    def __contains__(self, address: Address) -> bool:
        return len(address) == len(self.first) and (
            self.interval[0] <= int.from_bytes(address, "big") <= self.interval[1]
        )

    def __str__(self) -> str:
        return f"{format_address(self.first)}/{self.length}"


def subtract(network: Network, excepts: Iterable[Network]) -> tuple[Interval, ...]:
    """The addresses of ``network`` that are in none of ``excepts``.

    Returns:
        Disjoint intervals in ascending order, never two that touch; empty if nothing is left.
        Excepts of the other family or outside the network take nothing away.
    """
    start, end = network.interval
    left: list[Interval] = []
    for first, last in sorted(e.interval for e in excepts if len(e.first) == len(network.first)):
        if first > end:
            break
        if first > start:
            left.append((start, first - 1))
        start = max(start, last + 1)
    if start <= end:
        left.append((start, end))
    return tuple(left)


def merged(intervals: Iterable[Interval]) -> tuple[Interval, ...]:
    """Intervals in order, those that overlap or touch made one, as nft prints them."""
    found: list[Interval] = []
    for first, last in sorted(intervals):
        if found and first <= found[-1][1] + 1:
            found[-1] = (found[-1][0], max(found[-1][1], last))
        else:
            found.append((first, last))
    return tuple(found)


def format_interval(interval: Interval, family: Family) -> str:
    """An interval as nft prints it: an address, a prefix, or ``first-last``."""
    first, last = (value.to_bytes(family.bits // 8, "big") for value in interval)
    if first == last:
        return format_address(first)
    size = interval[1] - interval[0] + 1
    if size & (size - 1) == 0 and interval[0] % size == 0:
        return f"{format_address(first)}/{family.bits - size.bit_length() + 1}"
    return f"{format_address(first)}-{format_address(last)}"
