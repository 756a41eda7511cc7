"""A node and pods as network namespaces: made, attached through the CNI executable, probed, and removed again."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from cni import netns
from enforcer.control.messages import AnyQuestion, StatusQuestion
from enforcer.control.socket import ControlError, ask

NETNS = Path("/run/netns")
T = TypeVar("T")

_START_SECONDS = 20.0
# A busy machine may lose a packet; TCP sends it again after a second.
_PROBE_SECONDS = 1.5


class LabError(Exception):
    """The laboratory cannot be set up; the text says what failed."""


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
    if done.returncode != 0:
        raise LabError(f"{' '.join(words)}: {done.stderr.strip()}")


def _remove_namespace(name: str) -> None:
    if (NETNS / name).exists():
        _run("ip", "netns", "del", name)


@dataclass(slots=True)
class Pod:
    """A pod: its namespace's descriptor, and its addresses once it is attached."""

    key: str
    namespace: str
    descriptor: int
    addresses: list[str] = field(default_factory=list)


class Lab:
    """One node with its agent; a context manager that removes all that it made.

    ``source`` is the agent's option and its value: ``--source`` and a directory, or ``--kubeconfig`` and a file.
    """

    def __init__(
        self,
        *,
        name: str,
        source: tuple[str | Path, ...],
        run_dir: Path,
        executable: Path,
        pod_cidrs: tuple[str, ...],
        config: Path | None = None,
    ) -> None:
        self.name = name
        self.run_dir = run_dir
        self._executable = executable
        self._options = [*map(str, source)]
        self._options += [word for cidr in pod_cidrs for word in ("--pod-cidr", cidr)]
        self._options += ["--config", str(config)] if config else []
        self._own = netns.open_own()
        self.descriptor = -1
        self._agent: subprocess.Popen[bytes] | None = None
        self._open = contextlib.ExitStack()
        self.pods: dict[str, Pod] = {}

    def __enter__(self) -> Self:
        try:
            self.descriptor = self._add_namespace(self.name)
            self.start_agent()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    @property
    def pid(self) -> int:
        """The agent's process."""
        if self._agent is None:
            raise LabError("the agent does not run")
        return self._agent.pid

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop_agent()
        self._open.close()
        os.close(self._own)

    def _add_namespace(self, name: str) -> int:
        """Make a namespace; returns a descriptor of it."""
        # A namespace lives on while a socket of it does; the name goes, whatever happens, from before it is there.
        self._open.callback(_remove_namespace, name)
        _run("ip", "netns", "add", name)
        descriptor = os.open(NETNS / name, os.O_RDONLY | os.O_CLOEXEC)
        self._open.callback(os.close, descriptor)
        return descriptor

    def start_agent(self) -> None:
        """Start the agent in the node's namespace, and wait until it is in sync."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        with (self.run_dir / "agent.log").open("ab") as log:
            words = ["ip", "netns", "exec", self.name, sys.executable, "-m", "enforcer", "agent"]
            words += ["--node-name", self.name, "--run-dir", str(self.run_dir)]
            self._agent = subprocess.Popen(  # noqa: S603 - our own words
                words + self._options, stdin=subprocess.DEVNULL, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + _START_SECONDS
        while True:
            try:
                if self.status()["synced"]:
                    return
            except ControlError:
                pass
            if self._agent.poll() is not None or time.monotonic() > deadline:
                raise LabError(f"the agent does not start: {(self.run_dir / 'agent.log').read_text()[-2000:]}")
            time.sleep(0.02)

    def stop_agent(self, *, kill: bool = False) -> None:
        """End the agent, by SIGKILL if ``kill``."""
        if self._agent is not None:
            (self._agent.kill if kill else self._agent.terminate)()
            self._agent.wait()
            self._agent = None

    def status(self, wait: float = 10.0) -> dict[str, Any]:
        """The agent's status, when the kernel holds what the source held, or ``wait`` seconds have passed."""
        return self.ask(StatusQuestion(wait), dict[str, Any], seconds=wait + 10)

    def ask(self, question: AnyQuestion, answer: type[T], *, seconds: float = 10.0) -> T:
        """Ask the agent; see ``control.socket.ask``."""
        return ask(self.run_dir, question, answer, seconds=seconds)

    def add_pod(self, key: str, *, kubernetes: bool = True) -> Pod:
        """Make a pod's namespace and attach it."""
        namespace = f"{self.name}-{key.replace('/', '-')}"
        pod = Pod(key, namespace, self._add_namespace(namespace))
        self.pods[key] = pod
        done = self.cni("ADD", key, kubernetes=kubernetes)
        if done.returncode != 0:
            raise LabError(f"CNI ADD of {key}: {done.stdout}")
        pod.addresses = [ip["address"].partition("/")[0] for ip in json.loads(done.stdout)["ips"]]
        return pod

    def cni(
        self,
        command: str,
        key: str,
        *,
        kubernetes: bool = True,
        config: dict[str, Any] | None = None,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run the CNI executable for a pod."""
        namespace, _, name = key.partition("/")
        args = f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}" if kubernetes else ""
        network = {"cniVersion": "1.0.0", "name": "drawbridge", "type": "drawbridge"} | (config or {})
        return subprocess.run(  # noqa: S603 - our own words
            [self._executable],
            input=json.dumps(network),
            env={
                "CNI_COMMAND": command,
                "CNI_CONTAINERID": self.pods[key].namespace,
                "CNI_NETNS": str(NETNS / self.pods[key].namespace),
                "CNI_IFNAME": "eth0",
                "CNI_PATH": "/usr/lib/cni",
                "CNI_ARGS": args,
                "DRAWBRIDGE_CNI_SOCKET": str(self.run_dir / "cni.sock"),
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )

    def nft(self, *words: str) -> str:
        """Run nft in the node's namespace and return what it prints."""
        command = ["ip", "netns", "exec", self.name, "nft", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 - our own words
        if done.returncode != 0:
            raise LabError(f"nft {' '.join(words)}: {done.stderr.strip()}")
        return done.stdout

    @contextlib.contextmanager
    def inside(self, descriptor: int) -> Iterator[None]:
        """Have the calling thread in a namespace; a socket that is made there stays there."""
        with netns.visit(descriptor, home=self._own):
            yield

    def listen(self, pod: Pod, port: int) -> None:
        """Accept TCP connections to a pod's port, of every family; the kernel alone answers."""
        with self.inside(pod.descriptor):
            server = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=4096)
        self._open.callback(server.close)

    def connects(self, source: Pod, address: str, port: int, *, seconds: float = _PROBE_SECONDS) -> bool:
        """Whether a TCP connection is made within a time."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.inside(source.descriptor):
            probe = socket.socket(family, socket.SOCK_STREAM)
        with probe:
            probe.settimeout(seconds)
            try:
                probe.connect((address, port))
            except OSError:
                return False
        return True
