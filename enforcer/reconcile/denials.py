"""How many packets each policy has denied: totals over isolation groups that come and go, and over restarts.

A group's counter counts what all its policies together denied, so each of them has denied it. When a group goes, its
count is kept here, and in a file, for the policies that are left.
"""

from __future__ import annotations

import contextlib
from collections.abc import Container, Iterator, Mapping
from pathlib import Path

import msgspec
import structlog

from enforcer.model.objects import Direction
from enforcer.policy.isolation import Group
from enforcer.translate.names import DeniedCounter

log = structlog.get_logger()

_FILE = "denied.json"

Denied = tuple[str, Direction]
"""A policy's key and a direction."""


class Denials:
    """The counts of groups that are gone. ``folder`` None keeps them in memory only."""

    def __init__(self, folder: Path | None) -> None:
        self._path = folder / _FILE if folder else None
        self._groups: Mapping[str, Group] = {}
        self._retired: dict[Denied, int] = dict(self._read())

    def follow(self, groups: Mapping[str, Group]) -> None:
        """Take in the isolation groups by the names of their counters."""
        self._groups = groups

    def retire(self, counted: Mapping[str, int]) -> None:
        """Keep the packets of counters that have gone, by name, as far as they are groups'."""
        pairs = [(place, packets) for name, packets in counted.items() if packets for place in self._places(name)]
        for place, packets in pairs:
            self._retired[place] = self._retired.get(place, 0) + packets
        if pairs:
            self._write()

    def keep(self, policies: Container[str]) -> None:
        """Forget all policies but these."""
        gone = [place for place in self._retired if place[0] not in policies]
        for place in gone:
            del self._retired[place]
        if gone:
            self._write()

    def totals(self, counters: Mapping[str, tuple[int, int]]) -> dict[Denied, int]:
        """Packets that each policy has denied in each direction, with what the present groups' counters say."""
        totals = dict(self._retired)
        for name, (packets, _) in counters.items():
            for place in self._places(name):
                totals[place] = totals.get(place, 0) + packets
        return totals

    def _places(self, counter: str) -> list[Denied]:
        # A name that was too long does not tell; one that an earlier agent left is of no group that is known.
        group = self._groups.get(counter) or DeniedCounter.parse(counter)
        return [] if group is None else [(key, group.direction) for key in group.policies]

    def _read(self) -> Iterator[tuple[Denied, int]]:
        if self._path is None:
            return
        try:
            kept = msgspec.json.decode(self._path.read_bytes(), type=dict[str, dict[str, int]])
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError) as error:
            log.warning("denial counts lost", file=str(self._path), error=str(error))
            return
        for key, packets in kept.items():
            for direction in Direction:
                if direction.value in packets:
                    yield (key, direction), packets[direction.value]

    def _write(self) -> None:
        if self._path is None:
            return
        kept: dict[str, dict[str, int]] = {}
        for (key, direction), packets in self._retired.items():
            kept.setdefault(key, {})[direction.value] = packets
        scratch = self._path.with_suffix(".tmp")
        with contextlib.suppress(OSError):
            scratch.write_bytes(msgspec.json.encode(kept))
            scratch.replace(self._path)
