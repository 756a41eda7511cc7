"""What the container runtime finds on the node: the CNI executable, and the network configuration that names it.

The executable comes first, the configuration once pods can be attached: without one the node is not ready, and no pod
is started there that would fail. Both appear whole, by a rename.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

import msgspec

from cni.plugin.conflist import FILE_NAME, conflist

BIN_DIR = Path("/opt/cni/bin")
CONF_DIR = Path("/etc/cni/net.d")
_EXECUTABLE = "drawbridge"
# What containerd and CRI-O read; the first by name is the one that counts.
_EXTENSIONS = {".conf", ".conflist", ".json"}


def install_executable(source: Path, bin_dir: Path) -> bool:
    """Put the CNI executable where the runtime looks for it; whether it was not there as it is.

    Raises:
        OSError: it cannot be read or written.
    """
    return _write(bin_dir / _EXECUTABLE, source.read_bytes(), mode=0o755)


def install_configuration(conf_dir: Path, bin_dir: Path) -> bool:
    """Write the network configuration, with those plugins after ours that are installed; whether it was another.

    Raises:
        OSError: it cannot be written.
    """
    content = msgspec.json.format(msgspec.json.encode(conflist({path.name for path in bin_dir.iterdir()})), indent=2)
    return _write(conf_dir / FILE_NAME, content + b"\n", mode=0o644)


def preceding(conf_dir: Path) -> list[str]:
    """The configurations that the runtime takes rather than ours, as their names sort before it."""
    found = (path.name for path in conf_dir.iterdir() if path.suffix in _EXTENSIONS)
    return sorted(name for name in found if name < FILE_NAME)


def remove(conf_dir: Path, bin_dir: Path) -> list[str]:
    """Remove the configuration, then the executable; returns what was there.

    Raises:
        OSError: a file cannot be removed.
    """
    removed = []
    for path in (conf_dir / FILE_NAME, bin_dir / _EXECUTABLE):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
            removed.append(str(path))
    return removed


def _write(path: Path, content: bytes, *, mode: int) -> bool:
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == content and path.stat().st_mode & 0o777 == mode:
            return False
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without an extension, the runtime does not read it.
    scratch = path.with_name(".drawbridge-new")
    with scratch.open("wb") as file:
        file.write(content)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())
    scratch.replace(path)
    return True
