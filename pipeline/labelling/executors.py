"""Where stage one's work is done: in this process, or on dask workers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from pipeline.errors import DataError
from pipeline.labelling.job import Job, Meter
from pipeline.labelling.quality import Statistics, measure_owner
from pipeline.labelling.worker import ChunkResult, ChunkTask, label_chunks, load_backend


class Executor(Protocol):
    """Whatever does stage one's work; the same bytes whatever it is."""

    def groups(self, owners: Sequence[str]) -> list[Sequence[str]]:
        """Return the owners in groups, each to be labelled, measured and released together."""

    def run(self, tasks: Iterable[ChunkTask], *, meter: Meter) -> Iterator[ChunkResult]:
        """Label and write each task's chunk; yield each result once its labels are on the disk."""

    def measure(self, owners: Iterable[str]) -> Iterator[tuple[str, Statistics | DataError]]:
        """Measure finished stores; the error where an image of the sample cannot be read."""

    def check(self, owner: str) -> None:
        """Do all that comes before labelling the owner's images; it fails where that would."""


Workplace = AbstractContextManager[Callable[[Job], Executor]]  # e.g. ``cluster.connect(address)``


class InProcess:
    """The teacher in this process: one owner after the other, so that each is soon released."""

    def __init__(self, job: Job) -> None:
        """Load the teacher; errors as ``load_backend``'s."""
        self._job = job
        self._teacher = load_backend(job)

    def groups(self, owners: Sequence[str]) -> list[Sequence[str]]:
        """Return each owner alone."""
        return [[owner] for owner in owners]

    def run(self, tasks: Iterable[ChunkTask], *, meter: Meter) -> Iterator[ChunkResult]:
        """Label every task in turn; ``meter`` moves with every batch."""
        return label_chunks(self._job, tasks, self._teacher, meter=meter)

    def measure(self, owners: Iterable[str]) -> Iterator[tuple[str, Statistics | DataError]]:
        """Measure one store after the other."""
        return ((owner, measure_owner(self._job, owner, self._teacher)) for owner in owners)

    def check(self, owner: str) -> None:
        """Do nothing: the teacher is loaded, and the files are here."""


@contextmanager
def executor_on(job: Job, workplace: Workplace | None) -> Iterator[Executor]:
    """Enter the workplace, this process if it is None, and do the job there."""
    with workplace or nullcontext(InProcess) as executor_for:
        yield executor_for(job)
