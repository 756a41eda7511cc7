"""The agent's HTTP side: /metrics, /livez and /readyz, for Prometheus and the kubelet's probes."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

from prometheus_client import CollectorRegistry, make_wsgi_app

Check = Callable[[], str | None]
"""Asks whether something holds: None if so, else the reason why not."""
Remarks = Callable[[], Iterable[str]]
"""Lines for a person, which decide nothing."""


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True
    request_queue_size = 128


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Quiet(WSGIRequestHandler):
    # Who says nothing for so long, in seconds, is not waited for.
    timeout = 5

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class names it so
        """Log no requests: probes come every few seconds."""


class HealthServer:
    """Serves on ``host:port`` in a thread of its own; ``remarks`` follow the answer of /readyz."""

    def __init__(
        self, address: str, registry: CollectorRegistry, *, live: Check, ready: Check, remarks: Remarks
    ) -> None:
        metrics = make_wsgi_app(registry)
        checks = {"/livez": live, "/readyz": ready}

        def application(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
            path = environ.get("PATH_INFO", "")
            if path == "/metrics":
                page: Iterable[bytes] = metrics(environ, start_response)
                return page
            check = checks.get(path)
            if check is None:
                start_response("404 Not Found", [("Content-Type", "text/plain")])
                return [b"/metrics, /livez, /readyz\n"]
            reason = check()
            start_response("503 Service Unavailable" if reason else "200 OK", [("Content-Type", "text/plain")])
            lines = [reason or "ok", *(remarks() if check is ready else ())]
            return ["".join(f"{line}\n" for line in lines).encode()]

        host, _, port = address.rpartition(":")
        server = _Server6 if ":" in host else _Server
        self._server = make_server(host.strip("[]"), int(port), application, server, _Quiet)
        self._thread = threading.Thread(target=self._server.serve_forever, name="health", daemon=True)

    def start(self) -> None:
        """Start to serve."""
        self._thread.start()

    def stop(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
