"""What clients compute, counted in the process where they run: in this one, a worker, or a node.

For ``engines.py``. A module of its own, so that dask's workers import it and keep what they count.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from pipeline.federation.client import Client
from pipeline.federation.messages import AnyRequest, Reply

CLOCK = "BENCHMARK_CLOCK"  # names the file that a process of nodes writes its clock to


class Clock:
    """What the clients of this process have computed, in CPU seconds."""

    seconds = 0.0


def clock_clients() -> None:
    """Let ``Clock`` count what ``Client.answer`` takes in this process."""
    whole = Client.answer

    def answer(self: Client, request: AnyRequest) -> Reply:
        began = time.thread_time()
        reply = whole(self, request)
        Clock.seconds += time.thread_time() - began
        if CLOCK in os.environ:
            Path(os.environ[CLOCK]).write_text(str(Clock.seconds))
        return reply

    Client.answer = answer  # type: ignore[method-assign]


def read_clock() -> float:
    return Clock.seconds
