"""Stage one in other processes, which are killed at a counted step or belong to another user."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pytest
from forks import Forks

from pipeline.config import Config


@contextmanager
def counting_steps(kill_at: int | None = None) -> Iterator[list[int]]:
    """Count the flushes and renames of this process; kill it before one of them."""
    steps: list[int] = []

    def counted(step: Callable[..., None]) -> Callable[..., None]:
        def take(*args: Any, **options: Any) -> None:
            steps.append(len(steps))
            if len(steps) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            step(*args, **options)

        return take

    with pytest.MonkeyPatch.context() as patch:
        for name in ("fsync", "replace"):
            patch.setattr(os, name, counted(getattr(os, name)))
        yield steps


class StageOnes:
    """Runs stage one in forks of a process that has imported everything and done nothing."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    def run(self, config: Config, *, kill_at: int | None = None, user: int | None = None) -> int:
        """Return its exit code: of a kill at that step -9, of an OSError its number, else 0."""
        order: dict[str, Any] = {"root": str(config.data.root), "cache": str(config.cache.root)}
        print(json.dumps(order | {"kill_at": kill_at, "user": user}), file=self._file, flush=True)
        return int(self._file.readline())


@pytest.fixture(scope="module")
def stage_ones(forks: Forks) -> Iterator[StageOnes]:
    process, socket = forks.talk(__file__)
    with socket, socket.makefile("rw") as file:
        yield StageOnes(file)
    assert process.wait() == 0


def serve() -> None:
    """Run stage one in a fork for every line of standard input, and print its exit code."""
    from noise_cache import run, settings

    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            if order["user"] is not None:
                os.setuid(order["user"])
            try:
                with counting_steps(kill_at=order["kill_at"]):
                    run(settings(Path(order["root"]), Path(order["cache"])))
            except OSError as error:
                os._exit(error.errno or 1)
            os._exit(0)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
