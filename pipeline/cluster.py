"""dask: the workers of a running scheduler, or processes here, and the results of their tasks."""

from __future__ import annotations

import logging
import math
import signal
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice
from multiprocessing import resource_tracker
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dask
import distributed
from distributed.client import ClosedClientError
from distributed.scheduler import KilledWorker
from distributed.utils import LoopRunner

from pipeline.cores import usable_cores
from pipeline.dask_noise import interrupted_quietly
from pipeline.errors import ConfigError, SamfedError, first_line
from pipeline.runtime import resolve_device, visible_gpus

if TYPE_CHECKING:
    from tornado.ioloop import IOLoop

log = logging.getLogger("samfed.cluster")

Future = distributed.Future[Any]
Resources = Mapping[str, float]  # of a worker, as `dask worker --resources "GPU=1"` announces them

CONNECT_SECONDS = 15.0
WORKERS_SECONDS = 120.0  # without any worker, at the start or later, before a run gives up
LOOK_SECONDS = 5.0  # without news of a task, before asking whether there is a worker at all
_POLL_SECONDS = 0.02
_END_SECONDS = 30.0  # that a nanny has to end its worker, before the worker is left to itself
_RETRIES = 3  # of a task that raised, e.g. because a file system was away for a moment
_THREADS_PER_WORKER = 2  # one task reads and writes while another computes
#: What a task on a GPU takes of it: while one of two computes, the other reads and writes.
GPU: Resources = {"GPU": 1 / _THREADS_PER_WORKER}
NOTHING: Resources = {}
# no dashboard looks at our workers: two idle ones took 0.09 CPU seconds a second, and so take 0.02
_UNWATCHED = {
    "distributed.worker.profile.enabled": False,
    "distributed.admin.tick.interval": "500ms",
    "distributed.admin.system-monitor.interval": "5s",
}
_HERE = "127.0.0.1"  # a scheduler runs what it is sent: nobody else may reach a local one
_GONE = "the dask scheduler is gone; run the same command again to continue"


class NoResultError(Exception):
    """A task has no result yet, or lost it."""


