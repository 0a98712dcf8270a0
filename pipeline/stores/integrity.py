"""Every byte of a store, read and checked, and what is damaged made honest: work not yet done."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.disk import tree_bytes, write_bytes
from pipeline.errors import CorruptStoreError, FormatError
from pipeline.stores.arrays import (
    ADVICE,
    STORE_FILE,
    Advance,
    file_state,
    open_array,
    read_rows,
    read_sealed,
    read_store_file,
)
from pipeline.stores.label_store import (
    COPY_FILE,
    STATISTICS_FILE,
    Identity,
    LabelStore,
    RowKey,
    chunk_file,
    write_metadata,
)

METADATA = "metadata"  # store.json or a zarr.json, without which nothing else can be read
WHOLE_STORE = (METADATA, COPY_FILE)  # faults that ``restore_metadata`` mends, and loses no label
FORMAT_FAULT = "format"  # whole, but of another samfed


@dataclass(frozen=True)
class Fault:
    """Damage in one store."""

    path: Path  # of the store
    what: str  # an array, ``metadata``, ``format``, or a JSON file's name
    rows: range | None  # of the store; None where it concerns no row
    reason: str

    def __str__(self) -> str:
        where = "" if self.rows is None else f" rows {self.rows.start}..{self.rows.stop - 1}"
        return f"{self.path}: {self.what}{where}: {self.reason}"

    def as_json(self) -> dict[str, Any]:
        """Return it for ``--json``; rows are [first, last]."""
        rows = None if self.rows is None else [self.rows.start, self.rows.stop - 1]
        return {"store": str(self.path), "what": self.what, "rows": rows, "reason": self.reason}


def check_store(path: Path, advance: Advance = lambda read: None) -> list[Fault]:
    """Read a label or image store whole, one chunk at a time, and list all that is wrong with it.

    Each JSON file is held against its own sha256, and each other file against the one that a JSON
    file names, or in a chunk with rows still to come against its crc32c. Without its metadata
    nothing else of a store can be read: that is one fault.

    Raises:
        OSError: a file cannot be read, which says nothing about its bytes.
    """
    try:
        content = read_store_file(path)
    except CorruptStoreError as error:
        reason = str(error).removeprefix(f"{path}: ").removesuffix(f"; {ADVICE}")
        return [Fault(path, METADATA, None, reason)]
    except FormatError as error:
        return [Fault(path, FORMAT_FAULT, None, str(error).removeprefix(f"{path}: format "))]
    if content["kind"] == "labels":
        return list(_check_labels(LabelStore(path), advance))
    return list(_check_images(path, content["files"], advance))


def stored_identity(path: Path) -> Identity | None:
    """Return a label store's identity, from its copy if need be; None if both are damaged."""
    for name in (STORE_FILE, COPY_FILE):
        with suppress(CorruptStoreError):
            return Identity.model_validate(read_sealed(path, name)["identity"])
    return None


def restore_metadata(path: Path) -> None:
    """Write again what never changes in a label store, from its copy or from its other files.

    Raises:
        CorruptStoreError: nobody can tell any more whose labels these are, or of which images.
    """
    identity = stored_identity(path)
    if identity is None:
        raise CorruptStoreError(f"{path}: {STORE_FILE} and {COPY_FILE} are damaged; {ADVICE}")
    try:
        rows = _copied_rows(path)
    except CorruptStoreError:
        rows = list(LabelStore(path).rows)
    with tempfile.TemporaryDirectory() as folder:
        write_metadata(Path(folder), identity, rows)
        for file in sorted(Path(folder).rglob("*.json")):
            write_bytes(path / file.relative_to(folder), file.read_bytes())


def mend_store(path: Path, faults: Sequence[Fault]) -> None:
    """Make a label store with these faults, its metadata whole, an honest, unfinished one.

    A chunk with a fault becomes undone and loses what it holds. Marks are on the disk before
    anything is removed, so that none ever promises what is gone.

    Raises:
        CorruptStoreError: its metadata is damaged.
    """
    store, rows = LabelStore(path), _copied_rows(path)
    store.set_statistics(None)  # they were of the whole store, or are damaged themselves
    for chunk in sorted({f.rows.start // store.rows_per_chunk for f in faults if f.rows}):
        span = store.chunk_rows(chunk)
        store.forget_chunk(chunk, rows[span.start : span.stop])


def _check_images(path: Path, files: dict[str, str], advance: Advance) -> Iterator[Fault]:
    for name, sha256 in files.items():
        state = file_state(path / name, sha256)
        if state != "whole":
            array = open_array(path, name.split("/")[0])
            step, chunk = array.chunks[0], int(name.split(".")[1])
            rows = range(chunk * step, min((chunk + 1) * step, array.shape[0]))
            yield Fault(path, array.path, rows, state)
        advance(tree_bytes(path / name))


def _check_labels(store: LabelStore, advance: Advance) -> Iterator[Fault]:
    path = store.path
    copy = _check_sealed(path, COPY_FILE)
    yield from copy
    rows = [] if copy else _copied_rows(path)
    if (path / STATISTICS_FILE).exists():
        yield from _check_sealed(path, STATISTICS_FILE)
    for chunk in range(store.chunks):
        span, name = store.chunk_rows(chunk), chunk_file(chunk)
        faults = _check_sealed(path, name, span)
        if not faults and rows and store.state(chunk).rows != rows[span.start : span.stop]:
            faults = [Fault(path, name, span, f"of other images than {COPY_FILE}")]
        yield from faults or _check_chunk(store, chunk)
        advance(sum(tree_bytes(path / name) for name in store.chunk_files(chunk).values()))


def _check_chunk(store: LabelStore, chunk: int) -> Iterator[Fault]:
    """Check the files of a chunk by their sha256; by their crc32c where that may still change."""
    state, span = store.state(chunk), store.chunk_rows(chunk)
    for array, name in store.chunk_files(chunk).items():
        found = "whole"
        if state.files:
            found = file_state(store.path / name, state.files[name])
        elif any(state.done) or (store.path / name).exists():
            try:
                read_rows(store.path, open_array(store.path, array), span)
            except CorruptStoreError as error:
                found = _state(error)
        if found != "whole":
            yield Fault(store.path, array, span, found)


def _check_sealed(path: Path, name: str, rows: range | None = None) -> list[Fault]:
    try:
        read_sealed(path, name)
    except CorruptStoreError as error:
        return [Fault(path, name, rows, _state(error))]
    return []


def _state(error: CorruptStoreError) -> str:
    """Return "missing" or "damaged", with which these errors end before they give advice."""
    return str(error).removesuffix(f"; {ADVICE}").rsplit(" ", 1)[-1]


def _copied_rows(path: Path) -> list[RowKey]:
    return [RowKey(*row) for row in read_sealed(path, COPY_FILE)["rows"]]
