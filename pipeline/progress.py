"""How far long work is: what workers tell, and bars on the console that show it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol


class Progress(Protocol):
    """A display that is told how much of some work is done; it changes nothing."""

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None:
        """Show that ``done`` of ``total`` steps of ``what`` are done, and a note on it."""


@contextmanager
def console_progress() -> Iterator[Progress]:
    """Show a bar for each kind of work on stderr, if that is a terminal."""
    from rich import progress
    from rich.console import Console

    columns = (
        "{task.description}",
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        "{task.fields[note]}",
    )
    console = Console(stderr=True)
    bars: dict[str, Any] = {}
    # where nobody watches, stderr holds warnings and errors alone
    with progress.Progress(*columns, console=console, disable=not console.is_terminal) as display:

        def advance(what: str, done: int, total: int, note: str = "", /) -> None:
            if what not in bars:
                bars[what] = display.add_task(what, total=total, note="")
            display.update(bars[what], completed=done, total=total, note=note)

        yield advance
