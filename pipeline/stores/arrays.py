"""Arrays in chunks of up to 64 rows, and small JSON files: what every store is made of.

A chunk is one file on disk and one task of stage one. zarr reads and writes it; the crc32c in it
finds every flipped bit. A JSON file says everything twice, each time with the content's sha256, so
that a flipped bit in it costs nothing. Whatever is missing is damage, never an answer: even chunks
of zeros are written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.buffer.cpu import NDBuffer
from zarr.codecs import BloscCodec, Crc32cCodec, ZstdCodec
from zarr.storage import LocalStore, StorePath

from pipeline.disk import file_sha256, leftovers, to_json, write_bytes
from pipeline.errors import CorruptStoreError, FormatError

FORMAT = 2
CHUNK_ROWS = 64
STORE_FILE = "store.jsonl"  # what the store is, and the text of its zarr.json files
METADATA_FILE = "zarr.json"
REPAIR = "run `samfed cache repair`"  # of label stores; damaged image stores are written anew

Bytes = NDArray[np.uint8]
Advance = Callable[[int], None]  # takes the bytes read since the last call

_CHUNK_BYTES = 2**24  # uncompressed
_CONFIG: Any = {"write_empty_chunks": True}  # per array: threads share zarr's global setting

# Measured (docs/benchmarks.md): Blosc's bit shuffle makes photographs a sixth smaller. It saves
# nothing on labels, which take half as long again to read and to write with it.
LABEL_CODECS = (ZstdCodec(level=3), Crc32cCodec())
PHOTO_CODECS = (BloscCodec(cname="zstd", clevel=3, shuffle="bitshuffle"), Crc32cCodec())


class DurableStore(LocalStore):
    """A local zarr store whose files are on the disk, whole, before they get a name."""

    def set_sync(self, key: str, value: Any) -> None:
        """Write, flush, rename and flush the folder; zarr's own store never flushes."""
        write_bytes(self.root / key, value.to_bytes())

    async def set(self, key: str, value: Any) -> None:
        """Write as ``set_sync`` does; in a thread it might go on when zarr has raised already."""
        self.set_sync(key, value)

    async def set_if_not_exists(self, key: str, value: Any) -> None:
        """Write what is not there yet, likewise."""
        if not (self.root / key).exists():
            self.set_sync(key, value)


# --------------------------------------------------------------------------- arrays


