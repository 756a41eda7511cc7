"""A certificate authority of a test's own: EC keys and certificates that openssl makes in a moment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tests.api.processes import run

# Without a configuration of its own, openssl reads the machine's.
_CONFIG = "[req]\ndistinguished_name = name\n[name]\n"
_DAYS = "2"


@dataclass(frozen=True, slots=True)
class Pair:
    """The files of a certificate and its key, in PEM."""

    certificate: Path
    key: Path


class Authority:
    """Issues certificates for servers and clients into a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._own: Pair | None = None
        self._own = self._request("ca", "/CN=drawbridge-test", "basicConstraints=critical,CA:TRUE")

    @property
    def certificate(self) -> Path:
        """The authority's own certificate."""
        return self._folder / "ca.crt"

    def issue(self, name: str, *, user: str, group: str = "", hosts: tuple[str, ...] = ()) -> Pair:
        """Make ``name.crt`` and ``name.key``, good for both ends of a connection.

        Args:
            name: of the files.
            user: the common name, which Kubernetes takes as the user's.
            group: the organisation, which Kubernetes takes as the user's group.
            hosts: addresses and DNS names of a server.
        """
        extensions = ["basicConstraints=critical,CA:FALSE", "extendedKeyUsage=serverAuth,clientAuth"]
        if hosts:
            kinds = (
                f"IP:{host}" if ":" in host or host.replace(".", "").isdigit() else f"DNS:{host}" for host in hosts
            )
            extensions.append(f"subjectAltName={','.join(kinds)}")
        return self._request(name, f"/O={group}/CN={user}" if group else f"/CN={user}", *extensions)

    def _request(self, name: str, subject: str, *extensions: str) -> Pair:
        made = Pair(self._folder / f"{name}.crt", self._folder / f"{name}.key")
        words: list[str | Path] = ["openssl", "req", "-config", "/dev/stdin", "-x509", "-days", _DAYS, "-nodes"]
        words += ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-subj", subject]
        words += [word for extension in extensions for word in ("-addext", extension)]
        words += ["-CA", self._own.certificate, "-CAkey", self._own.key] if self._own else []
        run(*words, "-out", made.certificate, "-keyout", made.key, stdin=_CONFIG)
        return made
