"""``samfed fetch``: what is offered and under which licence, then the download and the import."""

from __future__ import annotations

import difflib
import logging
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.data.catalogue import SOURCES, Source
from pipeline.data.downloads import (
    PAUSES_SECONDS,
    RemoteFile,
    archive_lock,
    download,
    partial_bytes,
    remote_bytes,
)
from pipeline.data.importers.importing import ImportResult, import_data
from pipeline.data.importers.table import KINDS
from pipeline.data.importers.volumes import simple_itk
from pipeline.disk import writer_lock
from pipeline.errors import ConfigError, DataError, SamfedError
from pipeline.progress import Progress

_log = logging.getLogger("samfed")


@dataclass(frozen=True)
class Listing:
    """What ``fetch`` knows by name."""

    sources: Mapping[str, Source]

    def text(self) -> str:
        """Return a line for each name."""
        width = max(map(len, self.sources))
        return "\n".join(
            f"{name:<{width}}  {source.title}; "
            + (f"licence: {source.licence}" if source.files else f"by hand ({source.page})")
            for name, source in self.sources.items()
        )

    def as_json(self) -> dict[str, Any]:
        """Return the same for machines."""
        return {
            name: {
                "title": source.title,
                "licence": source.licence,
                "page": source.page,
                "urls": [file.url for file in source.files],
            }
            for name, source in self.sources.items()
        }


@dataclass(frozen=True)
class Offer:
    """What ``fetch`` is about to do, to be read and accepted before.

    ``files`` have their sizes where the table or the server says them. They are received into
    ``folder``; ``out`` is where the data set is imported to, or the same folder for weights.
    """

    name: str
    source: Source
    files: tuple[RemoteFile, ...]
    folder: Path
    out: Path

    def text(self) -> str:
        """Return licence, publisher and what would be received, a line each."""
        return "\n".join(
            [
                f"{self.name}: {self.source.title}",
                f"licence: {self.source.licence} ({self.source.page})",
                *map(_describe, self.files),
                f"into {self.out}",
            ]
        )

    def as_json(self) -> dict[str, Any]:
        """Return the same for machines."""
        return {
            "name": self.name,
            "licence": self.source.licence,
            "page": self.source.page,
            "bytes": {file.name: file.bytes for file in self.files},
            "out": str(self.out),
        }

    @property
    def terms(self) -> str:
        """Licence and size in a few words."""
        size = f"{self.known_bytes / 1e6:,.1f} MB" if self.known_bytes else "of unknown size"
        return f"the licence of {self.name}, {size}: {self.source.licence} ({self.source.page})"

    @property
    def known_bytes(self) -> int:
        """Bytes of all files whose size is known."""
        return sum(file.bytes or 0 for file in self.files)

    def space(self) -> dict[Path, int]:
        """Return the bytes that are yet to be written below each folder.

        A data set is unpacked and, where masks are merged or volumes cut, written again: images
        are packed already, so each of these takes about the archives' own size.
        """
        here = sum(partial_bytes(self.folder / file.name) for file in self.files)
        needed = {self.folder: max(0, self.known_bytes - here)}
        if self.source.kind is not None:
            needed[self.out] = 2 * self.known_bytes
        return needed


@dataclass(frozen=True)
class FetchedWeights:
    """Weights that are there and whose sha256 is right."""

    path: Path
    source: Source

    def text(self) -> str:
        """Return the settings that use them."""
        return (
            f"{self.path}: sha256 is right; to use it, write to params.yaml\n"
            f"sam:\n  variant: {self.source.variant}\n  checkpoint: {self.path}"
        )

    def as_json(self) -> dict[str, Any]:
        """Return the same for machines."""
        return {"sam.variant": self.source.variant, "sam.checkpoint": str(self.path)}


