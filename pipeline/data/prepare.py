"""``samfed prepare``: an input folder becomes a partition and image stores by owner and split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.drawing import draw_partition
from pipeline.data.images import (
    ImageRecord,
    decode_image,
    decode_mask,
    load_image,
    read_file,
    resize_image,
    resize_mask,
    scan,
)
from pipeline.data.partition import (
    ImageEntry,
    Partition,
    read_partition_file,
    save_partition,
)
from pipeline.data.public_set import load_labelled
from pipeline.disk import discard, flush, folder_beside, writer_lock
from pipeline.errors import ConfigError, DataError
from pipeline.stores.image_store import write_image_store

Row = tuple[NDArray[np.uint8], NDArray[np.uint8] | None]  # image and label in the client's frame
Progress = Callable[[str, int, int], None]  # what is being done, how much is done, of how much

LABELLED_SPLITS = ("calibration", "val", "test")  # and the server's train


@dataclass(frozen=True)
class PrepareResult:
    """What ``samfed prepare`` gave to whom."""

    partition: Partition

    def as_json(self) -> dict[str, dict[str, int]]:
        """Return the number of images by owner and split."""
        return {
            owner: {split: len(ids) for split, ids in self.partition.splits(owner).items()}
            for owner in self.partition.owners
        }

    def text(self) -> str:
        """Return a line for each owner."""
        return "\n".join(
            f"{owner}: " + ", ".join(f"{count} {split}" for split, count in splits.items())
            for owner, splits in self.as_json().items()
        )


def prepare(
    config: Config, *, with_oracle: bool = False, progress: Progress | None = None
) -> PrepareResult:
    """Partition ``data.root`` and write ``cache/partition.json`` and ``cache/images/``.

    Every image and mask is decoded and checked before anything is written.

    Args:
        with_oracle: also write the clients' training labels to ``cache/oracle/``, which only the
            ``oracle`` ceiling reads.

    Raises:
        DataError: an image or mask is unusable. ConfigError: the partition cannot be drawn.
    """
    root, cache = config.data.root.resolve(), config.cache.root.resolve()
    if cache == root or (root / "images") in (cache, *cache.parents):
        raise ConfigError(
            f"cache.root: {config.cache.root} lies in data.root {config.data.root}, which is only "
            "ever read; choose another folder"
        )
    advance = progress or (lambda *_: None)
    partition = _plan(config, advance)
    with writer_lock(config.cache.root / "locks" / "prepare.lock"):
        _write(config, partition, with_oracle, advance)
    return PrepareResult(partition)


def _plan(config: Config, advance: Progress) -> Partition:
    """Check every file, and draw the partition or read it back in; writes nothing."""
    records = scan(config.data.root)
    entries, foreground = {}, {}
    for i, (image_id, record) in enumerate(records.items(), start=1):
        entries[image_id], fraction = _check(config, record)
        if fraction is not None:
            foreground[image_id] = fraction
        advance("checking images", i, len(records))
    if config.partition.file is not None:
        partition = read_partition_file(config.partition.file, records)
        _check_digests(partition, entries)
        return partition
    server, clients = draw_partition(
        records, config.partition, seed=config.seed, foreground=foreground
    )
    used = {i for p in (server, *clients.values()) for ids in p.model_dump().values() for i in ids}
    return Partition(
        scheme=config.partition.scheme,
        seed=config.seed,
        server=server,
        clients=clients,
        images={i: entries[i] for i in sorted(used)},
    )


def _check(config: Config, record: ImageRecord) -> tuple[ImageEntry, float | None]:
    """Decode and digest an image and its mask; returns the fraction of foreground if there is."""
    file = read_file(config.data.root / record.image)
    size_hw = decode_image(file).shape[:2]
    entry = ImageEntry(
        image=record.image, image_sha256=file.sha256, site=record.site, group=record.group
    )
    if record.mask is None:
        return entry, None
    file = read_file(config.data.root / record.mask)
    mask = decode_mask(file, size_hw=size_hw, num_classes=config.data.num_classes)
    labelled = entry.model_copy(update={"mask": record.mask, "mask_sha256": file.sha256})
    return labelled, float((mask > 0).mean())


def _check_digests(partition: Partition, entries: dict[str, ImageEntry]) -> None:
    """Refuse other files than those that a published partition was made of."""
    for image_id, expected in partition.images.items():
        for key in ("image_sha256", "mask_sha256"):
            digest = getattr(expected, key)
            if digest is not None and getattr(entries[image_id], key) != digest:
                raise DataError(
                    f"partition.file: {key.removesuffix('_sha256')} of '{image_id}' has another "
                    "sha256 than the partition says; use the files that it was made of"
                )


def _write(config: Config, partition: Partition, with_oracle: bool, advance: Progress) -> None:
    """Write the stores, and the partition last."""
    cache = config.cache.root
    parts = [
        (o, split, ids) for o in partition.owners for split, ids in partition.splits(o).items()
    ]
    done, total = 0, sum(len(ids) for _, _, ids in parts)
    with ExitStack() as stack:  # everything is written before anything takes its place
        images = stack.enter_context(folder_beside(cache / "images"))
        for owner, split, ids in parts:
            labelled = owner == "server" or split in LABELLED_SPLITS
            path = images / owner / f"{split}.zarr"
            _write_store(path, config, partition, ids, labelled=labelled)
            done += len(ids)
            advance("writing image stores", done, total)
        if with_oracle:
            oracle = stack.enter_context(folder_beside(cache / "oracle"))
            for client, part in partition.clients.items():
                path = oracle / f"{client}.zarr"
                _write_store(path, config, partition, part.train, labelled=True)
        # a run that is killed from here on leaves no partition, never one of other stores
        (cache / "partition.json").unlink(missing_ok=True)
        flush(cache)
        if not with_oracle and (cache / "oracle").exists():
            discard(cache / "oracle")  # of an earlier partition
    save_partition(cache / "partition.json", partition)


def _write_store(
    path: Path, config: Config, partition: Partition, ids: Sequence[str], *, labelled: bool
) -> None:
    """Write the store of these images, if there are any."""
    if ids:
        rows = _rows(config, partition, ids, labelled=labelled)
        size, classes = config.data.image_size, config.data.num_classes
        write_image_store(path, ids, rows, size=size, num_classes=classes)


def _rows(
    config: Config, partition: Partition, ids: Sequence[str], *, labelled: bool
) -> Iterator[Row]:
    root, size = config.data.root, config.data.image_size
    if labelled:
        for item in load_labelled(config, partition, ids):
            yield resize_image(item.image, size), resize_mask(item.mask, size)
        return
    for entry in (partition.images[image_id] for image_id in ids):
        yield resize_image(load_image(root, entry.image, sha256=entry.image_sha256), size), None
