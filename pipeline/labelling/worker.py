"""The work of stage one: a task is the rows of one chunk that still lack a label.

Threads decode and resize the next images while the teacher works, and one writes finished chunks
behind it. The same code runs in process and on a dask worker. A task's batches do not depend on
where a run began or who else works, so neither do its bytes. Where the rows of a chunk are labelled
in two runs, because an image could not be read at first, they had other batches, and perhaps
another backend: the chunk's provenance names both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from pipeline.data.images import load_image
from pipeline.errors import DataError
from pipeline.labelling.backoff import Image, MemoryAwareTeacher, TeacherBackend, join
from pipeline.labelling.job import Job, Meter
from pipeline.labelling.quality import measure
from pipeline.sam.frame import fit_longest_side
from pipeline.sam.onnx import load_onnx_teacher
from pipeline.sam.teacher import load_teacher
from pipeline.stores.label_store import (
    LabelStore,
    Provenance,
    PseudoLabels,
    RowQuality,
    check_identity,
)

_AHEAD = 2  # batches that wait, decoded, for the teacher, and chunks that wait for the disk


@dataclass(frozen=True)
class ChunkTask:
    """Rows of one chunk of one store, and the file behind each of them."""

    owner: str
    chunk: int
    rows: tuple[int, ...]
    files: tuple[tuple[str, str], ...]  # path below data.root, sha256
    mirrored: frozenset[int] = frozenset()  # rows to be labelled once more, mirrored

    def __str__(self) -> str:
        return f"{self.owner} rows {self.rows[0]}..{self.rows[-1]}"


@dataclass
class ChunkResult:
    """What became of a task whose labels are on the disk; the coordinator then marks it done."""

    task: ChunkTask
    rows: list[int] = field(default_factory=list)  # labelled
    quality: list[RowQuality] = field(default_factory=list)  # of these rows
    failed: list[str] = field(default_factory=list)  # a line for each image that has no label
    provenance: list[Provenance] = field(default_factory=list)  # each that labelled some, once


class Executor(Protocol):
    """Whatever does stage one's work; the same bytes whatever it is."""

    def __call__(self, tasks: Iterable[ChunkTask], *, meter: Meter) -> Generator[ChunkResult]:
        """Label and write each task's chunk; yield each result once its labels are on the disk."""


def in_process(job: Job) -> Executor:
    """Load the teacher here; errors as ``load_backend``'s."""
    return partial(label_chunks, job, load_backend(job))


def load_backend(job: Job) -> TeacherBackend:
    """Load the teacher in the backend that ``precompute.backend`` names.

    Raises:
        StageError: not fine-tuned, or for ONNX not exported, yet. IdentityError: it is not the
        one that the settings ask for. ConfigError: a device or precision that is not there.
    """
    settings = job.config.precompute
    load = load_onnx_teacher if settings.backend == "onnx" else load_teacher
    return MemoryAwareTeacher(load(job.config, job.partition), settings.batch_size)


def label_chunks(
    job: Job, teacher: TeacherBackend, tasks: Iterable[ChunkTask], *, meter: Meter | None = None
) -> Generator[ChunkResult]:
    """Label and write every task in turn; yield each result once its labels are on the disk.

    At most two chunks are behind the teacher. Where an error or Ctrl-C stops it, the chunks that it
    has finished are yielded before that is raised. ``meter`` counts images as they are labelled.
    """
    writes: deque[Future[ChunkResult]] = deque()
    parts: list[PseudoLabels] = []
    workers = job.config.precompute.readers
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as writer:
        try:
            for batch in _read_ahead(job, tasks, readers):
                labels = _label(batch, teacher, job.identity.label_size)
                if labels is not None:
                    parts.append(labels)
                    if meter is not None:
                        meter.advance(len(labels.masks))
                if batch.last:
                    writes.append(writer.submit(_write, job, batch.result, parts))
                    parts = []
                while len(writes) > _AHEAD or (writes and writes[0].done()):
                    yield writes.popleft().result()
        except (Exception, KeyboardInterrupt):
            yield from (write.result() for write in writes)
            raise
        yield from (write.result() for write in writes)


@dataclass(frozen=True)
class _Batch:
    rows: tuple[int, ...]
    images: list[Future[Image]]
    result: ChunkResult  # of its task, which grows batch by batch
    last: bool  # of its task


def _read_ahead(
    job: Job, tasks: Iterable[ChunkTask], readers: ThreadPoolExecutor
) -> Iterator[_Batch]:
    """Decode the next batches, at the teacher's size, while the teacher works on this one."""

    def read(file: str, sha256: str) -> Image:
        image = load_image(job.config.data.root, file, sha256=sha256)
        return fit_longest_side(image, job.identity.input_size)

    size = job.config.precompute.batch_size
    waiting: deque[_Batch] = deque()
    for task in tasks:
        result = ChunkResult(task)
        for start in range(0, len(task.rows), size):
            stop = start + size
            images = [readers.submit(read, *file) for file in task.files[start:stop]]
            last = stop >= len(task.rows)
            waiting.append(_Batch(task.rows[start:stop], images, result, last))
            if len(waiting) > _AHEAD:
                yield waiting.popleft()
    yield from waiting


def _label(batch: _Batch, teacher: TeacherBackend, size: int) -> PseudoLabels | None:
    """Label and measure the batch's images that can be read; None if there are none."""
    images: list[Image] = []
    sample: dict[int, Image] = {}  # mirrored, by their place among the images
    result = batch.result
    for row, future in zip(batch.rows, batch.images, strict=True):
        try:
            image = future.result()
        except DataError as error:
            result.failed.append(str(error))  # named at the end; the other images go on
            continue
        if row in result.task.mirrored:
            sample[len(images)] = np.ascontiguousarray(image[:, ::-1])
        images.append(image)
        result.rows.append(row)
    if not images:
        return None
    labels = teacher.label(images, size)
    if teacher.provenance() not in result.provenance:
        result.provenance.append(teacher.provenance())
    masks = teacher.label([*sample.values()], size).masks if sample else ()
    result.quality += measure(labels, dict(zip(sample, masks, strict=True)))
    return labels


def _write(job: Job, result: ChunkResult, parts: Sequence[PseudoLabels]) -> ChunkResult:
    """Write the labels, if the store is still the one that they are for."""
    if parts:
        task, store = result.task, LabelStore(job.path(result.task.owner))
        # a worker may come late, when another run has taken over
        check_identity(store.path, store.identity, job.identity)
        sha256 = dict(zip(task.rows, (sha256 for _, sha256 in task.files), strict=True))
        store.check_rows(result.rows, [sha256[row] for row in result.rows])
        store.write_chunk(task.chunk, result.rows, join(parts))
    return result
