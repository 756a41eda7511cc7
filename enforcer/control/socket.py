"""The agent's own door: one JSON question and one JSON answer a connection, on a unix socket that only root can use."""

from __future__ import annotations

import os
import socket
import socketserver
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import msgspec
import structlog

from enforcer.control.messages import AnyQuestion

SOCKET = "agent.sock"
_MAX_LINE = 1 << 16

log = structlog.get_logger()

T = TypeVar("T")


class _Error(msgspec.Struct):
    """The reply to a question that has no answer."""

    error: str


class ControlError(Exception):
    """The agent cannot be asked, or does not answer; the text is for the person who asked."""


class _Handler(socketserver.StreamRequestHandler):
    server: _Server
    timeout = 5

    def handle(self) -> None:
        """Answer one question."""
        try:
            question = msgspec.json.decode(self.rfile.readline(_MAX_LINE), type=AnyQuestion)
            reply: object = {"answer": self.server.answer(question)}
        except msgspec.DecodeError as error:
            reply = _Error(f"not a question that this agent knows: {error}; are command and agent of one version?")
        except ControlError as error:
            reply = _Error(str(error))
        except Exception as error:
            log.exception("control request failed")
            reply = _Error(f"the agent failed: {error!r}")
        self.wfile.write(msgspec.json.encode(reply) + b"\n")


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = True

    def __init__(self, path: str, answer: Callable[[AnyQuestion], object]) -> None:
        self.answer = answer
        super().__init__(path, _Handler)


class ControlServer:
    """Has questions answered, in threads of its own.

    ``answer`` returns what msgspec can encode, and raises ``ControlError`` for the one who asks.
    """

    def __init__(self, run_dir: Path, answer: Callable[[AnyQuestion], object]) -> None:
        self._path = run_dir / SOCKET
        self._path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self._server = _Server(str(self._path), answer)
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


def ask(run_dir: Path, question: AnyQuestion, answer: type[T], *, seconds: float = 10.0) -> T:
    """Ask the agent of a run directory; the answer is of type ``answer``.

    Raises:
        ControlError: there is no agent, it does not answer within ``seconds``, or it answers with an error.
    """
    path = run_dir / SOCKET
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asked:
            asked.settimeout(seconds)
            asked.connect(str(path))
            asked.sendall(msgspec.json.encode(question) + b"\n")
            with asked.makefile("rb") as reply:
                line = reply.readline()
    except OSError as error:
        raise ControlError(f"no agent answers at {path}: {error}; is `drawbridge agent` running?") from error
    if not line:
        raise ControlError(f"the agent at {path} ended before it answered")
    told = msgspec.json.decode(line, type=dict[str, msgspec.Raw])
    if "error" in told:
        raise ControlError(msgspec.json.decode(told["error"], type=str))
    try:
        return msgspec.json.decode(told["answer"], type=answer)
    except msgspec.DecodeError as error:
        raise ControlError(f"the agent at {path} is of another version: {error}") from error
