"""Decoding: a file becomes channels of numbers. The only module that knows file formats.

What the numbers mean is said elsewhere: of an image in ``images``, of a mask in ``masks``.
"""

from __future__ import annotations

import hashlib
import io
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from pipeline.errors import DataError

# by content; no EPS reaches Ghostscript by another name
_FORMATS = ("PNG", "JPEG", "TIFF", "BMP", "GIF")
MAX_PIXELS = 100_000_000  # a larger image is refused, not decoded
MAX_BYTES = 8 * MAX_PIXELS  # four channels of 16 bits; a larger file is refused, not read

Image.MAX_IMAGE_PIXELS = None  # our own limit above is an error, Pillow's a warning

Values = NDArray[Any]

_ORIENTATION = 0x0112  # the same tag in EXIF and in TIFF
_SUBFILE, _REDUCED = 254, 1  # the tag of a page's kind, and the bit of a smaller copy
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _SAMPLES, _PLANAR = 256, 257, 258, 262, 277, 284
_TIFF_STARTS = {b"II*\0": 8, b"MM\0*": 8, b"II+\0": 16, b"MM\0+": 16}  # and their header's bytes
_PNG_START = b"\x89PNG\r\n\x1a\n"
_DEEP_PNG = {2: "RGB", 4: "LA", 6: "RGBA"}  # by PNG's colour type
_DEEP_TIFF = {(1, 2): "LA", (2, 3): "RGB", (2, 4): "RGBA"}  # by photometric and channels
_AS_THEY_ARE = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "F", "I;16", "I;16B", "I;16L")

# what EXIF's orientation asks for, on rows and columns
_UPRIGHT: dict[int, Callable[[Values], Values]] = {
    2: lambda values: values[:, ::-1],
    3: lambda values: values[::-1, ::-1],
    4: lambda values: values[::-1],
    5: lambda values: values.swapaxes(0, 1),
    6: lambda values: np.rot90(values, -1),
    7: lambda values: values[::-1, ::-1].swapaxes(0, 1),
    8: lambda values: np.rot90(values),
}


class Layers(NamedTuple):
    """Colour (H, W, 1) or (H, W, 3), and alpha (H, W) where there is one."""

    colour: Values
    alpha: Values | None


@dataclass(frozen=True)
class Raster:
    """A decoded file, upright (EXIF orientation applied).

    values: (H, W) or (H, W, C), in as many bits as the file has.
    mode: Pillow's name of the channels, such as 1, L, P, RGBA, I;16 or CMYK; values of a mode that
    is neither grey nor a palette nor RGB have been converted to RGB.
    palette: (256, 4) uint8 RGBA of each index, where the mode is P.
    orientation: what EXIF said, 1..8.
    sha256: of the very bytes that were decoded.
    """

    values: Values
    mode: str
    sha256: str
    palette: NDArray[np.uint8] | None = None
    orientation: int = 1

    def layers(self) -> Layers:
        """Return colour and alpha apart, a palette's indices as their colours."""
        values = self.values
        if self.palette is not None:
            values = self.palette[values]
        if values.ndim == 2:
            return Layers(values[:, :, None], None)
        if values.shape[2] in (2, 4):
            return Layers(values[:, :, :-1], values[:, :, -1])
        return Layers(values, None)


def decode(path: Path, *, sha256: str | None = None) -> Raster:
    """Read a file once, and decode the bytes that were hashed.

    Raises:
        DataError: the file is missing, too large, damaged or no image, cannot be read, has several
        pages, or has another digest than ``sha256``.
    """
    content = _read(path)
    digest = hashlib.sha256(content).hexdigest()
    if sha256 not in (None, digest):
        raise DataError(f"{path}: changed since `samfed prepare`; run `samfed prepare` again")
    try:
        return _decode(path, content, digest)
    except UnidentifiedImageError as error:
        raise DataError(
            f"{path}: not an image that can be read; expected the content of a PNG, JPEG, TIFF, "
            "BMP or GIF; replace or remove it"
        ) from error
    except (DataError, MemoryError):
        raise
    except Exception as error:  # decoders raise many kinds for damaged bytes
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(f"{path}: damaged image ({reason}); replace or remove it") from error


def _read(path: Path) -> bytes:
    try:
        status = path.stat()
        if stat.S_ISFIFO(status.st_mode) or stat.S_ISCHR(status.st_mode):  # reading may never end
            raise DataError(f"{path}: cannot be read (a pipe or a device); expected a file")
        if status.st_size > MAX_BYTES:
            raise DataError(
                f"{path}: {status.st_size} bytes; at most {MAX_BYTES} are read; scale it down"
            )
        return path.read_bytes()
    except FileNotFoundError as error:
        if path.is_symlink():
            raise DataError(
                f"{path}: cannot be read (a link to {os.readlink(path)}, which is not there); "
                "mend the link, or mount what it points to"
            ) from error
        raise DataError(
            f"{path}: no such file; check data.root, or run `samfed prepare` again"
        ) from error
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}); check its permissions and its disk"
        ) from error


