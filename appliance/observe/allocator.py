"""How the C library keeps memory that was freed.

By default it gives large blocks back to the kernel at once, and the next large tensor, body or answer pays for every
page of it anew: a third of the time that a JSON tensor of a megabyte takes. On other C libraries nothing is changed.
"""

from __future__ import annotations

import ctypes

KEPT_BYTES = 64 * 1024 * 1024
"""So much free memory at the end of the heap stays with the process."""

LARGEST_KEPT_BYTES = 32 * 1024 * 1024
"""Larger blocks are given back as soon as they are freed; glibc's own upper limit."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""See mallopt(3)."""


def keep_freed_memory() -> bool:
    """Have freed memory kept for what comes next; returns False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES))
