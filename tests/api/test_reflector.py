"""The source on the real API server: what it hands on is what the server holds, whatever happens on the way."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest
from kubernetes.client import ApiClient, Configuration
from kubernetes.config import incluster_config
from structlog.testing import CapturingLogger

from enforcer.kubernetes import reflector, resources
from enforcer.kubernetes.client import connect
from enforcer.kubernetes.reflector import ApiSource
from enforcer.model.changes import Change
from enforcer.model.objects import Namespace, NetworkPolicy, Node, Pod
from enforcer.model.sources import SourceError
from tests.api.controlplane import ControlPlane
from tests.api.processes import wait_until

SECONDS = 30.0


class Held:
    """What a source has handed on, by kind and key, and all that it has ever withdrawn."""

    def __init__(self) -> None:
        self.objects: dict[tuple[type, str], Any] = {}
        self.withdrawn: list[tuple[type, str]] = []
        self.synced = threading.Event()
        self._changed = threading.Condition()

    def take(self, changes: Sequence[Change]) -> None:
        with self._changed:
            for change in changes:
                if change.object is None:
                    self.objects.pop((change.kind, change.key), None)
                    self.withdrawn.append((change.kind, change.key))
                else:
                    self.objects[change.kind, change.key] = change.object
            self._changed.notify_all()

    def get(self, kind: type, key: str) -> Any:
        return self.objects.get((kind, key))

    def until(self, holds: Callable[[], object]) -> None:
        with self._changed:
            assert self._changed.wait_for(holds, SECONDS), self.objects


@contextmanager
def following(api: ApiClient) -> Iterator[tuple[Held, ApiSource]]:
    held = Held()
    source = ApiSource(api, changes=held.take, synced=held.synced.set)
    source.start()
    try:
        yield held, source
    finally:
        source.stop()


def pod(name: str, namespace: str, **spec: Any) -> dict[str, Any]:
    meta = {"name": name, "namespace": namespace, "labels": {"app": name}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": meta,
            "spec": {"containers": [{"name": "c", "image": "none"}], **spec}}  # fmt: skip


def policy(name: str, namespace: str) -> dict[str, Any]:
    meta = {"name": name, "namespace": namespace}
    spec = {"podSelector": {"matchLabels": {"app": "db"}}}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": meta, "spec": spec}


def apply(plane: ControlPlane, *objects: dict[str, Any]) -> None:
    plane.kubectl("apply", "-f", "-", stdin=json.dumps({"apiVersion": "v1", "kind": "List", "items": objects}))


def test_what_the_server_holds_is_handed_on_and_then_each_change(control_plane: ControlPlane) -> None:
    plane = control_plane
    plane.kubectl("create", "namespace", "changes")
    apply(plane, pod("db", "changes", nodeName="node-1"), policy("db", "changes"))
    with following(connect(plane.kubeconfig)) as (held, source):
        assert held.synced.wait(SECONDS)
        assert held.get(Namespace, "changes").labels["kubernetes.io/metadata.name"] == "changes"
        assert held.get(Pod, "changes/db").node == "node-1"
        assert held.get(NetworkPolicy, "changes/db").rejected is None
        plane.kubectl("label", "namespace", "changes", "team=a")
        held.until(lambda: held.get(Namespace, "changes").labels.get("team") == "a")
        plane.kubectl("label", "--overwrite", "-n", "changes", "pod", "db", "app=other")
        held.until(lambda: held.get(Pod, "changes/db").labels == {"app": "other"})
        status = json.dumps({"status": {"podIP": "10.1.0.5", "podIPs": [{"ip": "10.1.0.5"}, {"ip": "fd00::5"}]}})
        plane.kubectl("patch", "-n", "changes", "pod", "db", "--subresource=status", "--type=merge", "-p", status)
        held.until(lambda: len(held.get(Pod, "changes/db").addresses) == 2)
        apply(plane, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": "node-9"},
                      "spec": {"podCIDRs": ["10.9.0.0/24", "fd09::/64"]}})  # fmt: skip
        held.until(lambda: held.get(Node, "node-9"))
        plane.kubectl("delete", "-n", "changes", "networkpolicy", "db")
        held.until(lambda: held.get(NetworkPolicy, "changes/db") is None)
        assert source.rejections() == ()


def test_completed_and_host_network_pods_are_not_asked_for(control_plane: ControlPlane) -> None:
    plane = control_plane
    plane.kubectl("create", "namespace", "spared")
    apply(plane, pod("host", "spared", hostNetwork=True), pod("job", "spared"))
    with following(connect(plane.kubeconfig)) as (held, _):
        assert held.synced.wait(SECONDS)
        assert held.get(Pod, "spared/job")
        assert held.get(Pod, "spared/host") is None
        done = json.dumps({"status": {"phase": "Succeeded"}})
        plane.kubectl("patch", "-n", "spared", "pod", "job", "--subresource=status", "--type=merge", "-p", done)
        held.until(lambda: held.get(Pod, "spared/job") is None)


def test_more_objects_than_a_page_are_all_handed_on(control_plane: ControlPlane) -> None:
    plane = control_plane
    plane.kubectl("create", "namespace", "many")
    apply(plane, *(policy(f"p-{n}", "many") for n in range(520)))
    with following(connect(plane.kubeconfig)) as (held, _):
        assert held.synced.wait(SECONDS)
        assert sum(key.startswith("many/") for kind, key in held.objects if kind is NetworkPolicy) == 520
    plane.kubectl("delete", "namespace", "many", "--wait=false")


def test_a_policy_is_handed_on_again_when_asked_for_and_one_that_is_gone_is_not(control_plane: ControlPlane) -> None:
    plane = control_plane
    plane.kubectl("create", "namespace", "reread")
    apply(plane, policy("kept", "reread"), policy("gone", "reread"))
    with following(connect(plane.kubeconfig)) as (held, source):
        assert held.synced.wait(SECONDS)
        plane.kubectl("delete", "-n", "reread", "networkpolicy", "gone")
        held.until(lambda: held.get(NetworkPolicy, "reread/gone") is None)
        kept = held.objects.pop((NetworkPolicy, "reread/kept"))
        source.read_again(["reread/gone", "reread/never", "reread/kept"])
        held.until(lambda: held.get(NetworkPolicy, "reread/kept") == kept)
        assert held.get(NetworkPolicy, "reread/gone") is None


def test_a_user_who_may_not_read_is_told_which_resource_and_is_never_synced(control_plane: ControlPlane) -> None:
    stranger = control_plane.kubeconfig_of("stranger", user="stranger")
    with following(connect(stranger)) as (held, source):
        deadline = time.monotonic() + SECONDS
        while not all(kind.last_error for kind in source.status()):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert all("403" in kind.last_error for kind in source.status())
        assert not held.synced.is_set()


def test_a_restart_of_the_server_loses_no_change_and_takes_nothing_back(tmp_path: Path) -> None:
    with ControlPlane(tmp_path) as plane:
        apply(plane, pod("kept", "default"), pod("gone", "default"))
        with following(connect(plane.kubeconfig)) as (held, source):
            assert held.synced.wait(SECONDS)
            plane.stop_server()
            deadline = time.monotonic() + SECONDS
            while not all(kind.last_error for kind in source.status()):
                assert time.monotonic() < deadline
                time.sleep(0.05)
            assert held.get(Pod, "default/gone")
            plane.start_server()
            plane.kubectl("delete", "pod", "gone", "--force", "--grace-period=0")
            apply(plane, pod("new", "default"))
            held.until(lambda: held.get(Pod, "default/new") and held.get(Pod, "default/gone") is None)
            assert held.get(Pod, "default/kept")
            wait_until(lambda: not any(kind.last_error for kind in source.status()), "all is heard", seconds=SECONDS)


def token(plane: ControlPlane, name: str) -> str:
    """A token of a service account that is made, and may read."""
    plane.kubectl("create", "serviceaccount", name)
    resources = "namespaces,nodes,pods,networkpolicies.networking.k8s.io"
    plane.kubectl("create", "clusterrole", name, "--verb=list,watch", f"--resource={resources}")
    plane.kubectl("create", "clusterrolebinding", name, f"--clusterrole={name}", f"--serviceaccount=default:{name}")
    return plane.kubectl("create", "token", name).strip()


def test_a_service_account_token_that_is_replaced_on_disk_is_used_from_then_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loader(incluster_config.InClusterConfigLoader):
        """Looks at the file each time, and not once a minute."""

        def __init__(self, **files: Any) -> None:
            super().__init__(**files)  # type: ignore[no-untyped-call]  # the client has no types here
            self._token_refresh_period = timedelta(0)

    with ControlPlane(tmp_path) as plane:
        file = tmp_path / "token"
        file.write_text(token(plane, "first"))
        host, _, port = plane.url.removeprefix("https://").partition(":")
        monkeypatch.setenv(incluster_config.SERVICE_HOST_ENV_NAME, host)
        monkeypatch.setenv(incluster_config.SERVICE_PORT_ENV_NAME, port)
        monkeypatch.setattr(incluster_config, "SERVICE_TOKEN_FILENAME", str(file))
        monkeypatch.setattr(incluster_config, "SERVICE_CERT_FILENAME", str(plane.authority.certificate))
        monkeypatch.setattr(incluster_config, "InClusterConfigLoader", Loader)
        with following(connect(None)) as (held, source):
            assert held.synced.wait(SECONDS)
            file.write_text(token(plane, "second"))
            plane.kubectl("delete", "serviceaccount", "first")
            # Watches that stand were let in by the first; now each must be let in anew.
            plane.stop_server()
            plane.start_server()
            apply(plane, pod("new", "default"))
            held.until(lambda: held.get(Pod, "default/new"))
            wait_until(lambda: not any(kind.last_error for kind in source.status()), "all is heard", seconds=SECONDS)


class Refusing(BaseHTTPRequestHandler):
    """Refuses lists of namespaces as scripted, and notes when they were asked for; other kinds have no objects."""

    answers: list[tuple[int, dict[str, str]]]
    asked: list[float]

    def do_GET(self) -> None:
        status: int = 200
        headers: dict[str, str] = {}
        if "/namespaces" in self.path and "watch=1" not in self.path:
            type(self).asked.append(time.monotonic())
            status, headers = type(self).answers.pop(0) if type(self).answers else (200, {})
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if "watch=1" not in self.path:
            self.wfile.write(b'{"metadata": {"resourceVersion": "1"}, "items": []}')

    def log_message(self, *_: object) -> None: ...


def test_a_server_that_is_busy_is_asked_again_no_earlier_than_it_says_and_a_broken_one_ever_more_rarely() -> None:
    Refusing.asked = []
    Refusing.answers = [(429, {"Retry-After": "1"}), (500, {}), (503, {}), (502, {})]
    with serving(Refusing) as host, following(ApiClient(Configuration(host=host))) as (held, _):
        assert held.synced.wait(SECONDS)
    waits = [after - before for before, after in pairwise(Refusing.asked)]
    assert len(waits) == 4
    # Pauses of 0.25 s double with each failure; at least half of one is waited.
    assert all(waited >= least for waited, least in zip(waits, (1.0, 0.25, 0.5, 1.0), strict=True)), waits


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """A server of one's own; gives its URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def test_without_a_cluster_or_a_kubeconfig_the_error_names_the_ways_out(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="--kubeconfig or --source"):
        connect(None)
    (tmp_path / "bad").write_text("nothing")
    with pytest.raises(SourceError, match="bad"):
        connect(tmp_path / "bad")


