"""``sites.csv`` and ``spacing.csv``: what is known of each image, as people write such tables.

What has one meaning only is read as it is meant: spaces around a cell, an empty row or column, a
semicolon or tab between cells, a decomposed accent, an id with its file's ending. Everything else
that is not clear gets one line that names the table's line.
"""

from __future__ import annotations

import codecs
import csv
import io
import logging
import math
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from pipeline.disk import is_site_name
from pipeline.errors import DataError

log = logging.getLogger("samfed.data")

NO_GROUP = frozenset({"", "-", "na", "n/a", "nan", "none", "null"})  # in any case
COLUMNS = ("image_id", "site", "group")
SPACING_COLUMNS = ("image_id", "row_mm", "column_mm")


@dataclass(frozen=True)
class Sites:
    """Contents of ``sites.csv``."""

    rows: dict[str, tuple[str, str]]  # site and group of each image; groups are unique across sites
    strangers: tuple[str, ...] = ()  # ids that no image has


def plain_text(text: str) -> str:
    """Return ``text`` composed (Unicode NFC) and without the spaces around it."""
    return unicodedata.normalize("NFC", text).strip()


def read_sites(path: Path, images: Collection[str], *, endings: Collection[str]) -> Sites:
    """Read the table; without one there are no rows.

    Args:
        images: ids of the images that need a row, composed (NFC).
        endings: of image files, as ``.png``; an id in the table may have one.

    Raises:
        DataError: the table is damaged, or not clear, or lacks an image.
    """
    if not os.path.lexists(path):
        _name_look_alikes(path)
        return Sites({})
    rows: dict[str, tuple[str, str]] = {}
    strangers, lacking = list[str](), list[str]()
    for line, cells in _table(path, COLUMNS[:2], COLUMNS[2:]):
        image_id = _known_id(cells["image_id"], images, endings)
        site, group = cells["site"], cells.get("group")
        fault = _fault(image_id, site, seen=image_id in rows or image_id in strangers)
        if fault is not None:
            raise DataError(f"{path} line {line}: {fault}")
        if image_id not in images:
            strangers.append(image_id)
            continue
        if group is not None and group.lower() in NO_GROUP:
            lacking.append(group)
            group = None
        rows[image_id] = (site, f"{site}/{group or image_id}")
    missing = [image_id for image_id in images if image_id not in rows]
    if missing:
        counts = f"{len(missing)} of {len(images)} images lack one"
        raise DataError(f"{path}: no row for image '{missing[0]}' ({counts})")
    _warn(path, {site for site, _ in rows.values()}, lacking)
    return Sites(rows, tuple(strangers))


def _name_look_alikes(path: Path) -> None:
    """Warn of a table under another name: without a table all images are of one site."""
    for other in sorted(path.parent.glob("[sS][iI][tT][eE][sS].*")):
        log.warning("%s: is not read; save the table of sites as %s", other, path.name)


def read_spacing(
    path: Path, images: Collection[str], *, endings: Collection[str]
) -> dict[str, tuple[float, float]]:
    """Return the millimetres between rows and between columns of the images that have a row.

    Args:
        images, endings: as in ``read_sites``. Rows of other images are passed over.

    Raises:
        DataError: the table is damaged, or not clear, or a cell is no distance.
    """
    found: dict[str, tuple[float, float]] = {}
    for line, cells in _table(path, SPACING_COLUMNS) if os.path.lexists(path) else ():
        image_id, *texts = (cells[name] for name in SPACING_COLUMNS)
        image_id = _known_id(image_id, images, endings)
        if image_id in found:
            raise DataError(f"{path} line {line}: '{image_id}' is listed twice")
        try:
            row, column = map(float, texts)
        except ValueError:
            row = column = math.nan
        if not (0 < row < math.inf and 0 < column < math.inf):
            raise DataError(
                f"{path} line {line}: found {' and '.join(map(repr, texts))}; expected millimetres "
                "above 0, or no row where they are not known"
            )
        if image_id in images:
            found[image_id] = (row, column)
    return found


