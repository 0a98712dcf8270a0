"""``samfed prepare``: an input folder becomes a partition and image stores by owner and split.

Where sites really are apart, each prepares its own folder into a cache of its own (``--site``), and
so does the server (``--server``): nobody's manifest then names another's images.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.config import Config
from pipeline.data.drawing import ALONE, draw_partition, draw_server, draw_site
from pipeline.data.duplicates import join_copies, name_leaks
from pipeline.data.folder import InputFolder, scan
from pipeline.data.partition import (
    PARTITION_FILE,
    PUBLIC_FILE,
    ClientPart,
    ImageEntry,
    ImageFiles,
    Partition,
    ServerPart,
    load_partition,
    save_partition,
)
from pipeline.data.published import read_published
from pipeline.data.reading import FrameFile, Read, frame_file, read_all
from pipeline.data.survey import Seen, Survey
from pipeline.disk import flush, is_site_name, write_bytes, writer_lock
from pipeline.errors import ConfigError, DataError
from pipeline.folders import discard, folder_beside
from pipeline.params import with_settings
from pipeline.progress import Progress
from pipeline.stores.image_store import write_image_store

log = logging.getLogger("samfed.data")

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
    owner: str | None = None,
    with_oracle: bool = False,
    allow_duplicates: bool = False,
    progress: Progress | None = None,
) -> PrepareResult:
    """Partition ``data.root`` and write ``cache/partition.json`` and ``cache/images/``.

    Every image and mask is read once, and checked, before a store is written.

    Args:
        owner: whose ``data.root`` is, if it is one's alone: a site's name, or ``server``, which
            takes D_p and nothing else.
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
    _check_cache(config.cache.root, owner)
    advance = progress or (lambda *_: None)
    folder = scan(config.data.root, mask_pattern=config.data.mask_pattern)
    if owner is not None:
        folder = replace(folder, images=_all_of(owner, folder.images))
    with frame_file(config.cache.root, size=config.data.image_size) as frames:
        entries, survey = _read(config, folder, frames, advance)
        partition = _plan(config, entries, survey, owner, allow_duplicates)
        name_leaks(partition)
        _name_single_patient(partition)
        if with_oracle:
            _check_oracle(partition)
        survey.warn([i for ids in partition.splits("server").values() for i in ids])
        with writer_lock(config.cache.root / "locks" / "prepare.lock"):
            _write(config, partition, owner, frames, with_oracle, advance)
    return PrepareResult(partition, folder, survey)


def with_folder(config: Config, folder: Path | None) -> Config:
    """Return the settings with ``--data DIR`` in place of ``data.root``; warn where that differs.

    Stage one reads the images of ``data.root`` again.
    """
    if folder is None:
        return config
    if folder.resolve() != config.data.root.resolve():
        log.warning(
            "--data %s: data.root is %s, which later stages read; set data.root to this folder",
            folder, config.data.root,
        )  # fmt: skip
    return with_settings(config, "--data", data={"root": folder})


def alone(site: str | None, *, server: bool) -> str | None:
    """Return whose ``data.root`` is, by ``--site NAME`` or ``--server``; None if it is everybody's.

    Raises:
        ConfigError: both are given, or no folder can have the name.
    """
    if server and site is not None:
        raise ConfigError("--site and --server: give one of them")
    if site is not None and not is_site_name(site):
        raise ConfigError(
            f"--site {site!r}: cannot name a folder; avoid / \\ : and a dot in front, and 'server'"
        )
    return "server" if server else site


def _name_single_patient(partition: Partition) -> None:
    """Warn of a calibration part whose images are all of one group."""
    groups = {partition.images[image_id].group for image_id in partition.server.calibration}
    if len(groups) == 1:
        log.warning(
            "the calibration part is a single patient or video (%s): what is measured on it need "
            "not hold for others; the server's set needs images of more of them",
            *groups,
        )


def _check_oracle(partition: Partition) -> None:
    ids = [image_id for part in partition.clients.values() for image_id in part.train]
    bare = [image_id for image_id in ids if partition.images[image_id].mask is None]
    if bare:
        raise DataError(
            f"--with-oracle: {len(bare)} of {len(ids)} training images of the clients have no "
            f"masks, e.g. '{bare[0]}'; add them, or prepare without it"
        )


