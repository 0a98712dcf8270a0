"""Every byte of a store, read and checked, and what is damaged made honest: work not yet done."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.disk import tree_bytes, write_bytes
from pipeline.errors import CorruptStoreError, FormatError
from pipeline.stores.arrays import (
    STORE_FILE,
    Advance,
    file_state,
    is_sealed,
    open_array,
    read_rows,
    read_sealed,
    read_store_file,
    write_sealed,
)
from pipeline.stores.label_store import LabelStore, RowKey, chunk_file


@dataclass(frozen=True)
class Fault:
    """Damage in one store."""

    path: Path  # of the store
    what: str  # an array, ``format``, or a file that is no array's
    rows: range | None  # of the store, that are lost; None where none is, or all are
    reason: str
    mendable: bool = False  # without a teacher, as all is said elsewhere too

    def __str__(self) -> str:
        where = "" if self.rows is None else f" rows {self.rows.start}..{self.rows.stop - 1}"
        return f"{self.path}: {self.what}{where}: {self.reason}"

    def as_json(self) -> dict[str, Any]:
        """Return it for ``--json``; rows are [first, last]."""
        rows = None if self.rows is None else [self.rows.start, self.rows.stop - 1]
        return {"store": str(self.path), "what": self.what, "rows": rows, "reason": self.reason}


def check_store(path: Path, advance: Advance = lambda read: None) -> list[Fault]:
    """Read a label or image store whole, one chunk at a time, and list all that is wrong with it.

    Each line of a JSON file is held against its own sha256, and each other file against the one
    that a JSON file names, or in a chunk with rows still to come against its crc32c. Without
    ``store.jsonl`` nothing else of a store can be read: that is one fault.

    Raises:
        OSError: a file cannot be read, which says nothing about its bytes.
    """
    try:
        content = read_store_file(path)
    except CorruptStoreError as error:
        return [Fault(path, STORE_FILE, None, _state(error))]
    except FormatError as error:
        return [Fault(path, "format", None, str(error).removeprefix(f"{path}: format "))]
    check = _check_labels if content["kind"] == "labels" else _check_images
    metadata = _check_metadata(path, content["metadata"])
    return [*_check_json(path, STORE_FILE), *metadata, *check(path, content, advance)]


def mend_metadata(path: Path) -> None:
    """Mend all that costs a label store no label: JSON of which a line is left, and ``zarr.json``.

    Raises:
        CorruptStoreError: nobody can tell any more whose labels these are.
    """
    for name, text in read_sealed(path, STORE_FILE)["metadata"].items():
        write_bytes(path / name, text.encode())
    for name in (STORE_FILE, *map(chunk_file, range(LabelStore(path).chunks))):
        with suppress(CorruptStoreError):  # a chunk that ``forget_damaged`` forgets
            write_sealed(path / name, read_sealed(path, name))


def forget_damaged(path: Path, faults: Sequence[Fault], rows: Sequence[RowKey]) -> None:
    """Make the chunks of a label store that have a fault undone, and remove what they hold.

    Marks are on the disk before anything is removed, so that none ever promises what is gone.

    Args:
        rows: the rows that the store should have, for a chunk whose own list is lost.

    Raises:
        CorruptStoreError: such a chunk's rows cannot be told, or whose labels these are.
    """
    store = LabelStore(path)
    for chunk in sorted({f.rows.start // store.rows_per_chunk for f in faults if f.rows}):
        span = store.chunk_rows(chunk)
        try:
            known = store.state(chunk).rows
        except CorruptStoreError:
            if len(rows) != len(store):
                raise
            known = list(rows[span.start : span.stop])
        store.forget_chunk(chunk, known)


def _check_metadata(path: Path, texts: dict[str, str]) -> Iterator[Fault]:
    for name, text in texts.items():
        state = file_state(path / name, hashlib.sha256(text.encode()).hexdigest())
        if state != "whole":
            yield Fault(path, name, None, state, mendable=True)


def _check_images(path: Path, content: Any, advance: Advance) -> Iterator[Fault]:
    for name, sha256 in content["files"].items():
        state = file_state(path / name, sha256)
        if state != "whole":
            array = open_array(path, name.split("/")[0], content)
            step, chunk = array.chunks[0], int(name.split(".")[1])
            rows = range(chunk * step, min((chunk + 1) * step, array.shape[0]))
            yield Fault(path, array.path, rows, state)
        advance(tree_bytes(path / name))


def _check_labels(path: Path, content: Any, advance: Advance) -> Iterator[Fault]:
    store = LabelStore(path)
    for chunk in range(store.chunks):
        faults = _check_json(path, chunk_file(chunk), store.chunk_rows(chunk))
        yield from faults
        if all(fault.mendable for fault in faults):
            yield from _check_chunk(store, chunk)
        advance(sum(tree_bytes(path / name) for name in store.chunk_files(chunk).values()))


def _check_chunk(store: LabelStore, chunk: int) -> Iterator[Fault]:
    """Check the files of a chunk by their sha256; by their crc32c where that may still change."""
    state, span = store.state(chunk), store.chunk_rows(chunk)
    for name, file in store.chunk_files(chunk).items():
        found = "whole"
        if state.files:
            found = file_state(store.path / file, state.files.get(file, ""))
        elif any(state.done) or (store.path / file).exists():
            try:
                read_rows(store.path, store.arrays[name], span)
            except CorruptStoreError as error:
                found = _state(error)
        if found != "whole":
            yield Fault(store.path, name, span, found)


def _check_json(path: Path, name: str, rows: range | None = None) -> list[Fault]:
    """Check both lines of a JSON file; ``rows`` are lost only if neither is intact."""
    try:
        if is_sealed(path, name):
            return []
        return [Fault(path, name, None, "one of its two lines is damaged", mendable=True)]
    except CorruptStoreError as error:
        return [Fault(path, name, rows, _state(error))]


def _state(error: CorruptStoreError) -> str:
    """Return "missing" or "damaged", with which these errors end before they give advice."""
    return str(error).split("; ")[0].rsplit(" ", 1)[-1]
