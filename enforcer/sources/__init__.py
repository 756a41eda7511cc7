"""Sources of objects: decoded once, compared, and handed on as changes; what is refused is named with a reason."""

from __future__ import annotations

from dataclasses import dataclass


class SourceError(Exception):
    """A source cannot be used as configured; the text says what to correct."""


@dataclass(frozen=True, slots=True)
class Heard:
    """How old a source's state of one kind is: seconds since it was last heard of.

    ``trouble`` is why it is not heard of now, "" where it is.
    """

    kind: str
    seconds: float
    trouble: str = ""

    def __str__(self) -> str:
        if self.trouble:
            return f"{self.kind} not read for {self.seconds:.0f} s: {self.trouble}"
        return f"{self.kind} heard of {self.seconds:.0f} s ago"
