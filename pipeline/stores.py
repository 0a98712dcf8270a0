"""The zarr stores: a client's images, and the labels that the teacher gave them (docs/formats.md).

The only module that imports zarr. Every chunk carries a crc32c and is written even when it is all
zeros, so that a missing chunk is always damage and never an answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict
from zarr.codecs import BloscCodec, Crc32cCodec

from pipeline.errors import CorruptStoreError, IdentityError, StageError
from pipeline.files import folder_beside, write_bytes

FORMAT = 1
SHARD_ROWS = 64  # one task of stage one, one file on disk
CHUNK_ROWS = 8  # one read of stage two
_MARK_SHARDS = 64  # shards whose done marks and provenance share a chunk
_PROVENANCE_BYTES = 512
_CONFIDENCE_CLIP = (1 / 512, 511 / 512)

Bytes = NDArray[np.uint8]


class Identity(BaseModel):
    """What decides the content of a label store; two stores with one identity are exchangeable."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    variant: str  # teacher architecture
    base_sha256: str  # pretrained weights
    adapter_sha256: str  # what fine-tuning added
    prompt: str  # prompt policy
    input_size: int  # side of the teacher's input, px
    label_size: int  # side of the stored masks, px
    num_classes: int  # K foreground classes

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the sha256 of the fields."""
        return hashlib.sha256(_canonical(self.model_dump())).hexdigest()[:16]


@dataclass(frozen=True)
class RowKey:
    """The image behind one row, and the sha256 of the file it was read from."""

    image_id: str
    sha256: str


@dataclass(frozen=True)
class Labels:
    """Teacher labels of n images.

    masks (n, S, S) uint8 class indices; confidences (n, S, S) uint8, the probability of that class
    in 0..255; scores (n,) float32, the teacher's own estimate of the IoU.
    """

    masks: Bytes
    confidences: Bytes
    scores: NDArray[np.float32]


# --------------------------------------------------------------------------- images


@dataclass(frozen=True)
class ImageSet:
    """Images of one owner and split, in memory.

    images (N, S, S, 3) uint8 RGB; labels (N, S, S) uint8 class indices, None where unlabelled.
    """

    image_ids: tuple[str, ...]
    images: Bytes
    labels: Bytes | None

    def __len__(self) -> int:
        return len(self.image_ids)


def write_image_store(
    path: Path, image_ids: Sequence[str], rows: Iterable[tuple[Bytes, Bytes | None]], *, size: int
) -> None:
    """Write an image store whole: it appears at ``path`` complete or not at all.

    Args:
        rows: (S, S, 3) image and (S, S) label, or None for every label, in the order of the ids.
    """
    count = len(image_ids)
    with folder_beside(path) as building, _writing():
        group = zarr.create_group(store=building)
        images = _sharded(group, "images", (count, size, size, 3))
        labels: zarr.Array[Any] | None = None
        group.create_array("image_ids", data=_encode_ids(image_ids), compressors=_codecs())
        written = labelled = 0
        for start, block in _blocks(rows):
            images[start : start + len(block)] = np.stack([image for image, _ in block])
            marks = [label for _, label in block if label is not None]
            written, labelled = written + len(block), labelled + len(marks)
            if labelled not in (0, written):
                raise ValueError(f"found {labelled} labels for {written} images of {path}")
            if marks:
                labels = labels or _sharded(group, "labels", (count, size, size))
                labels[start : start + len(block)] = np.stack(marks)
        if written != count:
            raise ValueError(f"found {written} rows for {count} image ids of {path}")
        _seal(building, {"kind": "images", "format": FORMAT})


def _blocks(
    rows: Iterable[tuple[Bytes, Bytes | None]],
) -> Iterable[tuple[int, list[tuple[Bytes, Bytes | None]]]]:
    """Group rows by shard, so that each shard is written once."""
    start, block = 0, []
    for row in rows:
        block.append(row)
        if len(block) == SHARD_ROWS:
            yield start, block
            start, block = start + len(block), []
    if block:
        yield start, block


def read_image_store(
    path: Path, *, image_ids: Sequence[str], size: int, stage: str = "prepare"
) -> ImageSet:
    """Read an image store into memory: these images in this order, at this size.

    Raises:
        StageError: it does not exist. IdentityError: it holds other images, or another size.
        CorruptStoreError: its bytes are not what was written.
    """
    if not path.is_dir():
        raise StageError(f"{path}: not found; run `samfed {stage}` first")
    _check_seal(path)
    group = zarr.open_group(path, mode="r")
    labels = _read(path, group, "labels") if "labels" in group else None
    ids = _decode_ids(_read(path, group, "image_ids"))
    every: Any = group["images"]
    found: int = every.shape[1]
    if found != size:
        raise IdentityError(
            f"{path}: image_size is {found}, the run asks for {size}; run `samfed {stage}`"
        )
    if ids != tuple(image_ids):
        raise IdentityError(f"{path}: holds other images than the partition; run `samfed {stage}`")
    return ImageSet(ids, _read(path, group, "images"), labels)


# --------------------------------------------------------------------------- labels


class LabelStore:
    """A client's teacher labels on disk; see ``open_label_store`` and ``pipeline.precompute``.

    One coordinator creates the store and sets done marks; any worker may write the shard that it
    was given, whole, for every array (partial writes to a shard from two writers lose data:
    zarr-python #3682).
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise StageError(f"{path}: not found; run `samfed precompute-sam` first")
        self.path = path
        attributes = _check_seal(path)
        if attributes.get("kind") != "labels":
            raise CorruptStoreError(f"{path}: not a label store; remove it and rerun")
        self.identity = Identity.model_validate(attributes["identity"])
        with _writing():
            self._group = zarr.open_group(path, mode="r+")
            self._arrays: dict[str, Any] = dict(self._group.arrays())
        ids = _decode_ids(_read(path, self._group, "image_ids"))
        digests = _read(path, self._group, "image_sha256")
        self.rows = tuple(
            RowKey(image_id, digest.tobytes().hex())
            for image_id, digest in zip(ids, digests, strict=True)
        )

    @classmethod
    def create(cls, path: Path, identity: Identity, rows: Sequence[RowKey]) -> LabelStore:
        """A new store with no row done; it appears at ``path`` complete or not at all."""
        with folder_beside(path) as building, _writing():
            _create_arrays(building, identity, rows)
        return cls(path)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def shards(self) -> int:
        """Number of shards, the last one perhaps partly filled."""
        return -(-len(self) // SHARD_ROWS)

    def shard_rows(self, shard: int) -> range:
        """The rows that shard number ``shard`` holds."""
        return range(shard * SHARD_ROWS, min((shard + 1) * SHARD_ROWS, len(self)))

    def done(self) -> NDArray[np.bool_]:
        """Which rows are complete, (N,) bool, as on disk now."""
        marks: NDArray[np.bool_] = _read(self.path, self._group, "done")[: len(self)] == 1
        return marks

    def pending(self) -> list[int]:
        """Shards with a row that is not done."""
        done = self.done()
        return [
            shard
            for shard in range(self.shards)
            if not done[self.shard_rows(shard).start : self.shard_rows(shard).stop].all()
        ]

    def write_shard(self, shard: int, rows: Sequence[int], labels: Labels) -> None:
        """Write the labels of some ``rows`` of one shard; its other rows keep what they have."""
        span = self.shard_rows(shard)
        values = {
            "masks": labels.masks,
            "confidences": labels.confidences,
            "scores": labels.scores,
        }
        inside = np.asarray(rows) - span.start
        begun = bool(self.done()[span.start : span.stop].any())
        for name, new in values.items():
            array = self._arrays[name]
            if len(rows) == len(span):
                array[span.start : span.stop] = new
                continue
            if begun:
                whole = _read(self.path, self._group, name, slice(span.start, span.stop)).copy()
            else:  # what a killed run may have left is not kept: same bytes either way
                whole = np.zeros((len(span), *array.shape[1:]), array.dtype)
            whole[inside] = new
            array[span.start : span.stop] = whole

    def mark_done(self, shard: int, rows: Sequence[int], provenance: dict[str, str]) -> None:
        """Record where rows of a shard came from and then, last of all, that they are complete."""
        encoded = _canonical(provenance)
        if len(encoded) > _PROVENANCE_BYTES:
            raise ValueError(f"provenance takes {len(encoded)} bytes, at most {_PROVENANCE_BYTES}")
        record = np.zeros(_PROVENANCE_BYTES, np.uint8)
        record[: len(encoded)] = np.frombuffer(encoded, np.uint8)
        self._arrays["provenance"][shard] = record
        span = self.shard_rows(shard)
        marks = np.asarray(self._arrays["done"][span.start : span.stop])
        marks[np.asarray(rows) - span.start] = 1
        self._arrays["done"][span.start : span.stop] = marks

    def provenance(self) -> list[dict[str, str]]:
        """For each shard, backend, precision and versions that computed it; {} where not done."""
        records = _read(self.path, self._group, "provenance")[: self.shards]
        texts = [bytes(record).rstrip(b"\0") for record in records]
        return [json.loads(text) if text else {} for text in texts]

    def read(self, rows: slice = slice(None)) -> Labels:
        """Labels of ``rows``, all of which must be done.

        Raises:
            StageError: a row is not done. CorruptStoreError: a done row is missing or damaged.
        """
        done = self.done()[rows]
        if not done.all():
            raise StageError(
                f"{self.path}: {int(done.sum())} of {len(done)} rows are labelled; "
                "run `samfed precompute-sam` to finish it"
            )
        return Labels(
            masks=_read(self.path, self._group, "masks", rows),
            confidences=_read(self.path, self._group, "confidences", rows),
            scores=_read(self.path, self._group, "scores", rows),
        )


def confidence_to_probability(confidences: Bytes) -> NDArray[np.float32]:
    """Stored confidences as probabilities, float32 in [1/512, 511/512]: never quite certain."""
    return np.clip(confidences.astype(np.float32) / 255, *_CONFIDENCE_CLIP)


def read_labels(path: Path, *, rows: Sequence[RowKey], identity: Identity) -> Labels:
    """A finished store's labels, by this very teacher and for exactly these images in this order.

    Raises:
        StageError: missing or unfinished. IdentityError: by another teacher, or for other images.
    """
    store = LabelStore(path)
    check_identity(store, identity)
    if store.rows != tuple(rows):
        raise IdentityError(
            f"{path}: made for other images than the client now has; run `samfed precompute-sam`"
        )
    return store.read()


def open_label_store(
    path: Path, identity: Identity, rows: Sequence[RowKey], *, aside: Path
) -> tuple[LabelStore, str | None]:
    """The store to write to: the one at ``path``, one taken back from ``aside``, or a new one.

    A store with another identity is moved to ``aside/<its digest>.zarr`` and taken back from there
    when its identity is asked for again. Rows whose image file is unchanged are kept when images
    come or go.

    Returns:
        the store, and one sentence for the user when something was moved or carried over.
    """
    notice: str | None = None
    if path.exists():
        found = LabelStore(path).identity
        if found != identity:
            field, old, new = _first_difference(found, identity)
            retired = aside / f"{found.digest}.zarr"
            _replace(path, retired)
            notice = f"{path}: {field} was {old}, now {new}; moved the old labels to {retired}"
    kept = aside / f"{identity.digest}.zarr"
    if not path.exists() and kept.exists():
        _replace(kept, path)
        notice = f"{notice + '; ' if notice else ''}took back labels made earlier from {kept}"
    if not path.exists():
        return LabelStore.create(path, identity, rows), notice
    store = LabelStore(path)
    if store.rows == tuple(rows):
        return store, notice
    carried, count = _carry_over(store, rows)
    change = f"{path}: the images changed; kept the labels of {count} of {len(rows)}"
    return carried, f"{notice}; {change}" if notice else change


def check_identity(store: LabelStore, identity: Identity) -> None:
    """Refuse a store that another teacher made.

    Raises:
        IdentityError: names the first field that differs, both values, and the way out.
    """
    if store.identity != identity:
        field, old, new = _first_difference(store.identity, identity)
        raise IdentityError(
            f"{store.path}: {field} is {old}, the run asks for {new}; run `samfed precompute-sam`"
        )


def _first_difference(old: Identity, new: Identity) -> tuple[str, Any, Any]:
    after = new.model_dump()
    return next(
        (field, value, after[field])
        for field, value in old.model_dump().items()
        if value != after[field]
    )


def _replace(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def _carry_over(old: LabelStore, rows: Sequence[RowKey]) -> tuple[LabelStore, int]:
    """Rebuild ``old`` for other ``rows``; keep what is finished in both, and count it."""
    where = {key: i for i, key in enumerate(old.rows)}
    done = old.done()
    provenance = old.provenance()
    count = 0
    with folder_beside(old.path) as building:
        with _writing():
            _create_arrays(building, old.identity, rows)
        new = LabelStore(building)
        for shard in range(new.shards):
            span = new.shard_rows(shard)
            pairs = [
                (row, where[rows[row]])
                for row in span
                if rows[row] in where and done[where[rows[row]]]
            ]
            if not pairs:
                continue
            parts = [old.read(slice(source, source + 1)) for _, source in pairs]
            labels = Labels(
                *(
                    np.concatenate([getattr(part, name) for part in parts])
                    for name in ("masks", "confidences", "scores")
                )
            )
            targets = [row for row, _ in pairs]
            new.write_shard(shard, targets, labels)
            new.mark_done(shard, targets, provenance[pairs[0][1] // SHARD_ROWS])
            count += len(pairs)
    return LabelStore(old.path), count


def _create_arrays(path: Path, identity: Identity, rows: Sequence[RowKey]) -> None:
    count, size = len(rows), identity.label_size
    shards = -(-count // SHARD_ROWS)
    group = zarr.create_group(store=path)
    _sharded(group, "masks", (count, size, size))
    _sharded(group, "confidences", (count, size, size))
    _array(group, "scores", (count,), (SHARD_ROWS,), "float32")
    # zarr writes a scalar fill only where told to: every mark exists on disk from the start
    done = _array(group, "done", (count,), (_MARK_SHARDS * SHARD_ROWS,), "uint8")
    done[:] = np.zeros(count, np.uint8)
    provenance = _array(
        group, "provenance", (shards, _PROVENANCE_BYTES), (_MARK_SHARDS, _PROVENANCE_BYTES), "uint8"
    )
    provenance[:] = np.zeros((shards, _PROVENANCE_BYTES), np.uint8)
    group.create_array(
        "image_ids", data=_encode_ids([row.image_id for row in rows]), compressors=_codecs()
    )
    digests = np.frombuffer(bytes.fromhex("".join(row.sha256 for row in rows)), np.uint8)
    group.create_array("image_sha256", data=digests.reshape(count, 32), compressors=_codecs())
    _seal(path, {"kind": "labels", "format": FORMAT, "identity": identity.model_dump()})


# --------------------------------------------------------------------------- zarr


def _writing() -> Any:
    """Context in which arrays are opened so that all-zero chunks are written too."""
    return zarr.config.set({"array.write_empty_chunks": True})


def _codecs() -> list[Any]:
    return [BloscCodec(cname="zstd", clevel=5, shuffle="bitshuffle"), Crc32cCodec()]


def _sharded(group: Any, name: str, shape: tuple[int, ...]) -> Any:
    return group.create_array(
        name,
        shape=shape,
        dtype="uint8",
        chunks=(CHUNK_ROWS, *shape[1:]),
        shards=(SHARD_ROWS, *shape[1:]),
        compressors=_codecs(),
        fill_value=0,
    )


def _array(
    group: Any, name: str, shape: tuple[int, ...], chunks: tuple[int, ...], dtype: str
) -> Any:
    return group.create_array(
        name, shape=shape, dtype=dtype, chunks=chunks, compressors=_codecs(), fill_value=0
    )


def _read(path: Path, group: Any, name: str, rows: slice = slice(None)) -> Any:
    """Values of one array, each chunk checked against its crc32c and for being there at all."""
    array = group[name]
    start, stop, _ = rows.indices(array.shape[0])
    step = (array.shards or array.chunks)[0]
    for part in range(start // step, -(-stop // step)):
        key = "/".join([str(part)] + ["0"] * (array.ndim - 1))
        file = path / name / "c" / key
        if not file.is_file() or file.stat().st_size == 0:  # zarr reads an empty shard as zeros
            raise CorruptStoreError(
                f"{path}: {name} rows {part * step}..{min((part + 1) * step, stop) - 1} are "
                "missing; remove the store and run the stage that writes it again"
            )
    try:
        return np.asarray(array[start:stop])
    except Exception as error:  # zarr and its codecs raise many kinds for damaged bytes
        raise CorruptStoreError(
            f"{path}: {name} rows {start}..{stop - 1} are damaged ({type(error).__name__}: {error})"
        ) from error


def _encode_ids(image_ids: Sequence[str]) -> Bytes:
    """Ids as UTF-8 rows padded with zeros: zarr's own string types are not yet stable."""
    encoded = [image_id.encode() for image_id in image_ids]
    table = np.zeros((len(encoded), max(map(len, encoded))), np.uint8)
    for row, text in zip(table, encoded, strict=True):
        row[: len(text)] = np.frombuffer(text, np.uint8)
    return table


def _decode_ids(table: Bytes) -> tuple[str, ...]:
    return tuple(bytes(row).rstrip(b"\0").decode() for row in table)


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _metadata_digest(path: Path, document: dict[str, Any]) -> str:
    """sha256 over the root's metadata (digest aside) and every array's ``zarr.json``."""
    attributes = {k: v for k, v in document["attributes"].items() if k != "metadata_sha256"}
    digest = hashlib.sha256(_canonical({**document, "attributes": attributes}))
    for metadata in sorted(path.glob("*/zarr.json")):
        digest.update(metadata.parent.name.encode() + b"\0" + metadata.read_bytes())
    return digest.hexdigest()


def _seal(path: Path, attributes: dict[str, Any]) -> None:
    """Write the root's attributes and a digest over all metadata: crc32c covers chunks only."""
    document = json.loads((path / "zarr.json").read_text())
    document["attributes"] = attributes
    attributes["metadata_sha256"] = _metadata_digest(path, document)
    write_bytes(path / "zarr.json", _canonical(document))


def _check_seal(path: Path) -> dict[str, Any]:
    """The root's attributes, once the digest over all metadata agrees.

    Raises:
        CorruptStoreError: a metadata file is damaged, or the format is another version's.
    """
    try:
        content = (path / "zarr.json").read_bytes()
        document = json.loads(content)
        attributes: dict[str, Any] = document["attributes"]
        whole = content == _canonical(document)
        intact = whole and attributes["metadata_sha256"] == _metadata_digest(path, document)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptStoreError(
            f"{path}: metadata is unreadable ({type(error).__name__}); remove the store and run "
            "the stage that writes it again"
        ) from error
    if not intact:
        raise CorruptStoreError(
            f"{path}: metadata is damaged (digest differs); remove the store and run the stage "
            "that writes it again"
        )
    if attributes.get("format") != FORMAT:
        raise CorruptStoreError(
            f"{path}: format {attributes.get('format')}, this samfed reads format {FORMAT}"
        )
    return attributes
