"""Machines of a test cluster on this one: namespaces, a cgroup, a link to the others, and the programs of a node."""

from __future__ import annotations

import itertools
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.api.controlplane import ControlPlane
from tests.api.processes import Process, ProgramError, run, wait_until
from tests.cluster.fabric import Fabric, addresses
from tests.cluster.images import PAUSE
from tests.tools.build import binary

POD_CIDRS = ("10.244.0.0/16", "fd00:10:244::/56")
_SCRIPT = Path(__file__).with_name("machine.sh")
_CGROUPS = Path("/sys/fs/cgroup")
_SECONDS = 30.0
_numbers = itertools.count()


class Machine:
    """A node. Its files outlive ``stop``, as those of a machine that loses power do.

    Attributes:
        name: of the machine, of its node and of its link to the fabric.
        addresses: on the fabric, IPv4 and then IPv6.
        folder: for what the machine writes, and the logs of its programs.
    """

    def __init__(self, folder: Path, *, number: int, fabric: Fabric, control_plane: ControlPlane, order: slice) -> None:
        """Write what the programs of the node are told; nothing is started.

        Args:
            folder: that does not exist yet; it has the machine's name.
            number: the fabric's.
            fabric: that the machine is linked to.
            control_plane: of its cluster.
            order: puts a pair of addresses, IPv4 and then IPv6, in the order that the node prefers.
        """
        self.name = folder.name
        self.addresses = addresses(number)
        self.folder = folder
        self._number = number
        self._order = order
        self._fabric = fabric
        self._process: Process | None = None
        self._groups = _cgroups(f"drawbridge-{os.getpid()}-{next(_numbers)}")
        folder.mkdir()
        self._configure(control_plane)

    def start(self) -> None:
        """Switch the machine on; returns when it is on the network, before its node is ready.

        Raises:
            ProgramError: it ends, or is not there in time.
        """
        told = self.folder / "pid"
        for mark in (told, self.folder / "up"):
            mark.unlink(missing_ok=True)
        for group in self._groups:
            _make_cgroup(group)
        binaries = binary("kubelet").parent
        self._process = Process(
            _SCRIPT,
            self.folder,
            self.name,
            ",".join(self.addresses[self._order]),
            binaries,
            *self._groups,
            log=self.folder / "machine.log",
        )
        wait_until(told.exists, f"{self.name} is up", seconds=_SECONDS, processes=[self._process])
        self._fabric.link(self.name, number=self._number, pid=self.pid)

    def wait(self) -> None:
        """Return when containerd answers and the node's other programs are started.

        Raises:
            ProgramError: one ends, or they are not there in time.
        """
        wait_until((self.folder / "up").exists, f"{self.name} runs", seconds=_SECONDS, processes=[self.process])

    def stop(self) -> None:
        """Cut the power, if it is on; returns when nothing of the machine runs any more.

        Raises:
            ProgramError: something of it does not end.
        """
        if self._process is not None:
            self._process.stop()
            self._process = None
            # The link goes with the namespace, but not at once.
            self._fabric.unlink(self.name)
        wait_until(lambda: _remove_cgroups(self._groups), f"{self.name} is down", seconds=_SECONDS)

    @property
    def running(self) -> bool:
        return self._process is not None

    @property
    def process(self) -> Process:
        """What runs as long as the machine does.

        Raises:
            ProgramError: it does not run.
        """
        if self._process is None:
            raise ProgramError(f"{self.name} does not run")
        return self._process

    @property
    def pid(self) -> int:
        """The machine's process 1, as this one counts.

        Raises:
            ProgramError: it does not run.
        """
        self.process.check()
        return int((self.folder / "pid").read_text())

    def run(self, *words: str | Path, stdin: str | Path | None = None, seconds: float = 60.0) -> str:
        """Run a program in the machine and return what it prints.

        Args:
            words: the program and its arguments.
            stdin: text, or a file of this machine, that it reads.
            seconds: that it may take; it is ended after them.

        Raises:
            ProgramError: it ends with another code than 0, or not within the time.
        """
        enter = ("nsenter", f"--target={self.pid}", "--pid", "--mount", "--net", "--uts", "--ipc", "--cgroup")
        # nsenter passes no signal on: what it started must end with it.
        return run(*enter, "setpriv", "--pdeathsig", "KILL", *words, stdin=stdin, seconds=seconds)

    def forget(self) -> None:
        """Remove all that the machine wrote but its logs."""
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)

    def _configure(self, control_plane: ControlPlane) -> None:
        authority = control_plane.authority
        kubelet = authority.issue(
            self.name, user=f"system:node:{self.name}", group="system:nodes", hosts=(self.name, *self.addresses)
        )
        control_plane.kubeconfig_with(self.name, kubelet).rename(self.folder / "kubelet.kubeconfig")
        proxy = control_plane.kubeconfig_of("kube-proxy", user="system:kube-proxy")
        self._write("network", "".join(f"{line}\n" for line in _network(self.addresses, routed=self._fabric.routed)))
        self._write("containerd.toml", _CONTAINERD)
        self._write(
            "kube-proxy.json",
            {
                "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
                "kind": "KubeProxyConfiguration",
                "mode": "nftables",
                "clientConnection": {"kubeconfig": str(proxy)},
                "hostnameOverride": self.name,
                "clusterCIDR": ",".join(POD_CIDRS[self._order]),
                # The limits of connection tracking are the host's.
                "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
            },
        )
        self._write(
            "kubelet.json",
            {
                "apiVersion": "kubelet.config.k8s.io/v1beta1",
                "kind": "KubeletConfiguration",
                "authentication": {"x509": {"clientCAFile": str(authority.certificate)}},
                "tlsCertFile": str(kubelet.certificate),
                "tlsPrivateKeyFile": str(kubelet.key),
                "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
                "cgroupDriver": "cgroupfs",
                "failCgroupV1": False,
                "failSwapOn": False,
                "makeIPTablesUtilChains": False,
                "resolvConf": "",
                "volumePluginDir": "/var/lib/kubelet/volume-plugins",
                # Tests may fill the host's memory and disk further than a kubelet likes.
                "evictionHard": {"memory.available": "50Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
                "imageGCHighThresholdPercent": 100,
                "imageGCLowThresholdPercent": 99,
            },
        )

    def _write(self, name: str, content: str | dict[str, Any]) -> None:
        (self.folder / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2))


