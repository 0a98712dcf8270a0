"""``samfed import``: a public data set, or volumes and series, become an input folder."""

from __future__ import annotations

import csv
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
from PIL import Image

from pipeline import __version__
from pipeline.data.importers.dicom import read_frames
from pipeline.data.importers.dicom_files import find_dicom
from pipeline.data.importers.items import Item, Options, Spacing
from pipeline.data.importers.pictures import Pairs, fill, find_pairs, read_pairs
from pipeline.data.importers.sources import Files, count_signs, open_source, recognise_files
from pipeline.data.importers.table import GENERAL, KINDS, Kind
from pipeline.data.importers.volumes import (
    PLANES,
    Case,
    ClassTable,
    class_table,
    find_nifti,
    read_slices,
)
from pipeline.errors import ConfigError, DataError
from pipeline.folders import folder_beside
from pipeline.progress import Progress

logger = logging.getLogger("samfed")


@dataclass(frozen=True)
class ImportResult:
    """What ``samfed import`` wrote."""

    kind: str
    folder: Path
    images: int
    masks: int
    classes: int
    sites: dict[str, int]
    groups: int
    left_out: dict[str, int]

    def as_json(self) -> dict[str, Any]:
        """Return everything that was counted; ``sites`` has the images of each."""
        return {**vars(self), "folder": str(self.folder)}

    def text(self) -> str:
        """Return what was written, and how it is used next."""
        sites = ", ".join(f"{site} {count}" for site, count in self.sites.items())
        lines = [
            f"{self.kind}: {self.images} images, {self.masks} masks, {self.groups} groups, sites "
            f"{sites}",
            f"wrote {self.folder}; its SOURCE.md has licence and citation",
            f"next: samfed init {quote(str(self.folder))}",
        ]
        return "\n".join(lines)


@dataclass
class _Content:
    """What a kind found in a source: items to come, classes, and what is left out."""

    items: Iterator[Item]
    classes: int
    left_out: dict[str, int]


def import_data(
    kind: str,
    source: Path,
    out: Path,
    *,
    options: Options | None = None,
    progress: Progress | None = None,
) -> ImportResult:
    """Write ``images/``, ``masks/``, ``sites.csv`` and ``SOURCE.md`` to the new folder ``out``.

    Bytes of images and masks are copied as they are wherever the input layout takes them. ``out``
    appears as a whole or not at all; the same source and samfed give the same bytes.

    Args:
        kind: a name of ``KINDS`` or ``GENERAL``.
        source: a folder, an archive, or a folder of archives; it is only read.

    Raises:
        ConfigError: no such kind, or an option that it has not. DataError: the source is not such
        data, or is damaged; ``out`` holds something.
    """
    options, advance = options or Options(), progress or (lambda *_: None)
    _check(kind, source, out, options)
    with folder_beside(out.resolve()) as folder:
        unpacked = folder / ".unpacked"
        files = _open(kind, source, unpacked, progress)
        content = _content(kind, source, files, options, advance)
        written = _write(folder, content.items, options, unpacked)
        left_out = {what: count for what, count in content.left_out.items() if count}
        if not written:
            raise DataError(f"{source}: nothing of it could be imported as {kind}")
        result = _result(kind, out, written, content.classes, left_out)
        (folder / "SOURCE.md").write_text(_source_card(result), encoding="utf-8")
        if unpacked.exists():
            shutil.rmtree(unpacked)
    return result


