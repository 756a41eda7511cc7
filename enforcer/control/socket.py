"""The agent's own door: one JSON question and one JSON answer a connection, on a unix socket that only root can use."""

from __future__ import annotations

import os
import socket
import socketserver
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

SOCKET = "agent.sock"
_MAX_LINE = 1 << 16

log = structlog.get_logger()

Operation = Callable[[Mapping[str, Any]], Any]
"""Takes the question's arguments; returns what msgspec can encode; raises ``ControlError`` for the one who asks."""


class ControlError(Exception):
    """The agent cannot be asked, or does not answer; the text is for the person who asked."""


class _Handler(socketserver.StreamRequestHandler):
    server: _Server
    timeout = 5

    def handle(self) -> None:
        """Answer one question."""
        try:
            question = msgspec.json.decode(self.rfile.readline(_MAX_LINE), type=dict[str, Any])
            operation = self.server.operations[str(question.pop("operation", ""))]
            answer = {"answer": operation(question)}
        except ControlError as error:
            answer = {"error": str(error)}
        except Exception as error:
            log.exception("control")
            answer = {"error": f"the agent failed: {error!r}"}
        self.wfile.write(msgspec.json.encode(answer) + b"\n")


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, operations: Mapping[str, Operation]) -> None:
        self.operations = operations
        super().__init__(path, _Handler)


class ControlServer:
    """Serves operations, in threads of its own."""

    def __init__(self, run_dir: Path, operations: Mapping[str, Operation]) -> None:
        self._path = run_dir / SOCKET
        self._path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self._server = _Server(str(self._path), operations)
        finally:
            os.umask(mask)
        self._thread = threading.Thread(target=self._server.serve_forever, name="control", daemon=True)

    def start(self) -> None:
        """Start to serve."""
        self._thread.start()

    def stop(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._path.unlink(missing_ok=True)


def ask(run_dir: Path, operation: str, *, seconds: float = 10.0, **arguments: Any) -> Any:
    """Ask the agent of a run directory.

    Raises:
        ControlError: there is no agent, it does not answer within ``seconds``, or it answers with an error.
    """
    path = run_dir / SOCKET
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
            asked.settimeout(seconds)
            asked.connect(str(path))
            asked.sendall(msgspec.json.encode({"operation": operation, **arguments}) + b"\n")
            with asked.makefile("rb") as reply:
                line = reply.readline()
    except OSError as error:
        raise ControlError(f"no agent answers at {path}: {error}; is `drawbridge agent` running?") from error
    if not line:
        raise ControlError(f"the agent at {path} ended before it answered")
    answer: dict[str, Any] = msgspec.json.decode(line)
    if "error" in answer:
        raise ControlError(answer["error"])
    return answer["answer"]
