"""``samfed cache repair``: what is damaged in the label stores is labelled anew."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.config import Config
from pipeline.data.partition import load_partition
from pipeline.disk import move, recover_folder, writer_lock
from pipeline.errors import (
    EXIT_PARTIAL,
    CorruptStoreError,
    IdentityError,
    LockedStoreError,
    StoreError,
)
from pipeline.labelling.maintenance import (
    Progress,
    check_at_rest,
    image_stores,
    label_stores,
    meter,
    owner_ids,
    store_lock,
)
from pipeline.labelling.precompute import precompute
from pipeline.labelling.worker import load_backend
from pipeline.stores.arrays import CHUNK_ROWS, remove_partial_files
from pipeline.stores.integrity import FORMAT_FAULT, METADATA, Fault, check_store
from pipeline.stores.label_store import Identity, LabelStore, check_identity
from pipeline.stores.repair import forget_chunks, restore_metadata
from pipeline.stores.teacher_card import load_card

if TYPE_CHECKING:
    from pipeline.labelling.cluster import Cluster

_WHOLE = (METADATA, "image_ids", "image_sha256")  # without these no row of a store means anything


@dataclass
class Repair:
    """What ``repair`` found and did."""

    faults: list[Fault] = field(default_factory=list)  # in label stores; mended
    notices: list[str] = field(default_factory=list)  # metadata written again, stores moved aside
    remaining: list[str] = field(default_factory=list)  # what it cannot mend, and what can
    labelled: int = 0  # rows
    failed: list[str] = field(default_factory=list)  # images that have no label, as in stage one

    def as_json(self) -> dict[str, Any]:
        """For ``--json``."""
        return vars(self) | {"faults": [fault.as_json() for fault in self.faults]}

    def text(self) -> str:
        """For a person."""
        lines = [f"{fault}; mended" for fault in self.faults] + self.notices
        summary = f"{len(self.faults)} faults mended, {self.labelled} images labelled"
        return "\n".join([*lines, summary])

    @property
    def exit_code(self) -> int:
        """The command's, if there are failures."""
        return CorruptStoreError.exit_code if self.remaining else EXIT_PARTIAL

    def failures(self) -> list[str]:
        """Return what is still damaged, and the images that have no label, a line each."""
        return [*self.remaining, *self.failed]


def repair(
    config: Config,
    *,
    cluster: AbstractContextManager[Cluster] | None = None,
    progress: Progress | None = None,
) -> Repair:
    """Label anew the shards of label stores that fail verification, and finish these stores.

    Metadata and image ids are written again where it can be shown what they were; if not, the
    store is moved to ``cache/archive/<owner>/damaged-<n>.zarr`` and all its rows are labelled anew.

    Args:
        cluster: dask workers to label on, entered once something is to be labelled, before
            anything is removed; in this process if None.

    Raises:
        StageError: something is damaged, but there is no partition or no teacher to label with.
        IdentityError: the teacher is not the one that the settings ask for.
        LockedStoreError: another process writes to a store.
    """
    root = config.cache.root
    images, labels = image_stores(root), label_stores(root)
    advance = meter([*images, *labels], progress)
    result = Repair()
    for path in images:
        try:
            faults = check_at_rest(root, path, advance)
        except LockedStoreError as error:
            result.notices.append(str(error))
            continue
        result.remaining += [f"{fault}; run `samfed prepare` again" for fault in faults]
    owners: list[str] = []
    with _Labelling(config, cluster) as labelling:
        for path in labels:
            with writer_lock(store_lock(root, path.stem)):
                recover_folder(path)
                remove_partial_files(path)
                faults = check_store(path, advance)
                if faults and _make_honest(config, path, faults, result, labelling.check):
                    owners.append(path.stem)
                if not faults and LabelStore(path).pending():
                    result.notices.append(  # as after a repair that was stopped
                        f"{path}: some rows are not labelled yet; run `samfed precompute-sam`"
                    )
        if owners:
            done = precompute(config, owners=owners, cluster=labelling.workers(), progress=progress)
            result.labelled, result.failed = done.labelled, done.failed
            result.notices += done.notices
    return result


class _Labelling:
    """Where to label: tried before anything is removed that would have to be labelled again."""

    def __init__(self, config: Config, cluster: AbstractContextManager[Cluster] | None) -> None:
        self._config = config
        self._cluster = cluster
        self._entered = ExitStack()
        self._workers: Cluster | None = None
        self._loads = False

    def __enter__(self) -> _Labelling:
        return self

    def __exit__(self, *error: object) -> None:
        self._entered.close()

    def check(self, owner: str, identity: Identity) -> None:
        """Raise what is missing to label the owner's images: a teacher, a worker, its files."""
        if self._cluster is not None:
            self._workers = self._workers or self._entered.enter_context(self._cluster)
            self._workers.check(self._config, owner, identity)
        elif not self._loads:
            load_backend(self._config, load_partition(self._config.cache.root / "partition.json"))
            self._loads = True

    def workers(self) -> AbstractContextManager[Cluster] | None:
        """The checked ones, for ``precompute``, which lets them go before its locks."""
        return None if self._workers is None else self._handed_over(self._workers)

    @contextmanager
    def _handed_over(self, workers: Cluster) -> Iterator[Cluster]:
        with self._entered:
            yield workers


def _make_honest(
    config: Config,
    path: Path,
    faults: list[Fault],
    result: Repair,
    check: Callable[[str, Identity], None],
) -> bool:
    """Leave nothing damaged in a store that the caller holds locked, only rows not done.

    Returns:
        whether stage one can now finish the store; if not, it is untouched.
    """
    cache, owner = config.cache.root, path.stem
    partition = load_partition(cache / "partition.json")
    card = load_card(cache / "teacher")
    card.check(config, partition.server_sha256(), path=cache / "teacher")
    identity = card.identity(
        label_size=config.data.image_size, precision=config.precompute.precision
    )
    ids = owner_ids(partition).get(owner)
    whole = any(fault.what in _WHOLE for fault in faults)
    try:
        if ids is None:
            raise IdentityError(f"{path}: '{owner}' is no client of the partition; remove it")
        if faults[0].what == FORMAT_FAULT:
            raise StoreError(str(faults[0]))
        if not whole:  # labels of another teacher cannot be made again
            check_identity(LabelStore(path), identity)
    except StoreError as error:
        result.remaining.append(str(error))
        return False
    check(owner, identity)
    result.faults += faults
    if whole:
        restored = restore_metadata(path, identity, partition.row_keys(ids))
        faults = check_store(path)
        if not restored or any(fault.what in _WHOLE for fault in faults):
            result.notices.append(_move_aside(path, cache / "archive" / owner))
            return True
        result.notices.append(f"{path}: wrote metadata and image ids again as they were")
        result.faults += faults
    forget_chunks(path, sorted({row // CHUNK_ROWS for f in faults for row in f.rows or ()}))
    return True


def _move_aside(path: Path, archive: Path) -> str:
    names = (archive / f"damaged-{number}.zarr" for number in itertools.count(1))
    target = next(name for name in names if not name.exists())
    move(path, target)
    return (
        f"{path}: cannot tell whose labels these are; moved them to {target}, and labelled every "
        "image anew"
    )
