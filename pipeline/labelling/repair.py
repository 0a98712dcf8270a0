"""``samfed cache repair``: what is damaged in the label stores is labelled anew."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.cluster import Workers
from pipeline.config import Config
from pipeline.disk import writer_lock
from pipeline.errors import EXIT_PARTIAL, CorruptStoreError, IdentityError, StoreError
from pipeline.folders import move, recover_folder
from pipeline.labelling.job import Job, Meter, Progress, load_job, owner_images, store_lock
from pipeline.labelling.maintenance import check_at_rest, image_stores, label_stores, reading
from pipeline.labelling.precompute import executor_on, label_owners
from pipeline.labelling.worker import Executor
from pipeline.stores.arrays import remove_partial_files
from pipeline.stores.integrity import Fault, check_store, mend_metadata, mend_store
from pipeline.stores.label_store import LabelStore, check_identity

Damaged = dict[Path, list[Fault]]  # by label store


@dataclass
class Repair:
    """What ``repair`` found and did."""

    faults: list[Fault] = field(default_factory=list)  # in label stores; mended
    notices: list[str] = field(default_factory=list)  # stores moved aside, or skipped
    remaining: list[str] = field(default_factory=list)  # what it cannot mend, and what can
    labelled: int = 0  # rows
    failed: list[str] = field(default_factory=list)  # images that have no label, as in stage one

    @property
    def exit_code(self) -> int:
        """Return that of the command, if there are failures."""
        return CorruptStoreError.exit_code if self.remaining else EXIT_PARTIAL

    def text(self) -> str:
        lines = [f"{fault}; mended" for fault in self.faults] + self.notices
        summary = f"{len(self.faults)} faults mended, {self.labelled} images labelled"
        return "\n".join([*lines, summary])

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"faults": [fault.as_json() for fault in self.faults]}

    def failures(self) -> list[str]:
        return [*self.remaining, *self.failed]


def repair(
    config: Config,
    *,
    cluster: Workers | None = None,
    progress: Progress | None = None,
) -> Repair:
    """Label anew the chunks of label stores that fail verification, and finish these stores.

    Metadata is written again from what is left of it; if nothing is, the store is moved to
    ``cache/archive/<owner>/damaged-<n>.zarr`` and all its rows are labelled anew.

    Args:
        cluster: where to label, entered once something is to be labelled, before anything is
            removed; in this process if None.

    Raises:
        StageError: something is damaged, but there is no partition or no teacher to label with.
        IdentityError: the teacher is not the one that the settings ask for.
        LockedStoreError: another process writes to a store.
    """
    cache, result = config.cache.root, Repair()
    images, labels = image_stores(cache), label_stores(cache)
    meter = reading([*images, *labels], progress)
    for path in images:
        found = check_at_rest(cache, path, meter)
        if isinstance(found, str):
            result.notices.append(found)
        else:
            result.remaining += [f"{fault}; run `samfed prepare` again" for fault in found]
    with ExitStack() as entered:
        with ExitStack() as locks:
            for path in labels:
                locks.enter_context(writer_lock(store_lock(cache, path.stem)))
            damaged = _damaged(labels, meter, result)
            job = load_job(config) if damaged else None
            mendable = _mendable(job, damaged, result) if job is not None else {}
            if job is None or not mendable:
                return result
            executor = entered.enter_context(executor_on(job, cluster))
            for path in mendable:  # before anything is removed that would have to be labelled again
                executor.check(path.stem)
            for path, faults in mendable.items():
                _make_unfinished(job, path, faults, result)
        owners = [path.stem for path in mendable]
        done = label_owners(job, owners, _handed_over(entered, executor), progress=progress)
    result.labelled, result.failed = done.labelled, done.failed
    result.notices += done.notices
    return result


@contextmanager
def _handed_over(entered: ExitStack, executor: Executor) -> Iterator[Executor]:
    """Let ``label_owners`` leave the workers, which it does before it releases its locks."""
    with entered:
        yield executor


def _damaged(labels: Sequence[Path], meter: Meter, result: Repair) -> Damaged:
    """Read label stores whole, which the caller holds locked, and return those with faults.

    Damaged metadata is mended at once, for which no teacher is needed.
    """
    damaged = {}
    for path in labels:
        recover_folder(path)
        remove_partial_files(path)
        faults = check_store(path, meter.advance)
        if not all(fault.costs_labels for fault in faults):
            with suppress(CorruptStoreError):  # then it will be moved aside
                mend_metadata(path)
                result.faults += [fault for fault in faults if not fault.costs_labels]
                faults = check_store(path)
        if faults:
            damaged[path] = faults
        elif LabelStore(path).pending():  # as after a repair that was stopped
            result.notices.append(
                f"{path}: some rows are not labelled yet; run `samfed precompute-sam`"
            )
    return damaged


def _mendable(job: Job, damaged: Damaged, result: Repair) -> Damaged:
    """Return the stores that stage one can complete; say why it cannot the others."""
    mendable = {}
    for path, faults in damaged.items():
        try:
            if path.stem not in owner_images(job.partition):
                why = f"'{path.stem}' is no client of the partition; remove it"
                raise IdentityError(f"{path}: {why}")
            with suppress(CorruptStoreError):  # nobody can tell: it will be moved aside
                check_identity(path, LabelStore(path).identity, job.identity)
            mendable[path] = faults
        except StoreError as error:
            result.remaining.append(str(error))
    return mendable


def _make_unfinished(job: Job, path: Path, faults: list[Fault], result: Repair) -> None:
    """Leave nothing damaged in a store that the caller holds locked, only rows not done."""
    result.faults += faults
    try:
        mend_store(path, faults, job.rows(path.stem))
    except CorruptStoreError:
        archive = job.config.cache.root / "archive" / path.stem
        names = (archive / f"damaged-{number}.zarr" for number in itertools.count(1))
        target = next(name for name in names if not name.exists())
        move(path, target)
        result.notices.append(
            f"{path}: cannot tell whose labels these are; moved them to {target}, and labelled "
            "every image anew"
        )
