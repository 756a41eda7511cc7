"""An ADD that fails, or whose agent is killed, at each of its steps: nothing of it is left, and the next one works."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cni import netns
from cni.netlink import rtnetlink
from cni.node.bridge import Bridge
from cni.plugin.operations import Operations
from cni.plugin.protocol import CniError, request
from cni.plugin.store import Store
from enforcer.model.addresses import Network
from enforcer.model.objects import Attachment

pytestmark = pytest.mark.netns
NETWORKS = (Network.parse("10.99.0.0/24"), Network.parse("fd99::/64"))
_numbers = itertools.count()


class Enforcer:
    """Keeps what it was told."""

    def __init__(self) -> None:
        self.held: set[str] = set()
        self.step: Callable[[], None] = lambda: None

    def attach(self, attachment: Attachment) -> None:
        self.step()
        self.held.add(attachment.key)

    def detach(self, key: str) -> None:
        self.held.discard(key)

    def ready(self) -> str | None:
        return None


class Place:
    """A node's and a pod's namespace, and the state of one agent after another."""

    def __init__(self, folder: Path) -> None:
        self.names = [f"dbtest-{os.getpid()}-{kind}-{next(_numbers)}" for kind in ("node", "pod")]
        self.path = folder / f"{self.names[0]}.db"
        self._home = netns.open_own()

    def __enter__(self) -> Place:
        for name in self.names:
            subprocess.run(["ip", "netns", "add", name], check=True)
        self.node, self.pod = (os.open(f"/run/netns/{name}", os.O_RDONLY) for name in self.names)
        return self

    def __exit__(self, *_: object) -> None:
        for descriptor, name in zip((self.node, self.pod), self.names, strict=True):
            os.close(descriptor)
            subprocess.run(["ip", "netns", "del", name], check=True)
        os.close(self._home)

    def agent(self) -> tuple[Operations, Enforcer, Store]:
        """Start: on the node's namespace, with what an agent before has left."""
        enforcer, store = Enforcer(), Store(self.path)
        operations = Operations(store=store, bridge=Bridge(), enforcer=enforcer)
        enforcer.held = {attachment.key for attachment in operations.start(NETWORKS)}
        return operations, enforcer, store

    def add(self, operations: Operations) -> None:
        environment = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c", "CNI_IFNAME": "eth0", "CNI_NETNS": "x"}
        config = b'{"cniVersion": "1.0.0", "name": "drawbridge", "type": "drawbridge"}'
        operations.run(request(environment, config, self.pod))

    def left(self) -> list[str]:
        """Links, addresses, routes, neighbours and forwarding entries of both namespaces, but for lo."""
        kinds = ("-br link", "-br addr", "route", "-6 route", "neigh", "-6 neigh")
        commands = [f"ip -n {name} {kind}" for name in self.names for kind in kinds]
        commands.append(f"bridge -n {self.names[0]} fdb")
        listed = [
            line
            for command in commands
            for line in subprocess.run(command.split(), capture_output=True, text=True, check=True).stdout.splitlines()
        ]
        # Whether the bridge has a carrier depends on whether it ever had a port.
        states = re.compile(r" (UP|DOWN|UNKNOWN|linkdown)\b|<.*>")
        return [" ".join(states.sub("", line).split()) for line in listed if not line.startswith("lo ")]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    with Place(tmp_path) as made:
        yield made


class Steps:
    """Counts the steps of an ADD, and does something before one of them: each netlink message is one."""

    def __init__(self, at: int, do: Callable[[], None]) -> None:
        self.at, self.do, self.taken = at, do, 0

    def __call__(self) -> None:
        self.taken += 1
        if self.taken == self.at:
            self.do()

    def wrap(self, patch: pytest.MonkeyPatch, enforcer: Enforcer, store: Store) -> None:
        send, reserve, confirm = rtnetlink.Netlink.run, store.reserve, store.confirm

        def run(nl: rtnetlink.Netlink, *messages: rtnetlink.Message) -> None:
            for message in messages:
                self()
                send(nl, message)

        def stepped(function: Callable[..., object]) -> Callable[..., object]:
            def run(*arguments: object, **named: object) -> object:
                self()
                return function(*arguments, **named)

            return run

        patch.setattr(rtnetlink.Netlink, "run", run)
        patch.setattr(store, "reserve", stepped(reserve))
        patch.setattr(store, "confirm", stepped(confirm))
        enforcer.step = self


def refuse() -> None:
    raise OSError(5, "made to fail")


def test_an_add_that_fails_at_any_step_leaves_nothing(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    home = netns.open_own()
    with netns.visit(place.node, home=home):
        operations, enforcer, store = place.agent()
        place.add(operations)
        operations.run(request({"CNI_COMMAND": "DEL", "CNI_CONTAINERID": "c", "CNI_IFNAME": "eth0"},
                               b'{"cniVersion": "1.0.0", "name": "drawbridge"}', None))  # fmt: skip
        before = place.left()
        for at in itertools.count(1):
            with monkeypatch.context() as patch:
                steps = Steps(at, refuse)
                steps.wrap(patch, enforcer, store)
                try:
                    place.add(operations)
                except (CniError, OSError) as error:
                    assert "made to fail" in str(error)
                else:
                    break
            assert place.left() == before, f"step {at}"
            assert not enforcer.held
            assert store.records() == []
        assert at > 15
        assert len(operations.attachments()) == 1
        store.close()
    os.close(home)


CHILD = """
import os, sys
from cni import netns
from pathlib import Path
import pytest
from tests.cni.test_interrupted import Place, Steps
place = Place.__new__(Place)
place.names, place.path, at = sys.argv[1:3], Path(sys.argv[3]), int(sys.argv[4])
place.pod = os.open("/run/netns/" + place.names[1], os.O_RDONLY)
operations, enforcer, store = place.agent()
steps = Steps(at, lambda: os.kill(os.getpid(), 9))
steps.wrap(pytest.MonkeyPatch(), enforcer, store)
place.add(operations)
print("added")
"""


def test_an_agent_that_is_killed_at_any_step_of_an_add_leaves_nothing_once_the_next_has_started(place: Place) -> None:
    home = netns.open_own()
    with netns.visit(place.node, home=home):
        operations, _, store = place.agent()
        store.close()
        before = place.left()
        for at in itertools.count(1, 3):
            words = ["ip", "netns", "exec", place.names[0], sys.executable, "-c", CHILD, *place.names]
            done = subprocess.run([*words, str(place.path), str(at)], capture_output=True, text=True, check=False)
            operations, enforcer, store = place.agent()
            if done.stdout == "added\n":
                break
            assert done.returncode == -9, done.stderr
            assert place.left() == before, f"step {at}"
            assert not enforcer.held
            assert store.records() == []
            store.close()
        assert at > 15
        assert len(operations.attachments()) == 1
        store.close()
    os.close(home)
