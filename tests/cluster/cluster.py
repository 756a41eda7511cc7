"""A Kubernetes cluster of several machines on this one, with no pod network of its own.

A control plane (etcd, kube-apiserver, kube-controller-manager, kube-scheduler) lives in a network namespace with a
bridge; each machine is linked to it. The host's network, ``/etc``, ``/opt``, ``/var`` and ``/run`` stay as they are.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from tests.api.controlplane import ControlPlane
from tests.api.processes import run, wait_until
from tests.cluster import images
from tests.cluster.fabric import Fabric, addresses
from tests.cluster.machines import POD_CIDRS, Machine
from tests.tools.build import binary

_FIRST_NODE = 11
_SECONDS = 60.0


class Cluster:
    """A cluster; a context manager that ends all that it started and removes all but the logs.

    Where it comes up, each node is registered and has its pod networks. None is ready before something writes a CNI
    configuration to its ``/etc/cni/net.d``; the reference plugins are in ``/opt/cni/bin``, and the image that holds
    a pod's namespaces is there.

    Args:
        folder: that does not exist yet; not below ``/etc``, ``/opt``, ``/var`` or ``/run``.
        nodes: how many machines, named node-1 and so on.
        ipv6_first: whether Services, pods and nodes have IPv6 as their default family, in which the nodes also call
            the API server.
        options: further ones of kube-apiserver.
        routed: each machine is on a network segment of its own.
    """

    def __init__(
        self,
        folder: Path,
        *,
        nodes: int = 2,
        ipv6_first: bool = False,
        options: tuple[str, ...] = (),
        routed: bool = False,
    ) -> None:
        self.folder = folder
        self._count = nodes
        # How a pair of IPv4 and IPv6 is put in the order of preference.
        self._order = slice(None, None, -1) if ipv6_first else slice(None)
        self._options = options
        self._open = contextlib.ExitStack()
        self._machines: dict[str, Machine] = {}
        self._fabric = Fabric(folder, routed=routed)
        self._control_plane: ControlPlane | None = None

    def __enter__(self) -> Self:
        self.folder.mkdir(parents=True)
        try:
            self._start()
        except BaseException:
            self._open.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._open.close()

    @property
    def control_plane(self) -> ControlPlane:
        """The API server, with kubeconfigs that hold in the network namespace of the control plane."""
        assert self._control_plane is not None
        return self._control_plane

    @property
    def nodes(self) -> Mapping[str, tuple[str, str]]:
        """The addresses of each node, IPv4 and then IPv6, by name."""
        return MappingProxyType({name: machine.addresses for name, machine in self._machines.items()})

    @property
    def enter(self) -> tuple[str, ...]:
        """The words before those of a command that have it run on the fabric, where the kubeconfigs hold."""
        return self._fabric.enter

    def kubectl(self, *words: str | Path, stdin: str | None = None, seconds: float = 60.0) -> str:
        """Run kubectl as an administrator and return what it prints.

        Raises:
            ProgramError: it ends with another code than 0, or not within the time.
        """
        return self.control_plane.kubectl(*words, stdin=stdin, seconds=seconds)

    def get(self, *words: str) -> Any:
        """What ``kubectl get`` with these words returns, decoded."""
        return self.control_plane.get(*words)

    def run_on(self, node: str, *words: str | Path, stdin: str | Path | None = None, seconds: float = 60.0) -> str:
        """Run a program in a machine and return what it prints; ``stdin`` is text, or a file of the host.

        Raises:
            ProgramError: it ends with another code than 0, or not within the time.
        """
        return self._machines[node].run(*words, stdin=stdin, seconds=seconds)

    def run_outside(self, *words: str | Path, stdin: str | Path | None = None, seconds: float = 60.0) -> str:
        """Run a program on the fabric beside the machines, where the control plane is, and return what it prints.

        Raises:
            ProgramError: it ends with another code than 0, or not within the time.
        """
        return run(*self.enter, *words, stdin=stdin, seconds=seconds)

    def netns(self, node: str = "") -> Path:
        """The network namespace of a machine, or else of the fabric, as a file."""
        return Path(f"/proc/{self._machines[node].pid if node else self._fabric.pid}/ns/net")

    def load_image(self, archive: Path) -> None:
        """Give every machine that runs an image; it keeps it."""
        for machine in self._machines.values():
            if machine.running:
                machine.run("ctr", "--namespace=k8s.io", "images", "import", "-", stdin=archive)

    def stop_node(self, node: str) -> None:
        """Cut a machine's power. Kubernetes is not told."""
        self._machines[node].stop()

    def start_node(self, node: str) -> None:
        """Switch a machine on, which finds its files as it left them; returns when its programs run."""
        self._machines[node].start()
        self._machines[node].wait()

    def _start(self) -> None:
        fabric = self._open.enter_context(self._fabric)
        folder = self.folder / "control-plane"
        address = addresses(1)[self._order][0]
        self._control_plane = ControlPlane(folder, address=address, enter=fabric.enter, options=self._options)
        self._open.enter_context(self._control_plane)
        for number in range(self._count):
            machine = Machine(
                self.folder / f"node-{number + 1}",
                number=_FIRST_NODE + number,
                fabric=fabric,
                control_plane=self._control_plane,
                order=self._order,
            )
            self._machines[machine.name] = machine
            self._open.callback(machine.forget)
            self._open.callback(machine.stop)
            machine.start()
        self._start_controllers(self._control_plane)
        pause = images.pause(self.folder)
        for machine in self._machines.values():
            machine.wait()
        self.load_image(pause)
        wait_until(
            self._all_known,
            "each node is registered with its pod networks",
            seconds=_SECONDS,
            processes=[machine.process for machine in self._machines.values()],
        )

    def _start_controllers(self, control_plane: ControlPlane) -> None:
        controllers = control_plane.kubeconfig_of("controllers", user="system:kube-controller-manager")
        scheduler = control_plane.kubeconfig_of("scheduler", user="system:kube-scheduler")
        control_plane.start(
            "kube-controller-manager",
            binary("kube-controller-manager"),
            f"--kubeconfig={controllers}",
            f"--cluster-cidr={','.join(POD_CIDRS[self._order])}",
            f"--service-cluster-ip-range={control_plane.service_cidrs}",
            f"--service-account-private-key-file={control_plane.service_accounts.key}",
            f"--root-ca-file={control_plane.authority.certificate}",
            "--allocate-node-cidrs",
            "--use-service-account-credentials",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        )
        control_plane.start(
            "kube-scheduler",
            binary("kube-scheduler"),
            f"--kubeconfig={scheduler}",
            "--leader-elect=false",
            "--bind-address=127.0.0.1",
        )

    def _all_known(self) -> bool:
        known = {node["metadata"]["name"] for node in self.get("nodes")["items"] if "podCIDRs" in node["spec"]}
        return known == set(self._machines)
