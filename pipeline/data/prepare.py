"""``samfed prepare``: an input folder becomes a partition and image stores by owner and split."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.drawing import draw_partition
from pipeline.data.duplicates import join_copies, name_leaks
from pipeline.data.folder import InputFolder, scan
from pipeline.data.partition import ImageEntry, Partition, save_partition
from pipeline.data.published import read_published
from pipeline.data.reading import FrameFile, Read, frame_file, read_all
from pipeline.data.survey import Seen, Survey
from pipeline.disk import flush, write_bytes, writer_lock
from pipeline.errors import ConfigError, DataError
from pipeline.folders import discard, folder_beside
from pipeline.progress import Progress
from pipeline.stores.image_store import write_image_store

LABELLED_SPLITS = ("calibration", "val", "test")  # and the server's train


@dataclass(frozen=True)
class PrepareResult:
    """What ``samfed prepare`` gave to whom."""

    partition: Partition
    folder: InputFolder
    survey: Survey

    def as_json(self) -> dict[str, dict[str, Any]]:
        """Return what ``data.root`` holds, and the number of images by owner and split."""
        return {"data.root": self.folder.as_json() | self.survey.as_json()} | self._splits()

    def text(self) -> str:
        """Return what ``data.root`` and its masks hold, and a line for each owner."""
        lines = [
            f"{owner}: " + ", ".join(f"{count} {split}" for split, count in splits.items())
            for owner, splits in self._splits().items()
        ]
        return "\n".join([self.folder.text(), self.survey.text(), *lines])

    def _splits(self) -> dict[str, dict[str, int]]:
        return {
            owner: {split: len(ids) for split, ids in self.partition.splits(owner).items()}
            for owner in self.partition.owners
        }


def prepare(
    config: Config,
    *,
    with_oracle: bool = False,
    allow_duplicates: bool = False,
    progress: Progress | None = None,
) -> PrepareResult:
    """Partition ``data.root`` and write ``cache/partition.json`` and ``cache/images/``.

    Every image and mask is read once, and checked, before a store is written.

    Args:
        with_oracle: also write the clients' training labels to ``cache/oracle/``, which only the
            ``oracle`` ceiling reads.
        allow_duplicates: keep groups apart that share an image's bytes.

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
    folder = scan(config.data.root, mask_pattern=config.data.mask_pattern)
    with frame_file(config.cache.root, size=config.data.image_size) as frames:
        partition, survey = _plan(config, folder, frames, allow_duplicates, advance)
        name_leaks(partition)
        if with_oracle:
            _check_oracle(partition)
        survey.warn([i for ids in partition.splits("server").values() for i in ids])
        with writer_lock(config.cache.root / "locks" / "prepare.lock"):
            _write(config, partition, frames, with_oracle, advance)
    return PrepareResult(partition, folder, survey)


def _check_oracle(partition: Partition) -> None:
    ids = [image_id for part in partition.clients.values() for image_id in part.train]
    bare = [image_id for image_id in ids if partition.images[image_id].mask is None]
    if bare:
        raise DataError(
            f"--with-oracle: {len(bare)} of {len(ids)} training images of the clients have no "
            f"masks, e.g. '{bare[0]}'; add them, or prepare without it"
        )


def _plan(
    config: Config,
    folder: InputFolder,
    frames: FrameFile,
    allow_duplicates: bool,
    advance: Progress,
) -> tuple[Partition, Survey]:
    """Read every file, and draw the partition or read it back in; only ``frames`` are written."""
    entries, seen = dict[str, ImageEntry](), dict[str, Seen]()
    for i, (image_id, read) in enumerate(read_all(config.data, folder.images), start=1):
        entries[image_id] = _with_size(read, folder.spacing.get(image_id))
        seen[image_id] = read.seen
        frames.add(image_id, read.frame)
        advance("checking images", i, len(folder.images))
    if config.partition.file is not None:
        return read_published(config.partition.file, entries, config), Survey(seen)
    if not allow_duplicates:
        entries = join_copies(entries)
    return _draw(config, entries, seen), Survey(seen)


def _with_size(read: Read, spacing: tuple[float, float] | None) -> ImageEntry:
    """Return the image's entry, with its size in mm where the spacing of its pixels is known."""
    if spacing is None:
        return read.entry
    height, width = (pixels * mm for pixels, mm in zip(read.size_hw, spacing, strict=True))
    return read.entry.model_copy(update={"size_mm": (height, width)})


def _draw(config: Config, entries: Mapping[str, ImageEntry], seen: Mapping[str, Seen]) -> Partition:
    settings = config.partition
    foreground = {i: each.foreground for i, each in seen.items() if each.foreground is not None}
    server, clients = draw_partition(entries, settings, seed=config.seed, foreground=foreground)
    used = {i for part in (server, *clients.values()) for _, ids in part for i in ids}
    return Partition(
        scheme=settings.scheme,
        seed=config.seed,
        server=server,
        clients=clients,
        images={i: entries[i] for i in sorted(used)},
    )


def _write(
    config: Config, partition: Partition, frames: FrameFile, with_oracle: bool, advance: Progress
) -> None:
    """Write the stores, and the partition last."""
    cache = config.cache.root
    parts = [
        (o, split, ids) for o in partition.owners for split, ids in partition.splits(o).items()
    ]
    done, total = 0, sum(len(ids) for _, _, ids in parts)
    file, stores = cache / "partition.json", (cache / "images", cache / "oracle")
    # everything is written before anything takes its place
    with _withdrawal(file, stores) as withdraw, ExitStack() as stack:
        images = stack.enter_context(folder_beside(cache / "images"))
        for owner, split, ids in parts:
            labelled = owner == "server" or split in LABELLED_SPLITS
            _write_store(images / owner / f"{split}.zarr", config, frames, ids, labelled)
            done += len(ids)
            advance("writing image stores", done, total)
        if with_oracle:
            oracle = stack.enter_context(folder_beside(cache / "oracle"))
            for client, part in partition.clients.items():
                _write_store(oracle / f"{client}.zarr", config, frames, part.train, True)
        # a run that is killed from here on leaves no partition, never one of other stores
        withdraw()
        if not with_oracle and (cache / "oracle").exists():
            discard(cache / "oracle")  # of an earlier partition
    save_partition(file, partition)


@contextmanager
def _withdrawal(partition: Path, stores: Sequence[Path]) -> Iterator[Callable[[], None]]:
    """Yield what removes ``partition``; it returns where the block fails before a store changes."""
    old = partition.read_bytes() if partition.is_file() else None
    before = [_stamp(store) for store in stores]

    def withdraw() -> None:
        if partition.exists():
            partition.unlink()
            flush(partition.parent)

    try:
        yield withdraw
    except BaseException:
        unchanged = [_stamp(store) for store in stores] == before
        if old is not None and not partition.exists() and unchanged:
            write_bytes(partition, old)
        raise


def _stamp(folder: Path) -> tuple[int, int] | None:
    """Return what tells a folder from another one, and from itself with other entries."""
    if not folder.exists():
        return None
    status = folder.stat()
    return status.st_ino, status.st_mtime_ns


def _write_store(
    path: Path, config: Config, frames: FrameFile, ids: Sequence[str], labelled: bool
) -> None:
    """Write the store of these images, if there are any."""
    if ids:
        rows = (frames.read(image_id, labelled=labelled) for image_id in ids)
        size, classes = config.data.image_size, config.data.num_classes
        write_image_store(path, ids, rows, size=size, num_classes=classes)
