"""Stage one on dask: a task is one chunk, each worker loads the teacher once.

Workers read images and write chunks themselves, so they see ``data.root`` and ``cache.root`` under
the coordinator's paths; only file names travel. A lost worker costs the chunks that it had: dask
gives them to others, and the same rows written twice are the same bytes. Everything is checked and
marked done by the coordinator, which holds the stores' locks.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distributed
import torch
from distributed.scheduler import KilledWorker
from distributed.utils import LoopRunner

from pipeline import __version__
from pipeline.config import Config
from pipeline.disk import file_sha256
from pipeline.errors import ConfigError, DataError, SamfedError, first_line
from pipeline.labelling.backoff import TeacherBackend
from pipeline.labelling.job import Job, Meter, load_job, store_path
from pipeline.labelling.quality import Statistics, measure_owner
from pipeline.labelling.worker import ChunkResult, ChunkTask, label_chunks, load_backend
from pipeline.runtime import resolve_device
from pipeline.stores.label_store import Identity

if TYPE_CHECKING:
    from tornado.ioloop import IOLoop

log = logging.getLogger("samfed.cluster")

Future = distributed.Future[Any]

CONNECT_SECONDS = 15.0
WORKERS_SECONDS = 120.0  # without any worker, at the start or later, before a run gives up
LOOK_SECONDS = 5.0  # without news of a task, before asking whether there is a worker at all
_POLL_SECONDS = 0.02
_RETRIES = 3  # of a task that raised, e.g. because a file system was away for a moment
_THREADS_PER_WORKER = 2  # one task reads and writes while another has the teacher
_HERE = "127.0.0.1"  # a scheduler runs what it is sent: nobody else may reach a local one
_GONE = "the dask scheduler is gone; run the same command again to continue"


@dataclass(frozen=True)
class Order:
    """What every task brings along, so that any worker can do it."""

    settings: str  # as JSON, with paths that hold in any working directory
    identity: Identity
    partition: str  # sha256 of its file
    version: str = __version__  # the coordinator's samfed


class DaskExecutor:
    """dask workers that share the chunks of all owners; results come in no particular order.

    Every method raises SamfedError: a worker's own; a chunk killed one worker after another; the
    scheduler is gone, or had no worker for ``WORKERS_SECONDS``.
    """

    def __init__(
        self,
        client: distributed.Client,
        job: Job,
        *,
        threads: int | None = None,
        device: str | None = None,
    ) -> None:
        """``threads`` and ``device`` take the place of the settings' on every worker."""
        self._client = client
        partition = file_sha256(job.config.cache.root / "partition.json")
        settings = _for_workers(job.config, threads, device).model_dump_json()
        self._order = Order(settings, job.identity, partition)

    def groups(self, owners: Sequence[str]) -> list[Sequence[str]]:
        return [owners]

    def run(self, tasks: Iterable[ChunkTask], *, meter: Meter) -> Generator[ChunkResult]:
        result: ChunkResult
        for result in self._results(run_task, ((str(task), task) for task in tasks)):
            meter.advance(len(result.rows))
            yield result

    def measure(self, owners: Iterable[str]) -> Iterator[tuple[str, Statistics | DataError]]:
        return self._results(run_statistics, ((f"{owner}: statistics", owner) for owner in owners))

    def check(self, owner: str) -> None:
        list(self._results(run_check, [(f"{owner}: the teacher", owner)]))

    def _results(
        self, work: Callable[[Order, Any], Any], items: Iterable[tuple[str, Any]]
    ) -> Iterator[Any]:
        """Yield what ``work`` returns for each item; an item comes with its name for messages."""
        completed = distributed.as_completed(loop=self._client.loop)
        waiting: dict[Future, str] = {}
        items = iter(items)
        try:
            while True:
                with _reaching_the_scheduler():
                    threads = sum(self._client.nthreads().values())
                # few at once, so that memory stays flat however many there are
                for name, item in islice(items, max(0, max(2, 2 * threads) - len(waiting))):
                    future = self._client.submit(
                        work, self._order, item, retries=_RETRIES, pure=False
                    )
                    waiting[future] = name
                    completed.add(future)
                if not waiting:
                    return
                future = self._next(completed)
                yield self._result(future, waiting.pop(future))
        finally:
            with suppress(OSError, CancelledError):  # a scheduler that is gone runs nothing
                self._client.cancel(list(waiting))

    def _next(self, completed: distributed.as_completed) -> Future:
        """Return the next future that is over; dask itself would wait for ever for a worker."""
        looked = time.monotonic()
        while not completed.has_ready():
            if time.monotonic() - looked > LOOK_SECONDS:
                self._await_worker()
                looked = time.monotonic()
            time.sleep(_POLL_SECONDS)
        return next(completed)

    def _result(self, future: Future, name: str) -> Any:
        """Return a finished task's result, which is still with the worker that computed it."""
        while True:
            try:
                return future.result(timeout=LOOK_SECONDS)
            except TimeoutError:
                if future.status == "error":
                    raise  # the task's own
                self._await_worker()
            except KilledWorker as error:
                raise SamfedError(
                    f"{name}: each worker that took them died; see the workers' logs (memory?), "
                    "lower precompute.batch_size"
                ) from error
            except CancelledError as error:
                raise SamfedError(f"{name}: {_GONE}") from error

    def _await_worker(self) -> None:
        with _reaching_the_scheduler():
            where = f"the dask scheduler at {self._client.scheduler_info()['address']}"
            if not await_worker(self._client, where, missing="no worker left"):
                raise SamfedError(
                    f"{where} lost its last worker and found no other within "
                    f"{WORKERS_SECONDS:g} s; finished chunks are kept: see why workers stop, and "
                    "run the same command again"
                )


