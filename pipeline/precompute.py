"""Stage one, ``samfed precompute-sam``: the teacher labels every client's images, once.

This module coordinates: it opens the stores under their locks, hands out one task per shard with
work left (``labelling.py``; in process, or on dask workers through ``cluster.py``) and sets the
done marks, last of all, so that a run that stops anywhere continues where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pipeline.config import Config
from pipeline.devices import torch_threads
from pipeline.errors import ConfigError
from pipeline.labelling import Outcome, Task, label_tasks, store_path
from pipeline.locks import writer_lock
from pipeline.partition import Partition, load_partition
from pipeline.sam.teacher import load_teacher
from pipeline.stores.labels import Identity, LabelStore, RowKey, open_label_store

if TYPE_CHECKING:
    from pipeline.cluster import Cluster

log = logging.getLogger("samfed.precompute")

Progress = Callable[[str, int, int], None]


@dataclass
class StageOneResult:
    """What a run of stage one did."""

    labelled: int = 0  # rows computed now
    kept: int = 0  # rows that were there already
    failed: list[str] = field(default_factory=list)  # one line for each image that has no label
    notices: list[str] = field(default_factory=list)  # stores moved aside, rows carried over


def precompute(
    config: Config,
    *,
    clients: Sequence[str] = (),
    cluster: Cluster | None = None,
    progress: Progress | None = None,
) -> StageOneResult:
    """Label the images of ``clients`` (all if empty) and the server's calibration part.

    Args:
        cluster: dask workers to label on; in this process if None. The same bytes either way.

    Raises:
        StageError: no partition or no teacher yet. ConfigError: unknown client.
        LockedStoreError: another process writes to a store.
    """
    cache = config.cache.root
    partition = load_partition(cache / "partition.json")
    unknown = [client for client in clients if client not in partition.clients]
    if unknown:
        known = ", ".join(partition.clients)
        raise ConfigError(f"--client {unknown[0]}: no such client; expected one of {known}")
    teacher = load_teacher(config, partition)
    identity = teacher.card.identity(label_size=config.data.image_size)
    owners = {"server": partition.server.calibration}
    owners |= {name: partition.clients[name].train for name in clients or partition.clients}
    total = sum(len(ids) for ids in owners.values())
    with _Stores() as stores:
        for owner, ids in owners.items():
            stores.open(config, owner, identity, partition.row_keys(ids))
        counted = stores.result.kept

        def advance(images: int) -> None:
            nonlocal counted
            counted += images
            if progress is not None:
                progress("labelling images", counted, total)

        advance(0)
        tasks = _tasks(partition, stores.stores)
        if cluster is None:
            with torch_threads(config.precompute.threads):
                label_tasks(config, tasks, teacher, finished=stores.finish, advance=advance)
        else:
            cluster.label_tasks(config, tasks, identity, finished=stores.finish, advance=advance)
    return stores.result


class _Stores:
    """The stores of a run, each under its lock for as long as it has work left."""

    def __init__(self) -> None:
        self.stores: dict[str, LabelStore] = {}
        self.result = StageOneResult()
        self._locks: dict[str, ExitStack] = {}
        self._left: dict[str, int] = {}  # tasks

    def __enter__(self) -> _Stores:
        return self

    def __exit__(self, *error: object) -> None:
        for lock in self._locks.values():
            lock.close()

    def open(self, config: Config, owner: str, identity: Identity, rows: Sequence[RowKey]) -> None:
        """Take the owner's lock and open its store, or make it."""
        cache, lock = config.cache.root, ExitStack()
        lock.enter_context(writer_lock(cache / "locks" / f"sam-{owner}.lock"))
        self._locks[owner] = lock
        store, notice = open_label_store(
            store_path(config, owner), identity, rows, aside=cache / "aside" / owner
        )
        if notice:
            log.warning(notice)
            self.result.notices.append(notice)
        self.stores[owner] = store
        self.result.kept += int(store.done().sum())
        self._left[owner] = len(store.pending())
        if not self._left[owner]:
            lock.close()

    def finish(self, outcome: Outcome) -> None:
        """Mark a task's rows done, and let the store go after its last task."""
        owner = outcome.task.owner
        if outcome.rows:
            self.stores[owner].mark_done(outcome.task.shard, outcome.rows, outcome.provenance)
        self.result.labelled += len(outcome.rows)
        self.result.failed += outcome.failed
        self._left[owner] -= 1
        if not self._left[owner]:
            self._locks[owner].close()


def _tasks(partition: Partition, stores: dict[str, LabelStore]) -> Iterator[Task]:
    """Each shard with work left, and its rows that are not done."""
    for owner, store in stores.items():
        done = store.done()
        for shard in store.pending():
            rows = [row for row in store.shard_rows(shard) if not done[row]]
            entries = [partition.images[store.rows[row].image_id] for row in rows]
            files = [(entry.image, entry.image_sha256) for entry in entries]
            yield Task(owner, shard, tuple(rows), tuple(files))
