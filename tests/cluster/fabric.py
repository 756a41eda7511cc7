"""The network that the machines of a test cluster are linked to: a bridge in a namespace with no way out."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self

from tests.api.processes import Process, ProgramError, run, wait_until

_BRIDGE = "fabric"
_SECONDS = 10.0


def addresses(number: int) -> tuple[str, str]:
    """The addresses of a host of the fabric, IPv4 and then IPv6, whose prefixes are 24 and 64 bits long.

    Number 1 is the namespace itself, where the control plane lives and to which machines have their default routes.
    """
    return f"172.30.0.{number}", f"fd00:30::{number}"


class Fabric:
    """The namespace with its bridge, a context manager. It lives as long as a process in it, and has no name.

    Args:
        folder: for a log.
        routed: each machine is on a segment of its own, and the namespace is the router between them.
    """

    def __init__(self, folder: Path, *, routed: bool = False) -> None:
        self._folder = folder
        self.routed = routed
        self._holder: Process | None = None

    def __enter__(self) -> Self:
        holder = self._holder = Process("unshare", "--net", "sleep", "infinity", log=self._folder / "fabric.log")
        own, made = Path("/proc/self/ns/net"), Path(f"/proc/{holder.pid}/ns/net")
        try:
            wait_until(
                lambda: made.readlink() != own.readlink(),
                "the fabric's namespace is there",
                seconds=_SECONDS,
                processes=[holder],
            )
            self.ip(
                "link set lo up",
                f"link add {_BRIDGE} type bridge",
                *(
                    f"address add {address}/{length} dev {_BRIDGE} {option}"
                    for address, length, option in zip(addresses(1), (24, 64), ("", "nodad"), strict=True)
                ),
                f"link set {_BRIDGE} up",
            )
            if self.routed:
                forwarding = ("net.ipv4.ip_forward=1", "net.ipv6.conf.all.forwarding=1")
                run(*self.enter, "sysctl", "-qw", *forwarding, "net.ipv4.conf.all.send_redirects=0",
                    f"net.ipv4.conf.{_BRIDGE}.send_redirects=0")  # fmt: skip
        except BaseException:
            holder.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._holder is not None:
            self._holder.stop()

    @property
    def pid(self) -> int:
        """A process that is in the namespace."""
        assert self._holder is not None
        return self._holder.pid

    @property
    def enter(self) -> tuple[str, ...]:
        """The words before those of a command that have it run in the namespace."""
        return ("nsenter", f"--net=/proc/{self.pid}/ns/net")

    def ip(self, *commands: str) -> None:
        """Run commands of ip(8) in the namespace.

        Raises:
            ProgramError: one fails; those after it are not tried.
        """
        run(*self.enter, "ip", "-batch", "-", stdin="".join(f"{command}\n" for command in commands))

    def link(self, name: str, *, number: int, pid: int) -> None:
        """Give the network namespace of a process an interface ``eth0``, joined to the bridge by the link ``name``.

        A host keeps its link-layer address whenever it comes: the others still have it in mind.
        """
        peer = f"peer name eth0 address 02:00:00:00:00:{number:02x} netns {pid}"
        self.ip(f"link add {name} type veth {peer}", f"link set {name} master {_BRIDGE} up")
        if self.routed:
            # Machines do not hear each other, only the router.
            self.ip(f"link set {name} type bridge_slave isolated on")

    def unlink(self, name: str) -> None:
        """Remove a link, if there is one."""
        try:
            self.ip(f"link del {name}")
        except ProgramError:
            # It may have gone meanwhile, with the namespace of its other end.
            if f"{name}@" in run(*self.enter, "ip", "-brief", "link", "show"):
                raise
