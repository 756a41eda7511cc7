"""The agent on the real API server: its policies hold for packets, and an absent server opens nothing."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from enforcer.control.messages import Policies, PoliciesQuestion
from enforcer.demo.lab import Lab, LabError
from tests.api.controlplane import ControlPlane
from tests.api.processes import wait_until
from tests.api.test_reflector import apply, pod, policy
from tests.e2e.conftest import EXECUTABLE

pytestmark = pytest.mark.netns
PORT, METRICS = 5432, 9841
USER = "drawbridge"
# What may be stored since before the API server was strict (KEP-4858), and is read by each component as it likes.
LENIENT = "--feature-gates=StrictIPCIDRValidation=false"


def role(name: str, group: str, resources: list[str], verbs: list[str]) -> list[dict[str, Any]]:
    """A ClusterRole of one rule, bound to the user that the agent is."""
    rbac = {"apiVersion": "rbac.authorization.k8s.io/v1", "metadata": {"name": name}}
    rule = {"apiGroups": [group], "resources": resources, "verbs": verbs}
    bound = {"roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
             "subjects": [{"kind": "User", "name": USER, "apiGroup": "rbac.authorization.k8s.io"}]}  # fmt: skip
    return [{**rbac, "kind": "ClusterRole", "rules": [rule]}, {**rbac, "kind": "ClusterRoleBinding", **bound}]


ROLE = [
    *role("objects", "", ["namespaces", "nodes", "pods"], ["list", "watch"]),
    *role("policies", "networking.k8s.io", ["networkpolicies"], ["list", "watch"]),
]
EVENTS = role("events", "", ["events"], ["create", "patch"])


class ApiLab(Lab):
    """A node whose API server stands on its own loopback."""

    _plane: ControlPlane | None = None

    @property
    def plane(self) -> ControlPlane:
        assert self._plane is not None
        return self._plane

    def start_agent(self) -> None:
        if self._plane is None:
            enter = ("nsenter", f"--net=/run/netns/{self.name}")
            subprocess.run([*enter, "ip", "link", "set", "lo", "up"], check=True)
            folder = self.run_dir.parent / "plane"
            self._plane = self._open.enter_context(ControlPlane(folder, enter=enter, options=(LENIENT,)))
            apply(self._plane, *ROLE)
            self._options += ["--kubeconfig", str(self._plane.kubeconfig_of("agent", user=USER))]
        super().start_agent()


@pytest.fixture
def lab(tmp_path: Path) -> Iterator[ApiLab]:
    (tmp_path / "plane").mkdir()
    config = tmp_path / "config.yaml"
    config.write_text(f"metricsAddress: 127.0.0.1:{METRICS}\n")
    with ApiLab(name=f"dbtest-{os.getpid()}-api", source=(), run_dir=tmp_path / "run", executable=EXECUTABLE,
                pod_cidrs=("10.99.0.0/24",), config=config) as made:  # fmt: skip
        yield made


def reached(lab: Lab, expected: bool) -> None:
    """Wait until a connection is, or is not, made; a watch takes a moment."""
    web, db = lab.pods["default/web"], lab.pods["default/db"]
    wait_until(
        lambda: lab.connects(web, db.addresses[0], PORT, seconds=0.2) is expected, f"reached: {expected}", seconds=20
    )


def page(lab: ApiLab, path: str) -> tuple[int, str]:
    """The code and the body of a page of the agent's."""
    connection = http.client.HTTPConnection("127.0.0.1", METRICS, timeout=5)
    with lab.inside(lab.descriptor):
        connection.connect()
    with contextlib.closing(connection):
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def test_an_outage_of_the_api_leaves_the_agent_ready_and_says_how_old_its_state_is(lab: ApiLab) -> None:
    plane = lab.plane
    code, text = page(lab, "/readyz")
    assert code == 200
    assert text.startswith("ok\n")
    assert re.findall(r"^(\w+) heard of \d+ s ago$", text, re.MULTILINE) == [
        "Namespace",
        "Node",
        "Pod",
        "NetworkPolicy",
    ]
    plane.stop_server()

    def all_unread() -> bool:
        return len(re.findall(r"^\w+ not read for \d+ s: ", page(lab, "/readyz")[1], re.MULTILINE)) == 4

    wait_until(all_unread, "each kind is said to be unread", seconds=30)
    assert page(lab, "/readyz")[1].startswith("ok\n")
    assert page(lab, "/readyz")[0] == page(lab, "/livez")[0] == 200

    def age() -> float:
        found = re.search(r'^drawbridge_source_age_seconds{kind="Pod"} (\S+)$', page(lab, "/metrics")[1], re.MULTILINE)
        return float(found[1]) if found else -1.0

    before = age()
    assert before >= 0
    wait_until(lambda: age() > before + 0.5, "the age grows", seconds=10)
    shown = drawbridge("status", "--run-dir", lab.run_dir)
    assert shown.returncode == 1
    assert re.search(r"the last state stands: Pod not read for \d+ s: ", shown.stdout)
    plane.start_server()
    wait_until(lambda: "not read" not in page(lab, "/readyz")[1], "all is read", seconds=60)
    assert age() < before + 30
    shown = drawbridge("status", "--run-dir", lab.run_dir, "--wait", "10")
    assert shown.returncode == 0
    assert re.search(r"Pod heard of \d+ s ago", shown.stdout)


