"""A client's images, resized once, and the labels of those parts that may have them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from pipeline.disk import file_sha256
from pipeline.errors import IdentityError, StageError
from pipeline.folders import folder_beside
from pipeline.stores.arrays import (
    FORMAT,
    METADATA_FILE,
    PHOTO_CODECS,
    STORE_FILE,
    Bytes,
    chunk_name,
    create_array,
    open_array,
    read_rows,
    read_store_file,
    rows_per_chunk,
    store_metadata,
    write_sealed,
)

_Row = tuple[Bytes, Bytes | None]  # an image and its label


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
    path: Path,
    image_ids: Sequence[str],
    rows: Iterable[_Row],
    *,
    size: int,
    num_classes: int,
) -> None:
    """Write an image store whole: it appears at ``path`` complete or not at all.

    Args:
        rows: (S, S, 3) image and (S, S) label, or None for every label, in the order of the ids.
        num_classes: K, which decides how the labels' files were read.
    """
    count, per_chunk = len(image_ids), rows_per_chunk(size * size * 3)
    with folder_beside(path) as building:
        arrays = [
            create_array(
                building, "images", (count, size, size, 3), rows=per_chunk, codecs=PHOTO_CODECS
            )
        ]
        written = labelled = 0
        for block in _blocks(rows, per_chunk):
            span = slice(written, written + len(block))
            marks = [label for _, label in block if label is not None]
            written, labelled = span.stop, labelled + len(marks)
            if labelled not in (0, written):
                raise ValueError(f"found {labelled} labels for {written} images of {path}")
            arrays[0][span] = np.stack([image for image, _ in block])
            if marks:
                if span.start == 0:
                    shape = (count, size, size)
                    arrays.append(create_array(building, "labels", shape, rows=per_chunk))
                arrays[1][span] = np.stack(marks)
        if written != count:
            raise ValueError(f"found {written} rows for {count} image ids of {path}")
        chunks = range(-(-count // per_chunk))
        names = [chunk_name(array, chunk) for array in arrays for chunk in chunks]
        content = {
            "kind": "images",
            "format": FORMAT,
            "num_classes": num_classes,
            "image_ids": image_ids,
            "metadata": store_metadata(building),
            "files": {name: file_sha256(building / name) for name in names},
        }
        write_sealed(building / STORE_FILE, content)


def _blocks(rows: Iterable[_Row], size: int) -> Iterator[list[_Row]]:
    """Yield up to ``size`` rows at a time, so that each chunk is written once."""
    every = iter(rows)
    while block := list(islice(every, size)):
        yield block


class ImageStore:
    """An image store on disk, opened to read rows of it.

    Raises:
        StageError: it does not exist. CorruptStoreError: its bytes are not what was written.
        FormatError: another samfed's.
    """

    def __init__(self, path: Path, *, stage: str = "prepare") -> None:
        if not path.is_dir():
            raise StageError(f"{path}: not found; run `samfed {stage}` first")
        self.path, self.advice = path, f"run `samfed {stage}`"
        content = read_store_file(path, "images", advice=self.advice)
        self.image_ids: tuple[str, ...] = tuple(content["image_ids"])
        self.num_classes: int = content["num_classes"]
        self._arrays = [open_array(path, "images", content)]
        if f"labels/{METADATA_FILE}" in content["metadata"]:
            self._arrays.append(open_array(path, "labels", content))
        self.image_size: int = self._arrays[0].shape[1]

    def read(self, rows: range) -> ImageSet:
        """Return some rows, each chunk checked."""
        found = [read_rows(self.path, each, rows, advice=self.advice) for each in self._arrays]
        ids = self.image_ids[rows.start : rows.stop]
        return ImageSet(ids, found[0], found[1] if len(found) > 1 else None)


def read_image_store(
    path: Path, *, image_ids: Sequence[str], size: int, num_classes: int, stage: str = "prepare"
) -> ImageSet:
    """Read an image store into memory: these images in this order, at this size.

    Raises:
        IdentityError: it holds other images, another size or K. Else as ``ImageStore``.
    """
    store = ImageStore(path, stage=stage)
    for name, value in {"image_size": size, "num_classes": num_classes}.items():
        found = getattr(store, name)
        if found != value:
            raise IdentityError(
                f"{path}: {name} is {found}, the run asks for {value}; {store.advice}"
            )
    if store.image_ids != tuple(image_ids):
        raise IdentityError(f"{path}: holds other images than the partition; {store.advice}")
    return store.read(range(len(image_ids)))
