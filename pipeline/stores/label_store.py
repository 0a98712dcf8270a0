"""The teacher's labels of a client's images: what stage one writes and stage two reads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from pipeline.disk import flush, folder_beside, move, naming, recover_folder, unused_name
from pipeline.errors import CorruptStoreError, IdentityError, StageError
from pipeline.stores.arrays import (
    CHUNK_ROWS,
    FORMAT,
    MARK_SHARDS,
    PROVENANCE_BYTES,
    Bytes,
    Record,
    canonical_json,
    check_seal,
    chunk_file,
    decode_ids,
    decode_provenance,
    encode_ids,
    encode_provenance,
    open_arrays,
    plain_array,
    read_rows,
    remove_partial_files,
    seal,
    sharded_array,
    table_array,
)

#: Version of how labels come from an image and a teacher. Raised whenever resizing, cropping,
#: rounding or loading changes them, so that older labels are made anew. A golden-label test guards
#: it.
LABEL_VERSION = 1

_CONFIDENCE_CLIP = (1 / 512, 511 / 512)


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
    method_version: int = LABEL_VERSION
    precision: str | None = None  # only where it moves masks (timm: teachers): fp32, bf16 or fp16

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the sha256 of the fields."""
        return hashlib.sha256(canonical_json(self.model_dump())).hexdigest()[:16]


@dataclass(frozen=True)
class RowKey:
    """The image behind one row, and the sha256 of the file it was read from."""

    image_id: str
    sha256: str


@dataclass(frozen=True)
class PseudoLabels:
    """Teacher labels of n images.

    masks (n, S, S) uint8 class indices; confidences (n, S, S) uint8, the probability of that class
    in 0..255; predicted_iou (n,) float32, the teacher's own estimate of the IoU.
    """

    masks: Bytes
    confidences: Bytes
    predicted_iou: NDArray[np.float32]


