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
from pipeline.stores.label_store import Identity, LabelStore, RowKey, check_identity, write_empty
from pipeline.stores.optional_arrays import has_probabilities
from pipeline.stores.pseudo_labels import PseudoLabels


def open_label_store(
    path: Path,
    identity: Identity,
    rows: Sequence[RowKey],
    *,
    archive: Path,
    probabilities: bool = False,
) -> tuple[LabelStore, str | None]:
    """Open the store to write to: the one at ``path``, one back from ``archive``, or a new one.

    A store with another identity is moved to ``archive/<its digest>.zarr`` (``-2``, ``-3`` if there
    is one already: nothing is deleted) and taken back from there when its identity is asked for
    again; one of another format to ``archive/other-format.zarr``. Rows whose image file is
    unchanged are kept when images come or go. What a killed run left half done is made good first;
    the caller holds the lock.

    Args:
        probabilities: whether those of every class are asked for. A store without them is moved
            aside as well; one with them is kept where they are not, if it is whole.

    Returns:
        the store, and one sentence for the user when something was moved or carried over.

    Raises:
        IdentityError: rows are still to come of a store with probabilities, without any asked for.
    """
    recover_folder(path)
    notices = _retire(path, identity, archive, probabilities) if is_occupied(path) else []
    if not is_occupied(path):
        kept = _fullest(archive, identity, rows, probabilities)
        if kept is None:
            LabelStore.create(path, identity, rows, probabilities=probabilities)
        else:
            move(kept, path)
            notices.append(f"took back labels made earlier from {kept}")
    remove_partial_files(path)
    store = LabelStore(path)
    if store.rows != tuple(rows):
        store, count = _carry_over(store, rows)
        notices.append(f"{path}: the images changed; kept the labels of {count} of {len(rows)}")
    waiting = 0 if probabilities or not has_probabilities(store) else int((~store.done()).sum())
    if waiting:
        raise IdentityError(
            f"{path}: keeps the probabilities of every class, and {waiting} of its rows are still "
            "to come; set precompute.probabilities to true until they are there"
        )
    return store, "; ".join(notices) or None


def _retire(path: Path, identity: Identity, archive: Path, probabilities: bool) -> list[str]:
    """Move the store away if its labels are not those asked for, and say why and where."""
    name = "other-format"
    try:
        store = LabelStore(path)
        name = store.identity.digest
        check_identity(path, store.identity, identity)
        if probabilities and not has_probabilities(store):
            raise IdentityError(f"{path}: has no class probabilities, the run asks for them")
    except (FormatError, IdentityError) as error:
        retired = unused_name(archive / f"{name}.zarr")
        move(path, retired)
        return [f"{str(error).split('; ')[0]}; moved the old labels to {retired}"]
    return []


def _fullest(
    archive: Path, identity: Identity, rows: Sequence[RowKey], probabilities: bool
) -> Path | None:
    """Return the store with this identity in ``archive`` that has most of ``rows`` labelled.

    And that may be used: with class probabilities where they are asked for, and where they are not,
    with all rows labelled or without probabilities.
    """
    wanted = set(rows)

    def labelled(path: Path) -> int:
        try:
            store = LabelStore(path)
            return len(wanted.intersection(compress(store.rows, store.done())))
        except CorruptStoreError:
            return -1  # only if there is no other

    def usable(path: Path) -> bool:
        try:
            store = LabelStore(path)
            kept = has_probabilities(store)
            whole = not kept or wanted <= {*compress(store.rows, store.done())}
        except CorruptStoreError:
            return True
        return kept if probabilities else whole

    numbered = sorted(archive.glob(f"{identity.digest}-*.zarr"))
    stores = [*archive.glob(f"{identity.digest}.zarr"), *numbered]
    stores = [path for path in stores if usable(path)]
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
        probabilities = has_probabilities(old)
        new = write_empty(building, old.identity, rows, probabilities=probabilities)
        for chunk in range(new.chunks):
            targets = [row for row in new.chunk_rows(chunk) if rows[row] in where]
            sources = [where[rows[row]] for row in targets]
            if not sources:
                continue
            found = [(read_chunk(source), inside) for source, inside in sources]
            labels = {n: np.stack([getattr(part, n)[i] for part, i in found]) for n in old.arrays}
            new.write_chunk(chunk, targets, PseudoLabels(**labels))
            chunks = dict.fromkeys(source for source, _ in sources)
            records = [r for source in chunks for r in states[source].provenance]
            quality = [states[source].quality[inside] for source, inside in sources]
            new.mark_done(chunk, targets, records, quality)
    return LabelStore(old.path), sum(key in where for key in rows)
