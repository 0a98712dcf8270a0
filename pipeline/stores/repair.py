"""Making a damaged label store an honest, unfinished one, which stage one then completes."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pipeline.disk import flush, write_bytes
from pipeline.errors import CorruptStoreError
from pipeline.stores.arrays import CHUNK_ROWS, chunk_file, open_arrays, read_rows
from pipeline.stores.integrity import LABEL_ARRAYS, read_what_can_be
from pipeline.stores.label_store import Identity, LabelStore, RowKey


def forget_chunks(path: Path, shards: Sequence[int]) -> None:
    """Make these shards of a label store undone, and remove what they hold.

    Every damaged chunk of done marks or provenance must belong to these shards alone. Marks are
    cleared first and are on the disk before anything is removed, so that, wherever a kill comes,
    no mark promises what is gone.
    """
    store = LabelStore(path)
    if store.statistics is not None:  # they were of the whole store
        store.set_statistics(None)
    group = zarr.open_group(path, mode="r+")
    arrays = open_arrays(group)
    rows = [row for shard in shards for row in range(shard * CHUNK_ROWS, (shard + 1) * CHUNK_ROWS)]
    count = arrays["done"].shape[0]
    _clear(path, group, arrays["done"], [row for row in rows if row < count])
    _clear(path, group, arrays["provenance"], shards)
    for name in LABEL_ARRAYS:
        for shard in shards:
            chunk_file(path, arrays[name], shard).unlink(missing_ok=True)


def _clear(path: Path, group: Any, array: Any, rows: Sequence[int]) -> None:
    """Set rows of an array to zero, in damaged chunks too, durably."""
    name = array.basename
    values = read_what_can_be(path, group, name)
    values[np.asarray(rows, np.intp)] = 0
    step = array.chunks[0]
    for part in sorted({row // step for row in rows}):
        span = slice(part * step, min((part + 1) * step, array.shape[0]))
        file = chunk_file(path, array, part)
        try:
            read_rows(path, array, rows=span)
        except CorruptStoreError:
            file.unlink(missing_ok=True)  # zarr would merge with it, and cannot
        array[span] = values[span]
        flush(file)


def restore_metadata(path: Path, identity: Identity, rows: Sequence[RowKey]) -> bool:
    """Rewrite a label store's metadata and image ids, if they can only have been these.

    They are taken from a new store of this identity and these rows. That they were the damaged
    store's is shown by what is left of it: its root still names the digest that seals the
    metadata, identity included (or is right but for that digest), and its table of image sha256 is
    intact and lists the same files.

    Returns:
        whether it could be shown; if not, nothing is changed.
    """
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder) / path.name
        LabelStore.create(fresh, identity, rows)
        if not (_same_seal(path, fresh) and _same_images(path, fresh, rows)):
            return False
        chunks = (file for file in (fresh / "image_ids" / "c").rglob("*") if file.is_file())
        for file in [*chunks, *fresh.glob("*/zarr.json"), fresh / "zarr.json"]:
            write_bytes(path / file.relative_to(fresh), file.read_bytes())
    return True


def _same_seal(path: Path, fresh: Path) -> bool:
    root = path / "zarr.json"
    found = root.read_bytes() if root.is_file() else b""
    expected = (fresh / "zarr.json").read_bytes()
    digest = json.loads(expected)["attributes"]["metadata_sha256"].encode()
    start = expected.index(digest)
    stop = start + len(digest)
    return digest in found or (found[:start], found[stop:]) == (expected[:start], expected[stop:])


def _same_images(path: Path, fresh: Path, rows: Sequence[RowKey]) -> bool:
    """Read the table of sha256 of the store at ``path`` by the metadata of ``fresh``."""
    chunks = Path("image_sha256") / "c"
    shutil.rmtree(fresh / chunks)
    if not (path / chunks).is_dir():
        return False
    shutil.copytree(path / chunks, fresh / chunks)
    try:
        return LabelStore(fresh).rows == tuple(rows)
    except CorruptStoreError:
        return False
