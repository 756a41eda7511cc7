"""The demo is the README's promise, so it is run as a user would run it."""

from __future__ import annotations

import signal
import subprocess
import sys

import pytest

pytestmark = pytest.mark.netns
DEMO = [sys.executable, "-u", "-m", "enforcer", "demo"]


def namespaces(pid: int) -> list[str]:
    listed = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if line.startswith(f"drawbridge-demo-{pid}")]


def test_the_demo_ends_well_and_leaves_no_namespace() -> None:
    demo = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    output, _ = demo.communicate(timeout=60)
    assert demo.returncode == 0, output
    assert "All as expected." in output
    assert "\x1b" not in output
    assert namespaces(demo.pid) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_no_namespace_and_no_agent(number: signal.Signals) -> None:
    demo = subprocess.Popen(DEMO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert demo.stdout is not None
    for line in demo.stdout:
        if "Before the policies" in line:
            break
    assert namespaces(demo.pid)
    demo.send_signal(number)
    demo.communicate(timeout=30)
    assert demo.returncode != 0
    assert namespaces(demo.pid) == []
    agents = subprocess.run(["pgrep", "-f", f"enforcer agent .*drawbridge-demo-{demo.pid}"], check=False)
    assert agents.returncode == 1
