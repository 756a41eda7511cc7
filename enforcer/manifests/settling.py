"""Which files of a watched directory are not to be read at the moment: what stands for them stays.

A file is unsettled while someone writes it, and for a moment after it was renamed: Vim and Emacs rename a file to its
backup's name and then write it anew, and to take that for a removal would open, for as long as the editor takes,
what a policy in it closes. Pure: the clock comes from outside.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from typing import NamedTuple

HELD_SECONDS = 0.1
"""How long a file that was renamed is awaited again. An editor creates it anew within a millisecond."""


class _Held(NamedTuple):
    until: float
    cookie: int


class Unsettled:
    """The unsettled files, by path.

    Args:
        clock: seconds that never go back, such as ``time.monotonic``.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._written: set[str] = set()
        self._held: dict[str, _Held] = {}

    def __contains__(self, path: str) -> bool:
        return path in self._written or path in self._held

    def written(self, path: str) -> None:
        """Someone writes the file: it settles when it is closed."""
        self._held.pop(path, None)
        self._written.add(path)

    def renamed(self, path: str, *, cookie: int) -> None:
        """The file has another name now, and may be about to be written anew; ``cookie`` is inotify's."""
        self._written.discard(path)
        self._held[path] = _Held(self._clock() + HELD_SECONDS, cookie)

    def is_held(self, path: str) -> bool:
        """Whether the file was renamed a moment ago."""
        return path in self._held

    def any_renamed_by(self, moment: float) -> bool:
        """Whether a file is awaited that had been renamed at ``moment`` of the clock."""
        return any(held.until <= moment + HELD_SECONDS for held in self._held.values())

    def settle(self, path: str) -> None:
        """The file may be read, or is gone."""
        self._written.discard(path)
        self._held.pop(path, None)

    def arrived(self, cookie: int) -> set[str]:
        """Settle what was renamed with this cookie: it has become another manifest, so it was no backup."""
        return self._release(path for path, held in self._held.items() if held.cookie == cookie)

    def expired(self) -> set[str]:
        """Settle what was renamed and did not come back in time."""
        now = self._clock()
        return self._release(path for path, held in self._held.items() if held.until <= now)

    def keep_written(self, present: Collection[str]) -> None:
        """No one writes a file that is not there."""
        self._written.intersection_update(present)

    def clear(self) -> None:
        """All settles: events were lost, so a close may never be heard of."""
        self._written.clear()
        self._held.clear()

    @property
    def wait(self) -> float | None:
        """Seconds until a file has to be given up; None if none is awaited."""
        if not self._held:
            return None
        return max(0.0, min(held.until for held in self._held.values()) - self._clock())

    def _release(self, paths: Iterable[str]) -> set[str]:
        released = set(paths)
        for path in released:
            del self._held[path]
        return released
