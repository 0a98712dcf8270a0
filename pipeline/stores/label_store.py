"""The teacher's labels of a client's images: what stage one writes and stage two reads."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from pipeline.config import Frame
from pipeline.disk import file_sha256
from pipeline.errors import IdentityError, StageError, StoreError
from pipeline.folders import folder_beside
from pipeline.stores.arrays import (
    FORMAT,
    METADATA_FILE,
    STORE_FILE,
    canonical_json,
    chunk_name,
    create_array,
    open_array,
    read_rows,
    read_sealed,
    read_store_file,
    rows_per_chunk,
    store_metadata,
    write_sealed,
)
from pipeline.stores.pseudo_labels import (
    LABEL_ARRAYS,
    PROBABILITIES,
    VIEW_AGREEMENT,
    PseudoLabels,
    row_arrays,
)

#: Version of how labels come from an image and a teacher. Raised whenever resizing, cropping,
#: rounding or loading changes them, so that older labels are made anew. A golden-label test guards
#: it.
LABEL_VERSION = 2

Provenance = dict[str, str]  # what computed labels: backend, precision, device, versions


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
    precision: str | None = None  # only where it moves masks: timm: teachers, and int8
    # left out of files where it is pad, as in stores that are older than the choice
    frame: Annotated[Frame, Field(exclude_if=lambda frame: frame == "pad")] = "pad"
    # flips and turns whose mean the labels are; left out where it is 1, for the same reason
    views: Annotated[int, Field(exclude_if=lambda views: views == 1)] = 1

    @property
    def digest(self) -> str:
        """First 16 hexadecimal digits of the sha256 of the fields."""
        return hashlib.sha256(canonical_json(self.model_dump())).hexdigest()[:16]


def differences(found: Identity, wanted: Identity) -> list[tuple[str, object, object]]:
    """List the fields in which two identities differ, with both values."""
    pairs = [(name, getattr(found, name), getattr(wanted, name)) for name in Identity.model_fields]
    return [pair for pair in pairs if pair[1] != pair[2]]


class RowKey(NamedTuple):
    """The image behind one row, and the sha256 of the file it was read from."""

    image_id: str
    sha256: str


class RowQuality(NamedTuple):
    """What one image's labels say of the teacher without any truth."""

    confidence: float  # mean probability over all pixels
    foreground_confidence: float | None  # over those labelled foreground; None if there are none
    area: float  # the foreground's share of the pixels
    predicted_iou: float
    # with the mirrored image's labels, mirrored back; of a sample alone where there is one view
    flip_dice: float | None


@dataclass(frozen=True)
class ChunkState:
    """What ``chunks/<number>.jsonl`` says of one chunk."""

    rows: list[RowKey]
    done: list[bool]  # of each row
    provenance: list[Provenance]  # of all that computed one of the rows done
    files: dict[str, str]  # sha256 of the chunk's files, once every row is done
    quality: list[RowQuality | None]  # of each row; None where it is not done, or unknown


def chunk_file(chunk: int) -> str:
    """Return the name of the JSON file beside a chunk, relative to the store."""
    return f"chunks/{chunk}.jsonl"