# restrict_oom_score_adj: root may lack CAP_SYS_RESOURCE, and no container would start.
_CONTAINERD = f"""version = 2
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{PAUSE}"
restrict_oom_score_adj = true
"""


def _network(own: tuple[str, str], *, routed: bool) -> Iterator[str]:
    """Commands of ``ip -batch``, that connect a machine which has these addresses; ``routed`` as the fabric is."""
    (address, address6), (gateway, gateway6) = own, addresses(1)
    length, length6 = (32, 128) if routed else (24, 64)
    yield "link set lo up"
    yield f"address add {address}/{length} dev eth0"
    yield f"address add {address6}/{length6} dev eth0 nodad"
    yield "link set eth0 up"
    yield f"route add default via {gateway} dev eth0 onlink"
    yield f"route add default via {gateway6} dev eth0 onlink"


def _cgroups(name: str) -> list[Path]:
    """Where a group is made in each hierarchy: version 1 below this process's own group, version 2 below the root."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    own = [line.split(":", 2)[1:] for line in Path("/proc/self/cgroup").read_text().splitlines()]
    hierarchies = [(Path(mount[1]), set(mount[3].split(","))) for mount in mounts if mount[2] == "cgroup"]
    return [
        root / next(path for names, path in own if names and set(names.split(",")) <= options).lstrip("/") / name
        for root, options in hierarchies
    ] or [_CGROUPS / name]


def _make_cgroup(group: Path) -> None:
    subtree = group.parent / "cgroup.subtree_control"
    if subtree.exists():
        subtree.write_text("+cpu +cpuset +io +memory +pids")
    group.mkdir()
    for setting in ("cpuset.cpus", "cpuset.mems"):
        inherited = group.parent / setting
        if inherited.exists():
            # Without these two, no process may join a group of version 1.
            (group / setting).write_text(inherited.read_text())


def _remove_cgroups(groups: list[Path]) -> bool:
    """Remove groups and those below them; whether nothing ran in one any more."""
    for group in groups:
        for folder, _, _ in os.walk(group, topdown=False):
            try:
                Path(folder).rmdir()
            except OSError:
                return False
    return True
