"""The input folder: which file is which image's, and its site and group.

Input is a folder of ``images/<id>.<png|jpg|jpeg|tif|tiff|bmp>``, masks in ``masks/`` where they
exist, named as ``data.mask_pattern`` says, and an optional ``sites.csv`` (``image_id,site,group``).
It is only ever read. Ids are composed (Unicode NFC), however a file system stores the names.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.data.partition import ImageFiles
from pipeline.data.sites import Sites, read_sites, read_spacing
from pipeline.errors import DataError

log = logging.getLogger("samfed.data")

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
MASK_SUFFIXES = (*IMAGE_SUFFIXES, ".gif")
ANY_MASK = "{id}.*"  # the default of data.mask_pattern

_MASK_LIKE = (("", "_segmentation"), ("", "_mask"), ("mask_", ""))  # before and after an id


@dataclass(frozen=True)
class InputFolder:
    """The images of ``data.root`` by id, and what lies beside them that nothing reads."""

    images: dict[str, ImageFiles]  # in the order of the files' names
    ignored: tuple[str, ...] = ()  # files in images/ and masks/, relative to data.root
    subfolders: tuple[str, ...] = ()  # of images/ and masks/
    rows: tuple[str, ...] = ()  # ids in sites.csv that no image has
    spacing: Mapping[str, tuple[float, float]] = field(default_factory=dict)  # mm, of spacing.csv

    def as_json(self) -> dict[str, int]:
        """Return how many of each there are."""
        found = self.images.values()
        return {
            "images": len(found),
            "masks": sum(files.mask is not None for files in found),
            "groups": len({files.group for files in found}),
            "ignored_files": len(self.ignored),
            "ignored_subfolders": len(self.subfolders),
            "rows_without_image": len(self.rows),
        }

    def text(self) -> str:
        """Return the same as one line, with the first names of what is ignored."""
        count = self.as_json()
        line = f"{count['images']} images, {count['masks']} masks, {count['groups']} groups"
        unread = {"files": self.ignored, "subfolders": self.subfolders}
        unread["rows of sites.csv without an image"] = self.rows
        ignored = [f"{len(v)} {kind} ({_few(v)})" for kind, v in unread.items() if v]
        return f"{line}; ignored: {', '.join(ignored)}" if ignored else line


def scan(root: Path, *, mask_pattern: str = ANY_MASK) -> InputFolder:
    """Find all images below ``root``, with their masks, sites and groups.

    Args:
        mask_pattern: name of a mask's file: ``{id}`` stands for its image's id, ``.*`` at the end
            for any of ``MASK_SUFFIXES``.

    Raises:
        DataError: no images, two images with one id, a mask without an image, a bad ``sites.csv``.
    """
    images = _list_images(root / "images")
    _refuse_masks_among(images.by_id, root / "images")
    masks = _list(root / "masks", "mask", _mask_id(mask_pattern))
    _check_masks(root, masks, images.by_id, mask_pattern)
    sites = read_sites(root / "sites.csv", images.by_id, endings=IMAGE_SUFFIXES)
    return InputFolder(
        images=_join(images.by_id, masks.by_id, sites),
        ignored=_below(root, [*images.unread, *masks.unread]),
        subfolders=_below(root, [*images.subfolders, *masks.subfolders]),
        rows=sites.strangers,
        spacing=read_spacing(root / "spacing.csv", images.by_id, endings=IMAGE_SUFFIXES),
    )


def suggest_mask_pattern(root: Path) -> str | None:
    """Return the ``data.mask_pattern`` under which most files in ``root/masks`` belong to an image.

    None if no file does. It is found from the names alone, by what stands before and after the
    images' ids in them. No file is opened.

    Raises:
        DataError: there are no images, or two with one id.
    """
    images = _list_images(root / "images").by_id
    return _suggest(_list(root / "masks", "mask", _no_id).unread, images)


@dataclass(frozen=True)
class _Listing:
    by_id: dict[str, Path]
    unread: tuple[Path, ...]
    subfolders: tuple[Path, ...]


def _list_images(folder: Path) -> _Listing:
    if not folder.is_dir():
        hint = ""
        if folder.parts[-3:] == ("data", "synthetic", "images"):  # the default
            hint = "; for images of your own run `samfed init FOLDER`, for generated ones "
            hint += f"`samfed synth {folder.parent}`"
        raise DataError(
            f"{folder}: no such folder; expected images/<id>.png|jpg|tif|bmp in data.root{hint}"
        )
    found = _list(folder, "image", _image_id)
    if not found.by_id:
        below = f"; its {len(found.subfolders)} subfolders are not read" if found.subfolders else ""
        expected = " ".join(IMAGE_SUFFIXES)
        raise DataError(f"{folder}: no images found; expected {expected} files{below}")
    return found


def _list(folder: Path, kind: str, id_of: Callable[[Path], str | None]) -> _Listing:
    """List the files of a folder by id; those without one are not read. Hidden ones do not count.

    ``kind`` names a file in errors.
    """
    found: dict[str, Path] = {}
    unread, subfolders = list[Path](), list[Path]()
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith("."):
            continue
        image_id = id_of(path)
        if path.is_dir() or image_id is None:
            (subfolders if path.is_dir() else unread).append(path)
            continue
        if path.name.encode(errors="ignore").decode() != path.name:  # no table could hold it
            raise DataError(f"{str(path)!a}: file name is not valid UTF-8; rename it")
        if image_id in found:
            pattern = f", or set data.mask_pattern: '{{id}}{path.suffix}'" if kind == "mask" else ""
            raise DataError(
                f"{path}: a second {kind} with id '{image_id}' beside {found[image_id].name}; "
                f"rename or remove one{pattern}"
            )
        found[image_id] = path
    return _Listing(found, tuple(unread), tuple(subfolders))


def _composed(path: Path) -> str:
    return unicodedata.normalize("NFC", path.name)


def _image_id(path: Path) -> str | None:
    return Path(_composed(path)).stem if path.suffix.lower() in IMAGE_SUFFIXES else None


def _no_id(path: Path) -> str | None:
    return None


def _mask_id(pattern: str) -> Callable[[Path], str | None]:
    """Return what gives the id in a file's name, or None where the name is no mask's."""
    before, after = pattern.split("{id}")
    ending = "|".join(map(re.escape, MASK_SUFFIXES))
    after = f"{re.escape(after[:-2])}(?:{ending})" if after.endswith(".*") else re.escape(after)
    expression = re.compile(f"{re.escape(before)}(.+){after}", re.IGNORECASE)

    def find(path: Path) -> str | None:
        match = expression.fullmatch(_composed(path))
        return match[1] if match else None

    return find


def _refuse_masks_among(images: Mapping[str, Path], folder: Path) -> None:
    """Refuse masks that lie among the images: a network would be shown them as photographs."""
    for image_id in images:
        for before, after in _MASK_LIKE:
            name = f"{before}{image_id}{after}"
            if name in images:
                raise DataError(
                    f"{images[name]}: looks like the mask of {images[image_id].name}; move masks "
                    f"to {folder.with_name('masks')} and set data.mask_pattern: '{before}{{id}}"
                    f"{after}.*', or rename it"
                )


def _check_masks(root: Path, masks: _Listing, images: Collection[str], pattern: str) -> None:
    """Refuse a mask without an image; name the pattern under which more masks have one."""
    strangers = [image_id for image_id in masks.by_id if image_id not in images]
    files = [p for p in (*masks.by_id.values(), *masks.unread) if _is_mask(p)]
    matched = len(masks.by_id) - len(strangers)
    suggested = _suggest(files, images)
    would = 0 if suggested is None else sum(_mask_id(suggested)(p) in images for p in files)
    if would > matched:
        fault = (
            f"{root / 'masks'}: of {len(files)} masks {matched} belong to an image under "
            f"data.mask_pattern '{pattern}'; '{suggested}' would match {would}"
        )
        if strangers or not matched:
            raise DataError(f"{fault}; set it")
        log.warning("%s", fault)
    elif strangers:
        path, expected = masks.by_id[strangers[0]], f"images/{strangers[0]}.*"
        more = f" ({len(strangers)} masks lack one)" if len(strangers) > 1 else ""
        raise DataError(f"{path}: mask without an image; expected {expected}{more}")
    elif files and not matched:
        raise DataError(
            f"{root / 'masks'}: none of {len(files)} masks, e.g. {files[0].name}, is named by "
            f"data.mask_pattern '{pattern}'; change it, or move them away"
        )


def _is_mask(path: Path) -> bool:
    return path.suffix.lower() in MASK_SUFFIXES


def _suggest(files: Sequence[Path], images: Collection[str]) -> str | None:
    """Return the pattern under which most of ``files`` belong to one of ``images``."""
    endings: dict[tuple[str, str], Counter[str]] = defaultdict(Counter)
    owners: dict[tuple[str, str], set[str]] = defaultdict(set)
    for path in filter(_is_mask, files):
        stem = Path(_composed(path)).stem
        for start in range(len(stem)):
            for end in range(start + 1, len(stem) + 1):
                around = stem[:start], stem[end:]
                if stem[start:end] in images and not set("{}*").intersection(*around):
                    endings[around][path.suffix.lower()] += 1
                    owners[around].add(stem[start:end])
    if not endings:
        return None
    # of two that match as many, the one that adds less to the id
    before, after = max(endings, key=lambda each: (len(owners[each]), -len("".join(each))))
    found = endings[before, after]
    twice = found.total() > len(owners[before, after])  # x.png beside x.jpg
    one = twice or (len(found) == 1 and before + after)
    return f"{before}{{id}}{after}{found.most_common(1)[0][0] if one else '.*'}"


def _join(
    images: Mapping[str, Path], masks: Mapping[str, Path], sites: Sites
) -> dict[str, ImageFiles]:
    found = {}
    for image_id, path in images.items():
        site, group = sites.rows.get(image_id, ("site", image_id))
        mask = f"masks/{masks[image_id].name}" if image_id in masks else None
        image = f"images/{path.name}"
        found[image_id] = ImageFiles(image=image, mask=mask, site=site, group=group)
    return found


def _below(root: Path, paths: Sequence[Path]) -> tuple[str, ...]:
    return tuple(path.relative_to(root).as_posix() for path in paths)


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
