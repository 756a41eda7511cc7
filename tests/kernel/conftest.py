"""A network namespace for a test that commits from its own process."""

from __future__ import annotations

import itertools
import os
import subprocess
from collections.abc import Iterator

import pytest

from cni import netns

_numbers = itertools.count()


@pytest.fixture
def network() -> Iterator[str]:
    """The name of a new network namespace, which the test's thread is in."""
    name = f"dbtest-{os.getpid()}-network{next(_numbers)}"
    home = netns.open_own()
    subprocess.run(["ip", "netns", "add", name], check=True)
    try:
        descriptor = os.open(f"/run/netns/{name}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            with netns.visit(descriptor, home=home):
                yield name
        finally:
            os.close(descriptor)
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True)
        os.close(home)
