"""Stage one on dask: a task is one shard, each worker loads the teacher once.

Workers read images and write shards themselves, so they see ``data.root`` and ``cache.root`` under
the coordinator's paths; only file names travel. A lost worker costs the shards that it had: dask
gives them to others, and the same rows written twice are the same bytes. Everything is checked and
marked done by the coordinator, which holds the stores' locks.
"""

from __future__ import annotations

import logging
import os
import queue
import signal
import socket
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distributed
import torch
from distributed.scheduler import KilledWorker
from distributed.utils import LoopRunner

from pipeline import __version__
from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.errors import ConfigError, SamfedError
from pipeline.labelling.backoff import TeacherBackend
from pipeline.labelling.quality import measure_owner
from pipeline.labelling.worker import (
    Outcome,
    Task,
    label_tasks,
    load_backend,
    store_path,
)
from pipeline.runtime import resolve_device
from pipeline.stores.label_store import Identity

if TYPE_CHECKING:
    from tornado.ioloop import IOLoop

log = logging.getLogger("samfed.cluster")

_RETRIES = 3  # of a task that raised, e.g. because a file system was away for a moment
_THREADS_PER_WORKER = 2  # one task reads and writes while another has the teacher
_HERE = "127.0.0.1"  # a scheduler runs what it is sent: nobody else may reach a local one
_GONE = "the dask scheduler is gone; run the same command again to continue"
_CONNECT_SECONDS = 15
_WORKERS_SECONDS = 120  # without any worker, at the start or later, before a run gives up
_LOOK_SECONDS = 5  # without news of a task, before asking whether there is a worker at all


class Cluster:
    """dask workers that label; made by ``connect`` or ``local_cluster``."""

    def __init__(
        self,
        client: distributed.Client,
        *,
        threads: int | None = None,
        device: str | None = None,
    ) -> None:
        """``threads`` and ``device`` take the place of the settings' on every worker."""
        self._client = client
        self._threads = threads
        self._device = device

    def label_tasks(
        self,
        config: Config,
        tasks: Iterable[Task],
        identity: Identity,
        *,
        finished: Callable[[Outcome], None],
        advance: Callable[[int], None],
    ) -> None:
        """Label every task on some worker; ``finished`` is called here, in no particular order.

        Only a few tasks a worker thread are under way at once, so memory stays flat however many
        images there are.

        Raises:
            SamfedError: a worker's own, a shard killed one worker after another, or there was
            no worker left for a while.
        """
        settings = _for_workers(config, self._threads, self._device)
        done: queue.SimpleQueue[Any] = queue.SimpleQueue()
        waiting: dict[Any, Task] = {}

        def collect() -> None:
            future = self._patiently(done.get)
            task = waiting.pop(future)
            what = f"{task.owner} rows {task.rows[0]}..{task.rows[-1]}"
            outcome: Outcome = self._result(future, what)
            finished(outcome)
            advance(len(outcome.rows))

        try:
            for task in tasks:
                while len(waiting) >= self._window():
                    collect()
                future = self._client.submit(
                    run_task,
                    settings,
                    identity,
                    task,
                    __version__,
                    key=f"{task.owner}-{task.chunk}-{uuid.uuid4().hex}",
                    retries=_RETRIES,
                    pure=False,
                )
                waiting[future] = task
                future.add_done_callback(done.put)
            while waiting:
                collect()
        finally:
            self._cancel(list(waiting))

    def measure(
        self,
        config: Config,
        owners: Sequence[str],
        identity: Identity,
        *,
        measured: Callable[[str, Callable[[], dict[str, Any]]], None],
    ) -> None:
        """Statistics of finished stores, each on some worker.

        ``measured`` is called here with an owner and what returns, or raises, its statistics.
        """
        settings = _for_workers(config, self._threads, self._device)
        futures = {
            owner: self._client.submit(
                run_statistics,
                settings,
                identity,
                owner,
                __version__,
                retries=_RETRIES,
                pure=False,
            )
            for owner in owners
        }
        try:
            for owner, future in futures.items():
                measured(owner, partial(self._result, future, f"{owner}: statistics"))
        finally:
            self._cancel(list(futures.values()))

    def check(self, config: Config, owner: str, identity: Identity) -> None:
        """Let some worker do all that comes before labelling images of ``owner``.

        Raises:
            SamfedError: its own, e.g. because it does not see the teacher.
        """
        settings = _for_workers(config, self._threads, self._device)
        future = self._client.submit(
            run_check, settings, identity, owner, __version__, retries=_RETRIES, pure=False
        )
        try:
            self._result(future, f"{owner}: the teacher")
        finally:
            self._cancel([future])

    def _window(self) -> int:
        with _talking():
            threads: int = sum(self._client.nthreads().values())
        return max(2, 2 * threads)

    def _result(self, future: Any, what: str) -> Any:
        def result(*, timeout: float) -> Any:
            try:
                return future.result(timeout=timeout)
            except TimeoutError as error:
                if future.status == "error":
                    raise  # the task's own
                raise queue.Empty from error

        try:
            return self._patiently(result)  # it is still with the worker that made it
        except KilledWorker as error:
            raise SamfedError(
                f"{what}: each worker that took them died; see the workers' logs (memory?), "
                "lower precompute.batch_size"
            ) from error
        except CancelledError as error:
            raise SamfedError(f"{what}: {_GONE}") from error

    def _patiently(self, get: Callable[..., Any]) -> Any:
        """What ``get(timeout=seconds)`` returns once it no longer raises ``queue.Empty``.

        dask itself waits for ever for workers that are gone.

        Raises:
            SamfedError: the scheduler is gone, or it had no worker for ``_WORKERS_SECONDS``.
        """
        while True:
            try:
                return get(timeout=_LOOK_SECONDS)
            except queue.Empty:
                self._await_worker()

    def _await_worker(self) -> None:
        with _talking():
            if self._client.nthreads():
                return
            where = f"the dask scheduler at {self._client.scheduler_info()['address']}"
            log.warning("%s has no worker left; waiting up to %d s", where, _WORKERS_SECONDS)
            try:
                self._client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
            except TimeoutError as error:
                raise SamfedError(
                    f"{where} lost its last worker and found no other within {_WORKERS_SECONDS} s; "
                    "finished shards are kept: see why workers stop, and run the same command again"
                ) from error
            log.warning("%s has a worker again", where)

    def _cancel(self, futures: Sequence[Any]) -> None:
        with suppress(OSError, CancelledError):  # a scheduler that is gone runs nothing
            self._client.cancel(futures)