def offer(
    name: str, *, out: Path | None, cache: Path, sources: Mapping[str, Source] = SOURCES
) -> Offer:
    """Look up what ``name`` is; ask the server how large it is where the table does not know.

    Weights go to ``out`` (default: ``weights``). The archives of a data set go to ``downloads`` in
    the cache, the data set to ``out`` (default: ``data/<name>``).

    Raises:
        ConfigError: nothing has this name. SamfedError: it has no stable address; says where a
        person gets it and what to do then. DataError: ``out`` is in the way. NetworkError.
    """
    source = sources.get(name)
    if source is None:
        near = difflib.get_close_matches(name, sources, n=1)
        hint = f"did you mean {near[0]}?" if near else "`samfed fetch` lists all names"
        raise ConfigError(f"fetch: nothing is called '{name}'; {hint}")
    if not source.files:
        raise SamfedError(_by_hand(name, source))
    if source.kind is None:
        folder = out = out or Path("weights")
    else:
        folder, out = cache / "downloads" / name, out or Path("data") / name
        if KINDS[source.kind].volumes:
            simple_itk()  # or gigabytes would be received that cannot be read
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out}: is there already; move it away or give another --out")
    files = tuple(replace(file, bytes=remote_bytes(file)) for file in source.files)
    return Offer(name, source, files, folder, out)


def free_bytes(folder: Path) -> int:
    """Return the bytes free on the file system that ``folder`` is or will be on."""
    return shutil.disk_usage(_nearest(folder)).free


def fetch(
    offer: Offer,
    *,
    progress: Progress | None = None,
    free: Callable[[Path], int] = free_bytes,
    pauses: Sequence[float] = PAUSES_SECONDS,
) -> FetchedWeights | ImportResult:
    """Receive what was accepted, check it, and import it if it is a data set.

    The archives of a data set stay, so that it can be imported again without a network.

    Args:
        free: tells the bytes free on a folder's file system.

    Raises:
        DataError: the disk is too small, or what was received is not what was expected.
        NetworkError, LockedStoreError: as ``download``.
    """
    _check_space(offer, free)
    for file in offer.files:
        if not file.confirmed:
            _log.warning("%s: its sha256 is unverified, from one source alone", file.name)
    kind, folder = offer.source.kind, offer.folder
    with nullcontext() if kind is None else writer_lock(archive_lock(folder)):
        paths = [download(file, folder, progress=progress, pauses=pauses) for file in offer.files]
        if kind is None:
            return FetchedWeights(paths[0], offer.source)
        result = import_data(kind, offer.folder, offer.out, progress=progress)
    _log.info("the archives stay in %s; remove them if you need the room", offer.folder)
    return result


def _describe(file: RemoteFile) -> str:
    size = "size unknown" if file.bytes is None else f"{file.bytes / 1e6:,.1f} MB"
    digest = "sha256" if file.confirmed else "unverified sha256 (from one source alone)"
    return f"{file.name}: {size}, {digest} {file.sha256[:12]}..., from {file.url}"


def _by_hand(name: str, source: Source) -> str:
    """Say where a person gets what has no stable address, and what to do with it."""
    where = f"{name}: has no stable address; get {source.title} from {source.page}"
    if source.kind is None:
        return (
            f"{where} and set sam.variant to {source.variant} and sam.checkpoint to the path of "
            f"{source.file_name}"
        )
    return f"{where}, then run `samfed import {source.kind} FOLDER_OR_ARCHIVE data/{name}`"


def _nearest(folder: Path) -> Path:
    """Return the folder, or the nearest one above it that is there."""
    return next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())


def _check_space(offer: Offer, free: Callable[[Path], int]) -> None:
    """Refuse what does not fit, adding up what goes to the same file system."""
    needed: dict[int, int] = {}
    for folder, size in offer.space().items():
        device = os.stat(_nearest(folder)).st_dev
        needed[device] = needed.get(device, 0) + size
        there = free(folder)
        if needed[device] > there:
            raise DataError(
                f"{folder}: {there / 1e9:.1f} GB are free, about {needed[device] / 1e9:.1f} GB are "
                f"needed for {offer.name}; make room or choose another disk (--out, cache.root)"
            )