def rows_per_chunk(row_bytes: int) -> int:
    """Return 64, or the power of two that keeps a chunk of longer rows within 16 MiB."""
    fitting = max(1, _CHUNK_BYTES // row_bytes)
    return min(CHUNK_ROWS, 1 << (fitting.bit_length() - 1))


def create_array(
    path: Path,
    name: str,
    shape: tuple[int, ...],
    *,
    rows: int,
    dtype: str = "uint8",
    codecs: tuple[Any, ...] = LABEL_CODECS,
) -> Any:
    """Create an array of the store at ``path`` in chunks of so many rows, all in one folder."""
    return zarr.create_array(
        DurableStore(path),
        name=name,
        shape=shape,
        dtype=dtype,
        chunks=(rows, *shape[1:]),
        compressors=codecs,
        fill_value=0,
        zarr_format=3,
        config=_CONFIG,
        chunk_key_encoding={"name": "default", "separator": "."},
    )


def open_array(path: Path, name: str, content: Any) -> Any:
    """Open an array of a store, to be read and written to; ``content`` is its ``store.jsonl``'s.

    The ``zarr.json`` files, of which that holds the text, are for other readers: damage in them
    costs us nothing.
    """
    metadata = json.loads(content["metadata"][f"{name}/{METADATA_FILE}"])
    array = zarr.Array.from_dict(StorePath(DurableStore(path), name), metadata)
    return array.with_config(_CONFIG)


def chunk_name(array: Any, chunk: int) -> str:
    """Return the file of one chunk, relative to the store: ``masks/c.7.0.0``."""
    return f"{array.path}/{array.metadata.encode_chunk_key((chunk, *[0] * (array.ndim - 1)))}"


def read_rows(path: Path, array: Any, rows: range, *, advice: str = REPAIR) -> Any:
    """Read rows of one array, each chunk checked against its crc32c and for being there at all.

    Raises:
        CorruptStoreError: names the rows. OSError: a file is there and cannot be read.
    """
    step = array.chunks[0]
    values = np.empty((len(rows), *array.shape[1:]), array.dtype)
    for chunk in range(rows.start // step, -(-rows.stop // step)):
        first, last = max(rows.start, chunk * step), min(rows.stop, (chunk + 1) * step)
        out = NDBuffer.from_numpy_array(values[first - rows.start : last - rows.start])
        state = "damaged"
        try:
            if not (path / chunk_name(array, chunk)).is_file():
                state = "missing"
                raise ValueError("zarr would make zeros of it")
            array.get_basic_selection(slice(first, last), out=out)
        except (ValueError, RuntimeError) as error:  # of bad bytes: zarr's and numcodecs'
            raise CorruptStoreError(
                f"{path}: {array.path} rows {first}..{last - 1} are {state}; {advice}"
            ) from error
    return values


# --------------------------------------------------------------------------- JSON files


def canonical_json(value: Any) -> bytes:
    """Return ``value`` as JSON that is the same bytes for the same value."""
    return to_json(value, separators=(",", ":")).encode()


def write_sealed(file: Path, content: Any) -> None:
    """Write JSON and its sha256 on one line, and the same line again, durably."""
    write_bytes(file, 2 * _sealed(content))


def read_sealed(path: Path, name: str, *, advice: str = REPAIR) -> Any:
    """Read what ``write_sealed`` wrote to the file ``name`` of a store, from an intact line.

    Raises:
        CorruptStoreError: it is missing, or both lines are damaged.
    """
    try:
        raw = (path / name).read_bytes()
    except FileNotFoundError as error:
        raise CorruptStoreError(f"{path}: {name} is missing; {advice}") from error
    half = len(raw) // 2
    for line in (raw[:half], raw[half:]):
        with suppress(ValueError, LookupError, TypeError, RecursionError):
            content = json.loads(line)["content"]
            if line == _sealed(content):
                return content
    raise CorruptStoreError(f"{path}: {name} is damaged; {advice}")


def is_sealed(path: Path, name: str) -> bool:
    """Return whether both lines of a file that ``read_sealed`` can read are intact."""
    content = read_sealed(path, name)
    return (path / name).read_bytes() == 2 * _sealed(content)


def _sealed(content: Any) -> bytes:
    sha256 = hashlib.sha256(canonical_json(content)).hexdigest()
    return canonical_json({"content": content, "sha256": sha256}) + b"\n"


# --------------------------------------------------------------------------- stores


def store_metadata(path: Path) -> dict[str, str]:
    """Return the text of the ``zarr.json`` of a store's root and of each of its arrays."""
    files = sorted(path.rglob(METADATA_FILE))
    return {file.relative_to(path).as_posix(): file.read_text() for file in files}


def read_store_file(path: Path, kind: str | None = None, *, advice: str = REPAIR) -> Any:
    """Return what ``store.jsonl`` says.

    Raises:
        FormatError: another samfed wrote the store. CorruptStoreError: the file is damaged, or the
        store is not of this ``kind`` ("images" or "labels").
    """
    content = _format_1(path) or read_sealed(path, STORE_FILE, advice=advice)
    if content["format"] != FORMAT:
        way = (
            "`samfed prepare`, which writes it anew"
            if content["kind"] == "images"
            else "`samfed precompute-sam`, which moves it to the archive and labels anew"
        )
        found = f"format {content['format']}, this samfed reads format {FORMAT}"
        raise FormatError(f"{path}: {found}; run {way}")
    if kind not in (None, content["kind"]):
        raise CorruptStoreError(f"{path}: not a store of {kind}; remove it and rerun")
    return content


def _format_1(path: Path) -> Any:
    """Return format and kind of a store of format 1, where they were in ``zarr.json``."""
    root = path / METADATA_FILE
    if (path / STORE_FILE).exists() or not root.exists() or b'"format":1,' not in root.read_bytes():
        return None
    return {"format": 1, "kind": "images" if b'"kind":"images"' in root.read_bytes() else "labels"}


def file_state(file: Path, sha256: str) -> str:
    """Return whether a file is "whole", that is has this sha256, "damaged" or "missing"."""
    try:
        return "whole" if file_sha256(file) == sha256 else "damaged"
    except FileNotFoundError:
        return "missing"


def remove_partial_files(path: Path) -> None:
    """Remove what killed writers left in a store; the caller holds its lock."""
    for file in leftovers(path, seconds=0):
        file.unlink(missing_ok=True)
