"""One agent a network namespace, and one a run directory: two would undo each other's work without end."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

_NAME = "\0drawbridge-agent"


class LockError(Exception):
    """Another agent runs; the text says where, and what to do."""


class Lock:
    """Holds a network namespace and, of an agent, its run directory; the kernel lets go when the process ends.

    Raises:
        LockError: another process holds one of them.
    """

    def __init__(self, run_dir: Path | None = None) -> None:
        # Abstract names are of one network namespace.
        self._namespace = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._namespace.bind(_NAME)
        except OSError:
            self._namespace.close()
            raise LockError("a drawbridge agent runs in this network namespace; stop it first") from None
        self._file: int | None = None
        if run_dir is None:
            return
        self._file = os.open(run_dir / "agent.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self.release()
            raise LockError(f"a drawbridge agent uses {run_dir}; stop it, or give another --run-dir") from None

    def release(self) -> None:
        """Let go before the process ends."""
        self._namespace.close()
        if self._file is not None:
            os.close(self._file)
