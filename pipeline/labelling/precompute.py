"""Stage one, ``samfed precompute-sam``: the teacher labels every client's images, once.

This module coordinates: it opens the stores under their locks, hands out one task per shard with
work left (``labelling.py``; in process, or on dask workers through ``cluster.py``) and sets the
done marks, last of all, so that a run that stops anywhere continues where it stopped.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

from pipeline.config import Config, PrecomputeConfig
from pipeline.data.partition import Partition, load_partition
from pipeline.disk import writer_lock
from pipeline.errors import ConfigError, DataError
from pipeline.labelling.quality import as_table, doubts, measure_owner
from pipeline.labelling.worker import Outcome, Task, label_tasks, load_backend, store_path
from pipeline.runtime import torch_threads
from pipeline.sam.onnx import check_model
from pipeline.sam.teacher import checked_card
from pipeline.stores.label_store import Identity, LabelStore, RowKey, open_label_store

if TYPE_CHECKING:
    from pipeline.labelling.cluster import Cluster

log = logging.getLogger("samfed.precompute")

Progress = Callable[[str, int, int], None]


@dataclass
class StageOneResult:
    """What a run of stage one did."""

    labelled: int = 0  # rows computed now
    kept: int = 0  # rows that were there already
    failed: list[str] = field(default_factory=list)  # one line for each image that has no label
    notices: list[str] = field(default_factory=list)  # stores moved aside, rows carried over
    statistics: dict[str, dict[str, Any]] = field(default_factory=dict)  # of each finished store
    warnings: list[str] = field(default_factory=list)  # labels to doubt, by client

    def as_json(self) -> dict[str, Any]:
        """Return all of it."""
        return asdict(self)

    def text(self) -> str:
        """Return the counts and a table of the statistics."""
        counts = f"{self.labelled} images labelled, {self.kept} were labelled already"
        return "\n".join([counts, *([as_table(self.statistics)] if self.statistics else [])])

    def failures(self) -> list[str]:
        """Return a line for each image that has no label, and their number last."""
        count = f"{len(self.failed)} images have no label; the others are done"
        return [*self.failed, count] if self.failed else []


def choose_cluster(
    config: Config, *, scheduler: str | None, workers: int | None
) -> AbstractContextManager[Cluster] | None:
    """Return the workers that a scheduler's address or a number of processes asks for.

    None is this process; dask is imported for nobody else.

    Raises:
        ConfigError: both are given.
    """
    if scheduler is not None and workers is not None:
        raise ConfigError("--scheduler and --workers: give one of them")
    if scheduler is None and workers is None:
        return None
    from pipeline.labelling.cluster import connect, local_cluster

    logging.getLogger("distributed").setLevel(logging.WARNING)  # its own import sets INFO
    if workers is None:
        return connect(str(scheduler))
    return local_cluster(workers, device=config.precompute.device)


def precompute(
    config: Config,
    *,
    clients: Sequence[str] = (),
    owners: Sequence[str] = (),
    cluster: AbstractContextManager[Cluster] | None = None,
    progress: Progress | None = None,
) -> StageOneResult:
    """Label the images of ``clients`` (all if empty) and the server's calibration part.

    Args:
        owners: just these instead, clients or ``server``, for a repair.
        cluster: dask workers to label on, entered once everything has been checked; in this
            process if None. The same bytes either way.

    Raises:
        StageError: no partition or no teacher yet. ConfigError: unknown client.
        LockedStoreError: another process writes to a store.
    """
    partition = load_partition(config.cache.root / "partition.json")
    images = {"server": partition.server.calibration}
    images |= {name: part.train for name, part in partition.clients.items()}
    for client in clients:
        if client not in partition.clients:
            known = ", ".join(partition.clients)
            raise ConfigError(f"--client {client}: no such client; expected one of {known}")
    chosen = owners or ("server", *(clients or partition.clients))
    card = checked_card(config, partition)
    identity = card.identity(
        label_size=config.data.image_size, precision=config.precompute.precision
    )
    if cluster is not None and config.precompute.backend == "onnx":
        check_model(config, card)  # else each worker would find out for itself
    # the workers are gone before the locks are
    with (
        torch_threads(config.precompute.threads),
        _Stores(config.precompute) as stores,
        cluster or nullcontext() as workers,
    ):
        teacher = load_backend(config, partition) if workers is None else None
        for owner in chosen:
            stores.open(config, owner, identity, partition.row_keys(images[owner]))
        counted = stores.result.kept

        def advance(images: int) -> None:
            nonlocal counted
            counted += images
            if progress is not None:
                progress("labelling images", counted, sum(map(len, stores.opened.values())))

        advance(0)
        if teacher is not None:
            for owner, store in stores.opened.items():
                tasks = _tasks(partition, owner, store)
                label_tasks(config, tasks, teacher, finished=stores.finish, advance=advance)
                if owner in stores.unmeasured():
                    measured = partial(measure_owner, config, partition, owner, teacher)
                    stores.measure(owner, measured)
                stores.release(owner)
        if workers is not None:
            every = chain.from_iterable(_tasks(partition, *item) for item in stores.opened.items())
            workers.label_tasks(config, every, identity, finished=stores.finish, advance=advance)
            workers.measure(config, stores.unmeasured(), identity, measured=stores.measure)
    return stores.result


class _Stores:
    """The stores of a run, each under its lock for as long as there is work."""

    def __init__(self, settings: PrecomputeConfig) -> None:
        self.opened: dict[str, LabelStore] = {}
        self.result = StageOneResult()
        self._settings = settings
        self._locks: dict[str, ExitStack] = {}

    def __enter__(self) -> _Stores:
        return self

    def __exit__(self, *error: object) -> None:
        for owner in self._locks:
            self.release(owner)

    def open(self, config: Config, owner: str, identity: Identity, rows: Sequence[RowKey]) -> None:
        """Take the owner's lock and open its store, or make it."""
        cache, lock = config.cache.root, ExitStack()
        lock.enter_context(writer_lock(cache / "locks" / f"sam-{owner}.lock"))
        self._locks[owner] = lock
        store, notice = open_label_store(
            store_path(config, owner), identity, rows, archive=cache / "archive" / owner
        )
        if notice:
            log.warning(notice)
            self.result.notices.append(notice)
        self.opened[owner] = store
        done = store.done()
        self.result.kept += int(done.sum())
        if store.statistics is not None and done.all():
            self._note(owner, store.statistics)

    def release(self, owner: str) -> None:
        """Let another process write to the owner's store."""
        self._locks[owner].close()

    def finish(self, outcome: Outcome) -> None:
        """Mark a task's rows done."""
        if outcome.rows:
            store = self.opened[outcome.task.owner]
            store.mark_done(outcome.task.chunk, outcome.rows, outcome.provenance)
        self.result.labelled += len(outcome.rows)
        self.result.failed += outcome.failed

    def unmeasured(self) -> list[str]:
        """Owners whose store is complete and has no statistics yet."""
        return [
            owner
            for owner, store in self.opened.items()
            if store.statistics is None and store.done().all()
        ]

    def measure(self, owner: str, measured: Callable[[], dict[str, Any]]) -> None:
        """Keep the statistics with the finished store.

        Where an image of their sample cannot be read any more, the labels are good all the same.
        """
        try:
            statistics = measured()
        except DataError as error:
            self._warn([f"{owner}: the labels were not checked: {error}"])
            return
        self.opened[owner].set_statistics(statistics)
        self._note(owner, statistics)

    def _note(self, owner: str, statistics: dict[str, Any]) -> None:
        self.result.statistics[owner] = statistics
        self._warn(doubts(owner, statistics, self._settings))

    def _warn(self, lines: list[str]) -> None:
        for line in lines:
            log.warning(line)
        self.result.warnings += lines


def _tasks(partition: Partition, owner: str, store: LabelStore) -> Iterator[Task]:
    """Each shard with work left, and its rows that are not done."""
    done = store.done()
    for shard in store.pending():
        rows = [row for row in store.chunk_rows(shard) if not done[row]]
        entries = [partition.images[store.rows[row].image_id] for row in rows]
        files = [(entry.image, entry.image_sha256) for entry in entries]
        yield Task(owner, shard, tuple(rows), tuple(files))