class Script(BaseHTTPRequestHandler):
    """Plays a list for the namespaces that changes with each reading, and watches that fail in turn."""

    lists = 0
    watches: list[tuple[int, bytes]]
    asked: list[str]

    def do_GET(self) -> None:
        status, body, headers = 200, b"", {}
        if "/namespaces" not in self.path:
            body = b'{"metadata": {"resourceVersion": "1"}, "items": []}' if "watch=1" not in self.path else b""
        elif "watch=1" in self.path:
            type(self).asked.append(self.path)
            status, body = type(self).watches.pop(0) if type(self).watches else (200, b"")
            headers = {"Retry-After": "0"} if status == 429 else {}
        else:
            type(self).lists += 1
            items = [{"metadata": {"name": name, "resourceVersion": "5"}} for name in (f"list-{self.lists}", "kept")]
            body = json.dumps({"metadata": {"resourceVersion": f"{self.lists}0"}, "items": items}).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


def event(kind: str, **metadata: str) -> bytes:
    return json.dumps({"type": kind, "object": {"metadata": metadata}}).encode() + b"\n"


def test_a_watch_goes_on_where_it_stopped_and_is_listed_anew_only_when_it_is_too_old() -> None:
    gone = json.dumps({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}}).encode()
    Script.lists, Script.asked = 0, []
    Script.watches = [
        (200, event("ADDED", name="added", resourceVersion="11") + event("BOOKMARK", resourceVersion="15")),
        (429, b'{"message": "slow down"}'),
        (500, b"no JSON at all"),
        (200, event("ADDED", name="cut", resourceVersion="16") + b'{"type": "ADDED", "obj'),
        (200, gone + b"\n"),
    ]
    with serving(Script) as host, following(ApiClient(Configuration(host=host))) as (held, _):
        held.until(lambda: held.get(Namespace, "list-2"))
        # The second list has neither the first list's object nor what the watches had added.
        assert {key for kind, key in held.objects if kind is Namespace} == {"list-2", "kept"}
        # And what it has was never away, not for a moment.
        assert sorted(key for _, key in held.withdrawn) == ["added", "cut", "list-1"]
        wait_until(lambda: len(Script.asked) >= 6, "six watches were asked for", seconds=SECONDS)
    queries = [dict(parse_qsl(urlsplit(path).query)) for path in Script.asked[:6]]
    assert [query["resourceVersion"] for query in queries] == ["10", "15", "15", "15", "16", "20"]
    # A watch of which nothing is heard otherwise goes on from its last bookmark.
    assert {query["allowWatchBookmarks"] for query in queries} == {"1"}
    # Watches that all began together do not all end together.
    assert len({query["timeoutSeconds"] for query in queries}) > 1


