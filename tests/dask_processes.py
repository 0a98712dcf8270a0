"""dask workers for tests: processes of their own, and threads of this one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import distributed

ROOT = Path(__file__).parents[1]


class Workers:
    """A dask scheduler and workers, each a process that the command line starts."""

    def __init__(self, folder: Path) -> None:
        self.file = folder / "scheduler.json"
        self.processes = [
            self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard")
        ]
        self.address = ""

    def _start(self, role: str, *options: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "dask", role, "--scheduler-file", str(self.file)]
        command += ["--host", "127.0.0.1", "--no-dashboard"]
        return subprocess.Popen(
            [*command, *options], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )

    def add(self, count: int) -> list[subprocess.Popen[bytes]]:
        options = ("--no-nanny", "--nthreads", "1", "--death-timeout", "60")
        new = [self._start("worker", *options) for _ in range(count)]
        self.processes += new
        while not self.file.is_file():
            assert self.processes[0].poll() is None, "the scheduler died"
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
