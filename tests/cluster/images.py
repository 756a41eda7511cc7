"""Images for test pods, as docker archives that are written in a moment and need no registry."""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import tarfile
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from tests.api.processes import ProgramError, run
from tests.tools.build import binary

PAUSE = "localhost/pause:test"
AGNHOST = "localhost/agnhost:test"
_PAUSE_SOURCE = Path(__file__).with_name("pause.c")
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}


@dataclass(frozen=True, slots=True)
class Link:
    """A symbolic link of an image."""

    target: str


def pause(folder: Path) -> Path:
    """Write the image that holds a pod's namespaces; returns its archive."""
    with tempfile.TemporaryDirectory() as scratch:
        program = Path(scratch) / "pause"
        run("cc", "-Os", "-static", "-s", "-o", program, _PAUSE_SOURCE)
        return write_archive(folder / "pause.tar", name=PAUSE, content={"/pause": program}, entrypoint=["/pause"])


def agnhost(folder: Path, *, image: str = AGNHOST) -> Path:
    """Write Kubernetes' image for tests under a name, with a shell and what is called from it; returns its archive.

    It has bash as its shell: busybox's runs its own nc before any other.
    """
    content = _busybox() | {"/bin/bash": _program("bash-static"), "/bin/sh": Link("bash")}
    content["/agnhost"] = binary("agnhost")
    for name, program in (("curl", "curl"), ("nc", "nc.openbsd")):
        content[f"/bin/{name}"] = _program(program)
        content |= _libraries(_program(program))
    return write_archive(
        folder / "agnhost.tar", name=image, content=content, entrypoint=["/agnhost"], arguments=["pause"]
    )


def busybox(folder: Path, *, image: str) -> Path:
    """Write an image with busybox alone under a name; returns its archive."""
    return write_archive(folder / "busybox.tar", name=image, content=_busybox(), entrypoint=[], arguments=["sh"])


def write_archive(
    path: Path,
    *,
    name: str,
    content: Mapping[str, Path | Link],
    entrypoint: list[str],
    arguments: list[str] | None = None,
) -> Path:
    """Write an image of one layer.

    Args:
        path: of the archive, which is returned.
        name: of the image, with its tag.
        content: executables and links, by their absolute paths in the image.
        entrypoint: the words that start a container.
        arguments: further ones, which a pod may replace.
    """
    with tempfile.TemporaryFile() as layer:
        with tarfile.open(fileobj=layer, mode="w") as tar:
            for folder in sorted({str(parent) for inner in content for parent in PurePosixPath(inner).parents} - {"/"}):
                tar.addfile(_entry(folder, tarfile.DIRTYPE))
            tar.addfile(_entry("/tmp", tarfile.DIRTYPE, mode=0o1777))  # noqa: S108 - of the image
            for inner, source in content.items():
                if isinstance(source, Link):
                    tar.addfile(_entry(inner, tarfile.SYMTYPE, target=source.target))
                else:
                    with source.open("rb") as file:
                        tar.addfile(_entry(inner, tarfile.REGTYPE, size=source.stat().st_size), file)
        layer.seek(0)
        config = {
            "architecture": _ARCHITECTURES[platform.machine()],
            "os": "linux",
            "config": {"Entrypoint": entrypoint, "Cmd": arguments or [], "Env": [f"PATH={_PATH}"]},
            "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.file_digest(layer, 'sha256').hexdigest()}"]},
        }
        size = layer.tell()
        layer.seek(0)
        with tarfile.open(path, mode="w") as tar:
            tar.addfile(_entry("layer.tar", tarfile.REGTYPE, size=size), layer)
            manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": ["layer.tar"]}]
            for inner, value in (("config.json", config), ("manifest.json", manifest)):
                text = json.dumps(value).encode()
                tar.addfile(_entry(inner, tarfile.REGTYPE, size=len(text)), io.BytesIO(text))
    return path


def _entry(name: str, kind: bytes, *, size: int = 0, target: str = "", mode: int = 0o755) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name.lstrip("/"))
    entry.type, entry.size, entry.linkname, entry.mode = kind, size, target, mode
    return entry


def _busybox() -> dict[str, Path | Link]:
    """busybox and the links by whose names it is called, by their paths in an image."""
    program = _program("busybox")
    links: dict[str, Path | Link] = {f"/bin/{name}": Link("busybox") for name in run(program, "--list").split()}
    return links | {"/bin/busybox": program}


def _program(name: str) -> Path:
    """A program of this machine.

    Raises:
        ProgramError: it is not installed.
    """
    found = shutil.which(name)
    if found is None:
        raise ProgramError(f"{name} is not installed")
    return Path(found).resolve()


def _libraries(program: Path) -> dict[str, Path]:
    """The shared libraries that a program loads, under the paths that it loads them by."""
    words = (word for line in run("ldd", program).splitlines() for word in line.split())
    return {word: Path(word).resolve() for word in words if word.startswith("/")}
