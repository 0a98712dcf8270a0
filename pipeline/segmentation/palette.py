"""The colours of classes, wherever they are shown."""

from __future__ import annotations

from itertools import chain

from PIL import ImageColor

CLASS_COLOURS = ("#00E5FF", "#FFD400", "#FF4FD8", "#7CFF4F", "#FF7A1A")  # on skin and mucosa


def class_colour(index: int) -> tuple[int, int, int]:
    """Return the RGB of class ``index``, from 1; the colours begin again after the last."""
    red, green, blue, *_ = ImageColor.getrgb(CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)])
    return red, green, blue


def mask_palette(num_classes: int) -> list[int]:
    """Return the palette of an indexed mask: black for 0, then the classes, 3 values each."""
    return [0, 0, 0, *chain.from_iterable(class_colour(k) for k in range(1, num_classes + 1))]
