"""The work of stage one: a task is the rows of one chunk that still lack a label.

Threads decode and resize the next images while the teacher works, and one writes finished chunks
behind it. On a GPU the next batch is begun before the labels of the last one are fetched. The same
code runs in process and on a dask worker. A task's batches, each of images of one shape, do not
depend on where a run began or who else works, so neither do its bytes. Where the rows of a chunk
are labelled in two runs, because an image could not be read at first, they had other batches, and
perhaps another backend: the chunk's provenance names both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import numpy as np

from pipeline.allocation import keep_freed_memory
from pipeline.cores import usable_cores
from pipeline.data.images import load_image
from pipeline.errors import DataError
from pipeline.labelling.backoff import MemoryAwareTeacher, TeacherBackend
from pipeline.labelling.fidelity import check_fidelity
from pipeline.labelling.job import Job, Meter
from pipeline.labelling.quality import measure
from pipeline.sam.device import Image, Pending
from pipeline.sam.frame import fitted_hw, frame_hw, frame_patch
from pipeline.sam.onnx import load_onnx_teacher
from pipeline.sam.teacher import load_teacher
from pipeline.stores.label_store import LabelStore, Provenance, RowQuality, check_identity
from pipeline.stores.pseudo_labels import PseudoLabels, join

_AHEAD = 2  # batches that wait, decoded, for the teacher, and chunks that wait for the disk
_BEHIND = 1  # batches whose labels a GPU may still compute when the next one is begun


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
    written: dict[str, str] = field(default_factory=dict)  # sha256 of the chunk's files, by name


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
        one that the settings ask for. ConfigError: a device or precision that is not there, or a
        precision that moves this teacher's masks.
    """
    keep_freed_memory()
    settings = job.config.precompute
    load = load_onnx_teacher if settings.backend == "onnx" else load_teacher
    teacher = MemoryAwareTeacher(load(job.config, job.partition), settings.batch_size)
    check_fidelity(job, teacher)
    return teacher


def label_chunks(
    job: Job, teacher: TeacherBackend, tasks: Iterable[ChunkTask], *, meter: Meter | None = None
) -> Generator[ChunkResult]:
    """Label and write every task in turn; yield each result once its labels are on the disk.

    At most two chunks are behind the teacher. Where an error or Ctrl-C stops it, the chunks that it
    has finished are yielded before that is raised. ``meter`` counts images as they are labelled.
    """
    writes: deque[Future[ChunkResult]] = deque()
    parts: list[PseudoLabels] = []
    with ThreadPoolExecutor(_readers(job)) as readers, ThreadPoolExecutor(1) as writer:
        try:
            readings = _read_ahead(job, teacher, tasks, readers)
            for batch, labels in _label(job, teacher, _batches(job, readings)):
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
class _Reading:
    result: ChunkResult  # of its task, which grows batch by batch
    row: int
    image: Future[Image]


def _read_ahead(
    job: Job, teacher: TeacherBackend, tasks: Iterable[ChunkTask], readers: ThreadPoolExecutor
) -> Iterator[_Reading]:
    """Decode the next images, as the teacher takes them, while it works on the ones before."""

    def read(file: str, sha256: str) -> Image:
        return teacher.staged(load_image(job.config.data.root, file, sha256=sha256))

    waiting: deque[_Reading] = deque()
    # something to do for every thread
    ahead = max(_AHEAD * job.config.precompute.batch_size, _readers(job))
    for task in tasks:
        result = ChunkResult(task)
        for row, file in zip(task.rows, task.files, strict=True):
            waiting.append(_Reading(result, row, readers.submit(read, *file)))
            if len(waiting) > ahead:
                yield waiting.popleft()
    yield from waiting


@dataclass(frozen=True)
class _Batch:
    rows: tuple[int, ...]
    images: tuple[Image, ...]  # none if none of the task's could be read
    result: ChunkResult
    last: bool  # of its task