@dataclass(frozen=True)
class Cluster:
    """A scheduler's workers.

    Every method raises SamfedError: a worker's own; a task that killed one worker after another;
    the scheduler is gone, or had no worker for ``WORKERS_SECONDS``.
    """

    client: distributed.Client
    threads: int | None = None  # for torch on each worker, where the settings name none
    device: str | None = None  # of each worker, in place of the settings' one

    def results(
        self, work: Callable[[Any], Any], items: Iterable[tuple[str, Any]], *, on_gpus: bool = False
    ) -> Iterator[Any]:
        """Yield what ``work`` returns for each item, as it comes in no particular order.

        Items come with their names for messages; with ``on_gpus`` they go only to workers that
        announce a GPU, if there are any.
        """
        with reaching_the_scheduler():
            needs = GPU if on_gpus and _fitting(self.client, GPU) else NOTHING
        submit = partial(self.client.submit, retries=_RETRIES, pure=False, resources=needs)
        completed = distributed.as_completed(loop=self.client.loop)
        waiting: dict[Future, str] = {}
        items = iter(items)
        try:
            while True:
                with reaching_the_scheduler():
                    threads = sum(self.client.nthreads().values())
                # few at once, so that memory stays flat however many there are
                for name, item in islice(items, max(0, max(2, 2 * threads) - len(waiting))):
                    future = submit(work, item)
                    waiting[future] = name
                    completed.add(future)
                if not waiting:
                    return
                future = self._next(completed, needs)
                yield self.result(future, waiting.pop(future), needs)
        finally:
            self.cancel(waiting)

    def _next(self, completed: distributed.as_completed, needs: Resources) -> Future:
        """Return the next future that is over; dask itself would wait for ever for a worker."""
        looked = time.monotonic()
        while not completed.has_ready():
            if time.monotonic() - looked > LOOK_SECONDS:
                self.await_worker(needs)
                looked = time.monotonic()
            time.sleep(_POLL_SECONDS)
        return next(completed)

    def result(self, future: Future, name: str, needs: Resources = NOTHING) -> Any:
        """Return a finished task's result, which is still with the worker that computed it."""
        while True:
            try:
                return future.result(timeout=LOOK_SECONDS)
            except TimeoutError:
                if future.status == "error":
                    raise  # the task's own
                self.await_worker(needs)
            except KilledWorker as error:
                raise _killed(name) from error
            except CancelledError as error:
                raise SamfedError(f"{name}: {_GONE}") from error

    def result_soon(self, future: Future, name: str, within: float = math.inf) -> Any:
        """Return a task's result, for which this waits ``within`` or up to ``LOOK_SECONDS``.

        Raises:
            NoResultError: there is none yet, or it was lost with its worker.
        """
        try:
            seconds = LOOK_SECONDS if future.done() else min(within, LOOK_SECONDS)
            return future.result(timeout=seconds)
        except TimeoutError:
            if future.status == "error":
                raise  # the task's own
            raise NoResultError from None
        except CancelledError:
            raise NoResultError from None
        except KilledWorker as error:
            raise _killed(name) from error

    def cancel(self, futures: Iterable[Future]) -> None:
        """Give tasks up."""
        if self.client.status == "running":  # else the client has closed itself
            with suppress(OSError, CancelledError, ClosedClientError):
                self.client.cancel(list(futures))

    def tell(self, work: Callable[[Any], Any], item: Any) -> None:
        """Let every worker call ``work`` with ``item``, whatever comes of it."""
        if self.client.status == "running":
            with suppress(OSError, CancelledError, ClosedClientError):
                self.client.run(work, item, on_error="ignore")

    def addresses(self) -> list[str]:
        """Return the workers that there are; wait for one where there is none."""
        while True:
            with reaching_the_scheduler():
                found = sorted(self.client.nthreads())
            if found:
                return found
            self.await_worker()

    def end_worker(self, address: str) -> None:
        """End a worker with all that it computes; its nanny, where it has one, starts another.

        One without a nanny is left to itself, and no longer used.
        """
        scheduler: Any = self.client.scheduler  # its client's own method refuses without a nanny
        with reaching_the_scheduler():
            self.client.sync(
                scheduler.restart_workers,
                workers=[address],
                timeout=_END_SECONDS,
                wait_for_workers=False,
                on_error="return",
                stimulus_id="samfed",
            )
            while address in self.client.nthreads():
                time.sleep(_POLL_SECONDS)

    def await_worker(self, needs: Resources = NOTHING) -> None:
        """Return once there is a worker that has what a task needs."""
        with reaching_the_scheduler():
            where = f"the dask scheduler at {self.client.scheduler_info()['address']}"
            kind = "worker with a GPU" if needs else "worker"
            if not await_worker(self.client, where, missing=f"no {kind} left", needs=needs):
                raise SamfedError(
                    f"{where} lost its last {kind} and found no other within "
                    f"{WORKERS_SECONDS:g} s; what is finished is kept: see why workers stop, and "
                    "run the same command again"
                )


def _killed(name: str) -> SamfedError:
    return SamfedError(
        f"{name}: each worker that took it died; see the workers' logs, most often memory is short"
    )


def await_worker(
    client: distributed.Client, where: str, *, missing: str, needs: Resources = NOTHING
) -> bool:
    """Wait until the scheduler has a worker, and say so; return False if it gets none in time."""
    if _fitting(client, needs):
        return True
    log.warning("%s has %s; waiting up to %g s", where, missing, WORKERS_SECONDS)
    until = time.monotonic() + WORKERS_SECONDS
    while not _fitting(client, needs):
        if time.monotonic() > until:
            return False
        time.sleep(_POLL_SECONDS)
    log.warning("%s has a worker again", where)
    return True