def drawbridge(*words: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "enforcer", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


def test_policies_of_the_api_hold_also_while_the_server_is_away_and_the_agent_restarts(lab: ApiLab) -> None:
    plane = lab.plane
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
    with pytest.raises(LabError, match="the agent does not start"):
        lab.start_agent()
    code, text = page(lab, "/readyz")
    assert code == 503
    assert text.startswith("the source has not been read yet\n")
    assert re.search(r"^Pod not read for \d+ s: .*Connection refused", text, re.MULTILINE)
    assert page(lab, "/livez") == (200, "ok\n")
    apply_later = pod("late", "default", nodeName=lab.name)
    with pytest.raises(LabError, match=r"attach default/late: .* the source has not been read yet"):
        lab.add_pod("default/late")
    assert lab.nft("-s", "list", "ruleset") == rules
    reached(lab, False)
    plane.start_server()
    wait_until(lambda: page(lab, "/readyz")[0] == 200, "the agent is ready", seconds=60)
    reached(lab, False)
    apply(plane, apply_later)
    assert lab.cni("ADD", "default/late").returncode == 0
    assert lab.status()["synced"]
    assert lab.cni("DEL", "default/late").returncode == 0
    plane.kubectl("delete", "pod", "late", "--force", "--grace-period=0")
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


def refused() -> dict[str, Any]:
    """A policy of which 1.37 says "must not have leading 0s": it could be read as octal."""
    rule = {"from": [{"ipBlock": {"cidr": "10.010.0.0/16"}}]}
    return policy("octal", "default") | {"spec": {"podSelector": {"matchLabels": {"app": "db"}}, "ingress": [rule]}}


def test_a_refused_policy_closes_its_pods_and_an_event_says_so_where_events_may_be_written(lab: ApiLab) -> None:
    plane = lab.plane
    apply(plane, pod("web", "default", nodeName=lab.name), pod("db", "default", nodeName=lab.name))
    lab.add_pod("default/web")
    lab.listen(lab.add_pod("default/db"), PORT)
    reached(lab, True)
    apply(plane, refused())
    reached(lab, False)
    log = lab.run_dir / "agent.log"
    wait_until(lambda: "create and patch of events" in log.read_text(), "the hint is logged", seconds=30)
    assert "octal" not in plane.kubectl("get", "events")
    assert lab.status(10)["synced"]
    (row,) = lab.ask(PoliciesQuestion(), Policies).policies
    assert "spec.ingress[0].from[0].ipBlock.cidr" in (row.rejected or "")
    apply(plane, *EVENTS)
    lab.stop_agent()
    lab.start_agent()
    wait_until(lambda: "octal" in plane.kubectl("get", "events"), "the Event is there", seconds=30)
    shown = plane.kubectl("events", "--for=networkpolicy/octal")
    assert "Warning" in shown and "PolicyRejected" in shown
    assert "spec.ingress[0].from[0].ipBlock.cidr: '10.010.0.0/16' is no CIDR" in shown
    assert "closed" in shown
    reached(lab, False)
