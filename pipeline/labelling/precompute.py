"""Stage one, ``samfed precompute-sam``: the teacher labels every client's images, once.

This module coordinates: it opens the stores under their locks, gives an executor one task for each
chunk with work left, and marks what comes back as done, last of all, so that a run that stops
anywhere continues where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.disk import writer_lock
from pipeline.errors import ConfigError
from pipeline.labelling.job import Job, Meter, load_job, store_lock
from pipeline.labelling.quality import (
    Statistics,
    flip_sample,
    label_doubts,
    statistics,
    statistics_table,
)
from pipeline.labelling.worker import ChunkResult, ChunkTask, Executor, in_process
from pipeline.progress import Progress
from pipeline.runtime import torch_threads
from pipeline.stores.label_store import LabelStore
from pipeline.stores.opening import open_label_store

if TYPE_CHECKING:
    from pipeline.cluster import Workers

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
    wanted = {"server", *(clients or job.partition.clients)}
    owners = [owner for owner in job.partition.owners if owner in wanted]
    return label_owners(job, owners, cluster, progress=progress)


@contextmanager
def executor_on(job: Job, cluster: Workers | None) -> Iterator[Executor]:
    """Enter the cluster, this process if it is None, and do the job there."""
    if cluster is None:
        yield in_process(job)
        return
    from pipeline.labelling.cluster import on_workers

    with cluster as workers:
        yield on_workers(job, workers)


def label_owners(
    job: Job,
    owners: Sequence[str],
    cluster: Workers | None = None,
    *,
    progress: Progress | None = None,
) -> StageOneResult:
    """Label the images of these owners, clients or ``server``; the cluster is entered here.

    Raises:
        LockedStoreError: another process writes to a store. SamfedError: the executor's.
    """
    threads = torch_threads(job.config.precompute.threads)
    # the workers are gone before the locks are
    with threads, ExitStack() as locks, executor_on(job, cluster) as label:
        stores = _Stores(job, locks)
        for owner in owners:
            stores.open(owner)
        total, done = sum(map(len, stores.opened.values())), stores.result.already_labelled
        meter = Meter("labelling images", total, done, progress)
        meter.advance(0)
        with closing(label(stores.tasks(), meter=meter)) as chunks:
            for chunk in chunks:
                stores.mark_done(chunk)
    stores.judge()
    return stores.result


class _Stores:
    """The stores of a run, each under its lock for as long as there is work."""

    def __init__(self, job: Job, locks: ExitStack) -> None:
        self.result = StageOneResult()
        self.opened: dict[str, LabelStore] = {}
        self._job = job
        self._all_locks = locks
        self._locks: dict[str, ExitStack] = {}
        self._waiting: dict[str, int] = {}  # chunks

    def open(self, owner: str) -> None:
        """Take the owner's lock and open its store, or make it."""
        cache, job = self._job.config.cache.root, self._job
        self._locks[owner] = self._all_locks.enter_context(ExitStack())
        self._locks[owner].enter_context(writer_lock(store_lock(cache, owner)))
        store, notice = open_label_store(
            job.path(owner),
            job.identity,
            job.rows(owner),
            archive=cache / "archive" / owner,
            probabilities=job.config.precompute.keeps_probabilities(job.config.data.num_classes),
        )
        if notice:
            log.warning(notice)
            self.result.notices.append(notice)
        self.opened[owner] = store
        self.result.already_labelled += int(store.done().sum())
        self._release(owner, waiting=len(store.pending()))

    def tasks(self) -> Iterator[ChunkTask]:
        """Yield each chunk with work left, and its rows that are not done."""
        images = self._job.partition.images
        for owner, store in self.opened.items():
            done, sample = store.done(), set[int]()
            if store.identity.views == 1:  # else mirror images are among the views
                sample = flip_sample(store.rows)
            for chunk in store.pending():
                rows = tuple(row for row in store.chunk_rows(chunk) if not done[row])
                keys = [store.rows[row] for row in rows]
                files = tuple((images[key.image_id].image, key.sha256) for key in keys)
                yield ChunkTask(owner, chunk, rows, files, frozenset(sample.intersection(rows)))

    def mark_done(self, chunk: ChunkResult) -> None:
        """Set the done marks of what is labelled, once its files are seen here as well."""
        owner, done = chunk.task.owner, (chunk.rows, chunk.provenance, chunk.quality)
        if chunk.rows:
            self.opened[owner].mark_done(chunk.task.chunk, *done, written=chunk.written)
        self.result.labelled += len(chunk.rows)
        self.result.failed += chunk.failed
        self._release(owner, waiting=self._waiting[owner] - 1)

    def _release(self, owner: str, *, waiting: int) -> None:
        """Let others write to the owner's store once no chunk of it is waited for."""
        self._waiting[owner] = waiting
        if not waiting:
            self._locks[owner].close()

    def judge(self) -> None:
        """Say whose labels to doubt, of the stores that are finished."""
        for owner, store in self.opened.items():
            found = statistics(store.quality())
            if found is not None:
                self.result.statistics[owner] = found
        doubts = label_doubts(self.result.statistics, self._job.config)
        self.result.warnings += [doubt.text for doubt in doubts]
        for line in self.result.warnings:
            log.warning(line)
