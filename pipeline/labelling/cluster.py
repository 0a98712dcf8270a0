"""Stage one on dask: a task is one chunk, each worker loads the teacher once.

Workers read images and write chunks themselves, so they see ``data.root`` and ``cache.root`` under
the coordinator's paths; only file names travel. A lost worker costs the chunks that it had: dask
gives them to others, and the same rows written twice are the same bytes. Everything is checked and
marked done by the coordinator, which holds the stores' locks.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Iterable
from dataclasses import dataclass
from functools import partial

import torch

from pipeline import __version__
from pipeline.cluster import Cluster, absolute, check_worker
from pipeline.config import Config
from pipeline.disk import file_sha256
from pipeline.labelling.backoff import TeacherBackend
from pipeline.labelling.job import Job, Meter, load_job, store_path
from pipeline.labelling.worker import ChunkResult, ChunkTask, Executor, label_chunks, load_backend
from pipeline.stores.label_store import Identity


@dataclass(frozen=True)
class Order:
    """What every task brings along, so that any worker can do it."""

    settings: str  # as JSON, with paths that hold in any working directory
    identity: Identity
    partition: str  # sha256 of its file
    version: str = __version__  # the coordinator's samfed


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
        for result in cluster.results(partial(run_task, order), items):
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


_loading = threading.Lock()
_loaded: dict[Order, tuple[Job, TeacherBackend]] = {}  # the last one


def run_task(order: Order, task: ChunkTask) -> ChunkResult:
    """Label one chunk on this worker.

    Raises:
        SamfedError: this worker runs another samfed, or does not see the coordinator's files.
    """
    job, teacher = _loaded_for(order, task.owner)
    (result,) = label_chunks(job, teacher, [task])
    return result


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
