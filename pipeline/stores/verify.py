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
from pipeline.stores.chunks import (
    CHUNK_ROWS,
    SHARD_ROWS,
    Bytes,
    check_seal,
    chunk_file,
    decode_ids,
    decode_provenance,
    read_rows,
)

METADATA = "metadata"  # the zarr.json files, where a fault names an array
FORMAT_FAULT = "format"  # whole, but of another samfed
LABEL_ARRAYS = ("masks", "confidences", "scores")  # written by shard, before the done marks
_INDEX_CRC_BYTES = 4

Advance = Callable[[int], None]  # takes the bytes read since the last call
Bad = tuple[range, str]  # rows of an array, and what is wrong with them


@dataclass(frozen=True)
class Fault:
    """Damage in one store."""

    path: Path  # of the store
    array: str
    rows: range | None  # of the store; None where no row can be named
    reason: str

    def __str__(self) -> str:
        where = "" if self.rows is None else f" rows {self.rows.start}..{self.rows.stop - 1}"
        return f"{self.path}: {self.array}{where}: {self.reason}"

    def as_json(self) -> dict[str, Any]:
        """For ``--json``; rows are [first, last]."""
        rows = None if self.rows is None else [self.rows.start, self.rows.stop - 1]
        return {"store": str(self.path), "array": self.array, "rows": rows, "reason": self.reason}


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
    if not any(fault.array == "image_ids" for fault in faults):
        faults += _check_ids(path, group)
    return faults


def read_what_can_be(path: Path, group: Any, name: str) -> Bytes:
    """A whole array, with zeros in place of chunks that are missing or damaged."""
    array = group[name]
    values = np.zeros(array.shape, array.dtype)
    for span in _parts(array):
        try:
            values[span.start : span.stop] = read_rows(
                path, group, name, slice(span.start, span.stop)
            )
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
    if not any(fault.array == "provenance" for fault in faults):
        faults += _check_provenance(path, group, done)
    return faults


def _rows_of(shards: range, count: int) -> range:
    return range(shards.start * SHARD_ROWS, min(shards.stop * SHARD_ROWS, count))


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
            bad += _check_part(path, group, name, span, file)
        advance(file.stat().st_size if file.is_file() else 0)
    return bad


def _parts(array: Any) -> Iterator[range]:
    """The rows of each shard, or of each chunk of an array without shards."""
    step = (array.shards or array.chunks)[0]
    for start in range(0, array.shape[0], step):
        yield range(start, min(start + step, array.shape[0]))


def _check_part(path: Path, group: Any, name: str, span: range, file: Path) -> list[Bad]:
    """The rows of a shard or chunk that cannot be read, and why; adjacent ones as one range."""
    if not file.is_file() or file.stat().st_size == 0:
        return [(span, "missing")]
    sharded = group[name].shards is not None
    if _readable(path, group, name, span):
        return _check_index(file, span) if sharded else []
    if not sharded:
        return [(span, "damaged")]
    bad: list[range] = []
    for start in range(span.start, span.stop, CHUNK_ROWS):
        rows = range(start, min(start + CHUNK_ROWS, span.stop))
        if _readable(path, group, name, rows):
            continue
        if bad and bad[-1].stop == rows.start:
            bad[-1] = range(bad[-1].start, rows.stop)
        else:
            bad.append(rows)
    return [(rows, "damaged") for rows in bad or [span]]


def _readable(path: Path, group: Any, name: str, rows: range) -> bool:
    try:
        read_rows(path, group, name, slice(rows.start, rows.stop))
    except CorruptStoreError:
        return False
    return True


def _check_index(file: Path, span: range) -> list[Bad]:
    """Hold a readable shard's index against its file: zarr reads a chunk not named as zeros.

    The index ends the file (zarr's ``sharding_indexed``): offset and length of each chunk, uint64,
    all ones for none, and a crc32c that reading has checked.
    """
    chunks = SHARD_ROWS // CHUNK_ROWS
    with file.open("rb") as stream:
        size = stream.seek(-(chunks * 16 + _INDEX_CRC_BYTES), 2)
        index = np.frombuffer(stream.read(chunks * 16), "<u8").reshape(chunks, 2)
    named = (index != np.iinfo(np.uint64).max).all(axis=1)
    faults = [
        (range(start, min(start + CHUNK_ROWS, span.stop)), "missing")
        for start in range(span.start, span.stop, CHUNK_ROWS)
        if not named[(start - span.start) // CHUNK_ROWS]
    ]
    if not faults and int(index[named, 1].sum()) != size:
        return [(span, "damaged (bytes that belong to no chunk)")]
    return faults


def _check_ids(path: Path, group: Any) -> list[Fault]:
    table = read_rows(path, group, "image_ids")
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
    for shard, record in enumerate(read_rows(path, group, "provenance")):
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
