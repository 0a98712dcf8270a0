"""The input folder: which file is which image's, and its site and group.

Input is a folder of ``images/<id>.<png|jpg|jpeg|tif|tiff|bmp>``, ``masks/<id>.png`` where they
exist, and an optional ``sites.csv`` (``image_id,site,group``). It is only ever read.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path

from pipeline.data.partition import ImageFiles
from pipeline.disk import is_folder_name
from pipeline.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")


def scan(root: Path) -> dict[str, ImageFiles]:
    """Find all images below ``root`` by id, in the order of their files' names.

    Raises:
        DataError: no images, two images with one id, a mask without an image, a bad ``sites.csv``.
    """
    folder = root / "images"
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected images/<id>.png|jpg|tif|bmp in data.root"
        )
    images = _files_by_id(folder, "image", IMAGE_SUFFIXES)
    if not images:
        raise DataError(f"{folder}: no images found; expected {' '.join(IMAGE_SUFFIXES)} files")
    masks = _files_by_id(root / "masks", "mask", (".png",))
    for image_id, path in masks.items():
        if image_id not in images:
            raise DataError(f"{path}: mask without an image; expected images/{image_id}.*")
    sites = _read_sites(root / "sites.csv", images)
    found = {}
    for image_id, path in images.items():
        site, group = sites.get(image_id, ("site", image_id))
        mask = f"masks/{masks[image_id].name}" if image_id in masks else None
        image = f"images/{path.name}"
        found[image_id] = ImageFiles(image=image, mask=mask, site=site, group=group)
    return found


def _files_by_id(folder: Path, kind: str, suffixes: tuple[str, ...]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.suffix.lower() not in suffixes or path.name.startswith("."):
            continue
        if path.name.encode(errors="ignore").decode() != path.name:  # no table could hold it
            raise DataError(f"{str(path)!a}: file name is not valid UTF-8; rename it")
        if path.stem in found:
            raise DataError(
                f"{path}: a second {kind} with id '{path.stem}' beside {found[path.stem].name}; "
                "rename or remove one"
            )
        found[path.stem] = path
    return found


def _read_sites(path: Path, images: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Return site and group of each image id; a group's name is made unique across sites."""
    if not path.is_file():
        return {}
    rows: dict[str, tuple[str, str]] = {}
    try:
        table = csv.DictReader(io.StringIO(path.read_text(encoding="utf-8-sig"), newline=""))
        if not {"image_id", "site"} <= set(table.fieldnames or ()):
            raise DataError(
                f"{path}: found columns {table.fieldnames}; expected image_id, site and "
                "optionally group"
            )
        for row in table:
            image_id, site, group = row["image_id"], row["site"], row.get("group")
            fault = _site_fault(image_id, site, seen=image_id in rows)
            if fault is not None:
                raise DataError(f"{path} line {table.line_num}: {fault}")
            rows[image_id] = (site, f"{site}/{group or image_id}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{path}: damaged table ({error}); save it as CSV in UTF-8") from error
    missing = [image_id for image_id in images if image_id not in rows]
    if missing:
        raise DataError(f"{path}: no row for image '{missing[0]}' ({len(missing)} images lack one)")
    return rows


def _site_fault(image_id: str | None, site: str | None, *, seen: bool) -> str | None:
    if seen:
        return f"'{image_id}' is listed twice"
    if not image_id or not site:
        return "empty image_id or site"
    if not is_folder_name(site) or site == "server":  # a client is named after its site
        return (
            f"site '{site}' cannot name a client's folder; avoid / \\ : and a dot in front, and "
            "'server'"
        )
    return None
