"""The unix socket that the CNI executable talks to; the framing is described in ``shim/drawbridge.c``."""

from __future__ import annotations

import os
import socket
import socketserver
import struct
import threading
import time
from pathlib import Path
from typing import Any

import msgspec
import structlog

from cni.plugin.operations import Operations
from cni.plugin.protocol import IO_FAILURE, CniError, failure, request

_MAGIC = 0x44425231
_HEADER = struct.Struct("!III")
_MAX_ENVIRONMENT, _MAX_CONFIG = 256 << 10, 1 << 20
_READ_SECONDS = 2.0
_CREDENTIALS = struct.Struct("iII")

log = structlog.get_logger()


class _Handler(socketserver.BaseRequestHandler):
    server: _Server

    def handle(self) -> None:
        """Take one request, do it, answer."""
        connection: socket.socket = self.request
        _, uid, _ = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))
        if uid != 0:
            return
        connection.settimeout(_READ_SECONDS)
        try:
            environment, config, netns = _receive(connection)
        except (OSError, ValueError) as error:
            log.warning("cni request malformed", error=str(error))
            return
        try:
            connection.sendall(b"\0")
            status, reply = self._do(environment, config, netns)
            connection.sendall(struct.pack("!II", status, len(reply)) + reply)
        except OSError as error:
            # The runtime has given up; it runs DEL, or ADD again.
            log.warning("cni reply lost", error=str(error))
        finally:
            if netns is not None:
                os.close(netns)

    def _do(self, environment: dict[str, str], config: bytes, netns: int | None) -> tuple[int, bytes]:
        started = time.perf_counter()
        words: dict[str, Any] = {
            "command": environment.get("CNI_COMMAND"),
            "container": environment.get("CNI_CONTAINERID", "")[:80],
        }
        try:
            asked = request(environment, config, netns)
            words |= {"pod": asked.pod}
            result = self.server.operations.run(asked)
        except CniError as error:
            log.warning("cni request", **words, code=error.code, error=str(error), ms=_ms(started))
            return 1, msgspec.json.encode(failure(error, _version(config)))
        except Exception as error:
            log.error("cni request", **words, ms=_ms(started), exc_info=error)
            broken = CniError(IO_FAILURE, f"unexpected: {error!r}", "see the agent's log")
            return 1, msgspec.json.encode(failure(broken, _version(config)))
        if result is not None:
            words |= {"addresses": [ip["address"] for ip in result["ips"]]}
        log.info("cni request", **words, ms=_ms(started))
        return 0, msgspec.json.encode(result) if result is not None else b""


class _Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    daemon_threads = False
    block_on_close = True
    request_queue_size = 128

    def __init__(self, path: str, operations: Operations) -> None:
        self.operations = operations
        super().__init__(path, _Handler)


class CniServer:
    """Serves operations on a socket that only root can use, in threads of its own."""

    def __init__(self, path: Path, operations: Operations) -> None:
        path.unlink(missing_ok=True)
        mask = os.umask(0o177)
        try:
            self._server = _Server(str(path), operations)
        finally:
            os.umask(mask)
        self._path = path
        self._thread = threading.Thread(target=self._server.serve_forever, name="cni", daemon=True)

    def start(self) -> None:
        """Start to serve."""
        self._thread.start()

    def stop(self) -> None:
        """Take no more requests, and let those in flight end."""
        self._server.shutdown()
        self._thread.join()
        self._path.unlink(missing_ok=True)
        self._server.server_close()


def _receive(connection: socket.socket) -> tuple[dict[str, str], bytes, int | None]:
    """Environment, configuration and the namespace's descriptor of a request."""
    head, descriptors, _, _ = socket.recv_fds(connection, _HEADER.size, 1)
    netns = descriptors[0] if descriptors else None
    try:
        head += _exactly(connection, _HEADER.size - len(head))
        magic, environment_size, config_size = _HEADER.unpack(head)
        if magic != _MAGIC or environment_size > _MAX_ENVIRONMENT or config_size > _MAX_CONFIG:
            raise ValueError("not a request of the CNI executable")
        block = _exactly(connection, environment_size).decode(errors="replace")
        environment = dict(entry.partition("=")[::2] for entry in block.split("\0") if entry)
        return environment, _exactly(connection, config_size), netns
    except BaseException:
        if netns is not None:
            os.close(netns)
        raise


def _exactly(connection: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = connection.recv(size - len(data))
        if not chunk:
            raise ValueError("the request is cut short")
        data += chunk
    return bytes(data)


def _version(config: bytes) -> str:
    try:
        body = msgspec.json.decode(config)
    except msgspec.DecodeError:
        return ""
    return str(body.get("cniVersion", "")) if isinstance(body, dict) else ""


def _ms(started: float) -> float:
    return round((time.perf_counter() - started) * 1e3, 3)
