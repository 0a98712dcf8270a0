"""Where dask workers are: at a running scheduler, or in processes of this machine."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING

import distributed
import torch
from distributed.utils import LoopRunner

from pipeline.errors import ConfigError, SamfedError, first_line
from pipeline.labelling import dask_executor
from pipeline.labelling.dask_executor import DaskExecutor, await_worker
from pipeline.labelling.job import Job
from pipeline.runtime import resolve_device

if TYPE_CHECKING:
    from tornado.ioloop import IOLoop

CONNECT_SECONDS = 15.0
_THREADS_PER_WORKER = 2  # one task reads and writes while another has the teacher
_HERE = "127.0.0.1"  # a scheduler runs what it is sent: nobody else may reach a local one


ExecutorFor = Callable[[Job], DaskExecutor]


@contextmanager
def connect(address: str) -> Iterator[ExecutorFor]:
    """Use the workers of a running scheduler: ``tcp://host:8786``, or the path of its file.

    Raises:
        ConfigError: no scheduler answers there, or it has no workers.
    """
    try:
        where = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
        client = distributed.Client(**where, timeout=CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise ConfigError(
            f"--scheduler {address}: no dask scheduler answers within {CONNECT_SECONDS:g} s; "
            "check the address, or start one with `dask scheduler`"
        ) from error
    except (ValueError, TypeError, AssertionError) as error:  # an address or a file that is none
        raise ConfigError(
            f"--scheduler {address}: no address of a dask scheduler that can be used "
            f"({first_line(error)}); "
            "expected tcp://host:port, tls:// with dask's certificates set, or a scheduler file"
        ) from error
    with client:
        if not await_worker(client, address, missing="no workers yet"):
            raise ConfigError(
                f"--scheduler {address}: no worker within {dask_executor.WORKERS_SECONDS:g} s; "
                f"start some with `dask worker {address}`"
            )
        yield partial(DaskExecutor, client)


@contextmanager
def local_cluster(workers: int, *, device: str) -> Iterator[ExecutorFor]:
    """Start ``workers`` processes here, each with one of the GPUs in turn or a share of the cores.

    Args:
        device: as ``precompute.device``; on ``auto`` or ``cuda`` worker i sees GPU i alone.

    Raises:
        SamfedError: a worker does not start.
    """
    gpus = _visible_gpus() if resolve_device(device).type == "cuda" else []
    nanny = logging.getLogger("distributed.nanny")
    with ExitStack() as started:
        started.callback(nanny.setLevel, nanny.level)
        loop = started.enter_context(_loop_without_ctrl_c())
        try:
            cluster = started.enter_context(
                distributed.SpecCluster(
                    workers={number: _worker(number, gpus) for number in range(workers)},
                    scheduler=_scheduler(),
                    loop=loop,
                )
            )
            client = started.enter_context(distributed.Client(cluster, set_as_default=False))
            client.wait_for_workers(workers, timeout=dask_executor.WORKERS_SECONDS)
        except (RuntimeError, TimeoutError) as error:  # it died at once, or is mute
            raise SamfedError(
                f"--workers {workers}: not all of them started ({first_line(error)}); see above "
                "what stopped them (memory?), or give fewer"
            ) from error
        share = max(1, (os.cpu_count() or 1) // workers)
        # whatever a worker does when we close, nobody waits for: that it is killed is no news
        started.callback(nanny.setLevel, logging.ERROR)
        yield partial(DaskExecutor, client, threads=share, device="cuda" if gpus else None)


def _worker(number: int, gpus: list[str]) -> dict[str, object]:
    options = {
        "host": _HERE,
        "nthreads": _THREADS_PER_WORKER,
        "env": {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {},
        "memory_limit": 0,  # pausing and spilling serve dask's own data; we keep none
        "dashboard": False,
        "silence_logs": logging.WARNING,
    }
    return {"cls": distributed.Nanny, "options": options}


def _scheduler() -> dict[str, object]:
    # port 0: dask's usual one may be another cluster's, and dask would warn of it
    options = {"host": _HERE, "dashboard": False, "dashboard_address": f"{_HERE}:0"}
    return {"cls": distributed.Scheduler, "options": options}


@contextmanager
def _loop_without_ctrl_c() -> Iterator[IOLoop]:
    """Run an event loop whose processes never see Ctrl-C, which a terminal sends to them as well.

    It ends them through us, in order. What a thread starts inherits its blocked signals, so a
    worker that is started again later is spared too.
    """
    resource_tracker.ensure_running()  # where it starts, it unblocks the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        runner = LoopRunner()
        runner.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield runner.loop
    finally:
        runner.stop()


def _visible_gpus() -> list[str]:
    """Return this process's GPUs by the names that it was given, e.g. by SLURM."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]
