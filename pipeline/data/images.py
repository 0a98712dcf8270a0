"""Reading images, with their masks where they have one, and bringing both to the client's frame."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.config import Config
from pipeline.data.decoding import Values, decode
from pipeline.data.masks import read_mask
from pipeline.data.partition import Partition
from pipeline.errors import DataError

Pixels = NDArray[np.uint8]


class Decoded(NamedTuple):
    """An image's pixels, the sha256 of the bytes they were decoded from, and what EXIF said."""

    pixels: Pixels
    sha256: str
    orientation: int = 1  # 1..8; the pixels are upright


def read_image(path: Path, *, sha256: str | None = None) -> Decoded:
    """Read an image as (H, W, 3) uint8 RGB, upright (EXIF orientation applied).

    Grey images are repeated over the channels, alpha is dropped. Images with more than 8 bits a
    channel are scaled from their own minimum and maximum to 0..255, over all channels jointly,
    because scanners store 10 to 14 significant bits in 16-bit files and do not say how many.

    Raises:
        DataError: the file is missing, too large, damaged or no image, cannot be read, has several
        pages, or has another digest than ``sha256``.
    """
    raster = decode(path, sha256=sha256)
    colour = raster.layers().colour
    if raster.mode == "1":
        colour = colour * np.uint8(255)
    if colour.dtype != np.uint8:
        colour = _in_8_bits(path, colour)
    if colour.shape[2] == 1:
        colour = np.repeat(colour, 3, axis=2)
    return Decoded(np.ascontiguousarray(colour), raster.sha256, raster.orientation)


def _in_8_bits(path: Path, values: Values) -> Pixels:
    """Scale from the values' own minimum and maximum to 0..255."""
    if not np.isfinite(values).all():
        raise DataError(f"{path}: values are not finite (NaN or infinity); replace or remove it")
    low, high = float(values.min()), float(values.max())
    if low == high:
        return np.zeros(values.shape, np.uint8)
    deep = values.dtype == np.uint16  # computed once for each value there can be, not each pixel
    numbers = np.arange(high + 1) if deep else values.astype(np.float64)
    scaled = np.rint((numbers - low) * (255.0 / (high - low))).clip(0).astype(np.uint8)
    return scaled[values] if deep else scaled


def load_image(root: Path, file: str, *, sha256: str) -> Pixels:
    """Return the image ``root/file``, refusing one that changed since ``samfed prepare``."""
    return read_image(root / file, sha256=sha256).pixels


def resize_image(image: Pixels, size: int) -> Pixels:
    """Squash (H, W, 3) uint8 to the client's frame (size, size, 3), anti-aliased."""
    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def resize_mask(mask: Pixels, size: int) -> Pixels:
    """Squash class indices (H, W) uint8 to (size, size), nearest neighbour."""
    return np.asarray(Image.fromarray(mask).resize((size, size), Image.Resampling.NEAREST))


class LabelledImage(NamedTuple):
    """An image (H, W, 3) uint8 at its own size, with its mask (H, W) uint8."""

    image_id: str
    image: Pixels
    mask: Pixels


def load_labelled(
    config: Config, partition: Partition, ids: Sequence[str]
) -> Iterator[LabelledImage]:
    """Read labelled images (of D_p, or of a test part) at their own size, one at a time.

    Raises:
        DataError: an image or mask is missing, damaged, or changed since ``samfed prepare``.
    """
    root, classes = config.data.root, config.data.num_classes
    for image_id in ids:
        entry = partition.images[image_id]
        if entry.mask is None:
            raise DataError(f"image '{image_id}' is in a labelled part but has no mask")
        image = load_image(root, entry.image, sha256=entry.image_sha256)
        path, digest = root / entry.mask, entry.mask_sha256
        mask = read_mask(path, size_hw=image.shape[:2], num_classes=classes, sha256=digest).pixels
        yield LabelledImage(image_id, image, mask)
