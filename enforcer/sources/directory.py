"""Manifests in a directory, watched with inotify: the present state of its objects, handed on as changes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from enforcer.model.changes import Change, Rejection


class DirectorySource:
    """Watches a directory of manifests from a thread of its own.

    ``changes`` gets what differs from what it was given before; ``synced`` is called once, after the first scan's
    changes. Both are called in the source's thread.
    """

    def __init__(
        self, directory: Path, *, changes: Callable[[Sequence[Change]], None], synced: Callable[[], None]
    ) -> None:
        raise NotImplementedError

    def start(self) -> None:
        """Begin; returns before the first scan is over.

        Raises:
            OSError: the directory is missing, is none, or cannot be watched.
        """
        raise NotImplementedError

    def stop(self) -> None:
        """End the thread; no callback is called after this returns."""
        raise NotImplementedError

    def rescan(self) -> None:
        """Block until all that the directory held at the call has been handed to ``changes``."""
        raise NotImplementedError

    def rejections(self) -> tuple[Rejection, ...]:
        """What is not enforced as written, at this moment; any thread may ask."""
        raise NotImplementedError
