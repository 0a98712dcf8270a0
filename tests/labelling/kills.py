"""Stage one in other processes, which are killed at a counted step or belong to another user."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

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


class Forks:
    """Runs stage one in forks of a process that has imported everything and done nothing."""

    def __init__(self, server: subprocess.Popen[str]) -> None:
        self._server = server

    def run(self, config: Config, *, kill_at: int | None = None, user: int | None = None) -> int:
        """Return its exit code: of a kill at that step -9, of an OSError its number, else 0."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        order: dict[str, Any] = {"root": str(config.data.root), "cache": str(config.cache.root)}
        print(json.dumps(order | {"kill_at": kill_at, "user": user}), file=self._server.stdin)
        self._server.stdin.flush()
        return int(self._server.stdout.readline())


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    command = [sys.executable, __file__]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with subprocess.Popen(
        command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n"
        yield Forks(server)


def serve() -> None:
    """Run stage one in a fork for every line of standard input, and print its exit code."""
    from noise_cache import run, settings

    print("ready", flush=True)
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
