"""Network namespaces: what a descriptor stands for, and a visit to one on the calling thread."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# In a container /proc/sys is read-only; there, the node's is mounted beside it. Through either, a thread meets the
# settings of the network namespace that it is in.
_SYSCTLS = Path(os.environ.get("DRAWBRIDGE_SYSCTLS", "/proc/sys"))
_CLONE_NEWNET = 0x40000000
_NS_GET_NSTYPE = 0xB703

# os.setns came with Python 3.12.
_libc = ctypes.CDLL(None, use_errno=True)


def open_own() -> int:
    """A descriptor of the calling thread's network namespace."""
    return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def is_network_namespace(descriptor: int) -> bool:
    """Whether a descriptor is one of a network namespace."""
    try:
        return fcntl.ioctl(descriptor, _NS_GET_NSTYPE) == _CLONE_NEWNET
    except OSError:
        return False


def same(first: int, second: int) -> bool:
    """Whether two descriptors are of one namespace."""
    one, other = os.fstat(first), os.fstat(second)
    return (one.st_dev, one.st_ino) == (other.st_dev, other.st_ino)


@contextmanager
def visit(descriptor: int, *, home: int) -> Iterator[None]:
    """Have the calling thread in another network namespace for the body; ``home`` is the one that it is in.

    The process ends at once if the thread cannot come back: work meant for the node would be done to a pod.

    Raises:
        OSError: the namespace cannot be entered.
    """
    _setns(descriptor)
    try:
        yield
    finally:
        try:
            _setns(home)
        except OSError:
            os.abort()


def read_sysctl(name: str) -> str | None:
    """The value of ``net/...`` in the calling thread's namespace; None if the kernel has no such setting."""
    try:
        return (_SYSCTLS / name).read_text().strip()
    except FileNotFoundError:
        return None


def write_sysctl(name: str, value: str) -> str | None:
    """Set ``net/...`` in the calling thread's namespace if it has another value.

    Returns:
        The value before, if it was changed; None if it was so already, or if the kernel has no such setting.

    Raises:
        OSError: it cannot be read or written.
    """
    before = read_sysctl(name)
    if before is None or before == value:
        return None
    (_SYSCTLS / name).write_text(value)
    return before


def _setns(descriptor: int) -> None:
    if _libc.setns(descriptor, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