def _decode(path: Path, content: bytes, digest: str) -> Raster:
    pages = _tiff_pages(content)
    # beside the picture itself there may be small copies of it
    _check_pages(path, len(pages[:1] + [p for p in pages[1:] if not p.get(_SUBFILE, 0) & _REDUCED]))
    tags: Mapping[int, Any] = pages[0] if pages else {}
    orientation = int(tags.get(_ORIENTATION, 1))  # Pillow forgets it when it turns a TIFF
    if tags.get(_SAMPLES, 1) > 1 and max(tags.get(_BITS, (8,))) > 8:
        return _decode_deep_tiff(path, content, tags, digest)
    with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
        _check_size(path, *image.size)
        if image.format in ("PNG", "GIF"):  # further pictures in a JPEG are previews
            _check_pages(path, getattr(image, "n_frames", 1))
        image.load()
        orientation = int(image.getexif().get(_ORIENTATION, orientation))
        if content[:8] == _PNG_START and content[24] == 16 and content[25] in _DEEP_PNG:
            values = _turned(imagecodecs.png_decode(content), orientation)
            return Raster(values, _DEEP_PNG[content[25]], digest, orientation=orientation)
        mode, palette = image.mode, _palette(image)
        upright = ImageOps.exif_transpose(image)
        if mode not in _AS_THEY_ARE:
            upright = upright.convert("RGB")
        return Raster(np.asarray(upright), mode, digest, palette, orientation)


def _decode_deep_tiff(path: Path, content: bytes, tags: Mapping[int, Any], digest: str) -> Raster:
    """Decode several channels of more than 8 bits, which Pillow would cut down to 8."""
    _check_size(path, tags[_WIDTH], tags[_HEIGHT])
    kind = (tags.get(_PHOTOMETRIC), tags[_SAMPLES])
    if kind not in _DEEP_TIFF:
        raise DataError(
            f"{path}: {kind[1]} channels of {max(tags[_BITS])} bits (photometric {kind[0]}); "
            "expected grey, grey and alpha, RGB or RGBA; save it so"
        )
    values = imagecodecs.tiff_decode(content, 0)
    if tags.get(_PLANAR, 1) == 2:  # a plane for each channel
        values = np.moveaxis(values, 0, -1)
    if values.shape != (tags[_HEIGHT], tags[_WIDTH], kind[1]):
        raise ValueError(f"decoded to {values.shape}")
    orientation = int(tags.get(_ORIENTATION, 1))
    return Raster(_turned(values, orientation), _DEEP_TIFF[kind], digest, orientation=orientation)


def _turned(values: Values, orientation: int) -> Values:
    return _UPRIGHT[orientation](values) if orientation in _UPRIGHT else values


def _tiff_pages(content: bytes) -> list[ImageFileDirectory_v2]:
    """Return the tags of each page; none if this is no TIFF."""
    header = _TIFF_STARTS.get(content[:4])
    if header is None:
        return []
    pages, seen = list[ImageFileDirectory_v2](), set[int]()
    following = ImageFileDirectory_v2(content[:header]).next
    while 0 < following < len(content) and following not in seen:
        seen.add(following)
        file = io.BytesIO(content)
        file.seek(following)
        tags = ImageFileDirectory_v2(content[:header])
        tags.load(file)
        pages.append(tags)
        following = tags.next
    return pages


def _check_size(path: Path, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise DataError(
            f"{path}: {width} x {height} pixels; at most {MAX_PIXELS} are read; scale it down"
        )


def _check_pages(path: Path, count: int) -> None:
    if count > 1:
        raise DataError(
            f"{path}: {count} pages or frames; expected one image a file; save the one that is "
            "meant, or each under a name of its own"
        )


def _palette(image: Image.Image) -> NDArray[np.uint8] | None:
    """Return RGBA (256, 4) of each index of a palette image."""
    if image.mode != "P":
        return None
    table = np.zeros((256, 4), np.uint8)
    colours = np.array(image.getpalette() or (), np.uint8).reshape(-1, 3)
    table[: len(colours), :3] = colours
    table[:, 3] = 255
    transparency = image.info.get("transparency")
    if isinstance(transparency, bytes):
        alphas = np.frombuffer(transparency, np.uint8)
        table[: len(alphas), 3] = alphas
    elif transparency is not None:
        table[transparency, 3] = 0
    return table
