"""Containers of a runtime that we did not write: ``ctr run --cni`` of Debian's containerd."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer.control.messages import PodRow, PodsQuestion
from enforcer.demo.lab import Lab, Pod
from tests.e2e.conftest import WEB_TO_DB, put
from tests.e2e.containerd import Containerd, containerd

pytestmark = pytest.mark.netns
SERVE = ("/bin/busybox", "httpd", "-f", "-p", "80", "-h", "/bin")
GET = r"printf 'GET /busybox HTTP/1.0\r\n\r\n' | /bin/busybox nc -w 2 {} 80 | /bin/busybox head -n 1"


@pytest.fixture
def runtime(lab: Lab) -> Iterator[Containerd]:
    # The path of containerd's socket has room for 104 bytes: a test's own folder may be too deep.
    with tempfile.TemporaryDirectory(prefix="containerd-") as folder, containerd(lab, Path(folder, "node")) as made:
        yield made


def container_pod(lab: Lab, pid: int, known: set[str]) -> Pod:
    """A container's namespace, for probes; its address is the one that was not known before."""
    descriptor = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    new = [row for row in lab.ask(PodsQuestion(), list[PodRow]) if row.pod not in known]
    return Pod("container", "container", descriptor, new[0].addresses)


def test_containers_get_a_network_that_policies_hold_for_and_leave_nothing(
    lab: Lab, runtime: Containerd, source: Path
) -> None:
    db = lab.add_pod("x/db")
    lab.listen(db, 5432)
    known = {row.pod for row in lab.ask(PodsQuestion(), list[PodRow])}
    with runtime.run("server", *SERVE) as pid:
        server = container_pod(lab, pid, known)
        address = server.addresses[0]
        assert f"{address} comment" in lab.nft("list", "ruleset")
        assert lab.connects(db, address, 80)
        assert lab.connects(server, db.addresses[0], 5432)
        assert runtime.execute("server", "/bin/busybox", "cat", "/proc/sys/net/core/somaxconn").stdout == "777\n"
        with runtime.run("client", "/bin/busybox", "sleep", "600"):
            for served in server.addresses:
                assert " 200 OK" in runtime.execute("client", "/bin/busybox", "sh", "-c", GET.format(served)).stdout
        put(source / "policy.yaml", WEB_TO_DB.replace("podSelector: {matchLabels: {app: web}}", "podSelector: {}"))
        lab.status()
        assert not lab.connects(server, db.addresses[0], 5432)
        block = f"ipBlock: {{cidr: {address}/32}}"
        put(source / "policy.yaml", WEB_TO_DB.replace("podSelector: {matchLabels: {app: web}}", block))
        lab.status()
        assert lab.connects(server, db.addresses[0], 5432)
        os.close(server.descriptor)
    assert lab.status()["attachments"] == 1
    assert f"{address} comment" not in lab.nft("list", "ruleset")
