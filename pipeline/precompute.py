"""Stage one, ``samfed precompute-sam``: the teacher labels every client's images, once.

One shard of 64 rows is one task. Threads decode the next images while the teacher works, and one
writes finished shards behind it. Done marks come last, so a run that stops anywhere continues
where it stopped, with the same bytes: a shard's batches do not depend on where the run began.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.errors import ConfigError, DataError
from pipeline.images import load_image
from pipeline.locks import writer_lock
from pipeline.partition import Partition, load_partition
from pipeline.sam.teacher import Teacher, load_teacher
from pipeline.stores.labels import Labels, LabelStore, open_label_store

log = logging.getLogger("samfed.precompute")

Image = NDArray[np.uint8]
Progress = Callable[[str, int, int], None]


@dataclass
class StageOneResult:
    """What a run of stage one did."""

    labelled: int = 0  # rows computed now
    kept: int = 0  # rows that were there already
    failed: list[str] = field(default_factory=list)  # one line for each image that has no label
    notices: list[str] = field(default_factory=list)  # stores moved aside, rows carried over


def precompute(
    config: Config, *, clients: Sequence[str] = (), progress: Progress | None = None
) -> StageOneResult:
    """Label the images of ``clients`` (all if empty) and the server's calibration part.

    The client "server" stands for the calibration part alone.

    Raises:
        StageError: no partition or no teacher yet. ConfigError: unknown client.
        LockedStoreError: another process writes to a store.
    """
    cache = config.cache.root
    partition = load_partition(cache / "partition.json")
    unknown = [client for client in clients if client not in ("server", *partition.clients)]
    if unknown:
        known = ", ".join(partition.clients)
        raise ConfigError(f"--client {unknown[0]}: no such client; expected one of {known}")
    teacher = load_teacher(config, partition)
    owners = {"server": partition.server.calibration}
    chosen = [name for name in clients or partition.clients if name != "server"]
    owners |= {name: partition.clients[name].train for name in chosen}
    result = StageOneResult()
    total = sum(len(ids) for ids in owners.values())
    for owner, ids in owners.items():

        def advance(rows: int) -> None:
            if progress is not None:
                progress("labelling images", result.kept + result.labelled + rows, total)

        with writer_lock(cache / "locks" / f"sam-{owner}.lock"):
            _label_owner(config, partition, owner, ids, teacher, result, advance)
    return result


def _label_owner(
    config: Config,
    partition: Partition,
    owner: str,
    ids: Sequence[str],
    teacher: Teacher,
    result: StageOneResult,
    advance: Callable[[int], None],
) -> None:
    cache = config.cache.root
    rows = partition.row_keys(ids)
    identity = teacher.card.identity(label_size=config.data.image_size)
    store, notice = open_label_store(
        cache / "sam" / f"{owner}.zarr", identity, rows, aside=cache / "aside" / owner
    )
    if notice:
        log.warning(notice)
        result.notices.append(notice)
    result.kept += int(store.done().sum())
    advance(0)
    files = {i: (partition.images[i].image, partition.images[i].image_sha256) for i in ids}
    _label_pending(config, store, files, teacher, result, advance)


def _label_pending(
    config: Config,
    store: LabelStore,
    files: dict[str, tuple[str, str]],
    teacher: Teacher,
    result: StageOneResult,
    advance: Callable[[int], None],
) -> None:
    """Label the rows that are not done, shard by shard."""
    provenance = teacher.provenance()
    batches = _batches(_tasks(store), config.precompute.batch_size)
    writes: deque[Future[None]] = deque()
    with ThreadPoolExecutor(config.precompute.readers) as readers, ThreadPoolExecutor(1) as writer:
        parts: list[Labels] = []
        good: list[int] = []
        for (shard, chunk, last), images in _read_ahead(
            config.data.root, store, files, batches, readers
        ):
            readable = [
                (row, im)
                for row, im in zip(chunk, images, strict=True)
                if not isinstance(im, DataError)
            ]
            result.failed += [str(im) for im in images if isinstance(im, DataError)]
            if readable:
                parts.append(teacher.label([im for _, im in readable], config.data.image_size))
                good += [row for row, _ in readable]
            advance(len(good))
            if last and good:
                writes.append(writer.submit(_finish, store, shard, good, parts, provenance))
                result.labelled += len(good)
                while len(writes) > 2:  # bounded memory: at most two shards wait for the disk
                    writes.popleft().result()
            if last:
                parts, good = [], []
        for write in writes:
            write.result()


def _finish(
    store: LabelStore, shard: int, rows: list[int], parts: list[Labels], provenance: dict[str, str]
) -> None:
    labels = Labels(
        masks=np.concatenate([part.masks for part in parts]),
        confidences=np.concatenate([part.confidences for part in parts]),
        scores=np.concatenate([part.scores for part in parts]),
    )
    store.write_shard(shard, rows, labels)
    store.mark_done(shard, rows, provenance)


def _tasks(store: LabelStore) -> Iterator[tuple[int, list[int]]]:
    """Each shard with work left, and its rows that are not done."""
    done = store.done()
    for shard in store.pending():
        yield shard, [row for row in store.shard_rows(shard) if not done[row]]


Batch = tuple[int, list[int], bool]  # shard, its rows in this batch, whether it is the shard's last


def _batches(tasks: Iterator[tuple[int, list[int]]], size: int) -> Iterator[Batch]:
    for shard, rows in tasks:
        for start in range(0, len(rows), size):
            yield shard, rows[start : start + size], start + size >= len(rows)


def _read_ahead(
    root: Path,
    store: LabelStore,
    files: dict[str, tuple[str, str]],
    batches: Iterator[Batch],
    readers: ThreadPoolExecutor,
) -> Iterator[tuple[Batch, list[Image | DataError]]]:
    """Decode the next two batches while the teacher works on this one."""

    def read(row: int) -> Image | DataError:
        file, sha256 = files[store.rows[row].image_id]
        try:
            return load_image(root, file, sha256=sha256)
        except DataError as error:
            return error  # named at the end; the other images go on

    waiting: deque[tuple[Batch, list[Future[Image | DataError]]]] = deque()
    for batch in batches:
        waiting.append((batch, [readers.submit(read, row) for row in batch[1]]))
        if len(waiting) > 2:
            ready, futures = waiting.popleft()
            yield ready, [future.result() for future in futures]
    while waiting:
        ready, futures = waiting.popleft()
        yield ready, [future.result() for future in futures]
