"""Kubernetes Events on policies that are not enforced as written, for ``kubectl get events``.

In: the policies that are rejected now. Out: one Event for each, whatever the number of nodes: a few of them, which the
policy's UID chooses, write it. Its name is made of the UID and of the text, so the first makes it and the others find
it there. The API server forgets an Event after an hour, so its time is written again in each period of 20 minutes, for
as long as the policy is rejected; the time is the period's beginning, so what is written after the first changes
nothing.

All on a thread of its own that nothing waits for: where Events may not be written, or the server is away, policies are
enforced all the same.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import msgspec
import structlog
from kubernetes.client import ApiClient

from enforcer.kubernetes.client import StatusError, request
from enforcer.model.changes import Rejection

log = structlog.get_logger()

REASON = "PolicyRejected"
MAX_MESSAGE = 1024
"""Characters, as many as a ``note`` of events.k8s.io/v1 may have."""
MAX_POLICIES = 100
"""So many policies at once are written of, the first by namespace and name: the same on every node."""
_WRITERS = 3
"""Nodes a policy: one may be down, one just being upgraded."""
_MAX_NAME = 253
_OUTCOME = "Until it is corrected or deleted, the pods that it selects are closed in the directions of its policyTypes."
_PERIOD_SECONDS = 1200
# Over which nodes spread themselves: after a change of policies, and, as a part of a period, after its beginning.
_SPREAD_SECONDS, _PERIOD_SPREAD = 10.0, 0.25
_BETWEEN_SECONDS = 1.0
_READ_SECONDS = 10.0
_FIRST_PAUSE_SECONDS, _LAST_PAUSE_SECONDS = 1.0, 300.0
_FORBIDDEN, _NOT_FOUND, _CONFLICT, _TOO_MANY, _SERVER_ERRORS = 403, 404, 409, 429, 500


class EventWriter:
    """Writes Events in a thread of its own.

    Args:
        api: see ``client.connect``.
        node: this node's name.
        nodes: asks for the names of all nodes.
        period_seconds: how long an Event is left as it is.
        spread_seconds: over which nodes spread themselves after a change.
        clock: seconds since 1970.
    """

    def __init__(
        self,
        api: ApiClient,
        *,
        node: str,
        nodes: Callable[[], Collection[str]],
        period_seconds: int = _PERIOD_SECONDS,
        spread_seconds: float = _SPREAD_SECONDS,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._api = api
        self._node = node
        self._nodes = nodes
        self._period = period_seconds
        self._spread = spread_seconds
        self._clock = clock
        self._changed = threading.Condition()
        self._stopped = threading.Event()
        self._rejections: tuple[Rejection, ...] = ()
        self._thread = threading.Thread(target=self._run, name="events", daemon=True)
        # Everything below belongs to that thread: in which period each Event was last written, by its name.
        self._written: dict[str, int] = {}
        self._last_error = ""

    def start(self) -> None:
        """Start to write."""
        self._thread.start()

    def stop(self) -> None:
        """Write no more; the thread ends with the process."""
        self._stopped.set()

    @property
    def standing(self) -> tuple[Rejection, ...]:
        """The rejections that are written of now."""
        return self._rejections

    def rejected(self, rejections: Sequence[Rejection]) -> None:
        """Take in which policies are rejected now; returns at once."""
        found = sorted((r for r in rejections if r.uid), key=lambda r: (r.namespace, r.name))
        with self._changed:
            self._rejections = tuple(found[:MAX_POLICIES])
            self._changed.notify_all()

    def _run(self) -> None:
        pause = _FIRST_PAUSE_SECONDS
        while not self._stopped.is_set():
            with self._changed:
                rejections = self._rejections
            try:
                self._write(rejections)
            except Exception as error:  # noqa: BLE001 - no error of transport or credentials ends this
                self._tell(error)
                self._rest(max(pause, getattr(error, "retry_after", 0.0)))
                pause = min(pause * 2, _LAST_PAUSE_SECONDS)
                continue
            pause = _FIRST_PAUSE_SECONDS
            # Without rejections there is nothing to write again.
            left = self._period - self._clock() % self._period if rejections else None
            with self._changed:
                changed = self._changed.wait_for(partial(self._differ, rejections), left)
            # Nodes do not all come at once.
            self._stopped.wait(random.uniform(0, self._spread if changed else self._period * _PERIOD_SPREAD))  # noqa: S311

    def _differ(self, seen: Sequence[Rejection]) -> bool:
        return self._rejections is not seen

    def _write(self, rejections: Sequence[Rejection]) -> None:
        """Write what was not yet written in this period, with pauses between."""
        nodes = self._nodes() if rejections else ()
        ours = (rejection for rejection in rejections if self._node in writers_of(rejection.uid, nodes, self._node))
        events = {event["metadata"]["name"]: event for event in map(event_of, ours)}
        self._written = {name: period for name, period in self._written.items() if name in events}
        period = int(self._clock() // self._period)
        for name, event in events.items():
            if self._stopped.is_set():
                return
            if self._written.get(name) == period:
                continue
            try:
                self._put(event, again=name in self._written, period=period)
            except StatusError as error:
                if error.code == _TOO_MANY or error.code >= _SERVER_ERRORS:
                    raise
                # It is this Event, or all, that the server does not want: the others are tried, and all next period.
                self._tell(error)
            else:
                self._last_error = ""
            self._written[name] = period
            self._rest(_BETWEEN_SECONDS)

    def _put(self, event: dict[str, Any], *, again: bool, period: int) -> None:
        meta = event["metadata"]
        path = f"/api/v1/namespaces/{meta['namespace']}/events"
        if again:
            try:
                self._send("PATCH", f"{path}/{meta['name']}", {"lastTimestamp": _time(period * self._period)})
            except StatusError as error:
                if error.code != _NOT_FOUND:
                    raise
            else:
                return
        now = _time(self._clock())
        try:
            self._send("POST", path, event | {"firstTimestamp": now, "lastTimestamp": now})
        except StatusError as error:
            # Another node was first.
            if error.code != _CONFLICT:
                raise

    def _send(self, method: str, path: str, body: dict[str, Any]) -> None:
        kind = "application/merge-patch+json" if method == "PATCH" else "application/json"
        with request(
            self._api, method, path, headers={"Content-Type": kind}, body=msgspec.json.encode(body),
            read_seconds=_READ_SECONDS,
        ) as response:  # fmt: skip
            response.drain_conn()

    def _tell(self, error: Exception) -> None:
        """Log what is wrong, once for as long as it stays the same."""
        kind = str(getattr(error, "code", type(error).__name__))
        if kind == self._last_error:
            return
        self._last_error = kind
        hint = "grant this user create and patch of events" if kind == str(_FORBIDDEN) else ""
        log.warning("events not written", error=str(error), hint=hint)

    def _rest(self, seconds: float) -> None:
        self._stopped.wait(seconds * random.uniform(1.0, 2.0))  # noqa: S311 - jitter


def writers_of(uid: str, nodes: Collection[str], own: str) -> list[str]:
    """The nodes that write a policy's Event: of those that are known, and this one, always the same few."""

    def rank(node: str) -> bytes:
        return hashlib.sha256(f"{uid}\0{node}".encode(errors="surrogatepass")).digest()

    return sorted({*nodes, own}, key=rank)[:_WRITERS]