def _check(kind: str, source: Path, out: Path, options: Options) -> None:
    """Refuse a kind that is not there, options that it has not, and a folder that is taken."""
    if kind not in KINDS and kind not in GENERAL:
        near = get_close_matches(kind, [*KINDS, *GENERAL], n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ConfigError(f"import {kind}: no such kind{hint}; expected one of {_names()}")
    sliced = kind == "nifti" or (kind in KINDS and KINDS[kind].volumes)
    has = {
        "--labels": (options.labels is not None, kind in GENERAL),
        "--axis": (options.axis is not None, sliced),
        "--window": (options.window is not None, sliced or kind == "dicom"),
        "--drop-empty": (options.drop_empty, sliced or kind == "dicom"),
    }
    for option, (given, taken) in has.items():
        if given and not taken:
            raise ConfigError(f"{option}: {kind} does not take it; leave it out")
    if options.axis not in (None, *PLANES):
        raise ConfigError(f"--axis {options.axis}: expected {', '.join(PLANES)}")
    if not source.exists():
        raise DataError(f"{source}: no such file or folder; expected a data set or its archive")
    final, inside = out.resolve(), source.resolve()
    if final == inside or inside in final.parents:
        raise ConfigError(f"{out}: lies in {source}, which is only ever read; choose another")
    if final.exists() and not (final.is_dir() and not any(final.iterdir())):
        raise DataError(
            f"{out}: is there and not empty; move it away or choose another output folder"
        )


def _open(kind: str, source: Path, unpacked: Path, progress: Progress | None) -> Files:
    """Open the source; where paths may hold patients' names, no error says one."""
    try:
        return open_source(source, unpacked, progress)
    except (OSError, DataError) as error:
        if kind != "dicom":
            raise
        reason = error.strerror if isinstance(error, OSError) else "as an archive"
        raise DataError(
            f"{source}: something in it cannot be read ({reason}); check permissions and disk, and "
            "unpack archives yourself"
        ) from None


def _names() -> str:
    return ", ".join([*KINDS, *GENERAL])


def _content(
    kind: str, source: Path, files: Files, options: Options, progress: Progress
) -> _Content:
    if kind == "dicom":
        return _dicom(source, files, options, progress)
    if kind == "nifti":
        nifti = find_nifti(files, options.labels)
        if not nifti.cases:
            raise _unlike(kind, source, files)
        classes = class_table(nifti.cases)
        items = read_slices(nifti.cases, classes, options, progress)
        orphans = _count(kind, {"label volumes without an image": nifti.orphans})
        return _Content(items, len(classes.values), orphans)
    entry, pairs = KINDS[kind], find_pairs(KINDS[kind], files)
    looks_like = recognise_files(files)
    # common names, as images/1.png, are another data set's where its sign is on some of them
    foreign = looks_like in KINDS and looks_like != kind
    if not pairs.pairs or (foreign and count_signs(kind, files) < len(pairs.pairs)):
        raise _unlike(kind, source, files)
    if entry.volumes:
        items = read_slices(_cases(entry, pairs), ClassTable(entry.values), options, progress)
    else:
        items = read_pairs(entry, pairs, files, progress)
    unmasked = [pair.name for pair in pairs.pairs if not pair.masks]
    if unmasked:
        logger.warning("%s: %d images have no mask, e.g. %s", kind, len(unmasked), unmasked[0])
    left_out = _count(
        kind,
        {
            "masks without an image": pairs.unpaired,
            "files that are not the data set's": pairs.unknown,
        },
    )
    return _Content(items, entry.classes, left_out)


def _unlike(kind: str, source: Path, files: Files) -> DataError:
    """Return an error for a source that is not of this kind, which says what it looks like."""
    looks_like = recognise_files(files)
    if looks_like not in (None, kind):
        return DataError(
            f"{source}: not {kind}; this looks like {looks_like}: "
            f"samfed import {looks_like} {quote(str(source))} OUT"
        )
    return DataError(
        f"{source}: no images of {kind} among its {len(files)} files; expected it as it is "
        "published, see docs/public.md"
    )


def _count(kind: str, left_out: dict[str, list[str]]) -> dict[str, int]:
    """Warn of files that are left out, one of each sort by name, and return their numbers."""
    for what, names in left_out.items():
        if names:
            logger.warning("%s: %d %s are left out, e.g. %s", kind, len(names), what, names[0])
    return {what: len(names) for what, names in left_out.items()}


def _cases(entry: Kind, pairs: Pairs) -> list[Case]:
    """Return the volumes of a public data set with their labels."""
    return [
        Case(
            pair.image,
            pair.masks[0] if pair.masks else None,
            pair.image_id,
            fill(entry.site, pair),
            fill(entry.group, pair),
        )
        for pair in pairs.pairs
    ]


def _dicom(source: Path, files: Files, options: Options, progress: Progress) -> _Content:
    found = find_dicom(files, options.labels, progress)
    if not found.series:
        looks_like = recognise_files(files)
        hint = f"; this looks like {looks_like}" if looks_like not in (None, "dicom") else ""
        raise DataError(f"{source}: no DICOM images among its {len(files)} files{hint}")
    for what, count in found.left_out().items():
        if count:
            logger.warning("dicom: %d %s are left out", count, what)
    frames = read_frames(found, files, options, progress)
    return _Content(frames.items, frames.classes or 1, found.left_out())


# --------------------------------------------------------------------------- writing


def _write(folder: Path, items: Iterable[Item], options: Options, unpacked: Path) -> list[Item]:
    """Write images, masks and tables; return what was written, without pixels."""
    written: dict[str, Item] = {}
    for item in items:
        empty = isinstance(item.mask, Image.Image) and not np.asarray(item.mask).any()
        if empty and options.drop_empty:
            continue
        key = item.image_id.casefold()
        if key in written:
            raise DataError(
                f"ids '{written[key].image_id}' and '{item.image_id}' are one file on some "
                "systems; rename one of the images"
            )
        for kind, content in (("images", item.image), ("masks", item.mask)):
            if content is not None:
                _put(content, folder / kind / item.image_id, unpacked)
        written[key] = replace(item, image=Path(), mask=None if item.mask is None else Path())
    every = list(written.values())
    columns = ["image_id", "site"] + ["group"] * any(each.group for each in every)
    rows = [[getattr(each, column) for column in columns] for each in every]
    _write_table(folder / "sites.csv", columns, rows)
    spaced = [
        # headers hold 32-bit numbers: 0.7 and not 0.699999988
        (each.image_id, *("" if mm is None else f"{mm:.6g}" for mm in each.spacing))
        for each in every
        if each.spacing is not None
    ]
    if spaced:
        _write_table(folder / "spacing.csv", ("image_id", *Spacing._fields), spaced)
    return every


def _put(content: Path | Image.Image, target: Path, unpacked: Path) -> None:
    """Write an image or mask as ``target`` and its ending; a file that we unpacked is moved."""
    target.parent.mkdir(exist_ok=True)
    if isinstance(content, Image.Image):
        content.save(f"{target}.png", format="PNG")
        return
    final = target.with_name(target.name + content.suffix.lower())
    if unpacked in content.parents:
        os.replace(content, final)
    else:
        shutil.copyfile(content, final)


def _write_table(path: Path, columns: Iterable[str], rows: Iterable[Iterable[object]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerows([columns, *rows])


def _result(
    kind: str, out: Path, written: list[Item], classes: int, left_out: dict[str, int]
) -> ImportResult:
    return ImportResult(
        kind=kind,
        folder=out,
        images=len(written),
        masks=sum(item.mask is not None for item in written),
        classes=classes,
        sites=dict(sorted(Counter(item.site for item in written).items())),
        groups=len({(item.site, item.group or item.image_id) for item in written}),
        left_out=left_out,
    )


def _source_card(result: ImportResult) -> str:
    """Return the text of ``SOURCE.md``: where the data come from, under which terms, how many."""
    entry = KINDS.get(result.kind)
    facts = {
        "kind": result.kind,
        "licence": entry.licence if entry else "your own data",
        "address": entry.address if entry else "your own data",
        "citation": entry.citation if entry else "none",
        "images": result.images,
        "masks": result.masks,
        "classes (`data.num_classes`)": result.classes,
        "groups": result.groups,
        **{f"images of site {site}": count for site, count in result.sites.items()},
        **{f"left out: {what}": count for what, count in result.left_out.items()},
        "imported by": f"samfed {__version__}",
    }
    title = entry.title if entry else GENERAL[result.kind]
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"# {title}\n\n| | |\n|---|---|\n{rows}\n"
