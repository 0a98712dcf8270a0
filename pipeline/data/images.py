"""Reading images and masks: the only module that knows file formats."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline.config import Config
from pipeline.data.partition import Partition
from pipeline.errors import DataError

_FORMATS = ("PNG", "JPEG", "TIFF", "BMP")  # by content; no EPS reaches Ghostscript by another name
MAX_PIXELS = 100_000_000  # a larger image is refused, not decoded
MAX_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits; a larger file is refused, not read

Image.MAX_IMAGE_PIXELS = None  # our own limit above is an error, Pillow's a warning

Pixels = NDArray[np.uint8]


class Decoded(NamedTuple):
    """The pixels of a file, and the sha256 of the very bytes that they were decoded from."""

    pixels: Pixels
    sha256: str


def read_image(path: Path, *, sha256: str | None = None) -> Decoded:
    """Read an image as (H, W, 3) uint8 RGB, upright (EXIF orientation applied).

    Grey images are repeated over the channels, alpha is dropped. Images with more than 8 bits a
    channel are scaled from their own minimum and maximum to 0..255, because scanners store 10 to
    14 significant bits in 16-bit files and do not say how many.

    Raises:
        DataError: the file is missing, too large, damaged or no image, cannot be read, or has
        another digest than ``sha256``.
    """
    image, digest = _open(path, sha256)
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return Decoded(np.asarray(image.convert("RGB"), dtype=np.uint8), digest)
    values = np.asarray(image, dtype=np.float64)
    if not np.isfinite(values).all():
        raise DataError(f"{path}: values are not finite (NaN or infinity); replace or remove it")
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) * (255.0 / (high - low)) if high > low else np.zeros_like(values)
    return Decoded(np.repeat(np.rint(scaled).astype(np.uint8)[:, :, None], 3, axis=2), digest)


def read_mask(
    path: Path, *, size_hw: tuple[int, ...], num_classes: int, sha256: str | None = None
) -> Decoded:
    """Read a mask as class indices (H, W) uint8 in 0..K.

    With one class any non-zero value is foreground; with more, values are class indices.

    Raises:
        DataError: as ``read_image``; or another size than its image's, several channels, or an
        unknown class.
    """
    image, digest = _open(path, sha256)
    values = np.asarray(image)
    if image.mode in ("RGB", "RGBA", "LA"):
        channels = np.asarray(image.convert("RGB"))
        values = channels[:, :, 0]
        if (channels != channels[:, :, :1]).any():
            raise DataError(f"{path}: a colour image; expected class indices in one channel")
    if values.shape != size_hw:
        raise DataError(
            f"{path}: mask is {values.shape[1]} x {values.shape[0]} pixels, its image is "
            f"{size_hw[1]} x {size_hw[0]}; they must be equal"
        )
    values = (values != 0) if num_classes == 1 else values.astype(np.int64)
    if values.max(initial=0) > num_classes:
        raise DataError(
            f"{path}: found class {values.max()}, expected 0..{num_classes} (data.num_classes)"
        )
    return Decoded(values.astype(np.uint8), digest)


def load_image(root: Path, file: str, *, sha256: str) -> Pixels:
    """Return the image ``root/file``, refusing one that changed since ``samfed prepare``."""
    return read_image(root / file, sha256=sha256).pixels


def _open(path: Path, sha256: str | None) -> tuple[Image.Image, str]:
    """Read a file once; return its first frame, upright, and its digest."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise DataError(f"{path}: {size} bytes; at most {MAX_BYTES} are read; scale it down")
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; run `samfed prepare` again") from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check its permissions and its disk"
        ) from error
    digest = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, digest):
        raise DataError(f"{path}: changed since `samfed prepare`; run `samfed prepare` again")
    try:
        with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"{path}: {image.width} x {image.height} pixels; at most {MAX_PIXELS} are "
                    "read; scale it down"
                )
            image.load()
            return ImageOps.exif_transpose(image), digest
    except UnidentifiedImageError as error:
        raise DataError(f"{path}: not an image that can be read; replace or remove it") from error
    except (DataError, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise many kinds for damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: damaged image ({reason}); replace or remove it") from error


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
