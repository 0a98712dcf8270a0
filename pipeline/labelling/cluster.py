"""Stage one on dask: a task is one chunk, each worker loads the teacher once.

Workers read images and write chunks themselves, so they see ``data.root`` and ``cache.root`` under
the coordinator's paths; only file names travel. A lost worker costs the chunks that it had: dask
gives them to others, and the same rows written twice are the same bytes. Everything is checked and
marked done by the coordinator, which holds the stores' locks.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from pipeline import __version__
from pipeline.cluster import Cluster, absolute, check_worker
from pipeline.config import Config
from pipeline.disk import file_sha256
from pipeline.errors import DataError
from pipeline.labelling.backoff import TeacherBackend
from pipeline.labelling.job import Job, Meter, load_job, store_path
from pipeline.labelling.quality import Statistics, measure_owner
from pipeline.labelling.worker import ChunkResult, ChunkTask, label_chunks, load_backend
from pipeline.stores.label_store import Identity


@dataclass(frozen=True)
class Order:
    """What every task brings along, so that any worker can do it."""

    settings: str  # as JSON, with paths that hold in any working directory
    identity: Identity
    partition: str  # sha256 of its file
    version: str = __version__  # the coordinator's samfed


class DaskExecutor:
    """dask workers that share the chunks of all owners; results come in no particular order.

    Methods raise SamfedError as those of ``Cluster`` do.
    """

    def __init__(self, cluster: Cluster, job: Job) -> None:
        self._cluster = cluster
        partition = file_sha256(job.config.cache.root / "partition.json")
        settings = _for_workers(job.config, cluster.threads, cluster.device).model_dump_json()
        self._order = Order(settings, job.identity, partition)

    def groups(self, owners: Sequence[str]) -> list[Sequence[str]]:
        return [owners]

    def run(self, tasks: Iterable[ChunkTask], *, meter: Meter) -> Generator[ChunkResult]:
        result: ChunkResult
        items = ((str(task), task) for task in tasks)
        for result in self._cluster.results(partial(run_task, self._order), items):
            meter.advance(len(result.rows))
            yield result

    def measure(self, owners: Iterable[str]) -> Iterator[tuple[str, Statistics | DataError]]:
        items = ((f"{owner}: statistics", owner) for owner in owners)
        return self._cluster.results(partial(run_statistics, self._order), items)

    def check(self, owner: str) -> None:
        items = [(f"{owner}: the teacher", owner)]
        list(self._cluster.results(partial(run_check, self._order), items))


def _for_workers(config: Config, threads: int | None, device: str | None) -> Config:
    """Return the settings with paths that hold in any working directory."""
    config = absolute(config)
    run = config.precompute
    run = run.model_copy(update={"threads": run.threads or threads, "device": device or run.device})
    return config.model_copy(update={"precompute": run})


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
    config = Config.model_validate_json(order.settings)
    folders = [config.data.root, store_path(config.cache.root, owner)]
    check_worker(order.version, __version__, folders)
    if config.precompute.threads is not None:
        torch.set_num_threads(config.precompute.threads)
    with _loading:
        if order not in _loaded:
            _loaded.clear()
            job = load_job(config)
            _loaded[order] = (job, load_backend(job))
        return _loaded[order]
