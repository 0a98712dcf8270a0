"""What a mask means: class indices, or a refusal where it could mean two things.

With one class (K = 1) a mask shows a shape. Two values, 0 and another, are taken as they stand. A
palette is decided by its colours, as their order is arbitrary; a shape that is only in alpha is
read there; grey of more than two values, as compression and smooth edges leave it, is cut at half
of its maximum, but only if its values lie at both ends and the rest of them on edges. With K > 1
values are exact class indices.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from pipeline.data.decoding import Raster, Values, decode
from pipeline.errors import DataError

PALETTE = "palette by colour"
ALPHA = "shape in alpha"
THRESHOLD = "thresholded at half of the maximum"

_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "F")  # and I;16 of either byte order
_END = 1 / 4  # of the maximum: values so near to 0 or to the maximum lie at an end
_FEW, _END_OF_FEW = 8, 0.01  # so few values may be classes: the ends are narrow then
_MIDDLE = 0.1  # of the pixels: at most so many lie between the ends
_STRAY = 0.05  # of those between: at most so many lie on no edge
_EDGE_PX = 5  # an edge has both ends within a square of this side
_OWN_VALUES = "values"  # of a mask that is grey itself
_LEAST_MAXIMUM = 64  # integers up to a smaller maximum are class indices, no shades of grey
_DARK, _BRIGHT = (
    32,
    64,
)  # of 255, a colour's largest channel: background up to here, shape from here
_NAMED = 8  # so many values or colours are named in a message


class Mask(NamedTuple):
    """Class indices (H, W) uint8 in 0..K, what was decided to get them, and the file's sha256."""

    pixels: NDArray[np.uint8]
    sha256: str
    decisions: tuple[str, ...]  # of PALETTE, ALPHA and THRESHOLD; none where it is as it stands
    orientation: int  # EXIF's, 1..8


def read_mask(
    path: Path,
    *,
    size_hw: tuple[int, ...],
    num_classes: int,
    image_orientation: int = 1,
    sha256: str | None = None,
) -> Mask:
    """Read the mask of an image of this size and EXIF orientation.

    Raises:
        DataError: as ``decode``; or another size than its image's, an unknown class, or values or
        colours that could mean several things.
    """
    raster = decode(path, sha256=sha256)
    found = raster.values.shape[:2]
    if found != size_hw:
        reason = _why_turned(found, size_hw, raster.orientation, image_orientation)
        raise DataError(
            f"{path}: mask is {found[1]} x {found[0]} pixels, its image is "
            f"{size_hw[1]} x {size_hw[0]}; they must be equal{reason}"
        )
    try:
        pixels, decisions = interpret(raster, num_classes)
    except ValueError as error:
        raise DataError(f"{path}: {error}") from error
    return Mask(pixels, raster.sha256, decisions, raster.orientation)


def _why_turned(found: tuple[int, ...], expected: tuple[int, ...], mask: int, image: int) -> str:
    """Say whether EXIF orientations explain that the sizes differ."""
    turned = found[::-1] == expected
    if turned and (mask > 4) != (image > 4):
        whose, other = ("image", "mask") if image > 4 else ("mask", "image")
        return (
            f" (explained by the {whose}'s EXIF orientation {max(mask, image)}, which the {other} "
            f"lacks: save the {whose} upright and without it, or turn the {other})"
        )
    if turned or max(mask, image) > 1:
        return f" (not explained by EXIF orientation: mask {mask}, image {image})"
    return ""


def interpret(raster: Raster, num_classes: int) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """Return class indices (H, W) uint8 in 0..K, and what was decided to get them.

    Raises:
        ValueError: it could mean several things or nothing; says what was found and expected.
    """
    if raster.mode not in _MODES and not raster.mode.startswith("I;16"):
        raise ValueError(f"{raster.mode} colours; {_expected(num_classes)}")
    if raster.values.dtype.kind == "f" and not np.isfinite(raster.values).all():
        raise ValueError("values are not finite (NaN or infinity); replace or remove it")
    values, decisions = _shape(raster) if num_classes == 1 else _classes(raster, num_classes)
    return values.astype(np.uint8), decisions


# --------------------------------------------------------------------------- one class


def _shape(raster: Raster) -> tuple[Values, tuple[str, ...]]:
    """Return where the foreground is (H, W), and what was decided to find it."""
    colour, alpha = raster.layers()
    if alpha is None or _is_constant(alpha):
        return _shape_in_colour(raster, colour)
    inside, how = _shape_in_grey(alpha, "alpha values")
    if _is_constant(colour):
        return inside, (ALPHA, *how)
    by_colour, how = _shape_in_colour(raster, colour)
    if (by_colour != inside).any():
        raise ValueError(f"colour and alpha show different shapes; {_expected(1)}")
    return by_colour, how


def _shape_in_colour(raster: Raster, colour: Values) -> tuple[Values, tuple[str, ...]]:
    if raster.palette is None:
        return _shape_in_grey(_one_channel(colour, 1), _OWN_VALUES)
    used = np.unique(raster.values)
    colours = np.unique(raster.palette[used, :3], axis=0)
    if len(used) > len(colours) == 1:
        raise ValueError(f"a palette of one colour, {_colours(colours)}; {_expected(1)}")
    if (colours == colours[:, :1]).all():
        shape, how = _shape_in_grey(colour[:, :, 0], "greys of the palette")
        return shape, (PALETTE, *how)
    brightest = colours.max(axis=1)
    dark = brightest <= _DARK
    is_clear = len(colours) == 1 or (len(colours) == 2 and dark.sum() == 1)
    if not is_clear or (brightest[~dark] < _BRIGHT).any():
        raise ValueError(
            f"a palette that does not say what is background: {_colours(colours)}; expected black "
            f"for background and one other colour; {_expected(1)}"
        )
    return colour.max(axis=2) > _DARK, (PALETTE,)


