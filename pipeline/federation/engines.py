"""Where client updates run. Every engine calls the same ``local_update``, in client order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_in_process(update: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    """Run ``update`` on each task in turn; one result is in memory at a time."""
    for task in tasks:
        yield update(task)