def _batches(job: Job, readings: Iterable[_Reading]) -> Iterator[_Batch]:
    """Form batches of images that share a frame: rows of one task, in their order, so far as read.

    So they depend on nothing but the task.
    """
    side, patch = job.identity.input_size, frame_patch(job.identity)
    groups: dict[tuple[int, int], list[tuple[int, Image]]] = {}
    for reading in readings:
        result, task = reading.result, reading.result.task
        try:
            image = reading.image.result()
        except DataError as error:
            result.failed.append(str(error))  # named at the end; the other images go on
        else:
            group = groups.setdefault(frame_hw(fitted_hw(image, side), side, patch), [])
            if len(group) == job.config.precompute.batch_size:
                yield _batch(group, result, last=False)
                group.clear()
            group.append((reading.row, image))
        if reading.row == task.rows[-1]:
            *others, final = [*groups.values()] or [[]]
            yield from (_batch(group, result, last=False) for group in others)
            yield _batch(final, result, last=True)
            groups.clear()


def _batch(group: Sequence[tuple[int, Image]], result: ChunkResult, *, last: bool) -> _Batch:
    rows, images = tuple(row for row, _ in group), tuple(image for _, image in group)
    return _Batch(rows, images, result, last)


def _readers(job: Job) -> int:
    return job.config.precompute.readers or usable_cores()


_Labelled = tuple[_Batch, PseudoLabels | None]  # None if no image of the batch could be read


def _label(job: Job, teacher: TeacherBackend, batches: Iterable[_Batch]) -> Iterator[_Labelled]:
    """Yield each batch with its labels, on a GPU once the next batch is begun.

    Where an error or Ctrl-C stops it, what was begun before is yielded first.
    """
    begun: deque[_Begun] = deque()
    try:
        for batch in batches:
            begun.append(_begin(batch, teacher, job.identity.label_size))
            while begun and (len(begun) > _BEHIND or begun[0].done()):
                yield begun.popleft().finish()
    except (Exception, KeyboardInterrupt):
        yield from (each.finish() for each in begun)
        raise
    yield from (each.finish() for each in begun)


@dataclass(frozen=True)
class _Begun:
    """A batch that the teacher is at work on."""

    batch: _Batch
    labels: Pending | None  # of the images that could be read; None if there are none
    mirrored: Pending | None  # labels of some of them, mirrored
    places: tuple[int, ...]  # of these among the images

    def done(self) -> bool:
        return all(part.done() for part in (self.labels, self.mirrored) if part is not None)

    def finish(self) -> _Labelled:
        """Wait for the labels and measure them."""
        if self.labels is None:
            return self.batch, None
        labels = self.labels.result()
        masks = () if self.mirrored is None else self.mirrored.result().masks
        self.batch.result.quality += measure(labels, dict(zip(self.places, masks, strict=True)))
        return self.batch, labels


def _begin(batch: _Batch, teacher: TeacherBackend, size: int) -> _Begun:
    """Begin to label the batch's images."""
    if not batch.images:
        return _Begun(batch, None, None, ())
    images, result = batch.images, batch.result
    result.rows += batch.rows
    sample = {  # mirrored, by their place among the images
        place: np.ascontiguousarray(images[place][:, ::-1])
        for place, row in enumerate(batch.rows)
        if row in result.task.mirrored
    }
    labels = teacher.begin(images, size)
    if teacher.provenance() not in result.provenance:
        result.provenance.append(teacher.provenance())
    mirrored = teacher.begin([*sample.values()], size) if sample else None
    return _Begun(batch, labels, mirrored, tuple(sample))


def _write(job: Job, result: ChunkResult, parts: Sequence[PseudoLabels]) -> ChunkResult:
    """Write the labels, if the store is still the one that they are for."""
    if parts:
        task, store = result.task, LabelStore(job.path(result.task.owner))
        # a worker may come late, when another run has taken over
        check_identity(store.path, store.identity, job.identity)
        sha256 = dict(zip(task.rows, (sha256 for _, sha256 in task.files), strict=True))
        store.check_rows(result.rows, [sha256[row] for row in result.rows])
        store.write_chunk(task.chunk, result.rows, join(parts))
        result.written = store.digests(task.chunk)
    return result
