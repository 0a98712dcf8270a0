"""dask workers for tests: processes of their own, and threads of this one."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import distributed
from forks import Fork, Forks


class Workers:
    """A dask scheduler and workers, each a process that the command line starts."""

    def __init__(self, folder: Path, forks: Forks) -> None:
        self.file = folder / "scheduler.json"
        self._forks = forks
        self.processes = [self._start("scheduler", "--port", "0")]
        self.address = ""

    def _start(self, role: str, *options: str) -> Fork:
        file = ("--scheduler-file", self.file)
        here = ("--host", "127.0.0.1", "--no-dashboard")
        return self._forks.start("python", "-m", "dask", role, *file, *here, *options)

    def add(self, count: int) -> list[Fork]:
        options = ("--no-nanny", "--nthreads", "1", "--death-timeout", "60")
        new = [self._start("worker", *options) for _ in range(count)]
        self.processes += new
        while not self.file.is_file():
            assert self.processes[0].is_running(), "the scheduler died"
            time.sleep(0.1)
        self.address = json.loads(self.file.read_text())["address"]
        return new

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.kill()
            process.wait()


@contextmanager
def thread_workers(count: int = 1) -> Iterator[distributed.Client]:
    """Start a dask scheduler and workers, threads of this process; yield their client.

    The worker loads the teacher by itself, as one in another process would.
    """
    with (
        distributed.LocalCluster(
            n_workers=count, threads_per_worker=1, processes=False, dashboard_address="127.0.0.1:0"
        ) as cluster,
        distributed.Client(cluster, set_as_default=False) as client,
    ):
        yield client


def group_is_there(group: int) -> bool:
    """Return whether a process of the group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
