"""Memory that is given back to the system between two batches, and has to be had again: not here.

glibc maps each large block anew and unmaps it when it is freed, so every layer of a network pays a
page fault for each 4 KiB of its activations. With higher thresholds the process keeps what it has
freed and takes it again: fewer faults, and as much memory as the largest batch needs, until it is
returned.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers, malloc.h
_BYTES = 2**30  # above any activation; larger blocks are mapped as before


def keep_freed_memory() -> bool:
    """Let this process keep what it frees; returns False where malloc is not glibc's, as on macOS.

    Only for what malloc gives out from now on: call it before the work.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _BYTES)) and bool(mallopt(_TRIM_THRESHOLD, _BYTES))


def return_freed_memory() -> None:
    """Give the system what this process has kept of what it freed, where malloc is glibc's."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
