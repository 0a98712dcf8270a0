"""The work of stage one: a task is the rows of one chunk that still lack a label.

Threads decode and resize the next images while the teacher works, and one writes finished chunks
behind it. The same code runs in process and on a dask worker. A task's batches do not depend on
where a run began or who else works, so neither do its bytes. Where the rows of a chunk are labelled
in two runs, because an image could not be read at first, they had other batches, and perhaps
another backend: the chunk's provenance names both.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

from pipeline.data.images import load_image
from pipeline.errors import DataError
from pipeline.labelling.backoff import Image, MemoryAwareTeacher, TeacherBackend, join
from pipeline.labelling.job import Job, Meter
from pipeline.sam.frame import fit_longest_side
from pipeline.sam.onnx import load_onnx_teacher
from pipeline.sam.teacher import load_teacher
from pipeline.stores.arrays import Record
from pipeline.stores.label_store import LabelStore, PseudoLabels, check_identity

_AHEAD = 2  # batches that wait, decoded, for the teacher, and chunks that wait for the disk


@dataclass(frozen=True)
class ChunkTask:
    """Rows of one chunk of one store, and the file behind each of them."""

    owner: str
    chunk: int
    rows: tuple[int, ...]
    files: tuple[tuple[str, str], ...]  # path below data.root, sha256

    def __str__(self) -> str:
        return f"{self.owner} rows {self.rows[0]}..{self.rows[-1]}"


@dataclass
class ChunkResult:
    """What became of a task whose labels are on the disk; the coordinator then marks it done."""

    task: ChunkTask
    rows: list[int] = field(default_factory=list)  # labelled
    failed: list[str] = field(default_factory=list)  # a line for each image that has no label
    provenance: list[Record] = field(default_factory=list)  # what labelled them, each record once


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
    job: Job, tasks: Iterable[ChunkTask], teacher: TeacherBackend, *, meter: Meter | None = None
) -> Iterator[ChunkResult]:
    """Label and write every task in turn; yield each result once its labels are on the disk.

    At most two chunks are behind the teacher. Where an error or Ctrl-C stops it, the chunks that it
    has finished are yielded before that is raised. ``meter`` counts images as they are labelled.
    """
    writes: deque[Future[ChunkResult]] = deque()
    chunk = _Chunk()
    workers = job.config.precompute.readers
    with ThreadPoolExecutor(workers) as readers, ThreadPoolExecutor(1) as writer:
        try:
            for batch in _read_ahead(job, tasks, readers):
                count = chunk.label(batch, teacher, job.identity.label_size)
                if meter is not None:
                    meter.advance(count)
                if batch.last:
                    writes.append(writer.submit(chunk.write, job, batch.task))
                    chunk = _Chunk()
                while len(writes) > _AHEAD or (writes and writes[0].done()):
                    yield writes.popleft().result()
        except (Exception, KeyboardInterrupt):
            while writes:
                yield writes.popleft().result()
            raise
        while writes:
            yield writes.popleft().result()


class _Chunk:
    """A chunk that grows batch by batch."""

    def __init__(self) -> None:
        self._rows: list[int] = []
        self._failed: list[str] = []
        self._provenance: list[Record] = []
        self._parts: list[PseudoLabels] = []

    def label(self, batch: _Batch, teacher: TeacherBackend, size: int) -> int:
        """Label the batch's images that could be read; return how many."""
        images: list[Image] = []
        for row, future in zip(batch.rows, batch.images, strict=True):
            try:
                images.append(future.result())
                self._rows.append(row)
            except DataError as error:
                self._failed.append(str(error))  # named at the end; the other images go on
        if images:
            self._parts.append(teacher.label(images, size))
            if teacher.provenance() not in self._provenance:
                self._provenance.append(teacher.provenance())
        return len(images)

    def write(self, job: Job, task: ChunkTask) -> ChunkResult:
        """Write the labels, if the store is still the one that they are for."""
        if self._rows:
            store = LabelStore(job.path(task.owner))
            # a worker may come late, when another run has taken over
            check_identity(store, job.identity)
            sha256 = dict(zip(task.rows, (sha256 for _, sha256 in task.files), strict=True))
            store.check_rows(self._rows, [sha256[row] for row in self._rows])
            store.write_chunk(task.chunk, self._rows, join(self._parts))
        return ChunkResult(task, self._rows, self._failed, self._provenance)


# --------------------------------------------------------------------------- reading


@dataclass(frozen=True)
class _Batch:
    task: ChunkTask
    rows: tuple[int, ...]
    images: list[Future[Image]]
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
        for start in range(0, len(task.rows), size):
            stop = start + size
            images = [readers.submit(read, *file) for file in task.files[start:stop]]
            waiting.append(_Batch(task, task.rows[start:stop], images, stop >= len(task.rows)))
            if len(waiting) > _AHEAD:
                yield waiting.popleft()
    yield from waiting