def _fitting(client: distributed.Client, needs: Resources) -> bool:
    scheduler: Any = client.scheduler  # its client's own cache may be without workers
    workers = client.sync(scheduler.identity, n_workers=-1)["workers"].values()
    return any(needs.keys() <= worker["resources"].keys() for worker in workers)


@contextmanager
def reaching_the_scheduler() -> Iterator[None]:
    """Say what it means that the scheduler is gone, as with its job or its pod at any time."""
    try:
        yield
    except (OSError, CancelledError) as error:
        raise SamfedError(_GONE) from error


# --------------------------------------------------------------------------- where workers are


def check_worker(expected: str, found: str, folders: Iterable[Path]) -> None:
    """Check on a worker that it is fit for a run.

    Raises:
        SamfedError: it is another samfed, or does not see the coordinator's folders.
    """
    where = f"worker on {socket.gethostname()}"
    with suppress(ValueError):  # not on a worker of dask's
        where = f"worker {distributed.get_worker().name} on {socket.gethostname()}"
    if found != expected:
        raise SamfedError(f"{where}: samfed {found}, expected {expected}; install it")
    for folder in folders:
        if not folder.is_dir():
            raise SamfedError(
                f"{where}: {folder} is not there; put data.root and cache.root on a file system "
                "that every worker sees under the same path"
            )


#: Workers that are connected to, or started, when it is entered.
Workers = AbstractContextManager[Cluster]


def choose_cluster(*, scheduler: str | None, workers: int | None, device: str) -> Workers | None:
    """Return the workers that a scheduler's address or a number of processes asks for.

    None is this process.

    Raises:
        ConfigError: both are given.
    """
    if scheduler is not None and workers is not None:
        raise ConfigError("--scheduler and --workers: give one of them")
    logging.getLogger("distributed").setLevel(logging.WARNING)  # its own import sets INFO
    if scheduler is not None:
        return connect(scheduler)
    return None if workers is None else local_cluster(workers, device=device)


@contextmanager
def connect(address: str) -> Iterator[Cluster]:
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
    with interrupted_quietly(), client:
        if not await_worker(client, address, missing="no workers yet"):
            raise ConfigError(
                f"--scheduler {address}: no worker within {WORKERS_SECONDS:g} s; "
                f"start some with `dask worker {address}`"
            )
        yield Cluster(client)


@contextmanager
def local_cluster(workers: int, *, device: str) -> Iterator[Cluster]:
    """Start ``workers`` processes here, each with one of the GPUs in turn or a share of the cores.

    Args:
        device: as the settings' one; on ``auto`` or ``cuda`` worker i sees GPU i alone.

    Raises:
        SamfedError: a worker does not start.
    """
    gpus = visible_gpus() if resolve_device(device).type == "cuda" else []
    nanny = logging.getLogger("distributed.nanny")
    with ExitStack() as started:
        started.callback(nanny.setLevel, nanny.level)
        started.enter_context(dask.config.set(_UNWATCHED))
        started.enter_context(interrupted_quietly())
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
        share = max(1, usable_cores() // workers)
        # whatever a worker does when we close, nobody waits for: that it is killed is no news
        started.callback(nanny.setLevel, logging.ERROR)
        yield Cluster(client, threads=share, device="cuda" if gpus else None)


def _worker(number: int, gpus: list[str]) -> dict[str, object]:
    options = {
        "host": _HERE,
        "nthreads": _THREADS_PER_WORKER,
        "env": {"CUDA_VISIBLE_DEVICES": gpus[number % len(gpus)]} if gpus else {},
        "resources": {"GPU": 1} if gpus else {},
        "memory_limit": 0,  # pausing and spilling serve dask's own data; we keep none
        "dashboard": False,
        "silence_logs": logging.WARNING,
        "preload": ["pipeline.dask_noise"],
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
