"""How far long work is: what workers tell, and what the console shows of it with the time left."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol

from pipeline.disk import to_json

LINE_EVERY_SECONDS = 30.0  # where nobody watches: often enough for a log, seldom enough to read
JSON_EVERY_SECONDS = 1.0  # at most, but for the first and the last step of each kind of work


class Style(StrEnum):
    """How progress is shown on stderr."""

    AUTO = "auto"  # bars on a terminal, elsewhere a plain line now and then
    JSON = "json"  # a line of JSON for each event, for machines
    NONE = "none"


class Progress(Protocol):
    """A display that is told how much of some work is done; it changes nothing."""

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None:
        """Show that ``done`` of ``total`` steps of ``what`` are done, and a note on it."""


@dataclass
class Work:
    """One kind of work and how far it is."""

    what: str
    done: int
    total: int
    note: str
    first: int  # steps that were done when it began
    began: float  # seconds, as ``time.monotonic``

    def seconds(self) -> float:
        """Return the seconds since it began."""
        return time.monotonic() - self.began

    def seconds_left(self) -> float | None:
        """Return the seconds that the rest takes at the pace so far; None before the first step."""
        since = self.done - self.first
        if self.done >= self.total:
            return 0.0
        return self.seconds() * (self.total - self.done) / since if since > 0 else None

    def left(self) -> str:
        """Return the time left in words; empty if there is none, or none is known."""
        seconds = self.seconds_left()
        return f"{duration(seconds)} left" if seconds else ""

    def text(self) -> str:
        """Return it as a plain line."""
        counts = f"{self.what}: {self.done}/{self.total}"
        parts = [counts, f"{duration(self.seconds())} so far", self.left(), self.note]
        return ", ".join(filter(None, parts))

    def as_json(self) -> dict[str, Any]:
        """Return it for a machine."""
        left = self.seconds_left()
        return {
            "event": "progress",
            "what": self.what,
            "done": self.done,
            "total": self.total,
            "seconds": round(self.seconds(), 1),
            "seconds_left": None if left is None else round(left, 1),
            "note": self.note,
        }


def duration(seconds: float) -> str:
    """Return ``45 s``, ``3 min 20 s`` or ``2 h 05 min``."""
    whole = math.ceil(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


class _Board:
    """Keeps each kind of work; what is shown of it is a subclass's."""

    def __init__(self) -> None:
        self.works: dict[str, Work] = {}

    def __call__(self, what: str, done: int, total: int, note: str = "", /) -> None:
        work = self.works.get(what)
        if work is None or done < work.done:  # it begins, or begins anew
            work = Work(what, done, total, note, first=done, began=time.monotonic())
        work.done, work.total, work.note = done, total, note
        self.works[what] = work
        self.show(work)

    def show(self, work: Work) -> None:
        """Show what has changed."""

    def close(self) -> None:
        """End the display."""


class _Bars(_Board):
    """A bar for each kind of work, below what else is written; there once there is work."""

    def __init__(self) -> None:
        super().__init__()
        self._display: Any = None
        self._tasks: dict[str, Any] = {}

    def show(self, work: Work) -> None:
        if self._display is None:
            self._display = _rich_display()
            self._display.start()
        task = self._tasks.get(work.what)
        if task is None:
            task = self._display.add_task(work.what, total=work.total, left="", note="")
            self._tasks[work.what] = task
        elif work.done == work.first:
            self._display.reset(task)
        left, note = work.left(), work.note
        self._display.update(task, completed=work.done, total=work.total, left=left, note=note)

    def close(self) -> None:
        if self._display is not None:
            self._display.stop()


def _rich_display() -> Any:
    from rich import progress
    from rich.console import Console

    columns = (
        "{task.description}",
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        "{task.fields[left]}",
        "{task.fields[note]}",
    )
    return progress.Progress(*columns, console=Console(stderr=True))


class _Lines(_Board):
    """A plain line on unfinished work every so many seconds, also while a step takes long."""

    def __init__(self) -> None:
        super().__init__()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._ended.wait(LINE_EVERY_SECONDS):
            unfinished = [work for work in list(self.works.values()) if work.done < work.total]
            if unfinished:
                print("; ".join(work.text() for work in unfinished), file=sys.stderr, flush=True)

    def close(self) -> None:
        self._ended.set()
        self._thread.join()


class _JsonLines(_Board):
    """A line of JSON for a step, at most one a second, but for each work's first and last."""

    def __init__(self) -> None:
        super().__init__()
        self._shown = -math.inf

    def show(self, work: Work) -> None:
        now = time.monotonic()
        edge = work.done in (work.first, work.total)
        if edge or now - self._shown >= JSON_EVERY_SECONDS:
            self._shown = now
            print(to_json(work.as_json()), file=sys.stderr, flush=True)


@contextmanager
def console_progress(style: Style = Style.AUTO) -> Iterator[Progress]:
    """Show progress on stderr until the context ends; stdout holds results alone."""
    bars = style is Style.AUTO and sys.stderr.isatty()
    kinds = {Style.AUTO: _Bars if bars else _Lines, Style.JSON: _JsonLines, Style.NONE: _Board}
    board = kinds[style]()
    try:
        yield board
    finally:
        board.close()
