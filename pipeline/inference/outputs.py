"""What a prediction leaves on the disk: a mask, and if asked for probability maps and overlays."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import label

from pipeline.data.images import read_image
from pipeline.data.importers.volumes import write_like
from pipeline.disk import write_bytes
from pipeline.inference.inputs import Picture, Source
from pipeline.inference.model import Model
from pipeline.segmentation.palette import class_colour, mask_palette

MaskFormat = str  # png or tiff
_TINT = 0.4  # of a class's colour over the image
_DEPTH = 65535  # of probability maps, 16 bits
Row = dict[str, Any]


@dataclass(frozen=True)
class Wanted:
    """Which files to write, and where."""

    out: Path
    format: MaskFormat = "png"
    probabilities: bool = False
    overlays: bool = False

    def files(self, source: Source, num_classes: int) -> dict[str, Path]:
        """Return every file that belongs to a finished prediction: ``mask``, ``overlay``, ``k``."""
        ending = ".nii.gz" if source.is_volume else f".{self.format}"
        found = {"mask": self.out / "masks" / f"{source.name}{ending}"}
        if self.overlays and not source.is_volume:
            found["overlay"] = self.out / "overlays" / f"{source.name}.png"
        for k in range(1, num_classes + 1) if self.probabilities else ():
            end = ".nii.gz" if source.is_volume else ".png"
            found[str(k)] = self.out / "probabilities" / f"{source.name}_class{k}{end}"
        return found


@dataclass(frozen=True)
class Prediction:
    """Of one file: probabilities (N, K+1, h, w) of its slices, and their distances (N,)."""

    picture: Picture
    probabilities: NDArray[np.float32]
    distances: NDArray[np.float64] | None

    @property
    def num_classes(self) -> int:
        """K."""
        return int(self.probabilities.shape[1]) - 1


def at_own_size(
    probabilities: NDArray[np.float32], size_hw: tuple[int, int]
) -> NDArray[np.float32]:
    """Return probabilities (K+1, h, w) bilinearly at the image's size, (K+1, H, W)."""
    planes = (Image.fromarray(plane) for plane in probabilities)
    size = size_hw[::-1]
    return np.stack([np.asarray(p.resize(size, Image.Resampling.BILINEAR)) for p in planes])


def write_prediction(found: Prediction, wanted: Wanted, model: Model) -> list[Row]:
    """Write the files of one prediction; return its rows of ``predictions.csv``, one a class."""
    picture = found.picture
    mask, confidence, maps = _assemble(found, keep=wanted.probabilities)
    files = wanted.files(picture.source, found.num_classes)
    for k, values in maps.items():
        if picture.source.is_volume:
            write_like(picture.source.path, values, files[str(k)])
        else:
            _save(Image.fromarray(np.rint(values * _DEPTH).astype(np.uint16)), files[str(k)])
    if "overlay" in files:
        _save(_overlay(picture, mask), files["overlay"])
    if picture.source.is_volume:
        write_like(picture.source.path, mask, files["mask"])
    else:
        _save(_indexed(mask, found.num_classes, wanted.format), files["mask"])
    distance = None if found.distances is None else float(np.median(found.distances))
    coloured = model.grey and picture.coloured
    unlike = None if distance is None else distance > model.threshold or coloured
    of_image = {"distance": distance, "unlike": unlike}
    return [
        {"file": picture.source.name, "class": k, "class_name": name}
        | _measure(mask == k, confidence, picture)
        | of_image
        for k, name in enumerate(model.class_names, start=1)
    ]


def _assemble(
    found: Prediction, *, keep: bool
) -> tuple[NDArray[np.uint8], NDArray[np.float32], dict[int, NDArray[np.float32]]]:
    """Return classes and their probability at the file's own size, and, kept, each class's map.

    An image has (H, W), a volume (Z, Y, X).
    """
    picture, slices = found.picture, len(found.probabilities)
    shape = (slices, *picture.size_hw)
    mask, confidence = np.zeros(shape, np.uint8), np.zeros(shape, np.float32)
    classes = range(1, found.num_classes + 1) if keep else ()
    maps = {k: np.zeros(shape, np.float32) for k in classes}
    for index, probabilities in enumerate(found.probabilities):
        own = at_own_size(probabilities, picture.size_hw)
        mask[index], confidence[index] = own.argmax(axis=0), own.max(axis=0)
        for k, values in maps.items():
            values[index] = own[k]
    return (
        _placed(mask, picture),
        _placed(confidence, picture),
        {k: _placed(values, picture) for k, values in maps.items()},
    )


def _placed(slices: NDArray[Any], picture: Picture) -> NDArray[Any]:
    """Return (N, H, W) as the image (H, W), or as the volume that the slices were cut from."""
    if not picture.source.is_volume:
        return np.asarray(slices[0])
    turned = slices if picture.axis == 0 else slices[:, ::-1]  # as ``upright`` turned them
    return np.ascontiguousarray(np.moveaxis(turned, 0, picture.axis))


def _measure(inside: NDArray[np.bool_], confidence: NDArray[np.float32], picture: Picture) -> Row:
    """Return size, connected components (8 or 26 neighbours) and mean confidence of one class."""
    pixels = int(np.count_nonzero(inside))
    _, components = label(inside, np.ones((3,) * inside.ndim))
    each = None if picture.spacing is None else prod(picture.spacing) * pixels
    volume = picture.source.is_volume
    return {
        "area_px": pixels,
        "area_mm2": None if volume else each,
        "volume_mm3": each if volume else None,
        "components": int(components),
        "confidence": float(confidence[inside].mean()) if pixels else None,
    }


def _indexed(mask: NDArray[np.uint8], num_classes: int, kind: MaskFormat) -> Image.Image:
    """Return class indices as an image that the input format takes for a mask."""
    image = Image.fromarray(mask)
    if kind == "png":
        image = image.convert("P")
        image.putpalette(mask_palette(num_classes))
    return image


def _overlay(picture: Picture, mask: NDArray[np.uint8]) -> Image.Image:
    """Return the image at its own size with a tint of its class over each foreground pixel."""
    image = read_image(picture.source.path, sha256=picture.sha256).pixels.astype(np.float32)
    for k in np.unique(mask[mask > 0]):
        inside = mask == k
        image[inside] += _TINT * (np.array(class_colour(int(k)), np.float32) - image[inside])
    return Image.fromarray(np.rint(image).astype(np.uint8))


def _save(image: Image.Image, path: Path) -> None:
    out, kind = io.BytesIO(), path.suffix.lstrip(".").upper()
    image.save(out, kind, **({"compression": "tiff_lzw"} if kind == "TIFF" else {}))
    write_bytes(path, out.getvalue())


def table(rows: Sequence[Row]) -> list[list[Any]]:
    """Return the head and the lines of ``predictions.csv``; empty cells are unknown."""
    head = list(COLUMNS)
    return [head, *([_cell(row[name]) for name in head] for row in rows)]


COLUMNS = (
    "file",
    "class",
    "class_name",
    "area_px",
    "area_mm2",
    "volume_mm3",
    "components",
    "confidence",
    "distance",
    "unlike",
)


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else value