def _check_cache(cache: Path, owner: str | None) -> None:
    """Refuse to mix one owner's cache with that of many."""
    file, public = cache / PARTITION_FILE, cache / PUBLIC_FILE
    advice = "choose another cache.root"
    if owner is None:
        if public.exists():
            raise ConfigError(f"{public}: this cache is one site's; give --site NAME, or {advice}")
        return
    others = set(load_partition(file).owners) - {owner} if file.exists() else set()
    if others or (owner == "server" and public.exists()):
        found = ", ".join(sorted(others)) or "a site's copy of D_p"
        raise ConfigError(f"{cache}: holds images of others than {owner} ({found}); {advice}")


def _all_of(owner: str, images: Mapping[str, ImageFiles]) -> dict[str, ImageFiles]:
    """Count all images as the owner's, and say so where ``sites.csv`` names several sites."""
    sites = sorted({files.site for files in images.values()})
    if len(sites) > 1:
        log.warning("sites.csv names %s; all images count as %s's", ", ".join(sites), owner)
    return {i: files.model_copy(update={"site": owner}) for i, files in images.items()}


def _read(
    config: Config, folder: InputFolder, frames: FrameFile, advance: Progress
) -> tuple[dict[str, ImageEntry], Survey]:
    """Read every file; only ``frames`` are written."""
    entries, seen = dict[str, ImageEntry](), dict[str, Seen]()
    for i, (image_id, read) in enumerate(read_all(config.data, folder.images), start=1):
        entries[image_id] = _with_size(read, folder.spacing.get(image_id))
        seen[image_id] = read.seen
        frames.add(image_id, read.frame)
        advance("checking images", i, len(folder.images))
    return entries, Survey(seen)


def _with_size(read: Read, spacing: tuple[float, float] | None) -> ImageEntry:
    """Return the image's entry, with its size in mm where the spacing of its pixels is known."""
    if spacing is None:
        return read.entry
    height, width = (pixels * mm for pixels, mm in zip(read.size_hw, spacing, strict=True))
    return read.entry.model_copy(update={"size_mm": (height, width)})


def _plan(
    config: Config,
    entries: Mapping[str, ImageEntry],
    survey: Survey,
    owner: str | None,
    allow_duplicates: bool,
) -> Partition:
    """Draw the partition, or read it back in.

    Raises:
        ConfigError: it cannot be drawn, or what is read back has others' images than ``owner``'s.
    """
    file = config.partition.file
    if file is not None:
        partition = read_published(file, entries, config)
        if owner is not None and partition.owners != (owner,):
            names = ", ".join(partition.owners)
            raise ConfigError(f"partition.file: found images of {names}, expected {owner}'s alone")
        return partition
    entries = entries if allow_duplicates else join_copies(entries)
    return _draw(config, entries, survey.seen, owner)


def _draw(
    config: Config, entries: Mapping[str, ImageEntry], seen: Mapping[str, Seen], owner: str | None
) -> Partition:
    settings, seed = config.partition, config.seed
    foreground = {i: each.foreground for i, each in seen.items() if each.foreground is not None}
    server, clients = ServerPart(), dict[str, ClientPart]()
    if owner is None:
        server, clients = draw_partition(entries, settings, seed=seed, foreground=foreground)
    elif owner == "server":
        server = draw_server(entries, settings, seed=seed, foreground=foreground)
    else:
        part = draw_site(owner, entries, settings, seed=seed, foreground=foreground)
        clients = {owner: part}
    used = {i for part in (server, *clients.values()) for _, ids in part for i in ids}
    return Partition(
        scheme=settings.scheme if owner is None else ALONE,
        seed=seed,
        server=server,
        clients=clients,
        images={i: entries[i] for i in sorted(used)},
    )


def _write(
    config: Config,
    partition: Partition,
    alone: str | None,
    frames: FrameFile,
    with_oracle: bool,
    advance: Progress,
) -> None:
    """Write the stores, and the partition last; who is alone keeps what lies beside its stores."""
    cache = config.cache.root
    parts = [
        (o, split, ids) for o in partition.owners for split, ids in partition.splits(o).items()
    ]
    done, total = 0, sum(len(ids) for _, _, ids in parts)
    target = cache / "images" if alone is None else cache / "images" / alone
    file, stores = cache / PARTITION_FILE, (target, cache / "oracle")
    # everything is written before anything takes its place
    with _withdrawal(file, stores) as withdraw, ExitStack() as stack:
        images = stack.enter_context(folder_beside(target))
        for owner, split, ids in parts:
            labelled = owner == "server" or split in LABELLED_SPLITS
            place = images / owner if alone is None else images
            _write_store(place / f"{split}.zarr", config, frames, ids, labelled)
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