class LabelStore:
    """A client's teacher labels on disk; ``opening`` makes or finds it.

    One coordinator creates the store and marks rows done; any worker may write the chunk that it
    was given, whole, for every array (partial writes to a chunk from two writers lose data:
    zarr-python #3682).
    """

    def __init__(self, path: Path) -> None:
        if not path.is_dir():
            raise StageError(f"{path}: not found; run `samfed precompute-sam` first")
        self.path = path
        content = read_store_file(path, "labels")
        self.identity = Identity.model_validate(content["identity"])
        every = (*LABEL_ARRAYS, VIEW_AGREEMENT, PROBABILITIES)  # stores of before have three
        names = [name for name in every if f"{name}/{METADATA_FILE}" in content["metadata"]]
        self.arrays = {name: open_array(path, name, content) for name in names}

    @classmethod
    def create(
        cls,
        path: Path,
        identity: Identity,
        rows: Sequence[RowKey],
        *,
        probabilities: bool = False,
    ) -> LabelStore:
        """Create a store with no row done; it appears at ``path`` complete or not at all."""
        with folder_beside(path) as building:
            write_empty(building, identity, rows, probabilities=probabilities)
        return cls(path)

    def __len__(self) -> int:
        count: int = self.arrays["masks"].shape[0]
        return count

    @cached_property
    def rows(self) -> tuple[RowKey, ...]:
        """The image behind each row; read when first asked for, which no writer of a chunk does."""
        return tuple(chain.from_iterable(state.rows for state in self.states()))

    @property
    def rows_per_chunk(self) -> int:
        """Number of rows of every chunk but the last: 64, or fewer if they are very long."""
        count: int = self.arrays["masks"].chunks[0]
        return count

    @property
    def chunks(self) -> int:
        """Number of chunks, the last one perhaps partly filled."""
        return -(-len(self) // self.rows_per_chunk)

    def chunk_rows(self, chunk: int) -> range:
        """Return the rows that a chunk holds."""
        start = chunk * self.rows_per_chunk
        return range(start, min(start + self.rows_per_chunk, len(self)))

    def chunk_files(self, chunk: int) -> dict[str, str]:
        """Return the file of a chunk in each array, relative to the store."""
        return {name: chunk_name(array, chunk) for name, array in self.arrays.items()}

    def state(self, chunk: int) -> ChunkState:
        """Read what is known of a chunk, as on disk now.

        Raises:
            CorruptStoreError: its JSON file is missing or damaged.
        """
        content = read_sealed(self.path, chunk_file(chunk))
        rows = [RowKey(*row) for row in content["rows"]]
        marks = content.get("quality", [None] * len(rows))  # first stores of this format have none
        quality = [None if mark is None else RowQuality(*mark) for mark in marks]
        return ChunkState(**{**content, "rows": rows, "quality": quality})

    def states(self) -> list[ChunkState]:
        """Read what is known of every chunk; errors as ``state``'s."""
        return [self.state(chunk) for chunk in range(self.chunks)]

    def _write_state(self, chunk: int, state: ChunkState) -> None:
        write_sealed(self.path / chunk_file(chunk), vars(state))

    def done(self) -> NDArray[np.bool_]:
        """Return which rows are complete, bool, as on disk now."""
        return np.array([mark for state in self.states() for mark in state.done], np.bool_)

    def pending(self) -> list[int]:
        """List the chunks with a row that is not done."""
        return [chunk for chunk, state in enumerate(self.states()) if not all(state.done)]

    def quality(self) -> list[RowQuality | None]:
        """Return what is known of each row's labels."""
        return [mark for state in self.states() for mark in state.quality]

    def provenance(self) -> list[list[Provenance]]:
        """Return for each chunk all that computed one of its rows; [] where none is done.

        One is the rule; more where rows had to wait for another run, or came from other chunks.
        """
        return [state.provenance for state in self.states()]

    def check_rows(self, rows: Sequence[int], sha256: Sequence[str]) -> None:
        """Refuse rows of one chunk that are not of the images with these digests.

        Raises:
            IdentityError: the store was rebuilt for other images.
        """
        chunk = rows[0] // self.rows_per_chunk
        found, start = self.state(chunk).rows, self.chunk_rows(chunk).start
        for row, expected in zip(rows, sha256, strict=True):
            if found[row - start].sha256 != expected:
                raise IdentityError(
                    f"{self.path}: row {row} is of another image by now; "
                    "run `samfed precompute-sam`"
                )

    def write_chunk(self, chunk: int, rows: Sequence[int], labels: PseudoLabels) -> None:
        """Write the labels of some ``rows`` of one chunk; its other rows keep what they have.

        On return they are on the disk: marks that outlive a power cut never promise more.

        Raises:
            StoreError: one of the rows is done already, as when a worker comes late.
        """
        span, done = self.chunk_rows(chunk), self.state(chunk).done
        inside = [row - span.start for row in rows]
        if any(done[row] for row in inside):
            raise StoreError(f"{self.path}: rows of chunk {chunk} are labelled by now")
        for name, array in self.arrays.items():
            if any(done):
                values = read_rows(self.path, array, span)
            else:  # what a killed run may have left is not kept: same bytes either way
                values = np.zeros((len(span), *array.shape[1:]), array.dtype)
                if len(span) < self.rows_per_chunk:  # zarr would merge with it, damaged or not
                    (self.path / chunk_name(array, chunk)).unlink(missing_ok=True)
            value = getattr(labels, name)
            if value is None:
                raise StoreError(f"{self.path}: has the array {name}, which these labels lack")
            values[inside] = value
            array[span.start : span.stop] = values

    def digests(self, chunk: int) -> dict[str, str]:
        """Return the sha256 of each file of a chunk, by name; empty where there is none."""
        paths = {name: self.path / name for name in self.chunk_files(chunk).values()}
        return {name: file_sha256(p) if p.is_file() else "" for name, p in paths.items()}

    def mark_done(
        self,
        chunk: int,
        rows: Sequence[int],
        provenance: Sequence[Provenance],
        quality: Sequence[RowQuality | None] | None = None,
        *,
        written: Mapping[str, str] | None = None,
    ) -> None:
        """Record, last of all, that ``rows`` of a chunk are complete, and what computed them.

        What computed its other complete rows is kept, before these.

        Args:
            written: what ``digests`` was where the chunk was written, perhaps on another host.

        Raises:
            StoreError: a file is not here, or is not the one that was written there.
        """
        here = self.digests(chunk)
        strange = [name for name, at in here.items() if not at or at != (written or here)[name]]
        if strange:
            name = strange[0]
            found = "other bytes" if here[name] else "no such file"
            raise StoreError(
                f"{self.path / name}: found {found}, expected what a worker wrote; put cache.root "
                "on a file system that every worker sees under the same path"
            )
        before, start = self.state(chunk), self.chunk_rows(chunk).start
        done, marks = list(before.done), list(before.quality)
        for row, mark in zip(rows, quality or [None] * len(rows), strict=True):
            done[row - start], marks[row - start] = True, mark
        every = [*before.provenance, *provenance]
        unique = [record for n, record in enumerate(every) if record not in every[:n]]
        # rows that come later change the files, and a kill may come before the marks: no sha256 yet
        files = here if all(done) else {}
        self._write_state(chunk, ChunkState(before.rows, done, unique, files, marks))

    def forget_chunk(self, chunk: int, rows: Sequence[RowKey]) -> None:
        """Make a chunk of these ``rows`` undone, durably, and then remove what it holds."""
        count = len(rows)
        self._write_state(
            chunk, ChunkState(list(rows), [False] * count, [], {}, quality=[None] * count)
        )
        for name in self.chunk_files(chunk).values():
            (self.path / name).unlink(missing_ok=True)

    def read(self) -> PseudoLabels:
        """Read the labels of all rows, in the three arrays that every store has.

        Raises:
            StageError: a row is not done. CorruptStoreError: a done row is missing or damaged.
        """
        self.check_finished()
        return PseudoLabels(**self.read_arrays(LABEL_ARRAYS, range(len(self))))

    def check_finished(self) -> None:
        """Refuse a store with a row that is not done, as ``read`` does."""
        done = self.done()
        if not done.all():
            raise StageError(
                f"{self.path}: {int(done.sum())} of {len(done)} rows are labelled; "
                "run `samfed precompute-sam` to finish it"
            )

    def read_chunk(self, chunk: int) -> PseudoLabels:
        """Read every array of a chunk with a done row; its rows that are not done mean nothing.

        Raises:
            CorruptStoreError: it is missing or damaged.
        """
        return PseudoLabels(**self.read_arrays(self.arrays, self.chunk_rows(chunk)))

    def read_arrays(self, names: Iterable[str], rows: range) -> dict[str, Any]:
        """Read rows of the arrays ``names``, which the store has; errors as ``read_chunk``'s."""
        return {name: read_rows(self.path, self.arrays[name], rows) for name in names}


def write_empty(
    path: Path, identity: Identity, rows: Sequence[RowKey], *, probabilities: bool = False
) -> LabelStore:
    """Write a label store with no row done into the folder ``path``.

    Args:
        probabilities: whether it is to keep those of every class.
    """
    arrays = row_arrays(
        identity.label_size,
        identity.num_classes,
        views=identity.views,
        probabilities=probabilities,
    )
    per_chunk = rows_per_chunk(max(math.prod(shape) for shape, _ in arrays.values()))
    for name, (shape, dtype) in arrays.items():
        create_array(path, name, (len(rows), *shape), rows=per_chunk, dtype=dtype)
    content = {"kind": "labels", "format": FORMAT, "identity": identity.model_dump()}
    write_sealed(path / STORE_FILE, {**content, "metadata": store_metadata(path)})
    empty = LabelStore(path)
    for chunk in range(empty.chunks):
        span = empty.chunk_rows(chunk)
        empty.forget_chunk(chunk, rows[span.start : span.stop])
    return empty


def read_labels(path: Path, *, rows: Sequence[RowKey], identity: Identity) -> PseudoLabels:
    """Read a finished store: labels by this very teacher, of exactly these images in this order.

    Raises:
        StageError: missing or unfinished. IdentityError: by another teacher, or for other images.
    """
    store = LabelStore(path)
    check_identity(path, store.identity, identity)
    if store.rows != tuple(rows):
        raise IdentityError(
            f"{path}: made for other images than the client now has; run `samfed precompute-sam`"
        )
    return store.read()


def check_identity(path: Path, found: Identity, wanted: Identity) -> None:
    """Refuse the store at ``path``, whose identity is ``found``, if another one is wanted.

    Raises:
        IdentityError: names the first field that differs, both values, and the way out.
    """
    for field, value, asked in differences(found, wanted):
        raise IdentityError(
            f"{path}: {field} is {value}, the run asks for {asked}; run `samfed precompute-sam`"
        )