class LabelStore:
    """A client's teacher labels on disk; ``open_label_store`` makes or finds it.

    One coordinator creates the store and sets done marks; any worker may write the shard that it
    was given, whole, for every array (partial writes to a shard from two writers lose data:
    zarr-python #3682).
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise StageError(f"{path}: not found; run `samfed precompute-sam` first")
        self.path = path
        attributes = check_seal(path)
        if attributes.get("kind") != "labels":
            raise CorruptStoreError(f"{path}: not a label store; remove it and rerun")
        self.identity = Identity.model_validate(attributes["identity"])
        self._attributes = attributes
        self._arrays = open_arrays(zarr.open_group(path, mode="r+"))

    @classmethod
    def create(cls, path: Path, identity: Identity, rows: Sequence[RowKey]) -> LabelStore:
        """A new store with no row done; it appears at ``path`` complete or not at all."""
        with folder_beside(path) as building:
            create_arrays(building, identity, rows)
        return cls(path)

    def __len__(self) -> int:
        count: int = self._arrays["done"].shape[0]
        return count

    @cached_property
    def rows(self) -> tuple[RowKey, ...]:
        """The image behind each row; read when first asked for, which no writer of a shard does."""
        ids = decode_ids(self._values("image_ids"))
        digests = self._values("image_sha256")
        return tuple(
            RowKey(image_id, digest.tobytes().hex())
            for image_id, digest in zip(ids, digests, strict=True)
        )

    @property
    def chunks(self) -> int:
        """Number of shards, the last one perhaps partly filled."""
        return -(-len(self) // CHUNK_ROWS)

    def chunk_rows(self, shard: int) -> range:
        """The rows that shard number ``shard`` holds."""
        return range(shard * CHUNK_ROWS, min((shard + 1) * CHUNK_ROWS, len(self)))

    def done(self, rows: slice = slice(None)) -> NDArray[np.bool_]:
        """Which of ``rows`` are complete, bool, as on disk now."""
        marks: NDArray[np.bool_] = self._values("done", rows) == 1
        return marks

    def pending(self) -> list[int]:
        """Shards with a row that is not done."""
        done = self.done()
        return [
            shard
            for shard in range(self.chunks)
            if not done[self.chunk_rows(shard).start : self.chunk_rows(shard).stop].all()
        ]

    def write_chunk(self, shard: int, rows: Sequence[int], labels: PseudoLabels) -> None:
        """Write the labels of some ``rows`` of one shard; its other rows keep what they have.

        On return they are on the disk: done marks that outlive a power cut never promise more.
        """
        span = self.chunk_rows(shard)
        values = {
            "masks": labels.masks,
            "confidences": labels.confidences,
            "predicted_iou": labels.predicted_iou,
        }
        inside = np.asarray(rows) - span.start
        begun = bool(self.done(slice(span.start, span.stop)).any())
        for name, new in values.items():
            array = self._arrays[name]
            if begun:
                whole = self._values(name, slice(span.start, span.stop))
            else:  # what a killed run may have left is not kept: same bytes either way
                if len(span) < CHUNK_ROWS:  # zarr would merge with it, damaged or not
                    chunk_file(self.path, array, shard).unlink(missing_ok=True)
                whole = np.zeros((len(span), *array.shape[1:]), array.dtype)
            whole[inside] = new
            self._write(name, slice(span.start, span.stop), whole, part=shard)

    def check_rows(self, rows: Sequence[int], sha256: Sequence[str]) -> None:
        """Refuse rows that are not of the images with these digests.

        Raises:
            IdentityError: the store was rebuilt for other images.
        """
        span = slice(min(rows), max(rows) + 1)
        digests = self._values("image_sha256", span)
        for row, expected in zip(rows, sha256, strict=True):
            if digests[row - span.start].tobytes().hex() != expected:
                raise IdentityError(
                    f"{self.path}: row {row} is of another image by now; "
                    "run `samfed precompute-sam`"
                )

    def mark_done(self, shard: int, rows: Sequence[int], provenance: Sequence[Record]) -> None:
        """Record what computed rows of a shard and then, last of all, that they are complete.

        The records of its other complete rows are kept, before these. Statistics of the store as
        it was are dropped first.
        """
        if self.statistics is not None:
            self.set_statistics(None)
        span = self.chunk_rows(shard)
        inside = np.asarray(rows) - span.start
        marks = self.done(slice(span.start, span.stop)).astype(np.uint8)
        # read in any case: zarr merges with what is there, damaged or not
        before = self._values("provenance", slice(shard, shard + 1))[0]
        kept = decode_provenance(before) if np.delete(marks, inside).any() else []
        record = encode_provenance([*kept, *provenance])
        marks[inside] = 1
        part = shard // MARK_SHARDS
        self._write("provenance", slice(shard, shard + 1), record[None], part=part)
        self._write("done", slice(span.start, span.stop), marks, part=part)

    def _write(self, name: str, rows: slice, values: NDArray[Any], *, part: int) -> None:
        """Write rows of one shard or chunk, and return when they are on the disk."""
        file = chunk_file(self.path, self._arrays[name], part)
        with naming(file):
            self._arrays[name][rows] = values
            flush(file)

    def provenance(self) -> list[list[Record]]:
        """For each shard, the records of all that computed one of its rows; [] where none is done.

        One is the rule; more where rows had to wait for another run, or came from other shards.
        """
        return [decode_provenance(row) for row in self._values("provenance")[: self.chunks]]

    @property
    def statistics(self) -> dict[str, Any] | None:
        """What ``set_statistics`` kept with the labels as they are now; None if nothing."""
        return self._attributes.get("statistics")

    def set_statistics(self, statistics: dict[str, Any] | None) -> None:
        """Keep a JSON-ready summary of the finished labels among the attributes; None drops it."""
        attributes = {k: v for k, v in self._attributes.items() if k != "statistics"}
        if statistics is not None:
            attributes["statistics"] = statistics
        seal(self.path, attributes)
        self._attributes = attributes

    def read(self, rows: slice = slice(None)) -> PseudoLabels:
        """Labels of ``rows``, all of which must be done.

        Raises:
            StageError: a row is not done. CorruptStoreError: a done row is missing or damaged.
        """
        done = self.done(rows)
        if not done.all():
            raise StageError(
                f"{self.path}: {int(done.sum())} of {len(done)} rows are labelled; "
                "run `samfed precompute-sam` to finish it"
            )
        return self._read(rows)

    def read_chunk(self, shard: int) -> PseudoLabels:
        """What a shard with a done row holds; its rows that are not done mean nothing.

        Raises:
            CorruptStoreError: it is missing or damaged.
        """
        span = self.chunk_rows(shard)
        return self._read(slice(span.start, span.stop))

    def _values(self, name: str, rows: slice = slice(None)) -> Any:
        return read_rows(self.path, self._arrays[name], rows=rows)

    def _read(self, rows: slice) -> PseudoLabels:
        return PseudoLabels(
            masks=self._values("masks", rows),
            confidences=self._values("confidences", rows),
            predicted_iou=self._values("predicted_iou", rows),
        )


def confidence_to_probability(confidences: Bytes) -> NDArray[np.float32]:
    """Stored confidences as probabilities, float32 in [1/512, 511/512]: never quite certain."""
    return np.clip(confidences.astype(np.float32) / 255, *_CONFIDENCE_CLIP)


def read_labels(path: Path, *, rows: Sequence[RowKey], identity: Identity) -> PseudoLabels:
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


def check_identity(store: LabelStore, identity: Identity) -> None:
    """Refuse a store that another teacher made.

    Raises:
        IdentityError: names the first field that differs, both values, and the way out.
    """
    if store.identity != identity:
        field, old, new = first_difference(store.identity, identity)
        raise IdentityError(
            f"{store.path}: {field} is {old}, the run asks for {new}; run `samfed precompute-sam`"
        )


def first_difference(old: Identity, new: Identity) -> tuple[str, Any, Any]:
    """The first field that differs, and both values."""
    after = new.model_dump()
    return next(
        (field, value, after[field])
        for field, value in old.model_dump().items()
        if value != after[field]
    )


def create_arrays(path: Path, identity: Identity, rows: Sequence[RowKey]) -> None:
    """An empty label store in the folder ``path``; ``LabelStore.create`` makes it whole at once."""
    count, size = len(rows), identity.label_size
    shards = -(-count // CHUNK_ROWS)
    group = zarr.create_group(store=path)
    sharded_array(group, "masks", (count, size, size))
    sharded_array(group, "confidences", (count, size, size))
    plain_array(group, "predicted_iou", (count,), (CHUNK_ROWS,), "float32")
    # zarr writes a scalar fill only where told to: every mark exists on disk from the start
    done = plain_array(group, "done", (count,), (MARK_SHARDS * CHUNK_ROWS,), "uint8")
    done[:] = np.zeros(count, np.uint8)
    provenance = plain_array(
        group, "provenance", (shards, PROVENANCE_BYTES), (MARK_SHARDS, PROVENANCE_BYTES), "uint8"
    )
    provenance[:] = np.zeros((shards, PROVENANCE_BYTES), np.uint8)
    table_array(group, "image_ids", encode_ids([row.image_id for row in rows]))
    digests = np.frombuffer(bytes.fromhex("".join(row.sha256 for row in rows)), np.uint8)
    table_array(group, "image_sha256", digests.reshape(count, 32))
    seal(path, {"kind": "labels", "format": FORMAT, "identity": identity.model_dump()})


# --------------------------------------------------------------------------- opening


def open_label_store(
    path: Path, identity: Identity, rows: Sequence[RowKey], *, archive: Path
) -> tuple[LabelStore, str | None]:
    """The store to write to: the one at ``path``, one taken back from ``archive``, or a new one.

    A store with another identity is moved to ``archive/<its digest>.zarr`` (``-2``, ``-3`` if there
    is one already: nothing is deleted) and taken back from there when its identity is asked for
    again. Rows whose image file is unchanged are kept when images come or go. What a killed run
    left half done is made good first; the caller holds the lock.

    Returns:
        the store, and one sentence for the user when something was moved or carried over.
    """
    notice: str | None = None
    recover_folder(path)
    if path.exists():
        found = LabelStore(path).identity
        if found != identity:
            field, old, new = first_difference(found, identity)
            retired = unused_name(archive / f"{found.digest}.zarr")
            move(path, retired)
            notice = f"{path}: {field} was {old}, now {new}; moved the old labels to {retired}"
    kept = None if path.exists() else _fullest(archive, identity, rows)
    if kept is not None:
        move(kept, path)
        notice = f"{notice + '; ' if notice else ''}took back labels made earlier from {kept}"
    if not path.exists():
        return LabelStore.create(path, identity, rows), notice
    remove_partial_files(path)
    store = LabelStore(path)
    if store.rows == tuple(rows):
        return store, notice
    carried, count = _carry_over(store, rows)
    change = f"{path}: the images changed; kept the labels of {count} of {len(rows)}"
    return carried, f"{notice}; {change}" if notice else change


def _fullest(archive: Path, identity: Identity, rows: Sequence[RowKey]) -> Path | None:
    """Of the stores with this identity in ``archive``, the one with most of ``rows`` labelled."""

    def labelled(path: Path) -> int:
        try:
            store = LabelStore(path)
            wanted = set(rows)
            return sum(
                key in wanted for key, done in zip(store.rows, store.done(), strict=True) if done
            )
        except CorruptStoreError:
            return -1  # only if there is no other

    stores = [
        *archive.glob(f"{identity.digest}.zarr"),
        *sorted(archive.glob(f"{identity.digest}-*.zarr")),
    ]
    return max(stores, key=labelled, default=None)


def _carry_over(old: LabelStore, rows: Sequence[RowKey]) -> tuple[LabelStore, int]:
    """Rebuild ``old`` for other ``rows``; keep what is finished in both, and count it."""
    where = {key: i for i, key in enumerate(old.rows)}
    done = old.done()
    provenance = old.provenance()
    count = 0
    read_chunk = lru_cache(maxsize=2)(old.read_chunk)  # rows mostly keep their order
    with folder_beside(old.path) as building:
        create_arrays(building, old.identity, rows)
        new = LabelStore(building)
        for shard in range(new.chunks):
            span = new.chunk_rows(shard)
            pairs = [
                (row, where[rows[row]])
                for row in span
                if rows[row] in where and done[where[rows[row]]]
            ]
            if not pairs:
                continue
            targets = [row for row, _ in pairs]
            new.write_chunk(shard, targets, _pick(read_chunk, [source for _, source in pairs]))
            sources = dict.fromkeys(source // CHUNK_ROWS for _, source in pairs)
            records = [record for source in sources for record in provenance[source]]
            new.mark_done(shard, targets, records)
            count += len(pairs)
    return LabelStore(old.path), count


def _pick(read_chunk: Callable[[int], PseudoLabels], rows: Sequence[int]) -> PseudoLabels:
    """The labels of these ``rows``, in this order, reading each run of one shard's rows once."""
    parts = [
        (read_chunk(shard), [row - shard * CHUNK_ROWS for row in run])
        for shard, run in groupby(rows, lambda row: row // CHUNK_ROWS)
    ]
    return PseudoLabels(
        masks=np.concatenate([part.masks[inside] for part, inside in parts]),
        confidences=np.concatenate([part.confidences[inside] for part, inside in parts]),
        predicted_iou=np.concatenate([part.predicted_iou[inside] for part, inside in parts]),
    )