def event_of(rejection: Rejection) -> dict[str, Any]:
    """The Event (v1) of a rejected policy, without its times; equal wherever it is made."""
    reason = " ".join(f"Not enforced as written: {rejection.reason.rstrip('.')}.".split())
    room = MAX_MESSAGE - len(_OUTCOME) - 1
    message = f"{reason if len(reason) <= room else f'{reason[: room - 1]}…'} {_OUTCOME}"
    digest = hashlib.sha256(f"{rejection.uid}\0{message}".encode(errors="surrogatepass")).hexdigest()[:16]
    about = {"kind": rejection.kind, "namespace": rejection.namespace, "name": rejection.name, "uid": rejection.uid}
    return {
        "apiVersion": "v1",
        "kind": "Event",
        "metadata": {
            "name": f"{rejection.name[: _MAX_NAME - len(digest) - 1].rstrip('-.')}.{digest}",
            "namespace": rejection.namespace,
        },
        "involvedObject": {"apiVersion": "networking.k8s.io/v1", **about},
        "type": "Warning",
        "reason": REASON,
        "message": message,
        "count": 1,
        "source": {"component": "drawbridge"},
        "reportingComponent": "drawbridge",
    }


def _time(seconds: float) -> str:
    """Seconds since 1970 as the API's time (RFC 3339, UTC)."""
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))
