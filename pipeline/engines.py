"""Where client updates run. Every engine calls the same ``local_update``, in client order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_in_process(update: Callable[[Task], Result], tasks: Sequence[Task]) -> Iterator[Result]:
    """Run ``update`` on each task in turn; one result is in memory at a time."""
    for task in tasks:
        yield update(task)


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    """Pin torch's threads: the same seed then gives the same weights on the same machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
