"""How many cores there are for this process; without torch, which is slow to import."""

from __future__ import annotations

import os


def usable_cores() -> int:
    """Return how many cores this process may use: all, or those that it is bound to."""
    bound = getattr(os, "sched_getaffinity", None)  # macOS has none
    return len(bound(0)) if bound is not None else os.cpu_count() or 1
