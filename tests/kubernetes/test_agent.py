"""The agent on the real API server: its policies hold for packets, and an absent server opens nothing."""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from enforcer.demo.lab import Lab
from tests.e2e.conftest import EXECUTABLE
from tests.kubernetes.controlplane import ControlPlane
from tests.kubernetes.test_api_source import apply, pod, policy

pytestmark = pytest.mark.netns
PORT = 5432


class ApiLab(Lab):
    """A node whose API server stands on its own loopback."""

    plane: ControlPlane | None = None

    def start_agent(self) -> None:
        if self.plane is None:
            enter = ("nsenter", f"--net=/run/netns/{self.name}")
            subprocess.run([*enter, "ip", "link", "set", "lo", "up"], check=True)
            self.plane = self._open.enter_context(ControlPlane(self.run_dir.parent / "plane", enter=enter))
            self._options += ["--kubeconfig", str(self.plane.kubeconfig)]
        super().start_agent()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[ApiLab]:
    (tmp_path / "plane").mkdir()
    with ApiLab(name=f"dbtest-{os.getpid()}-api", source=(), run_dir=tmp_path / "run", executable=EXECUTABLE,
                pod_cidrs=("10.99.0.0/24",)) as made:  # fmt: skip
        yield made


def reached(lab: Lab, expected: bool) -> None:
    """Wait until a connection is, or is not, made; a watch takes a moment."""
    web, db = lab.pods["default/web"], lab.pods["default/db"]
    deadline = time.monotonic() + 10
    while lab.connects(web, db.addresses[0], PORT, seconds=0.2) is not expected:
        assert time.monotonic() < deadline


def test_policies_of_the_api_hold_also_while_the_server_is_away_and_the_agent_restarts(lab: ApiLab) -> None:
    plane = lab.plane
    assert plane is not None
    apply(plane, pod("web", "default", nodeName=lab.name), pod("db", "default", nodeName=lab.name))
    lab.add_pod("default/web")
    lab.listen(lab.add_pod("default/db"), PORT)
    reached(lab, True)
    apply(plane, policy("db", "default"))
    reached(lab, False)
    assert lab.status()["source"] == plane.url
    plane.stop_server()
    lab.stop_agent(kill=True)
    rules = lab.nft("-s", "list", "ruleset")
    with pytest.raises(Exception, match="the agent does not start"):
        lab.start_agent()
    lab.stop_agent()
    assert lab.nft("-s", "list", "ruleset") == rules
    reached(lab, False)
    plane.start_server()
    lab.start_agent()
    reached(lab, False)
    allowed = policy("db", "default")
    allowed["spec"]["ingress"] = [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]}]
    apply(plane, allowed)
    reached(lab, True)
    for app, expected in (("other", False), ("web", True), ("other", False)):
        plane.kubectl("label", "--overwrite", "pod", "web", f"app={app}")
        # What the server has answered is in the kernel when status says so.
        assert lab.status(10)["synced"]
        assert lab.connects(lab.pods["default/web"], lab.pods["default/db"].addresses[0], PORT, seconds=0.3) is expected
    assert lab.status()["pods"]["local"] == 2