def _for_workers(config: Config, threads: int | None, device: str | None) -> Config:
    """Return the settings with paths that hold in any working directory."""
    data = config.data.model_copy(update={"root": config.data.root.resolve()})
    cache = config.cache.model_copy(update={"root": config.cache.root.resolve()})
    checkpoint = config.sam.checkpoint.resolve() if config.sam.checkpoint is not None else None
    sam = config.sam.model_copy(update={"checkpoint": checkpoint})
    run = config.precompute
    run = run.model_copy(update={"threads": run.threads or threads, "device": device or run.device})
    return config.model_copy(update={"data": data, "cache": cache, "sam": sam, "precompute": run})


def await_worker(client: distributed.Client, where: str, *, missing: str) -> bool:
    """Wait until the scheduler has a worker, and say so; return False where it gets none in time.

    Before the first worker of a run and after its last one alike.
    """
    if client.nthreads():
        return True
    log.warning("%s has %s; waiting up to %g s", where, missing, WORKERS_SECONDS)
    try:
        client.wait_for_workers(1, timeout=WORKERS_SECONDS)
    except TimeoutError:
        return False
    log.warning("%s has a worker again", where)
    return True


@contextmanager
def _reaching_the_scheduler() -> Iterator[None]:
    """Say what it means that the scheduler is gone, as with its job or its pod at any time."""
    try:
        yield
    except (OSError, CancelledError) as error:
        raise SamfedError(_GONE) from error


# --------------------------------------------------------------------------- where workers are


@contextmanager
def connect(address: str) -> Iterator[Callable[[Job], DaskExecutor]]:
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
                f"--scheduler {address}: no worker within {WORKERS_SECONDS:g} s; "
                f"start some with `dask worker {address}`"
            )
        yield partial(DaskExecutor, client)


@contextmanager
def local_cluster(workers: int, *, device: str) -> Iterator[Callable[[Job], DaskExecutor]]:
    """Start ``workers`` processes here, each with one of the GPUs in turn or a share of the cores.

    Args:
        device: as ``precompute.device``; on ``auto`` or ``cuda`` worker i sees GPU i alone.

    Raises:
        SamfedError: a worker does not start.
    """
    gpus = _visible_gpus() if resolve_device(device).type == "cuda" else []
    nanny, loops = logging.getLogger("distributed.nanny"), logging.getLogger("tornado.application")
    with ExitStack() as started:
        started.callback(nanny.setLevel, nanny.level)
        started.callback(loops.setLevel, loops.level)
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
            client.wait_for_workers(workers, timeout=WORKERS_SECONDS)
        except (RuntimeError, TimeoutError) as error:  # it died at once, or is mute
            raise SamfedError(
                f"--workers {workers}: not all of them started ({first_line(error)}); see above "
                "what stopped them (memory?), or give fewer"
            ) from error
        share = max(1, (os.cpu_count() or 1) // workers)
        # whatever a worker does when we close, nobody waits for: that it is killed is no news, nor
        # that a callback of the event loop no longer finds what it was for
        started.callback(nanny.setLevel, logging.ERROR)
        started.callback(loops.setLevel, logging.CRITICAL)
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


# --------------------------------------------------------------------------- on a worker


_loading = threading.Lock()
_loaded: dict[Order, tuple[Job, TeacherBackend]] = {}  # the last one


def run_task(order: Order, task: ChunkTask) -> ChunkResult:
    """Label one chunk on this worker.

    Raises:
        SamfedError: this worker runs another samfed, or does not see the coordinator's files.
    """
    job, teacher = _loaded_for(order, task.owner)
    (result,) = label_chunks(job, [task], teacher)
    return result


def run_check(order: Order, owner: str) -> None:
    """Load the teacher as ``run_task`` would; errors as ``run_task``'s."""
    _loaded_for(order, owner)


def run_statistics(order: Order, owner: str) -> tuple[str, Statistics | DataError]:
    """Measure one finished store; errors as ``run_task``'s."""
    job, teacher = _loaded_for(order, owner)
    return owner, measure_owner(job, owner, teacher)


def _loaded_for(order: Order, owner: str) -> tuple[Job, TeacherBackend]:
    """Return the job and the teacher, once this worker is fit for them; pins torch's threads."""
    host = socket.gethostname()
    if order.version != __version__:
        raise SamfedError(
            f"worker on {host}: samfed {__version__}, expected {order.version}; install it"
        )
    config = Config.model_validate_json(order.settings)
    for path in (config.data.root, store_path(config.cache.root, owner)):
        if not path.is_dir():
            raise SamfedError(
                f"worker on {host}: {path} is not there; put data.root and cache.root on a file "
                "system that every worker sees under the same path"
            )
    if config.precompute.threads is not None:
        torch.set_num_threads(config.precompute.threads)
    with _loading:
        if order not in _loaded:
            _loaded.clear()
            job = load_job(config)
            _loaded[order] = (job, load_backend(job))
        return _loaded[order]
