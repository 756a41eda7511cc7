"""etcd and the real kube-apiserver, with certificates and kubeconfigs of their own."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.api.certificates import Authority, Pair
from tests.api.processes import Process, run, wait_until
from tests.tools.build import binary

SERVICE_CIDRS = ("10.96.0.0/16", "fd00:10:96::/112")
_SERVICE_HOSTS = ("10.96.0.1", "fd00:10:96::1", "kubernetes", "kubernetes.default", "kubernetes.default.svc")
_ISSUER = "https://kubernetes.default.svc"
_START_SECONDS = 60.0
ADMINISTRATORS = "system:masters"


class ControlPlane:
    """An API server that is ready; a context manager that ends what it started.

    Alone it has no controllers: no service account comes with a namespace, so none is asked for when a pod is made,
    and what no controller owns stays as it was written.

    Args:
        folder: for certificates and logs, which stay, and for data, which goes.
        address: that the server listens on; Services without a family of their own get one of its family.
        enter: words before those of each command, that have it run in another namespace.
        options: further ones of kube-apiserver.

    Attributes:
        url: where the server listens.
        kubeconfig: of an administrator.
        authority: who signs for the server and for its clients.
        service_cidrs: where Services get their addresses, the default family first, with a comma between.
        service_accounts: the key that signs service account tokens; its certificate has the public half.
    """

    def __init__(
        self, folder: Path, *, address: str = "127.0.0.1", enter: tuple[str, ...] = (), options: tuple[str, ...] = ()
    ) -> None:
        self.folder = folder
        self._address = address
        self._enter = enter
        self._options = options
        self._open = contextlib.ExitStack()
        self.authority = Authority(folder / "pki")
        self.service_accounts = self.authority.issue("service-accounts", user="service-accounts")
        self.service_cidrs = ",".join(sorted(SERVICE_CIDRS, key=lambda cidr: (":" in cidr) != (":" in address)))
        self.url = f"https://{f'[{address}]' if ':' in address else address}:{_free_port()}"
        self._etcd = f"http://127.0.0.1:{_free_port()}"
        self._server: Process | None = None
        self.kubeconfig = self.kubeconfig_of("admin", user="admin", group=ADMINISTRATORS)

    def __enter__(self) -> Self:
        try:
            self._open.callback(shutil.rmtree, self.folder / "etcd", ignore_errors=True)
            self._start_etcd(self._etcd)
            self.start_server()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    def start_server(self) -> None:
        """Start kube-apiserver, and return when it is ready."""
        self._server = self._start_server(self._etcd)
        wait_until(self._ready, "kube-apiserver is ready", seconds=_START_SECONDS, processes=[self._server])

    def stop_server(self) -> None:
        """End kube-apiserver; etcd goes on."""
        if self._server is not None:
            self._server.stop()

    def start(self, name: str, *words: str | Path) -> Process:
        """Start a program beside the server; it ends with it. Its log is ``name.log`` in the folder."""
        process = Process(*self._enter, *words, log=self.folder / f"{name}.log")
        self._open.callback(process.stop)
        return process

    def kubectl(self, *words: str | Path, stdin: str | None = None, seconds: float = 60.0) -> str:
        """Run kubectl as an administrator and return what it prints.

        Raises:
            ProgramError: it ends with another code than 0, or not within a time.
        """
        command = (*self._enter, binary("kubectl"), "--kubeconfig", self.kubeconfig, *words)
        # kubectl caches what it discovers, and reads preferences, in the home of its user.
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder)}
        return run(*command, stdin=stdin, env=environment, seconds=seconds)

    def get(self, *words: str) -> Any:
        """What ``kubectl get`` with these words returns, decoded."""
        return json.loads(self.kubectl("get", *words, "-o", "json"))

    def kubeconfig_of(self, name: str, *, user: str, group: str = "") -> Path:
        """Make ``name.kubeconfig`` for a user, who has a certificate."""
        return self.kubeconfig_with(name, self.authority.issue(name, user=user, group=group))

    def kubeconfig_with(self, name: str, pair: Pair) -> Path:
        """Make ``name.kubeconfig`` for the owner of a certificate."""
        client = {"client-certificate": str(pair.certificate), "client-key": str(pair.key)}
        server = {"server": self.url, "certificate-authority": str(self.authority.certificate)}
        path = self.folder / f"{name}.kubeconfig"
        content = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "test", "cluster": server}],
            "users": [{"name": name, "user": client}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": name}}],
            "current-context": "test",
        }
        path.write_text(json.dumps(content, indent=2))
        return path

    def _ready(self) -> bool:
        return self.kubectl("get", "--raw", "/readyz") == "ok"

    def _start_etcd(self, url: str) -> Process:
        return self.start(
            "etcd",
            "etcd",
            f"--data-dir={self.folder / 'etcd'}",
            f"--listen-client-urls={url}",
            f"--advertise-client-urls={url}",
            "--listen-peer-urls=http://127.0.0.1:0",
            "--unsafe-no-fsync",
            "--log-level=warn",
        )

    def _start_server(self, etcd: str) -> Process:
        server = self.authority.issue("server", user="kube-apiserver", hosts=(self._address, *_SERVICE_HOSTS))
        kubelet = self.authority.issue("kubelet-client", user="kube-apiserver", group=ADMINISTRATORS)
        # An endpoint of the Service "kubernetes" may not be on loopback; and no controller makes service accounts.
        alone = ("--endpoint-reconciler-type=none", "--disable-admission-plugins=ServiceAccount")
        return self.start(
            "kube-apiserver",
            binary("kube-apiserver"),
            f"--etcd-servers={etcd}",
            f"--bind-address={self._address}",
            f"--advertise-address={self._address}",
            f"--secure-port={self.url.rpartition(':')[2]}",
            f"--service-cluster-ip-range={self.service_cidrs}",
            f"--tls-cert-file={server.certificate}",
            f"--tls-private-key-file={server.key}",
            f"--client-ca-file={self.authority.certificate}",
            f"--kubelet-client-certificate={kubelet.certificate}",
            f"--kubelet-client-key={kubelet.key}",
            f"--kubelet-certificate-authority={self.authority.certificate}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--service-account-issuer={_ISSUER}",
            f"--service-account-key-file={self.service_accounts.certificate}",
            f"--service-account-signing-key-file={self.service_accounts.key}",
            "--authorization-mode=Node,RBAC",
            "--allow-privileged=true",
            *(alone if self._address == "127.0.0.1" else ()),
            *self._options,
        )


def _free_port() -> int:
    """A port of loopback that nothing listens on now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port
