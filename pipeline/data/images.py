"""Reading images and masks: the only module that knows file formats.

Input is a folder of ``images/<id>.<png|jpg|jpeg|tif|tiff|bmp>``, ``masks/<id>.png`` where they
exist, and an optional ``sites.csv`` (``image_id,site,group``). It is only ever read.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.disk import file_sha256, is_folder_name
from pipeline.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # by content; no EPS reaches Ghostscript by another name
MAX_PIXELS = 100_000_000  # a larger image is refused, not decoded

Image.MAX_IMAGE_PIXELS = None  # our own limit above is an error, Pillow's a warning


@dataclass(frozen=True)
class ImageRecord:
    """One image of the input folder; paths are relative to its root."""

    image_id: str
    image: str
    mask: str | None
    site: str
    group: str


def scan(root: Path) -> dict[str, ImageRecord]:
    """All images below ``root`` by id, in id order.

    Raises:
        DataError: no images, two images with one id, a mask without an image, a bad ``sites.csv``.
    """
    folder = root / "images"
    if not folder.is_dir():
        raise DataError(
            f"{folder}: no such folder; expected images/<id>.png|jpg|tif|bmp in data.root"
        )
    images: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGE_SUFFIXES or path.name.startswith("."):
            continue
        if not _is_text(path.name):
            raise DataError(f"{str(path)!a}: file name is not valid UTF-8; rename it")
        if path.stem in images:
            raise DataError(
                f"{path}: a second image with id '{path.stem}' beside {images[path.stem].name}; "
                "rename or remove one"
            )
        images[path.stem] = path
    if not images:
        raise DataError(f"{folder}: no images found; expected {' '.join(IMAGE_SUFFIXES)} files")
    masks = _scan_masks(root / "masks", images)
    sites = _read_sites(root / "sites.csv", images)
    return {
        image_id: ImageRecord(
            image_id,
            image=path.relative_to(root).as_posix(),
            mask=masks.get(image_id),
            site=sites[image_id][0] if image_id in sites else "site",
            group=sites[image_id][1] if image_id in sites else image_id,
        )
        for image_id, path in images.items()
    }


def _scan_masks(folder: Path, images: Mapping[str, Path]) -> dict[str, str]:
    masks: dict[str, str] = {}
    if not folder.is_dir():
        return masks
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() != ".png" or path.name.startswith("."):
            continue
        if path.stem not in images:
            raise DataError(f"{path}: mask without an image; expected images/{path.stem}.*")
        if path.stem in masks:
            raise DataError(
                f"{path}: a second mask with id '{path.stem}' beside {masks[path.stem]}; "
                "rename or remove one"
            )
        masks[path.stem] = f"masks/{path.name}"
    return masks


def _read_sites(path: Path, images: Mapping[str, Path]) -> dict[str, tuple[str, str]]:
    """Site and group of each image id; a group's name is made unique across sites."""
    if not path.is_file():
        return {}
    rows: dict[str, tuple[str, str]] = {}
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a UTF-8 table; save it as CSV in UTF-8") from error
    with io.StringIO(text, newline="") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is None or not {"image_id", "site"} <= set(reader.fieldnames):
            raise DataError(
                f"{path}: found columns {reader.fieldnames}; expected image_id, site and "
                "optionally group"
            )
        for row in reader:
            image_id, site, group = row["image_id"], row["site"], row.get("group")
            if image_id in rows:
                raise DataError(f"{path} line {reader.line_num}: '{image_id}' is listed twice")
            if not image_id or not site:
                raise DataError(f"{path} line {reader.line_num}: empty image_id or site")
            if not is_folder_name(site) or site == "server":  # a client is named after its site
                raise DataError(
                    f"{path} line {reader.line_num}: site '{site}' cannot name a client's folder; "
                    "avoid / \\ : and a dot in front, and 'server'"
                )
            rows[image_id] = (site, f"{site}/{group or image_id}")
    missing = [image_id for image_id in images if image_id not in rows]
    if missing:
        raise DataError(f"{path}: no row for image '{missing[0]}' ({len(missing)} images lack one)")
    return rows


def _is_text(name: str) -> bool:
    """Whether a file's name can be written to a table: bytes that are no UTF-8 cannot."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _decode(path: Path) -> Image.Image:
    """The first frame, in memory and upright (EXIF orientation applied); the file is closed."""
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are "
                    "read; scale it down"
                )
            image.load()
            return ImageOps.exif_transpose(image)
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; run `samfed prepare` again") from error
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not an image that can be read; replace or remove it") from error
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise many kinds for damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: damaged image ({reason}); replace or remove it") from error


def read_image(path: Path) -> NDArray[np.uint8]:
    """Decode an image to (H, W, 3) uint8 RGB, upright (EXIF orientation applied).

    Grey images are repeated over the channels, alpha is dropped. Images with more than 8 bits a
    channel are scaled from their own minimum and maximum to 0..255, because scanners store 10 to
    14 significant bits in 16-bit files and do not say how many.

    Raises:
        DataError: the file is missing, truncated, too large or no image.
    """
    image = _decode(path)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        values = np.asarray(image, dtype=np.float64)
        if not np.isfinite(values).all():
            raise DataError(
                f"{path}: values are not finite (NaN or infinity); replace or remove it"
            )
        low, high = float(values.min()), float(values.max())
        scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
        grey: NDArray[np.uint8] = np.rint(scaled).astype(np.uint8)
        return np.repeat(grey[:, :, None], 3, axis=2)
    return np.asarray(image.convert("RGB"), dtype=np.uint8)


def read_mask(path: Path, *, size_hw: tuple[int, int], num_classes: int) -> NDArray[np.uint8]:
    """Decode a mask to class indices (H, W) uint8 in 0..K.

    With one class any non-zero value is foreground; with more, values are class indices.

    Raises:
        DataError: unreadable, another size than its image, several channels, or an unknown class.
    """
    image = _decode(path)
    if image.mode in ("RGB", "RGBA", "LA"):
        channels = np.asarray(image.convert("RGB"))
        if (channels != channels[:, :, :1]).any():
            raise DataError(f"{path}: a colour image; expected class indices in one channel")
        values = channels[:, :, 0].astype(np.int64)
    else:
        values = np.asarray(image).astype(np.int64)
    if values.shape != size_hw:
        raise DataError(
            f"{path}: mask is {values.shape[1]} x {values.shape[0]} pixels, its image is "
            f"{size_hw[1]} x {size_hw[0]}; they must be equal"
        )
    if num_classes == 1:
        values = values != 0
    if values.max(initial=0) > num_classes:
        raise DataError(
            f"{path}: found class {values.max()}, expected 0..{num_classes} (data.num_classes)"
        )
    return values.astype(np.uint8)


def load_image(root: Path, file: str, *, sha256: str) -> NDArray[np.uint8]:
    """``read_image`` of ``root/file``, refusing a file that changed since ``samfed prepare``."""
    path = root / file
    if path.is_file() and file_sha256(path) != sha256:
        raise DataError(f"{path}: changed since `samfed prepare`; run `samfed prepare` again")
    return read_image(path)


def resize_image(image: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Squash (H, W, 3) uint8 to the client's frame (size, size, 3), anti-aliased."""
    resized = Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(resized)


def resize_mask(mask: NDArray[np.uint8], size: int) -> NDArray[np.uint8]:
    """Squash class indices (H, W) uint8 to (size, size), nearest neighbour."""
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))
