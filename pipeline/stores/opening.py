"""The label store to write to: the one that is there, one from the archive, or a new one.

No finished label is lost to another teacher, nor, of an image that stays, to other images.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import compress
from pathlib import Path

import numpy as np

from pipeline.errors import CorruptStoreError, FormatError, IdentityError
from pipeline.folders import folder_beside, is_occupied, move, recover_folder, unused_name
from pipeline.stores.arrays import remove_partial_files
from pipeline.stores.label_store import (
    LABEL_ARRAYS,
    Identity,
    LabelStore,
    PseudoLabels,
    RowKey,
    check_identity,
    write_empty,
)


def open_label_store(
    path: Path, identity: Identity, rows: Sequence[RowKey], *, archive: Path
) -> tuple[LabelStore, str | None]:
    """Open the store to write to: the one at ``path``, one back from ``archive``, or a new one.

    A store with another identity is moved to ``archive/<its digest>.zarr`` (``-2``, ``-3`` if there
    is one already: nothing is deleted) and taken back from there when its identity is asked for
    again; one of another format to ``archive/other-format.zarr``. Rows whose image file is
    unchanged are kept when images come or go. What a killed run left half done is made good first;
    the caller holds the lock.

    Returns:
        the store, and one sentence for the user when something was moved or carried over.
    """
    recover_folder(path)
    notices = _retire(path, identity, archive) if is_occupied(path) else []
    if not is_occupied(path):
        kept = _fullest(archive, identity, rows)
        if kept is None:
            LabelStore.create(path, identity, rows)
        else:
            move(kept, path)
            notices.append(f"took back labels made earlier from {kept}")
    remove_partial_files(path)
    store = LabelStore(path)
    if store.rows != tuple(rows):
        store, count = _carry_over(store, rows)
        notices.append(f"{path}: the images changed; kept the labels of {count} of {len(rows)}")
    return store, "; ".join(notices) or None


def _retire(path: Path, identity: Identity, archive: Path) -> list[str]:
    """Move the store away if its labels are not those of ``identity``, and say why and where."""
    name = "other-format"
    try:
        found = LabelStore(path).identity
        name = found.digest
        check_identity(path, found, identity)
    except (FormatError, IdentityError) as error:
        retired = unused_name(archive / f"{name}.zarr")
        move(path, retired)
        return [f"{str(error).split('; ')[0]}; moved the old labels to {retired}"]
    return []


def _fullest(archive: Path, identity: Identity, rows: Sequence[RowKey]) -> Path | None:
    """Return the store with this identity in ``archive`` that has most of ``rows`` labelled."""
    wanted = set(rows)

    def labelled(path: Path) -> int:
        try:
            store = LabelStore(path)
            return len(wanted.intersection(compress(store.rows, store.done())))
        except CorruptStoreError:
            return -1  # only if there is no other

    numbered = sorted(archive.glob(f"{identity.digest}-*.zarr"))
    stores = [*archive.glob(f"{identity.digest}.zarr"), *numbered]
    return max(stores, key=labelled, default=None)


def _carry_over(old: LabelStore, rows: Sequence[RowKey]) -> tuple[LabelStore, int]:
    """Rebuild ``old`` for other ``rows``; keep what is finished in both, and count it."""
    states = old.states()
    where = {
        key: (chunk, inside)
        for chunk, state in enumerate(states)
        for inside, key in enumerate(state.rows)
        if state.done[inside]
    }
    read_chunk = lru_cache(maxsize=2)(old.read_chunk)  # rows mostly keep their order
    with folder_beside(old.path) as building:
        new = write_empty(building, old.identity, rows)
        for chunk in range(new.chunks):
            targets = [row for row in new.chunk_rows(chunk) if rows[row] in where]
            sources = [where[rows[row]] for row in targets]
            if not sources:
                continue
            found = [(read_chunk(source), inside) for source, inside in sources]
            labels = (np.stack([getattr(part, n)[i] for part, i in found]) for n in LABEL_ARRAYS)
            new.write_chunk(chunk, targets, PseudoLabels(*labels))
            chunks = dict.fromkeys(source for source, _ in sources)
            records = [r for source in chunks for r in states[source].provenance]
            quality = [states[source].quality[inside] for source, inside in sources]
            new.mark_done(chunk, targets, records, quality)
    return LabelStore(old.path), sum(key in where for key in rows)