class Paged(BaseHTTPRequestHandler):
    """Lists policies in two pages, others each time; the first watch is too old, and the page after it fails once."""

    lists = 0
    refused = False

    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, dict(parse_qsl(urlsplit(self.path).query))
        status, meta, names = 200, {"resourceVersion": "1"}, []
        if path.endswith("/networkpolicies") and "watch" in query:
            status = 410 if type(self).lists == 1 else 200
        elif path.endswith("/networkpolicies") and "continue" not in query:
            type(self).lists += 1
            meta["continue"], names = "more", ["a", "b"]
        elif path.endswith("/networkpolicies"):
            names = ["y", "z"]
            if type(self).lists == 2 and not type(self).refused:
                type(self).refused, status = True, 503
        # Whatever is listed later is of another version, but for b.
        items = [
            {"metadata": {"name": n, "namespace": "x", "resourceVersion": "1" if n == "b" else f"{type(self).lists}"}}
            for n in names
        ]
        self.send_response(status)
        self.end_headers()
        if status == 200 and "watch" not in query:
            self.wfile.write(json.dumps({"metadata": meta, "items": items}).encode())

    def log_message(self, *_: object) -> None: ...


def test_policies_that_are_listed_anew_are_handed_on_at_once_and_only_if_the_list_is_whole() -> None:
    Paged.lists, Paged.refused = 0, False
    batches: list[list[str]] = []
    synced = threading.Event()

    def take(changes: Sequence[Change]) -> None:
        batches.append([change.key for change in changes])

    with serving(Paged) as host:
        source = ApiSource(ApiClient(Configuration(host=host)), changes=take, synced=synced.set)
        source.start()
        try:
            assert synced.wait(SECONDS)
            wait_until(lambda: Paged.refused and Paged.lists >= 3 and len(batches) >= 3, "listed anew", seconds=SECONDS)
        finally:
            source.stop()
    # The first list, of which nothing is enforced before its end, comes page by page.
    assert batches[:3] == [["x/a", "x/b"], ["x/y", "x/z"], ["x/a", "x/y", "x/z"]]


