"""The work of stage one: a task is the rows of one shard that still lack a label.

Threads decode and resize the next images while the teacher works, and one writes finished shards
behind it. The same code runs in process and on a dask worker. A task's batches do not depend on
where a run began or who else works, so neither do its bytes; a shard whose rows are labelled in two
runs, because an image could not be read at first, had other batches, and perhaps another backend:
its provenance names both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.config import Config
from pipeline.data.images import load_image
from pipeline.data.partition import Partition
from pipeline.errors import DataError
from pipeline.labelling.backoff import Image, MemoryAwareTeacher, TeacherBackend
from pipeline.sam.frame import fit_longest_side
from pipeline.sam.onnx import load_onnx_teacher
from pipeline.sam.teacher import load_teacher
from pipeline.stores.arrays import Record
from pipeline.stores.label_store import Identity, LabelStore, PseudoLabels, check_identity

_AHEAD = 2  # batches that wait, decoded, for the teacher, and shards that wait for the disk


def load_backend(config: Config, partition: Partition) -> TeacherBackend:
    """The teacher in the backend that ``precompute.backend`` names, ready for whole batches.

    Raises:
        StageError: not fine-tuned, or for ONNX not exported, yet. IdentityError: it is not the
        one that the settings ask for. ConfigError: a device or precision that is not there.
    """
    load = load_onnx_teacher if config.precompute.backend == "onnx" else load_teacher
    return MemoryAwareTeacher(load(config, partition), config.precompute.batch_size)


@dataclass(frozen=True)
class Task:
    """Rows of one shard of one store, and the file behind each of them."""

    owner: str
    chunk: int
    rows: tuple[int, ...]
    files: tuple[tuple[str, str], ...]  # path below data.root, sha256


@dataclass(frozen=True)
class Outcome:
    """What became of a task whose labels are on disk; the coordinator sets the done marks."""

    task: Task
    rows: tuple[int, ...]  # labelled
    failed: tuple[str, ...]  # one line for each image that has no label
    provenance: tuple[Record, ...]  # what labelled them, each record once


def store_path(config: Config, owner: str) -> Path:
    """The label store of a client, or of ``server``, whose calibration part is labelled too."""
    return config.cache.root / "sam" / f"{owner}.zarr"


def label_tasks(
    config: Config,
    tasks: Iterable[Task],
    teacher: TeacherBackend,
    *,
    finished: Callable[[Outcome], None],
    advance: Callable[[int], None] = lambda images: None,
) -> None:
    """Label and write every task in turn, at most two shards behind the teacher.

    Args:
        finished: called once a task's labels are written, in the order of ``tasks``, from the
            thread that writes.
        advance: called with the number of images that the teacher has just labelled.
    """
    identity = teacher.card.identity(
        label_size=config.data.image_size, precision=config.precompute.precision
    )
    writes: deque[Future[None]] = deque()
    with ThreadPoolExecutor(config.precompute.readers) as readers, ThreadPoolExecutor(1) as writer:
        parts: list[PseudoLabels] = []
        records: list[Record] = []
        rows: list[int] = []
        failed: list[str] = []
        for batch, images in _read_ahead(config, tasks, teacher.card.input_size, readers):
            good = [image for image in images if not isinstance(image, DataError)]
            failed += [str(image) for image in images if isinstance(image, DataError)]
            rows += [
                row
                for row, image in zip(batch.rows, images, strict=True)
                if not isinstance(image, DataError)
            ]
            if good:
                parts.append(teacher.label(good, config.data.image_size))
                if teacher.provenance() not in records:
                    records.append(teacher.provenance())
                advance(len(good))
            if batch.last:
                outcome = Outcome(batch.task, tuple(rows), tuple(failed), tuple(records))
                writes.append(writer.submit(_write, config, identity, outcome, parts, finished))
                while len(writes) > _AHEAD:
                    writes.popleft().result()
                parts, records, rows, failed = [], [], [], []
        for write in writes:
            write.result()


def _write(
    config: Config,
    identity: Identity,
    outcome: Outcome,
    parts: list[PseudoLabels],
    finished: Callable[[Outcome], None],
) -> None:
    if outcome.rows:
        labels = PseudoLabels(
            masks=np.concatenate([part.masks for part in parts]),
            confidences=np.concatenate([part.confidences for part in parts]),
            predicted_iou=np.concatenate([part.predicted_iou for part in parts]),
        )
        store = LabelStore(store_path(config, outcome.task.owner))
        # a worker may come late, when another run has taken over
        check_identity(store, identity)
        digests = dict(zip(outcome.task.rows, outcome.task.files, strict=True))
        store.check_rows(outcome.rows, [digests[row][1] for row in outcome.rows])
        store.write_chunk(outcome.task.chunk, outcome.rows, labels)
    finished(outcome)


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Batch:
    task: Task
    rows: tuple[int, ...]
    files: tuple[tuple[str, str], ...]
    last: bool  # of its task


def _batches(tasks: Iterable[Task], size: int) -> Iterator[_Batch]:
    for task in tasks:
        for start in range(0, len(task.rows), size):
            stop = start + size
            yield _Batch(
                task, task.rows[start:stop], task.files[start:stop], stop >= len(task.rows)
            )


def _read_ahead(
    config: Config, tasks: Iterable[Task], input_size: int, readers: ThreadPoolExecutor
) -> Iterator[tuple[_Batch, list[Image | DataError]]]:
    """Decode the next batches, at the teacher's size, while the teacher works on this one."""

    def read(file: str, sha256: str) -> Image | DataError:
        try:
            image = load_image(config.data.root, file, sha256=sha256)
        except DataError as error:
            return error  # named at the end; the other images go on
        return fit_longest_side(image, input_size)

    waiting: deque[tuple[_Batch, list[Future[Image | DataError]]]] = deque()
    for batch in _batches(tasks, config.precompute.batch_size):
        waiting.append((batch, [readers.submit(read, *file) for file in batch.files]))
        if len(waiting) > _AHEAD:
            ready, futures = waiting.popleft()
            yield ready, [future.result() for future in futures]
    while waiting:
        ready, futures = waiting.popleft()
        yield ready, [future.result() for future in futures]
