"""The label store to write to: the one that is there, one from archive, or a new one.

No finished label is lost to another teacher, nor, of an image that stays, to other images.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import numpy as np

from pipeline.disk import flush_tree, folder_beside, recover_folder, unused_name
from pipeline.errors import CorruptStoreError
from pipeline.stores.arrays import SHARD_ROWS, remove_partial_files
from pipeline.stores.label_store import (
    Identity,
    LabelStore,
    PseudoLabels,
    RowKey,
    create_arrays,
    first_difference,
)


def open_label_store(
    path: Path, identity: Identity, rows: Sequence[RowKey], *, archive: Path
) -> tuple[LabelStore, str | None]:
    """The store to write to: the one at ``path``, one taken back from ``archive``, or a new one.

    A store with another identity is moved to ``archive/<its digest>.zarr`` (``-2``, ``-3`` if there
    is one already: nothing is deleted) and taken back from there when its identity is asked for
    again. Rows whose image file is unchanged are kept when images come or go. What a killed run
    left half done is made good first; the caller holds the lock.

    Returns:
        the store, and one sentence for the user when something was moved or carried over.
    """
    notice: str | None = None
    recover_folder(path)
    if path.exists():
        found = LabelStore(path).identity
        if found != identity:
            field, old, new = first_difference(found, identity)
            retired = unused_name(archive / f"{found.digest}.zarr")
            _replace(path, retired)
            notice = f"{path}: {field} was {old}, now {new}; moved the old labels to {retired}"
    kept = None if path.exists() else _fullest(archive, identity, rows)
    if kept is not None:
        _replace(kept, path)
        notice = f"{notice + '; ' if notice else ''}took back labels made earlier from {kept}"
    if not path.exists():
        return LabelStore.create(path, identity, rows), notice
    remove_partial_files(path)
    store = LabelStore(path)
    if store.rows == tuple(rows):
        return store, notice
    carried, count = _carry_over(store, rows)
    change = f"{path}: the images changed; kept the labels of {count} of {len(rows)}"
    return carried, f"{notice}; {change}" if notice else change


def _fullest(archive: Path, identity: Identity, rows: Sequence[RowKey]) -> Path | None:
    """Of the stores with this identity in ``archive``, the one with most of ``rows`` labelled."""

    def labelled(path: Path) -> int:
        try:
            store = LabelStore(path)
            wanted = set(rows)
            return sum(
                key in wanted for key, done in zip(store.rows, store.done(), strict=True) if done
            )
        except CorruptStoreError:
            return -1  # only if there is no other

    stores = [
        *archive.glob(f"{identity.digest}.zarr"),
        *sorted(archive.glob(f"{identity.digest}-*.zarr")),
    ]
    return max(stores, key=labelled, default=None)


def _replace(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def _carry_over(old: LabelStore, rows: Sequence[RowKey]) -> tuple[LabelStore, int]:
    """Rebuild ``old`` for other ``rows``; keep what is finished in both, and count it."""
    where = {key: i for i, key in enumerate(old.rows)}
    done = old.done()
    provenance = old.provenance()
    count = 0
    read_shard = lru_cache(maxsize=2)(old.read_shard)  # rows mostly keep their order
    with folder_beside(old.path) as building:
        create_arrays(building, old.identity, rows)
        new = LabelStore(building)
        for shard in range(new.shards):
            span = new.shard_rows(shard)
            pairs = [
                (row, where[rows[row]])
                for row in span
                if rows[row] in where and done[where[rows[row]]]
            ]
            if not pairs:
                continue
            targets = [row for row, _ in pairs]
            new.write_shard(shard, targets, _pick(read_shard, [source for _, source in pairs]))
            sources = dict.fromkeys(source // SHARD_ROWS for _, source in pairs)
            records = [record for source in sources for record in provenance[source]]
            new.mark_done(shard, targets, records)
            count += len(pairs)
        flush_tree(building)  # the old store goes next
    return LabelStore(old.path), count


def _pick(read_shard: Callable[[int], PseudoLabels], rows: Sequence[int]) -> PseudoLabels:
    """The labels of these ``rows``, in this order, reading each run of one shard's rows once."""
    parts = [
        (read_shard(shard), [row - shard * SHARD_ROWS for row in run])
        for shard, run in groupby(rows, lambda row: row // SHARD_ROWS)
    ]
    return PseudoLabels(
        masks=np.concatenate([part.masks[inside] for part, inside in parts]),
        confidences=np.concatenate([part.confidences[inside] for part, inside in parts]),
        predicted_iou=np.concatenate([part.predicted_iou[inside] for part, inside in parts]),
    )
