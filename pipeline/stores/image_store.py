"""A client's images, resized once, and the labels of those parts that may have them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from pipeline.disk import folder_beside
from pipeline.errors import IdentityError, StageError
from pipeline.stores.arrays import (
    CHUNK_ROWS,
    FORMAT,
    Bytes,
    check_seal,
    decode_ids,
    encode_ids,
    read_rows,
    seal,
    sharded_array,
    table_array,
)


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
    rows: Iterable[tuple[Bytes, Bytes | None]],
    *,
    size: int,
    num_classes: int,
) -> None:
    """Write an image store whole: it appears at ``path`` complete or not at all.

    Args:
        rows: (S, S, 3) image and (S, S) label, or None for every label, in the order of the ids.
        num_classes: K, which decides how the labels' files were read.
    """
    count = len(image_ids)
    with folder_beside(path) as building:
        group = zarr.create_group(store=building)
        images = sharded_array(group, "images", (count, size, size, 3))
        labels: zarr.Array[Any] | None = None
        table_array(group, "image_ids", encode_ids(image_ids))
        written = labelled = 0
        for start, block in _blocks(rows):
            images[start : start + len(block)] = np.stack([image for image, _ in block])
            marks = [label for _, label in block if label is not None]
            written, labelled = written + len(block), labelled + len(marks)
            if labelled not in (0, written):
                raise ValueError(f"found {labelled} labels for {written} images of {path}")
            if marks:
                labels = labels or sharded_array(group, "labels", (count, size, size))
                labels[start : start + len(block)] = np.stack(marks)
        if written != count:
            raise ValueError(f"found {written} rows for {count} image ids of {path}")
        seal(building, {"kind": "images", "format": FORMAT, "num_classes": num_classes})


def _blocks(
    rows: Iterable[tuple[Bytes, Bytes | None]],
) -> Iterable[tuple[int, list[tuple[Bytes, Bytes | None]]]]:
    """Group rows by shard, so that each shard is written once."""
    start, block = 0, []
    for row in rows:
        block.append(row)
        if len(block) == CHUNK_ROWS:
            yield start, block
            start, block = start + len(block), []
    if block:
        yield start, block


def read_image_store(
    path: Path, *, image_ids: Sequence[str], size: int, num_classes: int, stage: str = "prepare"
) -> ImageSet:
    """Read an image store into memory: these images in this order, at this size.

    Raises:
        StageError: it does not exist. IdentityError: it holds other images, another size or K.
        CorruptStoreError: its bytes are not what was written.
    """
    if not path.is_dir():
        raise StageError(f"{path}: not found; run `samfed {stage}` first")
    attributes = check_seal(path)
    group = zarr.open_group(path, mode="r")
    labels = read_rows(path, group["labels"]) if "labels" in group else None
    ids = decode_ids(read_rows(path, group["image_ids"]))
    every: Any = group["images"]
    found: int = every.shape[1]
    if found != size:
        raise IdentityError(
            f"{path}: image_size is {found}, the run asks for {size}; run `samfed {stage}`"
        )
    classes = attributes.get("num_classes")
    if classes != num_classes:
        raise IdentityError(
            f"{path}: num_classes is {classes}, the run asks for {num_classes}; "
            f"run `samfed {stage}`"
        )
    if ids != tuple(image_ids):
        raise IdentityError(f"{path}: holds other images than the partition; run `samfed {stage}`")
    return ImageSet(ids, read_rows(path, every), labels)
