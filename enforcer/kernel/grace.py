"""A grace period of the kernel's RCU: every packet that is under way now has been dealt with when it is over."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import time

# membarrier(2): its number differs between architectures, and the C library has no function for it.
_SYSCALLS = {"x86_64": 324, "aarch64": 283, "riscv64": 283, "ppc64le": 365, "s390x": 356, "armv7l": 389}
_MEMBARRIER_CMD_GLOBAL = 1
_SUBSTITUTE_SECONDS = 1.0

_libc = ctypes.CDLL(None, use_errno=True)


def wait_for_packets() -> None:
    """Return when no packet is under way any more that was before the call; it takes some milliseconds.

    Where the kernel has no such call (``nohz_full``, or a filter of system calls), a second is waited: far longer than
    a packet is under way.
    """
    number = _SYSCALLS.get(platform.machine())
    if number is None or not _membarrier(number):
        time.sleep(_SUBSTITUTE_SECONDS)


def _membarrier(number: int) -> bool:
    if _libc.syscall(number, _MEMBARRIER_CMD_GLOBAL, 0, 0) == 0:
        return True
    if ctypes.get_errno() in {errno.EINVAL, errno.ENOSYS, errno.EPERM}:
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
