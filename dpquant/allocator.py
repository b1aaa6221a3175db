"""The C library's memory allocator, set for training on the CPU."""

from __future__ import annotations

import ctypes

# malloc.h of glibc: parameter -> value
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_SETTINGS = {
    _MMAP_MAX: 0,  # no mapping of its own for a large tensor: each would be new pages from the kernel
    _TRIM_THRESHOLD: -1,  # nothing at the top of the heap goes back
    _TOP_PAD: 64 << 20,  # bytes by which the heap grows at least
}


def keep_freed_memory() -> bool:
    """Has glibc keep the memory that tensors free, for the rest of the process.

    By default glibc gives large buffers back to the kernel when they are freed. A training step frees as much as it
    allocates, so the next one waits for the kernel to clear the same pages again: two to three times as long as the
    arithmetic, where per-example gradients are formed. The price: what the process once held it keeps. No number that
    is computed changes.

    Returns:
        Whether it is in force; False where the C library is not glibc.
    """
    try:
        libc = ctypes.CDLL("libc.so.6")
        return all(libc.mallopt(parameter, value) == 1 for parameter, value in _SETTINGS.items())
    except (OSError, AttributeError):
        return False