def _table(
    path: Path, needed: Sequence[str], other: Sequence[str] = ()
) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the number of each row's first line, and its cells by column."""
    rows = _rows(path)
    _, names = next(rows, (1, []))
    header = [name.lower() for name in names]
    columns = (*needed, *other)
    if not {*needed} <= {*header}:
        optional = f" and optionally {', '.join(other)}" if other else ""
        raise DataError(f"{path}: found columns {names}; expected {', '.join(needed)}{optional}")
    twice = [name for name in columns if header.count(name) > 1]
    if twice:
        raise DataError(f"{path}: found column {twice[0]} twice; remove one")
    for line, cells in rows:
        if not any(cells):
            continue
        if any(cells[len(header) :]):
            raise DataError(
                f"{path} line {line}: found {len(cells)} cells, the header has {len(header)}; put "
                "quotes around a cell that holds a separator"
            )
        pairs = zip_longest(header, cells[: len(header)], fillvalue="")
        yield line, {name: cell for name, cell in pairs if name in columns}


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the number of each row's first line, and its cells without the spaces around them."""
    line, advice = 1, "save it as CSV in UTF-8"
    try:
        text = path.read_text(encoding="utf-8-sig")
        head = text.partition("\n")[0]
        separator = max(",;\t", key=head.count)  # the comma where there is none
        reader = csv.reader(
            io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True
        )
        for cells in reader:
            if any("\n" in cell or "\r" in cell for cell in cells):
                raise DataError(
                    f"{path} line {line}: a cell goes on over several lines; close its quote"
                )
            yield line, [plain_text(cell) for cell in cells]
            line = reader.line_num + 1
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check its permissions and its disk"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not in UTF-8, {_encoding(error)}; {advice}") from error
    except csv.Error as error:
        fault = "a quote is not closed" if "unexpected end" in str(error) else str(error)
        raise DataError(f"{path} line {line}: damaged table ({fault}); {advice}") from error


def _encoding(error: UnicodeDecodeError) -> str:
    """Say what a table that is not in UTF-8 looks like instead."""
    text = error.object
    if text.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "it begins as UTF-16 does"
    line = text.count(b"\n", 0, error.start) + 1
    return f"line {line} has the byte 0x{text[error.start]:02x}, a letter in Latin-1"


def _known_id(text: str, images: Collection[str], endings: Collection[str]) -> str:
    """Return the image that is meant: the text as it is, or without its folder and ending."""
    name = re.split(r"[/\\]", text)[-1]
    stem, _, ending = name.rpartition(".")
    candidates = [text, name, stem] if f".{ending.lower()}" in endings else [text, name]
    return next((each for each in candidates if each in images), text)


def _fault(image_id: str, site: str, *, seen: bool) -> str | None:
    if not image_id or not site:
        return "empty image_id or site"
    if seen:
        return f"'{image_id}' is listed twice"
    if not is_site_name(site):  # a client is named after its site
        return (
            f"site {site!r} cannot name a client's folder; avoid / \\ : and a dot in front, and "
            "'server'"
        )
    return None


def _warn(path: Path, sites: Collection[str], lacking: Collection[str]) -> None:
    """Say what was read in a way that the table's author may not have meant."""
    if lacking:
        found = ", ".join(f"'{each}'" for each in sorted(set(lacking)))
        log.warning(
            "%s: %d images have no group (found %s); each is a group of its own",
            path, len(lacking), found,
        )  # fmt: skip
    spellings = Counter(site.casefold() for site in sites)
    alike = sorted(site for site in sites if spellings[site.casefold()] > 1)
    if alike:
        names = ", ".join(alike)
        log.warning(
            "%s: sites that differ in case alone: %s; they stay apart, so rename them if they are "
            "one, or if your file system ignores case",
            path, names,
        )  # fmt: skip
