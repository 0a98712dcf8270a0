"""Stage one on dask: a task is one chunk, each worker loads the teacher once.

Workers read images and write chunks themselves, so they see ``data.root`` and ``cache.root`` under
the coordinator's paths; only file names travel. A lost worker costs the chunks that it had: dask
gives them to others, and the same rows written twice are the same bytes. Everything is checked and
marked done by the coordinator, which holds the stores' locks.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch

from pipeline import __version__
from pipeline.allocation import return_freed_memory
from pipeline.cluster import Cluster, check_worker
from pipeline.config import Config
from pipeline.disk import file_sha256
from pipeline.labelling.backoff import TeacherBackend
from pipeline.labelling.job import Job, Meter, load_job, store_path
from pipeline.labelling.worker import ChunkResult, ChunkTask, Executor, label_chunks, load_backend
from pipeline.params import absolute
from pipeline.stores.label_store import LABEL_VERSION, Identity

#: What two processes must have in common to make the same labels and understand each other.
VERSION = f"{__version__} with labels of version {LABEL_VERSION}"
IDLE_SECONDS = 60.0  # without a task, after which a worker gives the teacher's memory back


@dataclass(frozen=True)
class Order:
    """What every task brings along, so that any worker can do it."""

    settings: str  # as JSON, with paths that hold in any working directory
    identity: Identity
    partition: str  # sha256 of its file
    version: str = VERSION  # the coordinator's samfed


def on_workers(job: Job, cluster: Cluster) -> Executor:
    """Share the chunks of all owners among the workers; results come in no particular order.

    The executor raises SamfedError as ``Cluster`` does.
    """
    partition = file_sha256(job.config.cache.root / "partition.json")
    settings = _for_workers(job.config, cluster.threads, cluster.device).model_dump_json()
    order = Order(settings, job.identity, partition)

    def label(tasks: Iterable[ChunkTask], *, meter: Meter) -> Generator[ChunkResult]:
        result: ChunkResult
        items = ((str(task), task) for task in tasks)
        on_gpus = job.config.precompute.device != "cpu"
        for result in cluster.results(partial(run_task, order), items, on_gpus=on_gpus):
            meter.advance(len(result.rows))
            yield result

    return label


def _for_workers(config: Config, threads: int | None, device: str | None) -> Config:
    """Return the settings with paths that hold in any working directory."""
    config = absolute(config)
    run = config.precompute
    share = {"threads": run.threads or threads, "readers": run.readers or threads}
    run = run.model_copy(update={**share, "device": device or run.device})
    return config.model_copy(update={"precompute": run})


# --------------------------------------------------------------------------- on a worker


@dataclass(eq=False)
class _Held:
    """The job and the teacher of the last order, until no task has used them for a while."""

    order: Order
    job: Job
    teacher: TeacherBackend
    users: int = 0  # tasks
    timer: threading.Timer | None = None


_lock = threading.Lock()
_held: list[_Held] = []  # at most one


def run_task(order: Order, task: ChunkTask) -> ChunkResult:
    """Label one chunk on this worker.

    Raises:
        SamfedError: this worker runs another samfed, or does not see the coordinator's files.
    """
    config = Config.model_validate_json(order.settings)
    folders = [config.data.root, store_path(config.cache.root, task.owner)]
    check_worker(order.version, VERSION, folders)
    if config.precompute.threads is not None:
        torch.set_num_threads(config.precompute.threads)
    with _teacher_of(order, config) as held:
        (result,) = label_chunks(held.job, held.teacher, [task])
    return result


@contextmanager
def _teacher_of(order: Order, config: Config) -> Iterator[_Held]:
    """Load the job and the teacher of an order, if need be, and keep them while the block runs."""
    with _lock:
        if not _held or _held[0].order != order:
            _held.clear()
            job = load_job(config)
            _held.append(_Held(order, job, load_backend(job)))
        held = _held[0]
        held.users += 1
        if held.timer is not None:
            held.timer.cancel()
    try:
        yield held
    finally:
        with _lock:
            held.users -= 1
            if not held.users:
                held.timer = threading.Timer(IDLE_SECONDS, _give_back, [held])
                held.timer.daemon = True
                held.timer.start()


def _give_back(held: _Held) -> None:
    """Forget a teacher that no task uses, and return its memory to the device."""
    with _lock:
        if held.users or held not in _held:  # a task came as the time was up, or another order
            return
        _held.clear()
    del held.teacher
    gc.collect()
    return_freed_memory()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
