"""A grace period of the kernel's RCU: every packet that is under way now has been dealt with when it is over."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import time

# membarrier(2): its number differs between architectures, and the C library has no function for it.
_SYSCALLS = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356, "armv7l": 389}
_MEMBARRIER_CMD_QUERY, _MEMBARRIER_CMD_GLOBAL = 0, 1
SUBSTITUTE_SECONDS = 1.0
"""How long is waited where the kernel cannot say when no packet is under way any more."""

_libc = ctypes.CDLL(None, use_errno=True)


def is_available() -> bool:
    """Whether the kernel ends a wait as soon as it can: not with ``nohz_full``, nor if membarrier(2) is filtered."""
    supported = _membarrier(_MEMBARRIER_CMD_QUERY)
    return supported is not None and bool(supported & _MEMBARRIER_CMD_GLOBAL)


def wait_for_packets() -> None:
    """Return when no packet is under way any more that was before the call; it takes some milliseconds.

    Where the kernel has no such call, a second is waited: far longer than a packet is under way.

    Raises:
        OSError: the kernel refuses for another reason.
    """
    if _membarrier(_MEMBARRIER_CMD_GLOBAL) is None:
        time.sleep(SUBSTITUTE_SECONDS)


def _membarrier(command: int) -> int | None:
    """What the kernel answers; None if it does not know the command, or may not be asked."""
    number = _SYSCALLS.get(platform.machine())
    if number is None:
        return None
    answer = int(_libc.syscall(number, command, 0, 0))
    if answer >= 0:
        return answer
    if ctypes.get_errno() in {errno.EINVAL, errno.ENOSYS, errno.EPERM}:
        return None
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
