"""What others do to a node: the agent puts back what is its own, and `drawbridge status` names the rest."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cni.plugin.conflist import FILE_NAME
from enforcer.demo.lab import Lab
from tests.api.processes import wait_until
from tests.e2e.conftest import EXECUTABLE, put
from tests.e2e.test_cli import drawbridge

pytestmark = pytest.mark.netns


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where the container runtime has its network configurations."""
    made = tmp_path / "net.d"
    made.mkdir()
    return made


@pytest.fixture
def node(tmp_path: Path, source: Path, folder: Path) -> Iterator[Lab]:
    with Lab(
        name=f"dbnode-{os.getpid()}",
        source=("--source", source, "--cni-conf-dir", folder, "--cni-bin-dir", EXECUTABLE.parent),
        run_dir=tmp_path / "run",
        executable=EXECUTABLE,
        pod_cidrs=("10.99.0.0/24",),
    ) as made:
        yield made


def says(lab: Lab, words: str) -> None:
    wait_until(lambda: words in drawbridge(lab, "status"), f"status says {words!r}", seconds=10)


def says_no_more(lab: Lab, words: str) -> None:
    wait_until(lambda: words not in drawbridge(lab, "status"), f"status says {words!r} no more", seconds=10)


def on_node(lab: Lab, *words: str) -> str:
    command = ["ip", "netns", "exec", lab.name, *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_the_runtimes_configuration_is_put_back(node: Lab, folder: Path) -> None:
    configuration = folder / FILE_NAME
    wait_until(configuration.exists, "the configuration is written", seconds=10)
    content = configuration.read_text()
    assert json.loads(content)["name"] == "drawbridge"
    configuration.unlink()
    wait_until(configuration.exists, "the configuration is written again", seconds=10)
    configuration.write_text("{}")
    wait_until(lambda: configuration.read_text() == content, "the configuration is right again", seconds=10)


def test_the_runtimes_configuration_is_there_only_when_pods_can_start_and_names_the_plugins_that_are_installed(
    tmp_path: Path, source: Path, folder: Path
) -> None:
    installed = tmp_path / "bin"
    installed.mkdir()
    (installed / "portmap").touch()
    with Lab(
        name=f"dbnode-{os.getpid()}-late",
        source=("--source", source, "--cni-conf-dir", folder, "--cni-bin-dir", installed),
        run_dir=tmp_path / "run",
        executable=EXECUTABLE,
        pod_cidrs=(),
    ) as lab:
        # The agent looks at settings, then at the configuration: by its second look, the first is over.
        on_node(lab, "sysctl", "-w", "net.ipv4.ip_forward=0")
        says(lab, "net.ipv4.ip_forward was 0 and is put back")
        on_node(lab, "sysctl", "-w", "net.ipv4.conf.all.send_redirects=1")
        says(lab, "net.ipv4.conf.all.send_redirects was 1 and is put back")
        assert list(folder.iterdir()) == []
        assert "no pod can start here: the node has no pod CIDR yet" in drawbridge(lab, "status")
        node = f"apiVersion: v1\nkind: Node\nmetadata: {{name: {lab.name}}}\nspec: {{podCIDRs: [10.96.0.0/24]}}\n"
        put(source / "node.yaml", node)
        wait_until((folder / FILE_NAME).exists, "the configuration is written", seconds=10)

        def named() -> list[str]:
            return [plugin["type"] for plugin in json.loads((folder / FILE_NAME).read_text())["plugins"]]

        assert named() == ["drawbridge", "portmap"]
        (installed / "bandwidth").touch()
        wait_until(lambda: named() == ["drawbridge", "portmap", "bandwidth"], "another plugin is named", seconds=10)
        (installed / "portmap").unlink()
        wait_until(lambda: named() == ["drawbridge", "bandwidth"], "a plugin is named no more", seconds=10)


def test_a_configuration_that_comes_to_precede_ours_is_named_until_it_is_gone(node: Lab, folder: Path) -> None:
    other = folder / "05-other.conflist"
    assert "problem on the node" not in drawbridge(node, "status")
    other.write_text("{}")
    says(node, f"problem on the node: {other}: the runtime takes it before ours; remove it")
    assert str(other) in (node.run_dir / "agent.log").read_text()
    other.unlink()
    says_no_more(node, "problem on the node")


def test_a_configuration_that_cannot_be_written_is_told(node: Lab, folder: Path) -> None:
    wait_until((folder / FILE_NAME).exists, "the configuration is written", seconds=10)
    (folder / FILE_NAME).unlink()
    folder.rmdir()
    folder.write_text("")
    says(node, "the network configuration cannot be written, no pod starts here")
    folder.unlink()
    says_no_more(node, "problem on the node")


def test_a_setting_that_another_program_makes_is_put_back_and_named(node: Lab) -> None:
    on_node(node, "sysctl", "-w", "net.ipv4.ip_forward=0")
    says(node, "a setting of the node is wrong: net.ipv4.ip_forward was 0 and is put back")
    assert on_node(node, "sysctl", "-n", "net.ipv4.ip_forward").strip() == "1"


def test_status_says_that_no_pod_can_start_without_the_bridge(node: Lab) -> None:
    assert "no pod can start" not in drawbridge(node, "status")
    on_node(node, "ip", "link", "del", "drawbridge0")
    says(node, "no pod can start here: bridge drawbridge0 is gone; restart the agent")
