"""``samfed prepare``: an input folder becomes a partition and image stores by owner and split."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config import Config
from pipeline.data.images import (
    ImageRecord,
    load_image,
    read_image,
    read_mask,
    resize_image,
    resize_mask,
    scan,
)
from pipeline.data.partition import (
    ImageEntry,
    Partition,
    draw_partition,
    read_partition_file,
    save_partition,
)
from pipeline.disk import file_sha256, folder_beside, writer_lock
from pipeline.errors import ConfigError, DataError
from pipeline.stores.image_store import write_image_store

Bytes = NDArray[np.uint8]
Progress = Callable[[str, int, int], None]  # what is being done, how much is done, of how much

LABELLED_SPLITS = ("calibration", "val", "test")  # and the server's train


def prepare(
    config: Config, *, with_oracle: bool = False, progress: Progress | None = None
) -> Partition:
    """Partition ``data.root`` and write ``cache/partition.json`` and ``cache/images/``.

    Every image and mask is decoded once and checked before anything is written.

    Args:
        with_oracle: also write the clients' training labels to ``cache/oracle/``, which only the
            ``oracle`` ceiling reads.

    Raises:
        DataError: an image or mask is unusable. ConfigError: the partition cannot be drawn.
    """
    root, cache = config.data.root, config.cache.root
    if root.resolve() == cache.resolve() or (root / "images").resolve() in (
        cache.resolve(),
        *cache.resolve().parents,
    ):
        raise ConfigError(
            f"cache.root: {cache} lies in data.root {root}, which is only ever read; "
            "choose another folder"
        )
    partition = _plan(config, progress)
    with writer_lock(cache / "locks" / "prepare.lock"):
        _write(config, partition, with_oracle, progress)
    return partition


def _plan(config: Config, progress: Progress | None) -> Partition:
    """Check every file, and draw the partition or read it back in; writes nothing."""
    root = config.data.root
    records = scan(root)
    entries, foreground = _check_files(root, records, config.data.num_classes, progress)
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


def _write(
    config: Config, partition: Partition, with_oracle: bool, progress: Progress | None
) -> None:
    """Write the stores, and the partition last."""
    cache = config.cache.root
    with ExitStack() as stack:  # everything is written before anything takes its place
        _write_images(
            stack.enter_context(folder_beside(cache / "images")), config, partition, progress
        )
        if with_oracle:
            _write_oracle(stack.enter_context(folder_beside(cache / "oracle")), config, partition)
        # a run that is killed from here on leaves no partition, never one of other stores
        (cache / "partition.json").unlink(missing_ok=True)
        if not with_oracle:
            shutil.rmtree(cache / "oracle", ignore_errors=True)  # of an earlier partition
    save_partition(cache / "partition.json", partition)


def _write_images(
    building: Path, config: Config, partition: Partition, progress: Progress | None
) -> None:
    """One image store for each owner and split that has images."""
    owners = ("server", *partition.clients)
    total = sum(len(ids) for owner in owners for ids in partition.splits(owner).values())
    done = 0
    for owner in owners:
        for split, ids in partition.splits(owner).items():
            labelled = owner == "server" or split in LABELLED_SPLITS
            rows = _rows(config, partition, ids, labelled=labelled)
            if ids:
                path = building / owner / f"{split}.zarr"
                write_image_store(
                    path,
                    ids,
                    rows,
                    size=config.data.image_size,
                    num_classes=config.data.num_classes,
                )
            done += len(ids)
            if progress is not None:
                progress("writing image stores", done, total)


def _check_files(
    root: Path,
    records: dict[str, ImageRecord],
    num_classes: int,
    progress: Progress | None,
) -> tuple[dict[str, ImageEntry], dict[str, float]]:
    """Decode and digest every file; entries by id, and the foreground fraction where labelled."""
    entries: dict[str, ImageEntry] = {}
    foreground: dict[str, float] = {}
    for i, (image_id, record) in enumerate(records.items(), start=1):
        height, width, _ = read_image(root / record.image).shape
        if record.mask is not None:
            mask = read_mask(root / record.mask, size_hw=(height, width), num_classes=num_classes)
            foreground[image_id] = float((mask > 0).mean())
        entries[image_id] = ImageEntry(
            image=record.image,
            image_sha256=file_sha256(root / record.image),
            mask=record.mask,
            mask_sha256=file_sha256(root / record.mask) if record.mask else None,
            site=record.site,
            group=record.group,
        )
        if progress is not None:
            progress("checking images", i, len(records))
    return entries, foreground


def _check_digests(partition: Partition, entries: dict[str, ImageEntry]) -> None:
    """A published partition must find the very files that it was made of."""
    for image_id, expected in partition.images.items():
        found = entries[image_id]
        for kind in ("image", "mask"):
            digest = getattr(expected, f"{kind}_sha256")
            if digest is not None and getattr(found, f"{kind}_sha256") != digest:
                raise DataError(
                    f"partition.file: {kind} of '{image_id}' has another sha256 than the partition "
                    "says; use the files that it was made of"
                )


def _rows(
    config: Config, partition: Partition, ids: Sequence[str], *, labelled: bool
) -> Iterator[tuple[Bytes, Bytes | None]]:
    root, size = config.data.root, config.data.image_size
    for image_id in ids:
        entry = partition.images[image_id]
        image = load_image(root, entry.image, sha256=entry.image_sha256)
        label: Bytes | None = None
        if labelled:
            if entry.mask is None:
                raise DataError(f"image '{image_id}' is in a labelled part but has no mask")
            mask = read_mask(
                root / entry.mask, size_hw=image.shape[:2], num_classes=config.data.num_classes
            )
            label = resize_mask(mask, size)
        yield resize_image(image, size), label


def _write_oracle(building: Path, config: Config, partition: Partition) -> None:
    """Training images with labels, for the ceiling alone."""
    for client, part in partition.clients.items():
        rows = _rows(config, partition, part.train, labelled=True)
        write_image_store(
            building / f"{client}.zarr",
            part.train,
            rows,
            size=config.data.image_size,
            num_classes=config.data.num_classes,
        )
