"""The files of an array, read without zarr: the index of a shard, crc32c, Blosc.

zarr reads the same files, and a test holds the two against each other. This exists because zarr's
event loop and copies take longer than all decoding (docs/benchmarks.md), and because zarr reads a
chunk that a shard's index leaves out as zeros, where it is damage.

The layout is that of Zarr v3's ``sharding_indexed``, ``blosc`` and ``crc32c`` codecs
(https://zarr-specs.readthedocs.io/en/latest/v3/codecs/). Writing is left to zarr.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import google_crc32c
import numpy as np
from numcodecs.blosc import decompress
from numpy.typing import NDArray

_CRC_BYTES = 4
_ENTRY_BYTES = 16  # offset and length of a chunk, uint64 little-endian
_ABSENT = np.iinfo(np.uint64).max  # both, of a chunk that the shard does not hold


class ChunkError(Exception):
    """A chunk of a file, or the whole file, that cannot be read.

    ``rows``: those of the file that it holds, None for all; ``reason``: "missing", "damaged (...)".
    """

    def __init__(self, rows: range | None, reason: str) -> None:
        super().__init__(reason)
        self.rows, self.reason = rows, reason


def read_file(
    file: Path, out: NDArray[Any], *, first: int, chunk_rows: int, chunks: int | None
) -> None:
    """Fill ``out`` with rows of a shard, or of a chunk that has a file to itself.

    Args:
        out: (n, ...) contiguous, of the array's dtype; row 0 is row ``first`` of the file.
        chunk_rows: rows of a chunk, those past the array's end counted.
        chunks: number of chunks of a shard; None for a chunk alone, which has no index.

    Raises:
        ChunkError: a chunk is missing or damaged. OSError: says nothing about the bytes.
    """
    wanted = range(first // chunk_rows, -(-(first + len(out)) // chunk_rows))
    for number, data in zip(wanted, _chunks(file, wanted, chunks), strict=True):
        rows = range(number * chunk_rows, (number + 1) * chunk_rows)
        if data is None:
            raise ChunkError(rows, "missing")
        start, stop = max(rows.start, first), min(rows.stop, first + len(out))
        target = out[start - first : stop - first]
        try:
            if len(target) == chunk_rows:
                _decode(data, target)
            else:
                whole = np.empty((chunk_rows, *out.shape[1:]), out.dtype)
                _decode(data, whole)
                target[:] = whole[start - rows.start : stop - rows.start]
        except (ValueError, RuntimeError) as error:  # numcodecs raises both for what is no Blosc
            raise ChunkError(rows, f"damaged ({error})") from error


def read_index(stream: BinaryIO, chunks: int) -> NDArray[np.uint64]:
    """The index that ends a shard: (chunks, 2), the offset and length of each chunk in bytes.

    Both are all ones for a chunk that the shard does not hold.

    Raises:
        ChunkError: its crc32c differs, or it points outside of the file.
    """
    size = index_bytes(chunks)
    end = stream.seek(0, os.SEEK_END) - size
    if end < 0:
        raise ChunkError(None, "damaged (too short for its index)")
    stream.seek(end)
    try:
        content = _checked(stream.read(size))
    except ValueError as error:
        raise ChunkError(None, f"damaged (index: {error})") from error
    index: NDArray[np.uint64] = np.frombuffer(content, "<u8").reshape(chunks, 2)
    held = index[is_held(index)]
    if (held > end).any() or (held.sum(axis=1) > end).any():
        raise ChunkError(None, "damaged (its index points outside)")
    return index


def index_bytes(chunks: int) -> int:
    """Length of the index of a shard of so many chunks."""
    return chunks * _ENTRY_BYTES + _CRC_BYTES


def is_held(index: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which chunks a shard with this index holds, (chunks,) bool."""
    held: NDArray[np.bool_] = (index != _ABSENT).all(axis=1)
    return held


def _chunks(file: Path, wanted: range, chunks: int | None) -> Iterator[bytes | None]:
    """The bytes of each wanted chunk, as on disk; None where a shard does not hold it."""
    with file.open("rb") as stream:
        if chunks is None:
            yield stream.read()
            return
        index = read_index(stream, chunks)[wanted.start : wanted.stop]
        for (offset, length), held in zip(index.tolist(), is_held(index), strict=True):
            if held:
                stream.seek(offset)
            yield stream.read(length) if held else None


def _decode(data: bytes, out: NDArray[Any]) -> None:
    content = _checked(data)
    size, coded = (
        int.from_bytes(content[at : at + 4], "little") for at in (4, 12)
    )  # Blosc's header
    if size != out.nbytes:  # less would leave a part of ``out`` as it was
        raise ValueError(f"holds {size} bytes, expected {out.nbytes}")
    if coded != len(content):  # Blosc would read past the end
        raise ValueError(f"takes {coded} bytes, found {len(content)}")
    decompress(content, out)


def _checked(data: bytes) -> bytes:
    """``data`` without the crc32c that ends it, once they agree."""
    content, crc = data[:-_CRC_BYTES], data[-_CRC_BYTES:]
    if google_crc32c.value(content) != int.from_bytes(crc, "little"):
        raise ValueError("crc32c differs")
    return content
