"""What the loop says of itself: to ``status`` and health as values, to metrics as it happens."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from enforcer.model.changes import Rejection
from enforcer.nodes.ownership import Ownership


class Observer(Protocol):
    """Is told of each transaction, on the loop's thread; ``observe.metrics`` is the one that matters."""

    def committed(self, *, whole: bool, seconds: float, elements: int) -> None:
        """A transaction was committed; ``whole`` if it compared all that the kernel holds."""

    def failed(self) -> None:
        """A transaction was refused."""

    def repaired(self) -> None:
        """Another process had changed our tables."""

    def cleared(self, connections: int) -> None:
        """Connections carried the stamp of an old epoch, and were cleared of it."""


def _nobody(_: object) -> None:
    return None


@dataclass(frozen=True, slots=True)
class Followers:
    """Who is told of what, on the loop's thread; nobody unless given.

    Attributes:
        ownership: is told of each new ownership, once this node's own Node is known.
        rejections: is told of all policies that are rejected, when others are.
        read_again: is given the keys of policies that the source has to hand on again.
    """

    ownership: Callable[[Ownership], None] = _nobody
    rejections: Callable[[Sequence[Rejection]], None] = _nobody
    read_again: Callable[[Collection[str]], None] = _nobody


@dataclass(frozen=True, slots=True)
class Stamps:
    """What is known of the stamps that connections carry.

    Attributes:
        epoch: the one that judged connections are stamped with; None: nothing is stamped, every packet is judged.
        cleared: how many connections were cleared of an old epoch's stamp.
        failure: why old stamps could not be cleared at the last try.
    """

    epoch: int | None
    cleared: int
    failure: str | None


@dataclass(frozen=True, slots=True)
class State:
    """The state of the loop; ``unread`` policies are closed until the source hands them on again."""

    synced: bool
    failure: str | None
    local_pods: int
    cluster_pods: int
    policies: int
    attachments: int
    rejections: tuple[Rejection, ...]
    unread: int
    stamps: Stamps
