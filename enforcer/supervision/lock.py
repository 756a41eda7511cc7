"""One agent a network namespace, and one a run directory: two would undo each other's work without end."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

_FOLDER = Path("/run/drawbridge")


class LockError(Exception):
    """Another agent runs; the text says where, and what to do."""


class Lock:
    """Holds a network namespace and, of an agent, its run directory; the kernel lets go when the process ends.

    Raises:
        LockError: another process holds one of them.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        # Only root can open these: nobody else can keep an agent from starting.
        _FOLDER.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._held: list[tuple[int, Path]] = []
        namespace = Path("/proc/thread-self/ns/net").stat().st_ino
        self._hold(_FOLDER / f"netns-{namespace}.lock", "runs in this network namespace; stop it first")
        if run_dir is not None:
            self._hold(run_dir / "agent.lock", f"uses {run_dir}; stop it, or give another --run-dir")

    def _hold(self, path: Path, what: str) -> None:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        self._held.append((file, path))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise LockError(f"a drawbridge agent {what}") from None

    def release(self) -> None:
        """Let go before the process ends."""
        while self._held:
            os.close(self._held.pop()[0])

    def remove(self) -> None:
        """Let go, and leave no file behind."""
        for _, path in self._held:
            path.unlink(missing_ok=True)
        self.release()
