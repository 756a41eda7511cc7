"""``network: none`` on pods that the plugin ``bridge`` attaches, as Flannel has it do: one bridge switches them."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from enforcer.control.messages import Flow, Question
from enforcer.demo.lab import NETNS, Lab
from tests.api.processes import wait_until
from tests.e2e.conftest import EXECUTABLE, PODS, WEB_TO_DB, put

pytestmark = pytest.mark.netns
PORT = 5432
SETTINGS = ("net.bridge.bridge-nf-call-iptables", "net.bridge.bridge-nf-call-ip6tables")


class BridgeLab(Lab):
    """A node whose pods the reference plugin attaches, in the node's own namespace."""

    def cni(self, command: str, key: str, **_: Any) -> subprocess.CompletedProcess[str]:
        ranges = [[{"subnet": "10.99.0.0/24"}], [{"subnet": "fd99::/64"}]]
        ipam = {"type": "host-local", "dataDir": str(self.run_dir / "ipam"), "ranges": ranges}
        config = {"cniVersion": "1.0.0", "name": "cbr0", "type": "bridge", "bridge": "cni0", "hairpinMode": True,
                  "isDefaultGateway": True, "ipam": ipam}  # fmt: skip
        environment = {"CNI_COMMAND": command, "CNI_CONTAINERID": self.pods[key].namespace, "CNI_IFNAME": "eth0",
                       "CNI_NETNS": str(NETNS / self.pods[key].namespace), "CNI_PATH": "/usr/lib/cni",
                       "PATH": os.environ["PATH"]}  # fmt: skip
        return subprocess.run(["ip", "netns", "exec", self.name, "/usr/lib/cni/bridge"], input=json.dumps(config),
                              env=environment, capture_output=True, text=True, check=False)  # fmt: skip

    def set(self, value: int) -> None:
        """Whether iptables and nftables see what a bridge switches."""
        words = [f"{name}={value}" for name in SETTINGS]
        subprocess.run(["ip", "netns", "exec", self.name, "sysctl", "-q", "-w", *words], check=True)


@pytest.fixture
def lab(tmp_path: Path, source: Path) -> Iterator[BridgeLab]:
    config = tmp_path / "config.yaml"
    config.write_text("network: none\n")
    name = f"dbtest-{os.getpid()}-cni0"
    node = f"apiVersion: v1\nkind: Node\nmetadata: {{name: {name}}}\nspec: {{podCIDRs: [10.99.0.0/24, fd99::/64]}}\n"
    put(source / "node.yaml", node)
    with BridgeLab(name=name, source=("--source", source), run_dir=tmp_path / "run", executable=EXECUTABLE,
                   pod_cidrs=(), config=config) as made:  # fmt: skip
        made.set(1)
        for key in ("x/web", "x/db", "x/other"):
            made.add_pod(key)
        made.listen(made.pods["x/db"], PORT)
        pods = PODS + "---\napiVersion: v1\nkind: Pod\nmetadata: {name: other, namespace: x}\nspec: {}\n"
        for key in ("web", "db", "other"):
            status = {"podIPs": [{"ip": address} for address in made.pods[f"x/{key}"].addresses]}
            pods = _with_status(pods, key, status)
        put(source / "pods.yaml", pods)
        yield made


def _with_status(pods: str, name: str, status: dict[str, Any]) -> str:
    documents = pods.split("---\n")
    marked = [d + f"status: {json.dumps(status)}\n" if f"{{name: {name}, namespace" in d else d for d in documents]
    return "---\n".join(marked)


def until(lab: BridgeLab, source: str, expected: bool) -> None:
    """Wait until a connection to the database is, or is not, made over each family."""

    def found(address: str) -> bool:
        return lab.connects(lab.pods[source], address, PORT, seconds=0.3) is expected

    for address in lab.pods["x/db"].addresses:
        wait_until(partial(found, address), f"{source} reaches {address}: {expected}", seconds=20)


def test_pods_of_one_bridge_obey_where_the_kernel_hands_on_what_it_switches(lab: BridgeLab, source: Path) -> None:
    until(lab, "x/other", True)
    put(source / "policy.yaml", WEB_TO_DB)
    assert lab.status()["synced"]
    until(lab, "x/other", False)
    until(lab, "x/web", True)
    assert lab.status()["settings"] == []


def test_a_bridge_that_switches_past_policy_is_told_of(lab: BridgeLab, source: Path) -> None:
    put(source / "policy.yaml", WEB_TO_DB)
    until(lab, "x/other", False)
    lab.set(0)
    until(lab, "x/other", True)
    wait_until(lambda: bool(lab.status()["settings"]), "the settings are told of", seconds=20)
    for setting, text in zip(SETTINGS, lab.status()["settings"], strict=True):
        assert text.startswith(f"{setting} = 0: pods on cni0 reach each other past policy")
    lab.set(1)
    wait_until(lambda: not lab.status()["settings"], "nothing is told of", seconds=20)
    until(lab, "x/other", False)


def test_a_pod_of_whose_address_nothing_is_known_is_closed_both_ways(lab: BridgeLab, source: Path) -> None:
    until(lab, "x/web", True)
    (source / "pods.yaml").unlink()
    assert lab.status()["synced"]
    v4 = lab.pods["x/db"].addresses[0]
    assert not lab.connects(lab.pods["x/web"], v4, PORT, seconds=0.5)
    (flow,) = lab.ask(
        Question(source=lab.pods["x/web"].addresses[0], destination=v4, protocol="tcp", port=PORT), list[Flow]
    )
    assert [(answer.allowed, answer.agrees) for answer in flow.answers] == [(False, True), (False, True)]
    assert "no pod of it is known for" in flow.answers[0].reason
