"""Images and masks of a public data set are found by the patterns of its entry in the table."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from pipeline.data.images import read_image
from pipeline.data.importers.items import Item
from pipeline.data.importers.sources import Files
from pipeline.data.importers.table import Kind, Layout, Metadata, Rule, pattern
from pipeline.data.masks import read_mask
from pipeline.errors import DataError
from pipeline.progress import Progress

# what comes with data sets and is never an image
_DOCUMENTS = re.compile(
    r".*\.(?:txt|md|pdf|docx?|xlsx?|csv|tab|json|xml|ya?ml|cfg|html?|mat|db)|(?:.*/)?[^/.]+",
    re.IGNORECASE,
)


@dataclass
class Pair:
    """An image of a public data set, its masks, and what its path says of it."""

    image_id: str
    name: str
    image: Path
    found: dict[str, str]
    layout: Layout
    masks: list[Path] = field(default_factory=list)  # empty, or as many as the layout has


@dataclass
class Pairs:
    """Images with their masks, and the names of files that belong to none."""

    pairs: list[Pair]
    unpaired: list[str]
    unknown: list[str]


def find_pairs(kind: Kind, files: Files) -> Pairs:
    """Find the images of ``kind`` among ``files`` and give each its masks.

    Raises:
        DataError: two images have the same id, or an image more masks than its layout has.
    """
    images: dict[str, Pair] = {}
    masks: dict[str, list[str]] = {}
    unknown = []
    others = [pattern(kind.others)] + ([pattern(kind.metadata.file)] if kind.metadata else [])
    for name, path in files.items():
        mask_id, pair = _match(kind, name, path)
        if mask_id is not None:
            masks.setdefault(mask_id, []).append(name)
        elif pair is not None:
            first = images.setdefault(pair.image_id, pair)
            if first is not pair:
                raise DataError(
                    f"{first.name} and {name}: two images with id '{pair.image_id}'; give the "
                    "folder of one of them"
                )
        elif not _DOCUMENTS.fullmatch(name) and not any(each.fullmatch(name) for each in others):
            unknown.append(name)
    for mask_id in masks.keys() & images.keys():
        images[mask_id].masks = [files[name] for name in _parts(images[mask_id], masks[mask_id])]
    unpaired = [names[0] for mask_id, names in masks.items() if mask_id not in images]
    return Pairs(list(images.values()), unpaired, unknown)


def _match(kind: Kind, name: str, path: Path) -> tuple[str | None, Pair | None]:
    """Return the id of the image whose mask ``name`` is, or the image that it is."""
    for layout in kind.layouts:
        for is_mask, text in ((True, layout.masks), (False, layout.images)):
            found = pattern(text).fullmatch(name)
            if found is not None:
                image_id = layout.image_id.format(**found.groupdict())
                if is_mask:
                    return image_id, None
                return None, Pair(image_id, name, path, found.groupdict(), layout)
    return None, None


def _parts(pair: Pair, names: list[str]) -> list[str]:
    """Return an image's masks; none where one of its parts is missing."""
    wanted = pair.layout.parts or len(names)
    if len(names) > wanted:
        raise DataError(
            f"{pair.name}: has {len(names)} masks, e.g. {names[0]} and {names[1]}, expected "
            f"{wanted}; give the folder of one of them"
        )
    return names if len(names) == wanted else []


def fill(rule: str | Rule, pair: Pair) -> str:
    """Return the site or group that a template or rule gives an image."""
    if isinstance(rule, str):
        return rule.format(**pair.found)
    try:
        return rule(pair.found, pair.image)
    except ValueError as error:
        raise DataError(f"{pair.name}: {error}; expected the data set as it is published") from None


def read_pairs(kind: Kind, pairs: Pairs, files: Files, progress: Progress) -> Iterator[Item]:
    """Yield each image with its mask; several masks are merged.

    Raises:
        DataError: masks to be merged cannot be read, or differ in size.
    """
    told = _read_metadata(kind.metadata, files) if kind.metadata else {}
    for number, pair in enumerate(pairs.pairs, start=1):
        mask = _merge(pair) if len(pair.masks) > 1 else next(iter(pair.masks), None)
        site, group = told.get(pair.image_id.lower(), ("", ""))
        yield Item(
            pair.image_id,
            pair.image,
            mask,
            site or fill(kind.site, pair),
            group or fill(kind.group, pair),
        )
        progress("importing images", number, len(pairs.pairs))


def _merge(pair: Pair) -> Image.Image:
    """Return the union of an image's masks, 0 and 255."""
    size = read_image(pair.image).pixels.shape[:2]
    masks = [read_mask(path, size_hw=size, num_classes=1).pixels for path in pair.masks]
    return Image.fromarray(np.maximum.reduce(masks) * np.uint8(255))


def _read_metadata(wanted: Metadata, files: Files) -> dict[str, tuple[str, str]]:
    """Return site and group by image id, in lower case, of a table of the data set if it is there.

    Raises:
        DataError: the table cannot be read or lacks a column.
    """
    shape = pattern(wanted.file)
    path = next((path for name, path in files.items() if shape.fullmatch(name)), None)
    if path is None:
        return {}
    try:
        text = path.read_text(encoding="utf-8-sig")
        delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
        rows = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
        return {
            row[wanted.image_id].lower(): (row.get(wanted.site) or "", row[wanted.group])
            for row in rows
        }
    except (UnicodeDecodeError, csv.Error, KeyError, AttributeError) as error:
        raise DataError(
            f"{path}: damaged table ({error}); expected columns {wanted.image_id} and "
            f"{wanted.group}; get it again"
        ) from error
