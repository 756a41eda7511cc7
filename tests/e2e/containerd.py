"""Debian's containerd, with every file and socket of its own, in the network and mount namespaces of a lab's node."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

from enforcer.demo.lab import Lab
from tests.e2e.conftest import EXECUTABLE

IMAGE = "localhost/busybox:test"
_SECONDS = 20.0

CONFIG = """
version = 2
root = "{folder}/root"
state = "{folder}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
  address = "{folder}/containerd.sock"
"""

# ctr reads its network configuration and plugins at fixed paths: they are ours within the mount namespace.
ENTER = """
mkdir -p {folder}/upper {folder}/work {folder}/opt
mount -t overlay overlay -o lowerdir=/etc,upperdir={folder}/upper,workdir={folder}/work /etc
mount --bind {folder}/opt /opt
mkdir -p /etc/cni/net.d /opt/cni/bin
rm -rf /etc/cni/net.d/*
cp {folder}/network.conflist /etc/cni/net.d/10-drawbridge.conflist
cp {executable} /usr/lib/cni/tuning /opt/cni/bin/
exec containerd --config {folder}/config.toml
"""


def image(path: Path, files: dict[str, bytes]) -> None:
    """Write a docker archive of one layer that holds some executables."""
    layer = _tar(files)
    diff = "sha256:" + hashlib.sha256(layer).hexdigest()
    head = {"architecture": "amd64", "os": "linux", "config": {}, "rootfs": {"type": "layers", "diff_ids": [diff]}}
    manifest = [{"Config": "config.json", "RepoTags": [IMAGE], "Layers": ["layer.tar"]}]
    parts = {"config.json": head, "manifest.json": manifest}
    path.write_bytes(_tar({name: json.dumps(part).encode() for name, part in parts.items()} | {"layer.tar": layer}))


def _tar(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


class Containerd:
    """A running containerd; ``run`` and ``execute`` are what a user types at ``ctr``."""

    def __init__(self, lab: Lab, folder: Path, daemon: subprocess.Popen[bytes]) -> None:
        self._lab = lab
        self._folder = folder
        self._daemon = daemon

    def ctr(self, *words: str) -> list[str]:
        """The command that runs ``ctr`` where containerd runs."""
        enter = ["nsenter", f"--target={self._daemon.pid}", "--net", "--mount"]
        return [*enter, "ctr", "--address", str(self._folder / "containerd.sock"), *words]

    @contextlib.contextmanager
    def run(self, name: str, *words: str) -> Iterator[int]:
        """Have a container with a network for the body; gives the process id of its first process."""
        environment = os.environ | {"DRAWBRIDGE_CNI_SOCKET": str(self._lab.run_dir / "cni.sock")}
        client = subprocess.Popen(
            self.ctr("run", "--rm", "--cni", IMAGE, name, *words), env=environment, stderr=subprocess.PIPE
        )
        try:
            yield self._started(name, client)
        finally:
            subprocess.run(self.ctr("task", "kill", "--signal", "SIGKILL", name), check=False, capture_output=True)
            client.communicate(timeout=_SECONDS)

    def execute(self, name: str, *words: str) -> subprocess.CompletedProcess[str]:
        """Run a command in a container."""
        command = self.ctr("task", "exec", "--exec-id", f"exec-{time.monotonic_ns()}", name, *words)
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=_SECONDS)

    def _started(self, name: str, client: subprocess.Popen[bytes]) -> int:
        deadline = time.monotonic() + _SECONDS
        while time.monotonic() < deadline:
            listed = subprocess.run(self.ctr("task", "list"), capture_output=True, text=True, check=True).stdout
            for line in listed.splitlines():
                if line.split()[0] == name and line.split()[2] == "RUNNING":
                    return int(line.split()[1])
            assert client.poll() is None, client.stderr.read().decode() if client.stderr else ""
            time.sleep(0.02)
        raise AssertionError(f"container {name} does not run")


@contextlib.contextmanager
def containerd(lab: Lab, folder: Path) -> Iterator[Containerd]:
    """A containerd whose network is Drawbridge's, followed by the standard plugin ``tuning``."""
    folder.mkdir()
    plugins = [{"type": "drawbridge"}, {"type": "tuning", "sysctl": {"net.core.somaxconn": "777"}}]
    network = {"cniVersion": "1.0.0", "name": "drawbridge", "plugins": plugins}
    (folder / "network.conflist").write_text(json.dumps(network))
    (folder / "config.toml").write_text(CONFIG.format(folder=folder))
    busybox = shutil.which("busybox")
    assert busybox is not None
    image(folder / "image.tar", {"bin/busybox": Path(busybox).read_bytes()})
    script = ENTER.format(folder=folder, executable=EXECUTABLE)
    enter = ["nsenter", f"--net=/run/netns/{lab.name}", "unshare", "--mount", "--propagation", "private"]
    with (folder / "log").open("wb") as log:
        daemon = subprocess.Popen([*enter, "sh", "-euc", script], stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    try:
        made = Containerd(lab, folder, daemon)
        deadline = time.monotonic() + _SECONDS
        while not (folder / "containerd.sock").exists():
            assert daemon.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, "containerd does not start"
            time.sleep(0.02)
        subprocess.run(made.ctr("images", "import", str(folder / "image.tar")), check=True, capture_output=True)
        yield made
    finally:
        daemon.terminate()
        daemon.wait()
