"""How the C library keeps memory that was freed, and how often the interpreter looks for more.

By default glibc gives large blocks back to the kernel at once, and the next large tensor, body or answer pays for every
page of it anew: a third of the time that a JSON tensor of a megabyte takes. On other C libraries nothing is changed.
"""

from __future__ import annotations

import ctypes
import gc

KEPT_BYTES = 64 * 1024 * 1024
"""So much free memory at the end of the heap stays with the process."""

LARGEST_KEPT_BYTES = 32 * 1024 * 1024
"""Larger blocks are given back as soon as they are freed; glibc's own upper limit."""

GARBAGE_THRESHOLDS = (10_000, 20, 20)
"""Containers made and not freed before the youngest are looked through, and how often until the next generation is."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""See mallopt(3)."""


def keep_freed_memory() -> bool:
    """Have freed memory kept for what comes next; returns False where the C library is not glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_TRIM_THRESHOLD, KEPT_BYTES) and mallopt(_M_MMAP_THRESHOLD, LARGEST_KEPT_BYTES))


def collect_garbage_seldom() -> None:
    """Have the interpreter look for garbage in cycles a tenth as often, and never again in what is there by now.

    Most garbage is in no cycle and goes at once. Looking for the rest took a tenth of what the event loop does for a
    small tensor. To be called once everything is imported and put together.
    """
    gc.freeze()
    gc.set_threshold(*GARBAGE_THRESHOLDS)