@contextmanager
def _talking() -> Iterator[None]:
    """The scheduler may go at any time, with its job or its pod."""
    try:
        yield
    except (OSError, CancelledError) as error:
        raise SamfedError(_GONE) from error


def _for_workers(config: Config, threads: int | None, device: str | None) -> str:
    """The settings as JSON, with paths that hold in any working directory."""
    data = config.data.model_copy(update={"root": config.data.root.resolve()})
    cache = config.cache.model_copy(update={"root": config.cache.root.resolve()})
    checkpoint = config.sam.checkpoint.resolve() if config.sam.checkpoint is not None else None
    sam = config.sam.model_copy(update={"checkpoint": checkpoint})
    run = config.precompute
    run = run.model_copy(update={"threads": run.threads or threads, "device": device or run.device})
    changed = {"data": data, "cache": cache, "sam": sam, "precompute": run}
    return config.model_copy(update=changed).model_dump_json()


# --------------------------------------------------------------------------- where workers are


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
    """The workers of a running scheduler: ``tcp://host:8786``, or the path of its scheduler file.

    Raises:
        ConfigError: no scheduler answers there, or it has no workers.
    """
    try:
        where = {"scheduler_file": address} if Path(address).is_file() else {"address": address}
        client = distributed.Client(**where, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, TimeoutError) as error:
        raise ConfigError(
            f"--scheduler {address}: no dask scheduler answers within {_CONNECT_SECONDS} s; "
            "check the address, or start one with `dask scheduler`"
        ) from error
    except (ValueError, TypeError, AssertionError) as error:  # an address or a file that is none
        raise ConfigError(
            f"--scheduler {address}: no address of a dask scheduler that can be used "
            f"({_first_line(error)}); "
            "expected tcp://host:port, tls:// with dask's certificates set, or a scheduler file"
        ) from error
    with client:
        _await_workers(client, address)
        yield Cluster(client)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _await_workers(client: distributed.Client, address: str) -> None:
    if not client.nthreads():
        log.warning("%s has no workers yet; waiting up to %d s", address, _WORKERS_SECONDS)
    try:
        client.wait_for_workers(1, timeout=_WORKERS_SECONDS)
    except TimeoutError as error:
        raise ConfigError(
            f"--scheduler {address}: no worker within {_WORKERS_SECONDS} s; start some with "
            f"`dask worker {address}`"
        ) from error


