"""``samfed cache repair``: what is damaged in the label stores is labelled anew."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.disk import writer_lock
from pipeline.errors import EXIT_PARTIAL, CorruptStoreError, IdentityError, StoreError
from pipeline.folders import move, recover_folder
from pipeline.labelling.job import Job, Meter, load_job, owner_images, store_lock
from pipeline.labelling.maintenance import (
    check_locked,
    counted,
    image_stores,
    label_stores,
    reading,
)
from pipeline.labelling.precompute import label_owners
from pipeline.progress import Progress
from pipeline.stores.arrays import remove_partial_files
from pipeline.stores.integrity import Fault, check_store, forget_damaged, mend_metadata
from pipeline.stores.label_store import LabelStore, check_identity

if TYPE_CHECKING:
    from pipeline.cluster import Workers


@dataclass
class Repair:
    """What ``repair`` found and did."""

    faults: list[Fault] = field(default_factory=list)  # in label stores; mended
    moved: list[str] = field(default_factory=list)  # stores moved aside: nobody can tell whose
    notices: list[str] = field(default_factory=list)
    remaining: list[str] = field(default_factory=list)  # what it cannot mend, and what can
    labelled: int = 0  # rows
    failed: list[str] = field(default_factory=list)  # images that have no label, as in stage one

    @property
    def exit_code(self) -> int:
        """Return that of the command, if there are failures."""
        return CorruptStoreError.exit_code if self.remaining else EXIT_PARTIAL

    def text(self) -> str:
        lines = [f"{fault}; mended" for fault in self.faults] + self.moved + self.notices
        counts = [f"{counted(len(self.faults), 'fault')} mended"]
        counts += [f"{counted(len(self.moved), 'store')} moved aside"] if self.moved else []
        return "\n".join(
            [*lines, ", ".join([*counts, f"{counted(self.labelled, 'image')} labelled"])]
        )

    def as_json(self) -> dict[str, Any]:
        return vars(self) | {"faults": [fault.as_json() for fault in self.faults]}

    def failures(self) -> list[str]:
        return [*self.remaining, *self.failed]


def repair(
    config: Config, *, cluster: Workers | None = None, progress: Progress | None = None
) -> Repair:
    """Label anew the chunks of label stores that fail verification, and finish these stores.

    All that costs no label is mended at once. A store of which nobody can tell whose labels it
    holds is moved to ``cache/archive/<owner>/damaged-<n>.zarr``, and all its rows are labelled
    anew.

    Args:
        cluster: where to label, entered once something is to be labelled; in this process if None.

    Raises:
        StageError: something is damaged, but there is no partition or no teacher to label with.
        IdentityError: the teacher is not the one that the settings ask for.
        LockedStoreError: another process writes to a store.
    """
    cache, result = config.cache.root, Repair()
    images, labels = image_stores(cache), label_stores(cache)
    meter = reading([*images, *labels], progress)
    for path in images:
        found = check_locked(cache, path, meter)
        if isinstance(found, str):
            result.notices.append(found)
        else:
            result.remaining += [f"{fault}; run `samfed prepare` again" for fault in found]
    with ExitStack() as locks:
        for path in labels:
            locks.enter_context(writer_lock(store_lock(cache, path.stem)))
        damaged = {path: faults for path in labels if (faults := _mend(path, meter, result))}
        if not damaged:
            return result
        job = load_job(config)
        owners = [
            path.stem for path, faults in damaged.items() if _forget(job, path, faults, result)
        ]
    if owners:  # unfinished stores by now, as any that stage one continues
        done = label_owners(job, owners, cluster, progress=progress)
        result.labelled, result.failed = done.labelled, done.failed
        result.notices += done.notices
    return result


def _mend(path: Path, meter: Meter, result: Repair) -> list[Fault]:
    """Read a label store, mend what needs no teacher, and return what does."""
    recover_folder(path)
    remove_partial_files(path)
    faults = check_store(path, meter.advance)
    mendable = [fault for fault in faults if fault.mendable]
    if mendable:
        mend_metadata(path)
        result.faults += mendable
    if not faults and LabelStore(path).pending():  # as after a repair that was stopped
        result.notices.append(
            f"{path}: some rows are not labelled yet; run `samfed precompute-sam`"
        )
    return [fault for fault in faults if not fault.mendable]


def _forget(job: Job, path: Path, faults: Sequence[Fault], result: Repair) -> bool:
    """Leave nothing damaged in a store, only rows not done; or say why stage one cannot help."""
    try:
        if path.stem not in owner_images(job.partition):
            what = f"'{path.stem}' is no client of the partition; remove it"
            if path.stem == "server":
                what = "it came from the server; run `samfed public import` again"
            raise IdentityError(f"{path}: {what}")
        check_identity(path, LabelStore(path).identity, job.identity)
        forget_damaged(path, faults, job.rows(path.stem))
        result.faults += faults
    except CorruptStoreError:
        _move_aside(job, path, result)
    except StoreError as error:
        result.remaining.append(str(error))
        return False
    return True


def _move_aside(job: Job, path: Path, result: Repair) -> None:
    archive = job.config.cache.root / "archive" / path.stem
    names = (archive / f"damaged-{number}.zarr" for number in itertools.count(1))
    target = next(name for name in names if not name.exists())
    move(path, target)
    result.moved.append(
        f"{path}: cannot tell whose labels these are; moved them to {target}, to label every "
        "image anew"
    )
