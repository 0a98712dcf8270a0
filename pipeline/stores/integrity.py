"""Every byte of a store, read and checked: what ``samfed cache verify`` does with one store."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from pipeline.errors import CorruptStoreError, StoreError
from pipeline.stores.arrays import (
    CHUNK_ROWS,
    INNER_ROWS,
    Bytes,
    check_seal,
    chunk_file,
    decode_ids,
    decode_provenance,
    read_rows,
)
from pipeline.stores.decode import ChunkError, index_bytes, is_held, read_index

METADATA = "metadata"  # the zarr.json files, where a fault names an array
FORMAT_FAULT = "format"  # whole, but of another samfed
LABEL_ARRAYS = ("masks", "confidences", "predicted_iou")  # written by shard, before the done marks

Advance = Callable[[int], None]  # takes the bytes read since the last call
Bad = tuple[range, str]  # rows of an array, and what is wrong with them


@dataclass(frozen=True)
class Fault:
    """Damage in one store."""

    path: Path  # of the store
    what: str  # an array, or what else of the store
    rows: range | None  # of the store; None where no row can be named
    reason: str

    def __str__(self) -> str:
        where = "" if self.rows is None else f" rows {self.rows.start}..{self.rows.stop - 1}"
        return f"{self.path}: {self.what}{where}: {self.reason}"

    def as_json(self) -> dict[str, Any]:
        """For ``--json``; rows are [first, last]."""
        rows = None if self.rows is None else [self.rows.start, self.rows.stop - 1]
        return {"store": str(self.path), "what": self.what, "rows": rows, "reason": self.reason}


def check_store(path: Path, advance: Advance = lambda read: None) -> list[Fault]:
    """Read a label or image store whole, one shard in memory at a time; all that is wrong with it.

    The metadata is held against its seal; each chunk against its crc32c, and for being there; a
    shard's index for naming each chunk and leaving no byte out; ids and provenance for being
    readable. Without its metadata nothing else of a store can be read: that is one fault.
    """
    try:
        attributes = check_seal(path)
    except CorruptStoreError as error:
        reason = str(error).removeprefix(f"{path}: metadata is ").split("; ")[0]
        return [Fault(path, METADATA, None, reason)]
    except StoreError as error:
        return [Fault(path, FORMAT_FAULT, None, str(error).removeprefix(f"{path}: format "))]
    group = zarr.open_group(path, mode="r")
    if attributes.get("kind") == "labels":
        faults = _check_labels(path, group, advance)
    else:
        faults = [
            Fault(path, name, *bad)
            for name in sorted(group)
            for bad in _check_array(path, group, name, advance)
        ]
    if not any(fault.what == "image_ids" for fault in faults):
        faults += _check_ids(path, group)
    return faults


def read_what_can_be(path: Path, group: Any, name: str) -> Bytes:
    """A whole array, with zeros in place of chunks that are missing or damaged."""
    array = group[name]
    values = np.zeros(array.shape, array.dtype)
    for span in _parts(array):
        try:
            rows = slice(span.start, span.stop)
            values[rows] = read_rows(path, array, rows=rows)
        except CorruptStoreError:
            continue  # its zeros are the answer
    return values


def _check_labels(path: Path, group: Any, advance: Advance) -> list[Fault]:
    done = read_what_can_be(path, group, "done") == 1
    faults: list[Fault] = []
    for name in sorted(group):
        needed = done if name in LABEL_ARRAYS else None
        for bad, reason in _check_array(path, group, name, advance, needed=needed):
            rows = _rows_of(bad, len(done)) if name == "provenance" else bad
            faults.append(Fault(path, name, rows, reason))
    if not any(fault.what == "provenance" for fault in faults):
        faults += _check_provenance(path, group, done)
    return faults


def _rows_of(shards: range, count: int) -> range:
    return range(shards.start * CHUNK_ROWS, min(shards.stop * CHUNK_ROWS, count))


def _check_array(
    path: Path,
    group: Any,
    name: str,
    advance: Advance,
    *,
    needed: NDArray[np.bool_] | None = None,
) -> list[Bad]:
    """What is wrong with one array.

    Args:
        needed: (N,) which rows must be there; a part without one is read where it exists. None
            means all.
    """
    array = group[name]
    bad: list[Bad] = []
    for number, span in enumerate(_parts(array)):
        file = chunk_file(path, array, number)
        if needed is None or needed[span.start : span.stop].any() or file.exists():
            bad += _check_part(path, array, span, file)
        advance(file.stat().st_size if file.is_file() else 0)
    return bad


def _parts(array: Any) -> Iterator[range]:
    """The rows of each shard, or of each chunk of an array without shards."""
    step = (array.shards or array.chunks)[0]
    for start in range(0, array.shape[0], step):
        yield range(start, min(start + step, array.shape[0]))


def _check_part(path: Path, array: Any, span: range, file: Path) -> list[Bad]:
    """The rows of a shard or chunk that cannot be read, and why."""
    if not file.is_file() or file.stat().st_size == 0:
        return [(span, "missing")]
    if array.shards is not None:
        return _check_shard(path, array, span, file)
    return [] if _readable(path, array, span) else [(span, "damaged")]


def _check_shard(path: Path, array: Any, span: range, file: Path) -> list[Bad]:
    """Chunk by chunk, adjacent rows with one fault as one range; then for bytes of no chunk."""
    chunks = CHUNK_ROWS // INNER_ROWS
    try:
        with file.open("rb") as stream:
            index = read_index(stream, chunks)
    except ChunkError:
        return [(span, "damaged")]
    bad: list[Bad] = []
    for number, start in enumerate(range(span.start, span.stop, INNER_ROWS)):
        rows = range(start, min(start + INNER_ROWS, span.stop))
        held = is_held(index)[number]
        if held and _readable(path, array, rows):
            continue
        reason = "damaged" if held else "missing"
        if bad and (bad[-1][0].stop, bad[-1][1]) == (rows.start, reason):
            rows = range(bad.pop()[0].start, rows.stop)
        bad.append((rows, reason))
    used = int(index[is_held(index), 1].sum()) + index_bytes(chunks)
    if not bad and used != file.stat().st_size:
        return [(span, "damaged (bytes that belong to no chunk)")]
    return bad


def _readable(path: Path, array: Any, rows: range) -> bool:
    try:
        read_rows(path, array, rows=slice(rows.start, rows.stop))
    except CorruptStoreError:
        return False
    return True


def _check_ids(path: Path, group: Any) -> list[Fault]:
    table = read_rows(path, group["image_ids"])
    try:
        ids = decode_ids(table)
    except UnicodeDecodeError:
        return [Fault(path, "image_ids", None, "not UTF-8")]
    if all(ids) and len(set(ids)) == len(ids):
        return []
    return [Fault(path, "image_ids", None, "an id is empty or there twice")]


def _check_provenance(path: Path, group: Any, done: NDArray[np.bool_]) -> list[Fault]:
    """Each shard with a done row says in JSON what computed it."""
    faults: list[Fault] = []
    for shard, record in enumerate(read_rows(path, group["provenance"])):
        rows = _rows_of(range(shard, shard + 1), len(done))
        if not done[rows.start : rows.stop].any():
            continue
        try:
            found = decode_provenance(record)
        except ValueError:
            found = []
        if not found:
            faults.append(Fault(path, "provenance", rows, "no record of what computed it"))
    return faults
