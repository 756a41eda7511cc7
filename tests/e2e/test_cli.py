"""Each command of the README, as a user types it, on a node with pods and policies."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from enforcer.cli import inspect
from enforcer.control.messages import Kernel, Pods, Status
from enforcer.demo.lab import Lab
from enforcer.reconcile.state import Stamps
from tests.e2e.conftest import EXECUTABLE, WEB_TO_DB, put

pytestmark = pytest.mark.netns
ROOT = Path(__file__).parents[2]


def drawbridge(lab: Lab, *words: str, status: int = 0) -> str:
    command = ["ip", "netns", "exec", lab.name, sys.executable, "-m", "enforcer", *words]
    if words[0] in {"status", "explain", "pods", "policies"}:
        command += ["--run-dir", str(lab.run_dir)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == status, done.stdout + done.stderr
    assert "\x1b" not in done.stdout
    return done.stdout + done.stderr


def test_the_commands_of_the_readme_are_those_that_are_tested_here() -> None:
    table = re.findall(r"`drawbridge (\w+)", (ROOT / "README.md").read_text())
    assert set(table) == {"agent", "status", "check", "render", "explain", "pods", "policies", "config", "install",
                          "uninstall"}  # fmt: skip


def test_config_prints_every_key(lab: Lab) -> None:
    assert {"network", "routing", "masquerade", "metricsAddress"} <= yaml.safe_load(drawbridge(lab, "config")).keys()


def test_install_puts_the_executable_where_it_is_told(lab: Lab, tmp_path: Path) -> None:
    words = ("install", "--cni-bin-dir", str(tmp_path), "--executable", str(EXECUTABLE))
    assert "is installed" in drawbridge(lab, *words)
    assert (tmp_path / "drawbridge").read_bytes() == EXECUTABLE.read_bytes()
    assert os.access(tmp_path / "drawbridge", os.X_OK)
    assert "was there" in drawbridge(lab, *words)


def test_what_the_agent_knows_is_shown_for_people_and_for_scripts(lab: Lab, source: Path) -> None:
    db, web = lab.add_pod("x/db"), lab.add_pod("x/web")
    lab.listen(db, 80)
    put(source / "policy.yaml", WEB_TO_DB)
    assert "in sync" in drawbridge(lab, "status", "--wait", "10")
    told = json.loads(drawbridge(lab, "status", "--wait", "10", "-o", "json"))
    assert {"synced", "node", "source", "pods", "policies", "rejected", "table"} <= told.keys()
    assert told["synced"] is True
    assert told["pods"] == {"local": 2, "cluster": 2}
    assert not lab.connects(web, db.addresses[0], 80, seconds=0.3)
    for word in ("x/db", "x/web", *db.addresses):
        assert word in drawbridge(lab, "pods")
    assert {row["pod"] for row in json.loads(drawbridge(lab, "pods", "-o", "json"))} == {"x/db", "x/web"}
    assert "x/db" in drawbridge(lab, "policies")
    (row,) = json.loads(drawbridge(lab, "policies", "-o", "json"))["policies"]
    assert row["denied"]["ingress"] > 0


@pytest.mark.parametrize(
    ("source_end", "destination", "port", "status", "words"),
    [
        ("x/web", "x/db", "5432", 0, "x/db allows it: ingress[0]"),
        (
            "x/web",
            "x/db",
            "80/tcp",
            1,
            "to allow it: add to a policy that selects x/db: ingress from x/web, port 80/tcp",
        ),
        ("x/db", "x/web", "icmp", 0, "no policy isolates the pod"),
        ("node", "x/db", "80", 0, "what a node sends to its own pods is not filtered"),
        ("192.0.2.1", "x/db", "5432/udp", 1, "isolated by x/db, and no rule of theirs matches"),
    ],
)
def test_explain_says_why_and_its_exit_status_whether(  # noqa: PLR0917 - one a column
    lab: Lab, source: Path, source_end: str, destination: str, port: str, status: int, words: str
) -> None:
    lab.add_pod("x/db")
    lab.add_pod("x/web")
    put(source / "policy.yaml", WEB_TO_DB)
    lab.status()
    said = drawbridge(lab, "explain", source_end, destination, port, status=status)
    assert words in said
    assert "DISAGREES" not in said
    if source_end != "node":
        assert "kernel agrees" in said
    flows = json.loads(drawbridge(lab, "explain", source_end, destination, port, "-o", "json", status=status))
    assert all(flow["allowed"] is (status == 0) for flow in flows)


def test_explain_of_what_is_not_known_says_where_to_look(lab: Lab) -> None:
    assert "drawbridge pods" in drawbridge(lab, "explain", "x/nobody", "x/db", "80", status=1)
    assert "PORT" in drawbridge(lab, "explain", "x/db", "x/db", "70000", status=2)


def test_a_command_without_an_agent_says_so(lab: Lab) -> None:
    lab.stop_agent()
    said = drawbridge(lab, "status", status=1)
    assert "drawbridge agent" in said


def test_the_version_and_help_of_each_command_are_there(lab: Lab) -> None:
    assert re.search(r"\d+\.\d+", drawbridge(lab, "version"))
    for command in (
        "agent",
        "status",
        "render",
        "check",
        "explain",
        "pods",
        "policies",
        "demo",
        "config",
        "install",
        "uninstall",
        "version",
    ):
        assert "Usage:" in subprocess.run([sys.executable, "-m", "enforcer", command, "--help"], capture_output=True,
                                          text=True, check=True).stdout  # fmt: skip


def test_a_reason_with_brackets_is_printed_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """The kernel's and the API server's words are not ours to read as markup."""
    said = "Error: syntax error [/x] [red]y"
    answer = Status(synced=False, node="n", source="s", pods=Pods(0, 0), attachments=0, policies=0, rejected=[],
                    sources=[], settings=[said], failure=said, stamps=Stamps(None, 0, said), unready=said,
                    problems=[said], kernel=Kernel("6.18", [said], []), table="t")  # fmt: skip
    inspect._print_status(answer)
    assert capsys.readouterr().out.count(said) == 6
