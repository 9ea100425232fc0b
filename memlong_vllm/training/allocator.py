"""Keeps freed memory in the process, which training on a CPU needs to be fast."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # Of malloc.h (glibc).


def keep_freed_memory() -> bool:
    """Tell glibc to reuse large blocks instead of returning them to the kernel at every free.

    Each step makes the same activations anew. Fresh pages for them cost more than the arithmetic:
    on a virtual machine training was measured at half the speed and less. Returns whether it took.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # Another C library.
        return False
    return all(
        mallopt(option, value) == 1
        for option, value in ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 1 << 28))
    )
