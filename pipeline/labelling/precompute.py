"""Stage one, ``samfed precompute-sam``: the teacher labels every client's images, once.

This module coordinates: it opens the stores under their locks, gives an executor one task for each
chunk with work left, and marks what comes back as done, last of all, so that a run that stops
anywhere continues where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

from pipeline.cluster import Workers
from pipeline.config import Config
from pipeline.disk import writer_lock
from pipeline.errors import ConfigError, DataError
from pipeline.labelling.cluster import DaskExecutor
from pipeline.labelling.job import Job, Meter, Progress, load_job, store_lock
from pipeline.labelling.quality import Statistics, quality_warnings, statistics_table
from pipeline.labelling.worker import ChunkResult, ChunkTask, Executor, InProcess
from pipeline.runtime import torch_threads
from pipeline.stores.label_store import LabelStore
from pipeline.stores.opening import open_label_store

log = logging.getLogger("samfed.precompute")


@dataclass
class StageOneResult:
    """What a run of stage one did."""

    labelled: int = 0  # rows computed now
    already_labelled: int = 0  # rows that were there
    failed: list[str] = field(default_factory=list)  # one line for each image that has no label
    notices: list[str] = field(default_factory=list)  # stores moved aside, rows carried over
    statistics: dict[str, Statistics] = field(default_factory=dict)  # of each finished store
    warnings: list[str] = field(default_factory=list)  # labels to look at, by client

    def text(self) -> str:
        table = f"\n{statistics_table(self.statistics)}" if self.statistics else ""
        counts = f"{self.labelled} images labelled, {self.already_labelled} were labelled already"
        return counts + table

    def as_json(self) -> dict[str, Any]:
        return asdict(self)

    def failures(self) -> list[str]:
        """Return a line for each image that has no label, and their number last."""
        count = f"{len(self.failed)} images have no label; the others are done"
        return [*self.failed, count] if self.failed else []


def precompute(
    config: Config,
    *,
    clients: Sequence[str] = (),
    cluster: Workers | None = None,
    progress: Progress | None = None,
) -> StageOneResult:
    """Label the images of ``clients`` (all if empty) and the server's calibration part.

    Args:
        cluster: where to label, entered once everything has been checked; in this process if
            None. The same bytes either way.

    Raises:
        StageError: no partition or no teacher yet. ConfigError: unknown client.
        LockedStoreError: another process writes to a store.
    """
    job = load_job(config)
    for client in clients:
        if client not in job.partition.clients:
            known = ", ".join(job.partition.clients)
            raise ConfigError(f"--client {client}: no such client; expected one of {known}")
    owners = ("server", *(clients or job.partition.clients))
    return label_owners(job, owners, executor_on(job, cluster), progress=progress)


@contextmanager
def executor_on(job: Job, cluster: Workers | None) -> Iterator[Executor]:
    """Enter the cluster, this process if it is None, and do the job there."""
    if cluster is None:
        yield InProcess(job)
        return
    with cluster as workers:
        yield DaskExecutor(workers, job)


def label_owners(
    job: Job,
    owners: Sequence[str],
    executor: AbstractContextManager[Executor],
    *,
    progress: Progress | None = None,
) -> StageOneResult:
    """Label the images of these owners, clients or ``server``; ``executor`` is entered here.

    Raises:
        LockedStoreError: another process writes to a store. SamfedError: the executor's.
    """
    threads = torch_threads(job.config.precompute.threads)
    # the workers are gone before the locks are
    with threads, _Stores(job) as stores, executor as workers:
        for owner in owners:
            stores.open(owner)
        total, done = sum(map(len, stores.opened.values())), stores.result.already_labelled
        meter = Meter("labelling images", total, done, progress)
        meter.advance(0)
        for group in workers.groups(owners):
            with closing(workers.run(stores.tasks(group), meter=meter)) as chunks:
                for chunk in chunks:
                    stores.mark_done(chunk)
            for owner, statistics in workers.measure(stores.unmeasured(group)):
                stores.keep_statistics(owner, statistics)
            stores.release(group)
    return stores.result


class _Stores(ExitStack):
    """The stores of a run, each under its lock for as long as there is work."""

    def __init__(self, job: Job) -> None:
        super().__init__()
        self.result = StageOneResult()
        self._job = job
        self.opened: dict[str, LabelStore] = {}
        self._locks: dict[str, ExitStack] = {}

    def open(self, owner: str) -> None:
        """Take the owner's lock and open its store, or make it."""
        cache, job = self._job.config.cache.root, self._job
        self._locks[owner] = self.enter_context(ExitStack())
        self._locks[owner].enter_context(writer_lock(store_lock(cache, owner)))
        store, notice = open_label_store(
            job.path(owner), job.identity, job.rows(owner), archive=cache / "archive" / owner
        )
        if notice:
            log.warning(notice)
            self.result.notices.append(notice)
        self.opened[owner] = store
        done = store.done()
        self.result.already_labelled += int(done.sum())
        if store.statistics is not None and done.all():
            self._show(owner, store.statistics)

    def release(self, owners: Iterable[str]) -> None:
        """Let another process write to the owners' stores."""
        for owner in owners:
            self._locks[owner].close()

    def tasks(self, owners: Sequence[str]) -> Iterator[ChunkTask]:
        """Yield each chunk of the owners' with work left, and its rows that are not done."""
        images = self._job.partition.images
        for owner in owners:
            store = self.opened[owner]
            done = store.done()
            for chunk in store.pending():
                rows = tuple(row for row in store.chunk_rows(chunk) if not done[row])
                keys = [store.rows[row] for row in rows]
                files = tuple((images[key.image_id].image, key.sha256) for key in keys)
                yield ChunkTask(owner, chunk, rows, files)

    def mark_done(self, chunk: ChunkResult) -> None:
        """Set the done marks of what is labelled."""
        if chunk.rows:
            store = self.opened[chunk.task.owner]
            store.mark_done(chunk.task.chunk, chunk.rows, chunk.provenance)
        self.result.labelled += len(chunk.rows)
        self.result.failed += chunk.failed

    def unmeasured(self, owners: Sequence[str]) -> list[str]:
        """Return the owners whose store is complete and has no statistics yet."""
        stores = ((owner, self.opened[owner]) for owner in owners)
        return [owner for owner, s in stores if s.statistics is None and s.done().all()]

    def keep_statistics(self, owner: str, statistics: Statistics | DataError) -> None:
        """Keep the statistics with the finished store.

        Where an image of their sample cannot be read any more, the labels are good all the same.
        """
        if isinstance(statistics, DataError):
            self._warn([f"{owner}: the labels were not checked: {statistics}"])
        else:
            self.opened[owner].set_statistics(statistics)
            self._show(owner, statistics)

    def _show(self, owner: str, statistics: Statistics) -> None:
        self.result.statistics[owner] = statistics
        self._warn(quality_warnings(owner, statistics, self._job.config.precompute))

    def _warn(self, lines: list[str]) -> None:
        for line in lines:
            log.warning(line)
        self.result.warnings += lines
