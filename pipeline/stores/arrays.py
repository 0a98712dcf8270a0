"""What every store has in common: sharded, checksummed arrays under sealed metadata.

Every chunk carries a crc32c and is written even when it is all zeros, so that a missing chunk is
always damage and never an answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

from pipeline.disk import write_bytes
from pipeline.errors import CorruptStoreError, StoreError
from pipeline.stores.decode import ChunkError, read_file

FORMAT = 1
CHUNK_ROWS = 64  # one task of stage one, one file on disk
INNER_ROWS = 8  # one read of stage two
MARK_SHARDS = 64  # shards whose done marks, provenance or image ids share a chunk

Bytes = NDArray[np.uint8]
Record = dict[str, str]  # what computed labels: backend, precision, device, versions

PROVENANCE_BYTES = 512  # of a shard's records
_OMITTED: Record = {"omitted": "earlier records"}  # in the place of those that found no room

_ADVICE = "run `samfed cache repair`"
_CONFIG = {"write_empty_chunks": True}  # of each array: zarr's global setting is shared by threads


def codecs() -> list[Any]:
    return [BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"), Crc32cCodec()]


def sharded_array(group: Any, name: str, shape: tuple[int, ...]) -> Any:
    return group.create_array(
        name,
        shape=shape,
        dtype="uint8",
        chunks=(INNER_ROWS, *shape[1:]),
        shards=(CHUNK_ROWS, *shape[1:]),
        compressors=codecs(),
        fill_value=0,
        config=_CONFIG,
    )


def plain_array(
    group: Any, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str
) -> Any:
    return group.create_array(
        name,
        shape=shape,
        dtype=dtype,
        chunks=chunks,
        compressors=codecs(),
        fill_value=0,
        config=_CONFIG,
    )


def table_array(group: Any, name: str, values: Bytes) -> None:
    """A (N, width) array that is written once, whole; a row is in one chunk, as in every array."""
    chunks = (min(len(values), MARK_SHARDS * CHUNK_ROWS), values.shape[1])
    group.create_array(name, data=values, chunks=chunks, compressors=codecs(), config=_CONFIG)


def open_arrays(group: Any) -> dict[str, Any]:
    """The arrays of a group, to be written to."""
    return {name: array.with_config(_CONFIG) for name, array in group.arrays()}


def chunk_file(path: Path, array: Any, part: int) -> Path:
    """The file of an array's shard (or chunk, where it has no shards) number ``part``."""
    key = "/".join([str(part)] + ["0"] * (array.ndim - 1))
    return path / str(array.basename) / "c" / key


def read_rows(path: Path, array: Any, *, rows: slice = slice(None)) -> Any:
    """Values of one array, each chunk checked against its crc32c and for being there at all."""
    start, stop, _ = rows.indices(array.shape[0])
    chunk_rows = array.chunks[0]
    step = array.shards[0] if array.shards else chunk_rows
    chunks = step // chunk_rows if array.shards else None
    values = np.empty((max(stop - start, 0), *array.shape[1:]), array.dtype.newbyteorder("<"))
    for part in range(start // step, -(-stop // step)):
        offset, file = part * step, chunk_file(path, array, part)
        first, last = max(start, offset), min(stop, offset + step)
        try:
            if not file.is_file() or file.stat().st_size == 0:
                raise ChunkError(None, "missing")
            read_file(
                file,
                values[first - start : last - start],
                first=first - offset,
                chunk_rows=chunk_rows,
                chunks=chunks,
            )
        except ChunkError as error:
            bad = error.rows or range(step)
            raise CorruptStoreError(
                f"{path}: {array.basename} rows {max(first, offset + bad.start)}.."
                f"{min(last, offset + bad.stop) - 1} are {error.reason}; {_ADVICE}"
            ) from error
    return values


def remove_partial_files(path: Path) -> None:
    """Remove what a killed writer left: zarr writes ``<name>.<uuid>.partial`` and then renames."""
    for file in path.rglob("*.partial"):
        file.unlink()


def encode_ids(image_ids: Sequence[str]) -> Bytes:
    """Ids as UTF-8 rows padded with zeros: zarr's own string types are not yet stable."""
    encoded = [image_id.encode() for image_id in image_ids]
    table = np.zeros((len(encoded), max(map(len, encoded))), np.uint8)
    for row, text in zip(table, encoded, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    return table


def decode_ids(table: Bytes) -> tuple[str, ...]:
    return tuple(bytes(row).rstrip(b"\0").decode() for row in table)


def encode_provenance(records: Sequence[Record]) -> Bytes:
    """A shard's records, each once, as JSON padded with zeros: an object, or a list if several.

    Where there is no room for all, the earliest give way to one that says so.

    Raises:
        ValueError: there is no room for a single one.
    """
    each = [record for n, record in enumerate(records) if record not in records[:n]]
    named = [record for record in each if record != _OMITTED]
    encoded = canonical_json(each[0] if len(each) == 1 else each)
    while len(encoded) > PROVENANCE_BYTES:
        if len(named) == 1:
            raise ValueError(f"provenance takes {len(encoded)} bytes, at most {PROVENANCE_BYTES}")
        named = named[1:]
        encoded = canonical_json([_OMITTED, *named])
    row = np.zeros(PROVENANCE_BYTES, np.uint8)
    row[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    return row


def decode_provenance(row: Bytes) -> list[Record]:
    """A shard's records in the order in which they came; none where no row is done.

    Raises:
        ValueError: the bytes are not such records.
    """
    text = bytes(row).rstrip(b"\0")
    value = json.loads(text) if text else []
    records = value if isinstance(value, list) else [value]
    if not all(isinstance(record, dict) and record for record in records):
        raise ValueError(f"expected records of provenance, found {value!r}")
    return records


def canonical_json(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _metadata_digest(path: Path, document: dict[str, Any]) -> str:
    """sha256 over the root's metadata (digest aside) and every array's ``zarr.json``."""
    attributes = {k: v for k, v in document["attributes"].items() if k != "metadata_sha256"}
    digest = hashlib.sha256(canonical_json({**document, "attributes": attributes}))
    for metadata in sorted(path.glob("*/zarr.json")):
        digest.update(metadata.parent.name.encode() + b"\0" + metadata.read_bytes())
    return digest.hexdigest()


def seal(path: Path, attributes: dict[str, Any]) -> None:
    """Write the root's attributes and a digest over all metadata: crc32c covers chunks only."""
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"] = attributes
    attributes["metadata_sha256"] = _metadata_digest(path, document)
    write_bytes(path / "zarr.json", canonical_json(document))


def check_seal(path: Path) -> dict[str, Any]:
    """The root's attributes, once the digest over all metadata agrees.

    Raises:
        CorruptStoreError: a metadata file is damaged. StoreError: another version's format.
    """
    try:
        content = (path / "zarr.json").read_bytes()
        document = json.loads(content)
        attributes: dict[str, Any] = document["attributes"]
        whole = content == canonical_json(document)
        intact = whole and attributes["metadata_sha256"] == _metadata_digest(path, document)
    except (FileNotFoundError, ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(
            f"{path}: metadata is unreadable ({type(error).__name__}); {_ADVICE}"
        ) from error
    if not intact:
        raise CorruptStoreError(f"{path}: metadata is damaged (digest differs); {_ADVICE}")
    if attributes.get("format") != FORMAT:
        raise StoreError(
            f"{path}: format {attributes.get('format')}, this samfed reads format {FORMAT}"
        )
    return attributes
