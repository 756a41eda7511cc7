"""The demo is the README's promise, so it is run as a user would run it."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.netns
def test_the_demo_ends_well_and_leaves_no_namespace() -> None:
    done = subprocess.run([sys.executable, "-m", "enforcer", "demo"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "All as expected." in done.stdout
    assert "\x1b" not in done.stdout
    assert "drawbridge-demo" not in subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