def _shape_in_grey(values: Values, name: str) -> tuple[Values, tuple[str, ...]]:
    levels, expected = np.unique(values), _expected(1, grey=name == _OWN_VALUES)
    if len(levels) == 1 or (len(levels) == 2 and levels[0] == 0):
        return values != 0, ()
    top = levels[-1]
    if levels[0] < 0 or (top < _LEAST_MAXIMUM and values.dtype.kind in "iu"):
        several = " (several classes? then set data.num_classes)" if levels[0] >= 0 else ""
        raise ValueError(f"{name} {_listed(levels)}{several}; {expected}")
    end = _END_OF_FEW if len(levels) <= _FEW else _END
    low, high = values <= top * end, values >= top * (1 - end)
    if len(levels) <= _FEW and levels[0] == 0 and _has_area(values, low & (values > 0)):
        raise ValueError(f"{name} {_listed(levels)} (several classes?); {expected}")
    middle = ~(low | high)
    if middle.any():
        edge = ndimage.maximum_filter(low, _EDGE_PX) & ndimage.maximum_filter(high, _EDGE_PX)
        stray = (middle & ~edge).sum() / middle.sum()
        if middle.mean() > _MIDDLE or stray > _STRAY:
            raise ValueError(
                f"{name} {_listed(levels)}, {middle.mean():.1%} of the pixels between the ends and "
                f"{stray:.0%} of these on no edge: no mask but shades or several classes; "
                f"{expected}"
            )
    return values > top / 2, (THRESHOLD,)


def _has_area(values: Values, inside: Values) -> bool:
    """Return whether a square of 3 pixels of one value lies there: a region, no noise."""
    alike = ndimage.minimum_filter(values, 3) == ndimage.maximum_filter(values, 3)
    return bool((alike & inside).any())


# --------------------------------------------------------------------------- several classes


def _classes(raster: Raster, num_classes: int) -> tuple[Values, tuple[str, ...]]:
    """Return class indices (H, W), and what was decided to find them."""
    colour, alpha = raster.layers()
    decisions: tuple[str, ...] = ()
    if raster.palette is None:
        values = _one_channel(colour, num_classes)
    else:
        values, decisions = _palette_classes(raster, raster.palette, num_classes)
    if alpha is not None and _is_constant(values) and not _is_constant(alpha):
        raise ValueError(f"one value, and a shape in alpha; {_expected(num_classes)}")
    levels = np.unique(values)
    if levels[0] < 0 or levels[-1] > num_classes or (levels != np.rint(levels)).any():
        expected = _expected(num_classes, grey=raster.palette is None)
        raise ValueError(f"found values {_listed(levels)}; {expected}")
    return values, decisions


def _palette_classes(
    raster: Raster, palette: NDArray[np.uint8], num_classes: int
) -> tuple[Values, tuple[str, ...]]:
    """Take indices, unless the colours are class indices themselves; refuse an arbitrary order."""
    used = np.unique(raster.values)
    colours = palette[used, :3]
    greys = colours[:, 0]
    are_grey = (colours == greys[:, None]).all() and len(np.unique(greys)) == len(used)
    if are_grey and greys.max() <= num_classes and (greys != used).any():
        return palette[raster.values, 0], (PALETTE,)
    if used[-1] > 0 and not colours[used > 0].any(axis=1).all() and palette[0, :3].any():
        raise ValueError(
            f"a palette in which black is not index 0: {_colours(colours)}, so that the order of "
            f"its indices may be arbitrary; {_expected(num_classes)}"
        )
    return raster.values, ()


# --------------------------------------------------------------------------- both


def _expected(num_classes: int, *, grey: bool = False) -> str:
    """Say what is expected, and what to do; a mask that is ``grey`` need not become so."""
    if num_classes == 1:
        advice = "threshold the mask" if grey else "save the mask as grey PNG"
        return f"expected one channel of two values, 0 for background; {advice}"
    advice = "renumber its values, or change that" if grey else "save the mask as grey PNG"
    return f"expected class indices 0..{num_classes} (data.num_classes) in one channel; {advice}"


def _is_constant(values: Values) -> bool:
    """Return whether all pixels are alike."""
    return bool((values == values[:1, :1]).all())


def _one_channel(colour: Values, num_classes: int) -> Values:
    """Return the first of channels that are all equal."""
    if (colour != colour[:, :, :1]).any():
        colours = np.unique(colour.reshape(-1, colour.shape[2]), axis=0)
        raise ValueError(f"a colour image of {_colours(colours)}; {_expected(num_classes)}")
    grey: Values = colour[:, :, 0]
    return grey


def _listed(items: Iterable[Any]) -> str:
    """Name the first few values, the last, and how many there are."""
    names = [f"{item:g}" if isinstance(item, np.floating) else str(item) for item in items]
    if len(names) <= _NAMED:
        return ", ".join(names)
    return f"{', '.join(names[: _NAMED - 1])} ... {names[-1]} ({len(names)} of them)"


def _colours(colours: Values) -> str:
    return _listed(f"({', '.join(map(str, colour))})" for colour in colours.tolist())