class Silent(BaseHTTPRequestHandler):
    """Lists nothing, and says nothing more on a watch until the test is over; notes which were asked for."""

    over: threading.Event
    asked: list[str]

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        if "watch=1" in self.path:
            type(self).asked.append(urlsplit(self.path).path)
            self.wfile.flush()
            type(self).over.wait()
        else:
            self.wfile.write(b'{"metadata": {"resourceVersion": "1"}, "items": []}')

    def log_message(self, *_: object) -> None: ...


def test_a_watch_on_which_nothing_comes_is_given_up_and_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resources, "_SILENCE_SECONDS", 0.2)
    Silent.over, Silent.asked = threading.Event(), []
    with serving(Silent) as host, following(ApiClient(Configuration(host=host))) as (held, source):
        try:
            assert held.synced.wait(SECONDS)
            paths = [resource.path for resource in resources.RESOURCES]
            wait_until(lambda: min(map(Silent.asked.count, paths)) >= 2, "each is asked for again", seconds=SECONDS)
            assert source.alive()
        finally:
            Silent.over.set()


def _has_said(log: CapturingLogger) -> bool:
    return bool(log.calls)


@pytest.mark.parametrize(("headers", "least", "most"), [({}, 0.12, 0.38), ({"Retry-After": "2"}, 2.0, 3.0)])
def test_nodes_that_fail_together_do_not_ask_again_together(
    monkeypatch: pytest.MonkeyPatch, headers: dict[str, str], least: float, most: float
) -> None:
    """With the least, and with the most, that chance may give: what the log says of the pause."""
    for chance, pause in ((min, least), (max, most)):
        said = CapturingLogger()
        monkeypatch.setattr(reflector, "log", said)
        monkeypatch.setattr(random, "uniform", chance)
        Refusing.asked, Refusing.answers = [], [(429, headers)]
        with serving(Refusing) as host, following(ApiClient(Configuration(host=host))):
            wait_until(partial(_has_said, said), "the failure is told", seconds=SECONDS)
        assert said.calls[0].kwargs["again_in"] == pause