@contextmanager
def local_cluster(workers: int, *, device: str) -> Iterator[Cluster]:
    """``workers`` processes on this machine, each with one of its GPUs in turn or a share of cores.

    Args:
        device: as ``precompute.device``; on ``auto`` or ``cuda`` worker i sees GPU i alone.

    Raises:
        SamfedError: a worker does not start.
    """
    gpus = _visible_gpus() if resolve_device(device).type == "cuda" else []
    spec = {
        number: {
            "cls": distributed.Nanny,
            "options": {
                "host": _HERE,
                "nthreads": _THREADS_PER_WORKER,
                "env": {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {},
                "memory_limit": 0,  # pausing and spilling serve dask's own data; we keep none
                "dashboard": False,
                "silence_logs": logging.WARNING,
            },
        }
        for number in range(workers)
    }
    # port 0: dask's usual one may be another cluster's, and dask would warn of it
    options = {"host": _HERE, "dashboard": False, "dashboard_address": f"{_HERE}:0"}
    scheduler = {"cls": distributed.Scheduler, "options": options}
    nanny = logging.getLogger("distributed.nanny")
    with ExitStack() as started:
        started.callback(nanny.setLevel, nanny.level)
        loop = started.enter_context(_loop_without_ctrl_c())
        try:
            cluster = started.enter_context(
                distributed.SpecCluster(workers=spec, scheduler=scheduler, loop=loop)
            )
            client = started.enter_context(distributed.Client(cluster, set_as_default=False))
            client.wait_for_workers(workers, timeout=_WORKERS_SECONDS)
        except (RuntimeError, TimeoutError) as error:  # it died at once, or is mute
            raise SamfedError(
                f"--workers {workers}: not all of them started ({_first_line(error)}); see above "
                "what stopped them (memory?), or give fewer"
            ) from error
        share = max(1, (os.cpu_count() or 1) // workers)
        # whatever a worker does when we close, nobody waits for: that it is killed is no news
        started.callback(nanny.setLevel, logging.ERROR)
        yield Cluster(client, threads=share, device="cuda" if gpus else None)


@contextmanager
def _loop_without_ctrl_c() -> Iterator[IOLoop]:
    """An event loop whose processes never see Ctrl-C, which a terminal sends to them as well.

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
    """This process's GPUs by the names that it was given, e.g. by SLURM."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",") if given else [str(i) for i in range(torch.cuda.device_count())]


# --------------------------------------------------------------------------- on a worker


_loading = threading.Lock()
_loaded: dict[tuple[str, str], TeacherBackend] = {}  # the last teacher, by settings and identity


def run_task(settings: str, identity: Identity, task: Task, version: str) -> Outcome:
    """Label one shard on this worker; ``version`` is the coordinator's samfed.

    Raises:
        SamfedError: this worker runs another samfed, or does not see the coordinator's files.
    """
    config = _on_this_worker(settings, task.owner, version)
    outcomes: list[Outcome] = []
    teacher = _teacher(config, settings, identity)
    label_tasks(config, [task], teacher, finished=outcomes.append)
    return outcomes[0]


def run_check(settings: str, identity: Identity, owner: str, version: str) -> None:
    """Load the teacher as ``run_task`` would; errors as ``run_task``'s."""
    _teacher(_on_this_worker(settings, owner, version), settings, identity)


def run_statistics(settings: str, identity: Identity, owner: str, version: str) -> dict[str, Any]:
    """Statistics of one finished store; errors as ``run_task``'s."""
    config = _on_this_worker(settings, owner, version)
    teacher = _teacher(config, settings, identity)
    partition = load_partition(config.cache.root / "partition.json")
    return measure_owner(config, partition, owner, teacher)


def _on_this_worker(settings: str, owner: str, version: str) -> Config:
    """The coordinator's settings, once this worker is fit for them; pins torch's threads."""
    host = socket.gethostname()
    if version != __version__:
        raise SamfedError(f"worker on {host}: samfed {__version__}, expected {version}; install it")
    config = Config.model_validate_json(settings)
    for path in (config.data.root, store_path(config, owner)):
        if not path.is_dir():
            raise SamfedError(
                f"worker on {host}: {path} is not there; put data.root and cache.root on a file "
                "system that every worker sees under the same path"
            )
    if config.precompute.threads is not None:
        torch.set_num_threads(config.precompute.threads)
    return config


def _teacher(config: Config, settings: str, identity: Identity) -> TeacherBackend:
    key = (settings, identity.digest)
    with _loading:
        if key not in _loaded:
            _loaded.clear()
            partition = load_partition(config.cache.root / "partition.json")
            _loaded[key] = load_backend(config, partition)
        return _loaded[key]
