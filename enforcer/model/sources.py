"""What a source of objects is, and what it says of itself."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

from enforcer.model.changes import Rejection


class SourceError(Exception):
    """A source cannot be used as configured; the text says what to correct."""


@dataclass(frozen=True, slots=True)
class SourceStatus:
    """How old a source's state of one kind is: seconds since it was last heard of.

    ``last_error`` is why it is not heard of now, "" where it is.
    """

    kind: str
    seconds: float
    last_error: str = ""

    def __str__(self) -> str:
        if self.last_error:
            return f"{self.kind} not read for {self.seconds:.0f} s: {self.last_error}"
        return f"{self.kind} heard of {self.seconds:.0f} s ago"


class Source(Protocol):
    """What hands objects to the loop."""

    def start(self) -> None:
        """Begin."""

    def alive(self) -> bool:
        """Whether it runs."""

    def stop(self) -> None:
        """End; nothing is handed on after that."""

    def catch_up(self, seconds: float) -> bool:
        """Return when all that is there now has been handed on; False if that takes longer."""

    def read_again(self, policies: Collection[str]) -> None:
        """Hand on these policies (keys) as they are now, whether or not they are different, soon; any thread."""

    def rejections(self) -> tuple[Rejection, ...]:
        """What cannot be used, and why."""

    def status(self) -> tuple[SourceStatus, ...]:
        """How old what has been handed on is, by kind, where that is not simply now."""
