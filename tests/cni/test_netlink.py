"""rtnetlink's events, in a network namespace of their own."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.netns

SCRIPT = """
import subprocess
from cni.netlink.rtnetlink import Events

events = Events()
for number in range(5):
    subprocess.run(["ip", "link", "add", f"link{number}", "type", "bridge"], check=True)
first = events.wait(5)
try:
    rest = events.wait(0.2)
except TimeoutError:
    rest = []
print(sum(kind == 16 for kind, _ in first) >= 5, len(rest))
"""


def test_what_has_happened_comes_at_once() -> None:
    command = ["unshare", "--net", sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "0"]
